"""Rows to texts: asks run together through one scheduler, and each becomes an object."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastgen.call import Call
from fastgen.generator import CausalLM
from fastgen.jobs.ask import Ask, Reader
from fastgen.jobs.row import Done, Row, failed
from fastgen.output import Token
from fastgen.prefill import CHUNK
from fastgen.prefix import PrefixCache
from fastgen.schedule import MAX_ROWS, Scheduler

# A window: so many tokens are read ahead and sorted, and so many rows at most.
WINDOW_TOKENS, WINDOW_ROWS = 2**17, 4096
AHEAD = 16  # calls that wait in the scheduler, so that none of its steps is for fewer rows


@dataclass
class Running:
    """A row while it is generated."""

    row: Row
    ask: Ask
    call: Call
    writer: Any
    notes: list[str]
    tokens: list[Token] = field(default_factory=list)


class Generation:
    """What `fastgen batch` does with rows.

    Args:
        reader: makes rows to asks.
        ids: whether the tokens are given out too; they always are without a tokenizer.
        max_rows: rows that run together.
    """

    def __init__(
        self, model: CausalLM, reader: Reader, ids: bool = False, max_rows: int = MAX_ROWS
    ) -> None:
        self.model, self.reader = model, reader
        self.ids = ids or not model.has_tokenizer
        # Nobody reads along, so a chunk is the one that is read fastest.
        self.scheduler = Scheduler(
            model.model, max_rows=max_rows, chunk=CHUNK, prefix_cache=PrefixCache()
        )

    def check(self, names: Collection[str]) -> None:
        """Raise a ValueError for a field that means nothing and that nobody asked to keep."""
        self.reader.check(names)

    def is_kept(self, name: str) -> bool:
        """Whether the output has this field of the input."""
        return self.reader.is_kept(name)

    def run(self, rows: Iterable[Row]) -> Iterator[Done]:
        """What each row becomes, in whatever order they are done.

        A window of rows is read, and its longest run first, so that at the end no long one is
        left alone. The next window is read when the last row of this one has begun: nobody waits
        for the others of his window.
        """
        left, running = iter(rows), dict[int, Running]()
        window: deque[tuple[Row, Ask]] = deque()
        more = True
        while True:
            while self.scheduler.waiting < AHEAD and (window or more):
                if not window:
                    bad = self._fill(window, left)
                    more = bool(window or bad)
                    yield from bad
                    continue
                row, ask = window.popleft()
                try:
                    begun = self._begin(row, ask)
                except ValueError as error:
                    yield failed(row, error, ask.kept)
                else:
                    running[id(begun.call)] = begun
            if self.scheduler.idle:
                return
            yield from self._step(running)

    def _fill(self, window: deque[tuple[Row, Ask]], rows: Iterator[Row]) -> list[Done]:
        """Read the next window, longest first; returns the rows that are no good."""
        bad: list[Done] = []
        found: list[tuple[Row, Ask]] = []
        tokens = 0
        for row in rows:
            kept: Mapping[str, Any] = {}
            try:
                fields = row.fields()
                kept = self.reader.kept(fields)
                ask = self.reader(fields, row.name)
            except ValueError as error:
                bad.append(failed(row, error, kept))
            else:
                found.append((row, ask))
                tokens += ask.length
            if tokens >= WINDOW_TOKENS or len(found) + len(bad) >= WINDOW_ROWS:
                break
        window.extend(sorted(found, key=lambda pair: -pair[1].length))
        return bad

    def _begin(self, row: Row, ask: Ask) -> Running:
        """Let the scheduler have it; what its door warns of is noted.

        Raises:
            ValueError: it cannot be run, or never fit.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call = self.model.call([ask.ids], **ask.knobs)
        self.scheduler.submit(call)
        notes = [" ".join(str(one.message).split()) for one in caught]
        return Running(row, ask, call, self.model.writer(call), notes)

    def _step(self, running: dict[int, Running]) -> Iterator[Done]:
        """A step of all that run; gives the rows that end with it."""
        for call, events in self.scheduler.step():
            one = running[id(call)]
            one.tokens += one.writer.take(events)
            if not call.request.done:
                continue
            del running[id(call)]
            error = call.request.error
            if error is None:
                yield Done(one.row, self._written(one), len(one.tokens))
            elif isinstance(error, ValueError):  # of its own knobs, such as all tokens ruled out
                yield failed(one.row, error, one.ask.kept)
            else:
                raise error

    def _written(self, one: Running) -> dict[str, Any]:
        """The output of a row: lists where it asks for several sequences."""
        rows: dict[int, list[Token]] = {}
        for token in one.tokens:
            rows.setdefault(token.row, []).append(token)
        found = [rows[place] for place in sorted(rows)]
        said: dict[str, list[Any]] = {"text": ["".join(t.text for t in row) for row in found]}
        if self.ids:
            said["ids"] = [[token.id for token in row] for row in found]
        said["finish_reason"] = [row[-1].finish_reason for row in found]
        if one.call.request.params.top_logprobs:
            said["top_logprobs"] = [[token.top_logprobs for token in row] for row in found]
        if not self.model.has_tokenizer:
            del said["text"]
        alone = len(found) == 1
        return {
            **one.row.place,
            **one.ask.kept,
            **{name: value[0] if alone else value for name, value in said.items()},
            "prompt_tokens": len(one.ask.ids),
            "new_tokens": len(one.tokens),
            **({"warnings": one.notes} if one.notes else {}),
        }
