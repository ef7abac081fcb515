"""The tokens of a call with their text, as its steps make them."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen.engine.output import Token
from fastgen.engine.request import Row
from fastgen.engine.step import Event
from fastgen.text.tokenizer import TextStream


class Writer:
    """Makes tokens with their text of a call's events.

    Rows that linger after their end (see `Request.lingers`) are written as `generate` returns
    them: to the length of the longest, and only the last token says why.

    Args:
        texts: of each row; None where there is no tokenizer.
    """

    def __init__(self, texts: Sequence[TextStream] | None) -> None:
        self._texts = texts
        self._made: dict[int, int] = {}  # tokens of each row
        self._waiting: list[tuple[int, Event]] = []  # those that may not be in the result

    def take(self, events: Sequence[Event]) -> list[Token]:
        """The tokens of a step."""
        came, self._waiting = [*self._waiting, *map(self._counted, events)], []
        out = []
        for count, event in came:
            length = _length(event.row, self._made[event.row.index])
            if length is None and count >= _least(event.row):
                self._waiting.append((count, event))
            elif length is None or count <= length:
                out.append(self._token(event, count == length))
        return out

    def _counted(self, event: Event) -> tuple[int, Event]:
        """An event, and how many tokens its row has with it."""
        count = self._made[event.row.index] = self._made.get(event.row.index, 0) + 1
        return count, event

    def _token(self, event: Event, is_last: bool) -> Token:
        row, text = event.row, ""
        if self._texts is not None:
            text = self._texts[row.index].push(event.token)
            text += self._texts[row.index].end() if is_last else ""
        return Token(
            id=event.token,
            text=text,
            logprob=event.logprob,
            top_logprobs=event.top_logprobs,
            finish_reason=row.finish_reason if is_last else None,
            row=row.index,
        )


def _length(row: Row, made: int) -> int | None:
    """The tokens that a row comes to, of which `made` are there; None while nobody knows."""
    request = row.request
    if row.finish_reason is None:
        return None
    if not request.lingers or request.params.num_beams > 1:
        return made
    return request.width - request.prompt_length if request.done else None


def _least(row: Row) -> float:
    """The tokens that a row comes to at least: a row that has ended goes as far as the others."""
    if row.finish_reason is None:
        return float("inf")
    lengths = (one.width or one.length + 1 for one in row.request.rows)
    return max(lengths) - row.request.prompt_length
