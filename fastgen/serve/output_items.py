"""An answer as items of `/v1/responses`: they grow as it is read, and each change is an event."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastgen.engine.output import Token
from fastgen.serve.items import PREFIXES, Item, new_id
from fastgen.serve.tools.reader import AnswerEvent

Event = dict[str, Any]


class OutputItems:
    """The items of one answer: a message, reasoning and calls, in the order of their beginning.

    Args:
        logprobs: log-probabilities of tokens, as a text has them; None where none are wanted.

    Attributes:
        items: those that are over, and the one that grows.
    """

    def __init__(self, logprobs: Callable[[Sequence[Token]], list[Any]] | None = None) -> None:
        self.items: list[Item] = []
        self._logprobs = logprobs
        self._open: str | None = None  # the type of the item that grows
        self._pieces: list[str] = []
        self._tokens: list[Token] = []  # of the text that grows
        self._given = 0  # of these, those that a delta has had

    def take(self, events: Sequence[AnswerEvent], tokens: Sequence[Token]) -> Iterator[Event]:
        """Read what a token says.

        Args:
            tokens: those of the text that have come with it.
        """
        self._tokens += tokens
        for event in events:
            if event.kind == "reasoning":
                yield from self._grow("reasoning", event.text)
            elif event.kind == "content":
                yield from self._grow("message", event.text)
            elif event.kind == "call":
                yield from self._begin("function_call", name=event.text)
            elif event.kind == "arguments":
                yield from self._grow("function_call", event.text)
            elif event.kind == "end":
                yield from self._end("completed")
            else:
                yield from self._end("incomplete")
                if event.text:
                    yield from self._grow("message", event.text)

    def end(self, whole: bool) -> Iterator[Event]:
        """End it: there is one item at least.

        Args:
            whole: whether it was not cut off.
        """
        status = "completed" if whole else "incomplete"
        if not self.items:
            yield from self._begin("message")
        yield from self._end(status)

    def _begin(self, kind: str, **more: str) -> Iterator[Event]:
        yield from self._end("completed")
        item: Item = {"id": new_id(PREFIXES[kind]), "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            item |= {"summary": [], "content": []}
        else:
            item |= {"call_id": new_id("call"), "arguments": "", **more}
        self.items.append(item)
        self._open = kind
        yield self._said("response.output_item.added", item={**item})
        if kind != "function_call":
            yield self._of_part("response.content_part.added", part=self._part("", []))

    def _grow(self, kind: str, piece: str) -> Iterator[Event]:
        if self._open != kind:
            yield from self._begin(kind)
        self._pieces.append(piece)
        if kind == "function_call":
            yield self._of_item("response.function_call_arguments.delta", delta=piece)
        elif kind == "reasoning":
            yield self._of_part("response.reasoning_text.delta", delta=piece)
        else:
            new, self._given = self._tokens[self._given :], len(self._tokens)
            scores = self._scores(new)
            yield self._of_part("response.output_text.delta", delta=piece, logprobs=scores)

    def _end(self, status: str) -> Iterator[Event]:
        """End the item that grows, if one does."""
        if self._open is None:
            return
        text, item = "".join(self._pieces), self.items[-1]
        if self._open == "function_call":
            item["arguments"] = text
            if status == "completed":
                yield self._of_item("response.function_call_arguments.done", arguments=text)
        else:
            scores = self._scores(self._tokens) if self._open == "message" else []
            part = self._part(text, scores)
            if self._open == "message":
                yield self._of_part("response.output_text.done", text=text, logprobs=scores)
                self._tokens, self._given = [], 0
            else:
                yield self._of_part("response.reasoning_text.done", text=text)
            yield self._of_part("response.content_part.done", part=part)
            item["content"] = [part]
        item["status"] = status
        self._open, self._pieces = None, []
        yield self._said("response.output_item.done", item=item)

    def _part(self, text: str, scores: list[Any]) -> dict[str, Any]:
        if self._open == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}

    def _scores(self, tokens: Sequence[Token]) -> list[Any]:
        return [] if self._logprobs is None else self._logprobs(tokens)

    def _said(self, kind: str, **more: Any) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, **more}

    def _of_item(self, kind: str, **more: Any) -> Event:
        return self._said(kind, item_id=self.items[-1]["id"], **more)

    def _of_part(self, kind: str, **more: Any) -> Event:
        return self._of_item(kind, content_index=0, **more)
