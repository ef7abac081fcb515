"""The slots of a cache: rows move between them, and what the cache holds moves along."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.cache import Cache


class Move(NamedTuple):
    """A copy within the cache: `slot` becomes what `source` is, from token `start` on."""

    slot: int
    source: int
    start: int = 0


class Slots:
    """Rearranges the slots of one cache, with as few copies as there can be.

    Args:
        cache: whose slots these are.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def copy(self, moves: Iterable[Move], count: int) -> None:
        """Make these copies, all at once, and keep the first `count` slots."""
        parents, starts = np.arange(count), np.zeros(count, np.int64)
        for slot, source, start in moves:
            parents[slot], starts[slot] = source, start
        self.cache.take(parents, starts)

    def insert(
        self, sources: Sequence[int] | NDArray[np.int64], at: int, others: Sequence[range] = ()
    ) -> list[int]:
        """Let the slots from `at` on become what `sources` are, which may lie behind them.

        Args:
            sources: a slot for each new one; a slot may be named several times.
            at: the first new slot. Those before it stay.
            others: slots of prompts that are being read: those in the way move to the end.

        Returns:
            The first slot of each of `others` now.
        """
        stop = at + len(sources)
        last = max([stop, 1 + max(map(int, sources), default=0), *(span.stop for span in others)])
        parents = np.arange(last)
        parents[at:stop] = sources
        firsts = []
        for span in others:
            moves = span.start < stop
            firsts.append(len(parents) if moves else span.start)
            if moves:
                parents = np.append(parents, span)
        ends = (first + len(span) for first, span in zip(firsts, others, strict=True))
        parents = parents[: max([stop, *ends])]
        self.cache.reserve(len(parents), 0)
        self.cache.take(parents)
        return firsts

    def close_gaps(
        self, held: Sequence[int], end: int | None = None, in_order: bool = False
    ) -> list[int]:
        """Move what is in the `held` slots to the first ones; the others are free.

        Only what lies beyond the first `len(held)` slots moves, into the gaps between the others.

        Args:
            held: the slots that are in use.
            end: the slots from `len(held)` to this one stay as they are; None for no more slots.
            in_order: whether all move up instead, in the order of `held`.

        Returns:
            The slot of each of `held` now.
        """
        count = len(held)
        gaps = iter(sorted(set(range(count)) - set(held)))
        now = list(range(count)) if in_order else [s if s < count else next(gaps) for s in held]
        moves = [Move(*pair) for pair in zip(now, held, strict=True)]
        self.copy(moves, max(count, end or 0))
        return now

    def clear(self, used: Collection[int]) -> None:
        """Let the slots that are not in `used` hold nothing."""
        for slot in np.flatnonzero(self.cache.lengths).tolist():
            if slot not in used:
                self.cache.begin(slot)
