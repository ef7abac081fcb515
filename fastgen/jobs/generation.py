"""Rows to texts: what they ask for runs together through one scheduler, a step at a time."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from fastgen.engine.call import Call
from fastgen.engine.output import Token
from fastgen.engine.prefill import CHUNK
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.schedule import MAX_ROWS, Scheduler
from fastgen.engine.writer import Writer
from fastgen.jobs.ask import Reader, Wanted, is_openai
from fastgen.jobs.row import Done, Outcome, Row

# A window: so many tokens are read ahead and sorted, and so many rows at most.
WINDOW_TOKENS, WINDOW_ROWS = 2**17, 4096
AHEAD = 16  # calls that wait in the scheduler, so that none of its steps is for fewer rows


@dataclass
class Running:
    """A row while it is generated.

    Attributes:
        left: its calls that are not over.
        notes: what was warned of at the door.
        error: of the first of its calls that failed.
    """

    row: Row
    wanted: Wanted
    calls: list[Call]
    writers: list[Writer]
    tokens: list[list[Token]]
    notes: list[str]
    left: int
    error: Exception | None = None


class Generation:
    """What `fastgen batch` does with rows.

    Args:
        reader: says what rows ask for.
        max_rows, max_bytes: of what runs together (see `Scheduler`).
    """

    def __init__(
        self, reader: Reader, max_rows: int = MAX_ROWS, max_bytes: int | None = None
    ) -> None:
        self.reader = reader
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
        """Whether the output has this field of the input."""
        return self.reader.is_kept(name)

    def run(self, rows: Iterable[Row]) -> Iterator[Done]:
        """What each row becomes, in whatever order they are done.

        A window of rows is read, and its longest run first, so that at the end no long one is
        left alone. The next window is read when the last row of this one has begun: nobody waits
        for the others of his window.
        """
        try:
            yield from self._run(iter(rows))
        finally:  # whoever reads no further leaves nothing behind
            for one, place in list(self._running.values()):
                self.scheduler.cancel(one.calls[place])
            self._running.clear()

    def _run(self, rows: Iterator[Row]) -> Iterator[Done]:
        window: deque[tuple[Row, Wanted]] = deque()
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

    def _fill(self, window: deque[tuple[Row, Wanted]], rows: Iterator[Row]) -> list[Done]:
        """Read the next window, longest first; returns the rows that are no good."""
        bad: list[Done] = []
        found: list[tuple[Row, Wanted]] = []
        tokens = 0
        for row in rows:
            read = self._read(row)
            if isinstance(read, Outcome):
                bad.append(Done(row, read))
            else:
                found.append((row, read))
                tokens += read.length
            if tokens >= WINDOW_TOKENS or len(found) + len(bad) >= WINDOW_ROWS:
                break
        window.extend(sorted(found, key=lambda pair: -pair[1].length))
        return bad

    def _read(self, row: Row) -> Wanted | Outcome:
        """What a row asks for, or why it cannot be told.

        Raises:
            ValueError: of what is installed; whatever is wrong with the row is its outcome.
        """
        kept: Mapping[str, object] = row.place
        try:
            fields = row.fields()
            if not is_openai(fields):
                kept = row.place | self.reader.kept(fields)
                return self.reader(row, fields)
        except ValueError as error:
            return Outcome.failed(error, kept)
        return self.reader.line(row, fields)

    def _begin(self, row: Row, wanted: Wanted) -> Done | None:
        """Let the scheduler have a row's calls; it is done at once if it has none, or cannot be."""
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made = wanted.calls()
            for call, _ in made:
                self.scheduler.check(call)
        except Exception as error:
            return Done(row, wanted.refused(error))
        notes = [" ".join(str(one.message).split()) for one in caught]
        notes += dict.fromkeys(note for call, _ in made for note in call.notes)
        if not made:
            return Done(row, wanted.answer([], notes))
        calls, writers = [call for call, _ in made], [writer for _, writer in made]
        one = Running(row, wanted, calls, writers, [[] for _ in made], notes, len(made))
        for place, call in enumerate(calls):
            self._running[id(call)] = one, place
            self.scheduler.submit(call)
        return None

    def _step(self) -> Iterator[Done]:
        """A step of all that run; gives the rows that end with it."""
        for call, events in self.scheduler.step():
            one, place = self._running[id(call)]
            one.tokens[place] += one.writers[place].take(events)
            if not call.done:
                continue
            del self._running[id(call)]
            one.left -= 1
            one.error = one.error or call.error
            if one.left:
                continue
            if one.error is None:
                yield Done(one.row, one.wanted.answer(one.tokens, one.notes))
            else:
                yield Done(one.row, one.wanted.refused(one.error))
