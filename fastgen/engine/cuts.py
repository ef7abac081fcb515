"""Cuts of prompts that are read together: numbers alone, for `prefill`.

A call of the model reads a rectangle: neighbouring rows, from one token on up to another. Shorter
rows are padded, or all are read to the end of a shorter one and the rest goes on in another call: a
staircase. A call takes as long as CALL tokens would without any; what costs least is found here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

CALL = 20  # tokens that take as long as a call without any: reading the weights, mostly
STAIRS = 16  # rows of a staircase, at most: of more, neighbours are about as long
STRIP = 64  # tokens of each row that go into a call, at least, where no row ends
NEVER = float("inf")

Known = Callable[[int, int], int]


def groups(layers: Collection[tuple[int, int]]) -> frozenset[int]:
    """The sizes that groups of queries may have, which attention treats together.

    Args:
        layers: (kv_heads, head_dim) of each.
    """
    return frozenset({64, 128, 256, *(2 * dim for _, dim in layers)})


def ends_alike(end: int, start: int, at: int, sizes: Collection[int]) -> bool:
    """Tell if a text read from token `at` to `end` ends as if it was read from `start` on.

    Several kernels treat one row apart: the last of an odd number of rows of a 4-bit product, or
    of a group of queries in attention (of 2 * head_dim, or as the processor's cache suggests). So
    the last token is alone in its group here if, and only if, it is so there.

    Args:
        sizes: of groups, whichever it may be.
    """
    return all(((end - start) % size == 1) == ((end - at) % size == 1) for size in sizes)


@dataclass(frozen=True)
class Cuts:
    """The places where prompts may be cut.

    Every row is cut at multiples of the chunk, as it is alone. In between it is cut at an even
    place, and only where its tokens are the same bits for that (see `ends_alike`).

    Attributes:
        chunk: tokens of one row that go into a call.
        most: tokens of several rows that do, padding included.
        between: whether a cut between multiples of the chunk leaves the bits as they are: it does
            not where something is rounded between calls, or where states go through a chunk.
        sizes: of groups of queries; see `groups`.
    """

    chunk: int
    most: int
    between: bool = False
    sizes: frozenset[int] = frozenset()

    def together(self, lengths: Sequence[int], known: Known | None = None) -> list[tuple[int, int]]:
        """The neighbours of rows that are read together: (first, last + 1) of each group.

        Args:
            lengths: of the prompts, in ascending order.
            known: (row, first) -> the tokens of a row that need not be read, if the rows before
                `first` were; None where that is none.
        """
        least = [0.0] + [NEVER] * len(lengths)  # cost of the first rows, by their number
        starts = [0] * (len(lengths) + 1)
        held: dict[int, int] = {}  # of all rows from one on to the last, at least
        for end in range(1, len(lengths) + 1):
            way = _Way(self, lengths, end)
            for start in range(end - 1, -1, -1):
                if known is not None:
                    mine = known(end - 1, start)
                    held[start] = min(held[start], mine) if start < end - 1 else mine
                cost = least[start] + way.cheapest(start, held.get(start, 0))[0]
                if cost < least[end]:
                    least[end], starts[end] = cost, start
                if cost == NEVER and known is None and not self._stairs(end - start):
                    break  # more rows fit even less
        found = []
        end = len(lengths)
        while end:
            found.append((starts[end], end))
            end = starts[end]
        return found[::-1]

    def _stairs(self, rows: int) -> bool:
        """True if so many rows may be cut where one of them ends."""
        return self.between and rows <= STAIRS

    def cost(self, lengths: Sequence[int]) -> float:
        """The cost of reading a group of rows: tokens, padding included, and CALL for each call."""
        return _Way(self, lengths, len(lengths)).cheapest(0, 0)[0]

    def stop(self, lengths: Sequence[int], at: int) -> int:
        """The token to which a group of rows is read next.

        Args:
            lengths: of those that are not complete, in ascending order.
            at: the token from which on they are read, or the first of these.
        """
        cost, stop = _Way(self, lengths, len(lengths)).cheapest(0, at)
        return (at // self.chunk + 1) * self.chunk if cost == NEVER else stop


class _Way:
    """The cheapest ways to read rows up to the last of them.

    Args:
        lengths: of the prompts, in ascending order.
        end: the number of rows; those behind are not looked at.
    """

    def __init__(self, cuts: Cuts, lengths: Sequence[int], end: int) -> None:
        self._cuts, self._lengths, self._end = cuts, lengths, end
        self._known: dict[tuple[int, int], tuple[float, int]] = {}

    def cheapest(self, first: int, at: int) -> tuple[float, int]:
        """The cost of reading the rows from `first` on from a token on, and the first stop."""
        longest = self._lengths[self._end - 1]
        cost, stop = 0.0, longest
        begun = at
        while at < longest:  # as long as there is no choice
            first = bisect_right(self._lengths, at, first, self._end)
            if (first, at) in self._known:
                return self._with(cost, stop, begun, at, self._known[first, at])
            stops = self._stops(first, at)
            if len(stops) != 1:
                best = self._best(first, at, stops)
                self._known[first, at] = best
                return self._with(cost, stop, begun, at, best)
            if at == begun:
                stop = stops[0]
            cost += self._of_call(first, at, stops[0])
            at = stops[0]
        return cost, stop

    @staticmethod
    def _with(
        cost: float, stop: int, begun: int, at: int, rest: tuple[float, int]
    ) -> tuple[float, int]:
        """The cost up to `at` and that of the rest, and the first stop of both."""
        return cost + rest[0], rest[1] if at == begun else stop

    def _best(self, first: int, at: int, stops: Sequence[int]) -> tuple[float, int]:
        """The cheapest of several stops."""
        return min(
            (
                (self._of_call(first, at, stop) + self.cheapest(first, stop)[0], stop)
                for stop in stops
            ),
            default=(NEVER, at),
        )

    def _of_call(self, first: int, at: int, stop: int) -> float:
        return CALL + (self._end - first) * (min(stop, self._lengths[self._end - 1]) - at)

    def _stops(self, first: int, at: int) -> list[int]:
        """The tokens to which the rows from `first` on, none of which is complete, may be read."""
        cuts, lengths, last = self._cuts, self._lengths, self._end - 1
        rows = self._end - first
        begin = at // cuts.chunk * cuts.chunk
        chunk_end = begin + cuts.chunk
        furthest = chunk_end if rows == 1 else min(chunk_end, at + cuts.most // rows)
        stairs = cuts._stairs(rows)
        if at == begin and (rows == 1 or not stairs):  # every row ends as it does alone
            whole = [min(chunk_end, lengths[last])]
            return whole if whole[0] <= furthest else []
        stops: list[int] = []
        for row in range(first, self._end):
            length = lengths[row]
            if length > furthest:
                break
            if at > begin and not ends_alike(length, begin, at, cuts.sizes):
                return stops
            if row == last:
                return [*stops, length]
            stop = length + length % 2
            if stairs and stop <= furthest and lengths[row + 1] > stop:
                stops.append(stop)
        if furthest == chunk_end:
            if chunk_end not in stops:
                stops.append(chunk_end)
        elif stairs and not stops and furthest - at >= STRIP:
            stops.append(furthest - furthest % 2)
        return stops
