"""Rows to texts: their requests run together through one scheduler, a step at a time."""

from __future__ import annotations

import functools
import time
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastgen.engine.call import Call
from fastgen.engine.output import Token
from fastgen.engine.prefill import CHUNK
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.schedule import MAX_ROWS, Scheduler
from fastgen.engine.writer import Writer
from fastgen.jobs.request import RowReader, RowRequest, is_openai
from fastgen.jobs.row import Done, InputRow, Outcome
from fastgen.jobs.window import Window
from fastgen.system import extras

if TYPE_CHECKING:
    from fastgen.jobs.openai import Offline

WINDOW = Window(tokens=2**17, rows=4096)
AHEAD = 16  # calls that wait in the scheduler, so that none of its steps is for fewer rows


@dataclass
class Running:
    """A row while it is generated.

    Attributes:
        left: its calls that are not over.
        notes: what was warned of at the door.
        error: of the first of its calls that failed.
    """

    row: InputRow
    request: RowRequest
    calls: list[Call]
    writers: list[Writer]
    tokens: list[list[Token]]
    notes: list[str]
    left: int
    error: Exception | None = None


class GenerationWork:
    """The work of `fastgen batch`.

    Args:
        reader: makes requests of rows.
        max_rows, max_bytes: of the calls that run together (see `Scheduler`).
        window: rows that are read ahead.
    """

    def __init__(
        self,
        reader: RowReader,
        max_rows: int = MAX_ROWS,
        max_bytes: int | None = None,
        window: Window = WINDOW,
    ) -> None:
        self.reader, self.window = reader, window
        # Nobody reads along, so a chunk is the one that is read fastest.
        self.scheduler = Scheduler(
            reader.model.model,
            max_bytes=max_bytes,
            max_rows=max_rows,
            chunk=CHUNK,
            prefix_cache=PrefixCache(),
        )
        self._running: dict[int, tuple[Running, int]] = {}  # and which call, by the call's id

    def check(self, names: Collection[str]) -> None:
        """Raise a ValueError for a field that means nothing and that nobody asked to keep."""
        self.reader.check(names)

    def is_kept(self, name: str) -> bool:
        """True where the output has this field of the input."""
        return name in self.reader.kept

    def run(self, rows: Iterable[InputRow]) -> Iterator[Done]:
        """Each row with its outcome, in the order in which they are done.

        A window of rows is read, and its longest run first, so that at the end no long one is
        left alone. The next window is read when the last row of this one has begun: no row waits
        for the others of its window.
        """
        try:
            yield from self._run(iter(rows))
        finally:  # whoever reads no further leaves nothing behind
            for running, index in list(self._running.values()):
                self.scheduler.cancel(running.calls[index])
            self._running.clear()

    def _run(self, rows: Iterator[InputRow]) -> Iterator[Done]:
        window: deque[tuple[InputRow, RowRequest]] = deque()
        more = True
        while True:
            while self.scheduler.waiting < AHEAD and (window or more):
                if not window:
                    bad = self._fill(window, rows)
                    more = bool(window or bad)
                    yield from bad
                    continue
                done = self._begin(*window.popleft())
                if done is not None:
                    yield done
            if self.scheduler.idle:
                return
            yield from self._step()

    def _fill(
        self, window: deque[tuple[InputRow, RowRequest]], rows: Iterator[InputRow]
    ) -> list[Done]:
        """Read the next window, longest first; returns the rows that are no good."""
        bad, good = self.window.read(rows, self._read, lambda request: request.length)
        window.extend(sorted(good, key=lambda pair: -pair[1].length))
        return bad

    def _read(self, row: InputRow) -> RowRequest | Outcome:
        """The request of a row, or why it cannot be told.

        Raises:
            ValueError: an extra is not installed; whatever is wrong with the row is its outcome.
        """
        kept: Mapping[str, object] = row.location
        try:
            fields = row.fields()
            if not is_openai(fields):
                kept = self.reader.kept.of(row, fields)
                return self.reader(row, fields)
        except ValueError as error:
            return Outcome.failed(error, kept)
        return self._offline.line(fields, row.name)

    @functools.cached_property
    def _offline(self) -> Offline:
        """Reads and answers lines of OpenAI's batch API, by the code of the service."""
        try:
            from fastgen.jobs.openai import Offline
        except ImportError as error:
            raise ValueError(
                f"OpenAI's lines need the service: {extras.install('serve')} ({error})"
            ) from error
        reader = self.reader
        created = int(time.time()) if reader.created is None else reader.created
        return Offline(reader.model, reader.knobs, reader.seed, created)

    def _begin(self, row: InputRow, request: RowRequest) -> Done | None:
        """Let the scheduler have a row's calls; it is done at once if it has none, or cannot be."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made = request.calls()
            for call, _ in made:
                self.scheduler.check(call)
        except Exception as error:
            return Done(row, request.refused(error))
        notes = [" ".join(str(one.message).split()) for one in caught]
        notes += dict.fromkeys(note for call, _ in made for note in call.notes)
        if not made:
            return Done(row, request.answer([], notes))
        calls, writers = [call for call, _ in made], [writer for _, writer in made]
        running = Running(row, request, calls, writers, [[] for _ in made], notes, len(made))
        for index, call in enumerate(calls):
            self._running[id(call)] = running, index
            self.scheduler.submit(call)
        return None

    def _step(self) -> Iterator[Done]:
        """A step of all that run; gives the rows that end with it."""
        for call, events in self.scheduler.step():
            running, index = self._running[id(call)]
            running.tokens[index] += running.writers[index].take(events)
            if not call.done:
                continue
            del self._running[id(call)]
            running.left -= 1
            running.error = running.error or call.error
            if running.left:
                continue
            if running.error is None:
                yield Done(running.row, running.request.answer(running.tokens, running.notes))
            else:
                yield Done(running.row, running.request.refused(running.error))
