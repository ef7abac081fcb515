"""The plan of a step: which jobs are let in, which chunk is read, which search steps.

It is made of numbers alone (rows, tokens, bytes); `schedule` runs it on a model.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fastgen.engine.cuts import Cuts


class Work(enum.Enum):
    """The ways in which a job runs."""

    ROWS = "its prompts are read, then its rows run beside those of others"
    SEARCH = "it has a cache of its own, and steps by itself"
    SCORING = "its text is scored, a chunk at a time"


@dataclass(eq=False)
class Entry:
    """A job as the plan sees it.

    Attributes:
        job: the job itself, which is never looked into here.
        rows: rows, or beams, that it has.
        bytes: memory that it may come to hold.
        prompts: the number of its prompts.
        prompt: tokens of the longest of these.
        longest: tokens that a row of it may come to have.
        read_with: jobs whose prompts may be read together have the same here.
    """

    job: Any
    work: Work
    rows: int
    bytes: int
    prompts: int = 1
    prompt: int = 0
    longest: int = 0
    read_with: Any = None


class Reading(Protocol):
    """Prompts that are being read."""

    @property
    def left(self) -> int:
        """Tokens that are still to be read."""


R = TypeVar("R", bound=Reading)


@dataclass(frozen=True)
class Plan(Generic[R]):
    """The plan of one step. At most one chunk is read: by `read`, `begin` or `score`.

    Attributes:
        enter: jobs that are let in.
        read: the prompts, begun earlier, of which a chunk is read.
        begin: jobs whose prompts are begun to be read, together.
        score: the job whose text is scored.
        search: the job whose search steps.
    """

    enter: Sequence[Entry] = ()
    read: R | None = None
    begin: Sequence[Entry] = ()
    score: Entry | None = None
    search: Entry | None = None


class Planner:
    """Jobs that wait and jobs that run, and which of them are next.

    Args:
        max_bytes: memory that the jobs that run may come to hold together.
        max_rows: rows that run together.
        cuts: how prompts are read together; no more tokens than a chunk has are begun together.
        max_tokens: tokens for which the cache of the rows may have room, in all slots together.
        margin: tokens for which each slot has room besides those of its row.

    Attributes:
        waiting: jobs that wait for room, in order.
        unread: jobs that were let in, but nothing of whose prompts has been read.
        begun: jobs whose prompts are being read or whose rows run.
        rows, held: rows, and bytes, of the jobs that were let in.
    """

    def __init__(
        self, max_bytes: int, max_rows: int, cuts: Cuts, max_tokens: int, margin: int
    ) -> None:
        self.max_bytes, self.max_rows, self.cuts = max_bytes, max_rows, cuts
        self.max_tokens, self.margin = max_tokens, margin
        self.waiting: deque[Entry] = deque()
        self.unread: list[Entry] = []
        self.begun: list[Entry] = []
        self.rows = self.held = 0
        self._searches: deque[Entry] = deque()
        self._scorings: deque[Entry] = deque()
        self._turn, self._scored_last = 0, False

    def leave(self, entry: Entry) -> None:
        """Forget a job that is over, wherever it is."""
        if entry in self.waiting:
            self.waiting.remove(entry)
            return
        for jobs in (self.unread, self.begun, self._searches, self._scorings):
            if entry in jobs:
                jobs.remove(entry)
                self.rows -= entry.rows
                self.held -= entry.bytes

    def longest(self, entries: Sequence[Entry] = ()) -> int:
        """Tokens of a slot, so that each row that runs, and those of `entries`, find room."""
        every = (*entries, *self.unread, *self.begun)
        return max((entry.longest for entry in every), default=0) + self.margin

    def plan(self, readings: Sequence[R]) -> Plan[R]:
        """Plan a step, as if it was then taken.

        Args:
            readings: the prompts that are being read, in the order in which they were begun.
        """
        enter = self._enter()
        read: R | None = None
        begin: list[Entry] = []
        score: Entry | None = None
        if self._scorings and not ((self.unread or readings) and self._scored_last):
            self._scored_last = True
            score = _next(self._scorings)
        else:
            self._scored_last = False
            read, begin = self._chunk_of(readings)
        return Plan(enter, read, begin, score, _next(self._searches))

    def _enter(self) -> list[Entry]:
        """Let in the first that wait, as long as there is room; nobody overtakes."""
        enter = []
        while self.waiting and self._has_room(self.waiting[0]):
            entry = self.waiting.popleft()
            jobs = {Work.SCORING: self._scorings, Work.SEARCH: self._searches}
            jobs.get(entry.work, self.unread).append(entry)
            self.rows += entry.rows
            self.held += entry.bytes
            enter.append(entry)
        return enter

    def _has_room(self, entry: Entry) -> bool:
        rows = self.rows + entry.rows
        if self.held + entry.bytes > self.max_bytes or rows > self.max_rows:
            return False
        # The cache has slots that are as long as the longest row; alone, a job finds room in it.
        in_cache = entry.work is not Work.SCORING
        return not (in_cache and self.rows and rows * self.longest([entry]) > self.max_tokens)

    def _chunk_of(self, readings: Sequence[R]) -> tuple[R | None, list[Entry]]:
        """The prompts of which a chunk is read: by turns the oldest, and those nearest their end.

        So that a short question does not wait for a long text, nor a long text for ever.
        """
        self._turn += 1
        if self._turn % 2:
            return (readings[0], []) if readings else (None, self._begin(self.unread))
        short = sorted(self.unread, key=lambda entry: entry.prompt)
        nearest = min(readings, key=lambda reading: reading.left, default=None)
        if nearest is not None and (not short or nearest.left <= short[0].prompt):
            return nearest, []
        return None, self._begin(short)

    def _begin(self, entries: Sequence[Entry]) -> list[Entry]:
        """Begin with the first of these, and with others that are read together with it."""
        if not entries:
            return []
        count = 1
        while count < len(entries) and self._fit(entries[: count + 1]):
            count += 1
        begin = list(entries[:count])
        self.unread = [entry for entry in self.unread if entry not in begin]
        self.begun += begin
        return begin

    def _fit(self, entries: Sequence[Entry]) -> bool:
        """True if the prompts of these have a chunk of tokens at most and are a group together."""
        same = all(entry.read_with is entries[0].read_with for entry in entries)
        lengths = sorted(entry.prompt for entry in entries for _ in range(entry.prompts))
        small = sum(lengths) <= self.cuts.chunk
        return same and small and len(self.cuts.together(lengths)) == 1


def _next(entries: deque[Entry]) -> Entry | None:
    """The first of those that take turns, which becomes the last."""
    if not entries:
        return None
    entries.rotate(-1)
    return entries[-1]
