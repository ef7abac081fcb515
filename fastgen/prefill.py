"""Prompts on their way into the cache: a chunk at a time, several rows together, known ones first.

Whoever has rows that run meanwhile takes one chunk, steps, and takes the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.cache import Cache
from fastgen.codes import Desk
from fastgen.model import Model
from fastgen.prefix import PrefixCache

CHUNK = 256  # tokens of one row that are read at a time
TOGETHER = 512  # tokens of several rows that are read at a time
CALL = 20  # tokens that take as long as a call without any: reading the weights, mostly

States = dict[int, list[NDArray[np.float32]]]  # of a row, by how many tokens were read


class Prefill:
    """Prompts that are being read into the slots from `first` on, which become empty for it.

    Args:
        prompts: int64 [length] each, shortest first.
        prefix_cache: where their keys and values are kept, if anywhere.
        chunk: tokens of a row that are read at a time, CHUNK if None; a multiple of `prefix.BLOCK`.
            Chunks end at its multiples, for every row.

    Attributes:
        first: the slot of the first prompt; whoever moves the slots says so here.
        logits: float32 [prompts, vocab]: those after the last token of each that has been read.
        done: whether all have been.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        prompts: Sequence[NDArray[np.int64]],
        first: int,
        prefix_cache: PrefixCache | None = None,
        chunk: int | None = None,
    ) -> None:
        self.model, self.cache, self.prompts, self.first = model, cache, prompts, first
        self.prefix_cache, self.chunk = prefix_cache, chunk or CHUNK
        self.logits = np.empty((len(prompts), model.info.vocab_size), np.float32)
        self.done = False
        for slot in range(first, first + len(prompts)):
            cache.begin(slot)
        self._chunks = self._read_all()

    @property
    def left(self) -> int:
        """How many tokens are still to be read."""
        held = self.cache.lengths[self.first : self.first + len(self.prompts)]
        return sum(map(len, self.prompts)) - int(held.sum())

    def read(self) -> None:
        """Read one chunk."""
        next(self._chunks, None)

    def _read_all(self) -> Iterator[None]:
        for start, end in together([len(prompt) for prompt in self.prompts], self.chunk):
            if start:
                yield
            yield from self._read_group(start, end)
        self.done = True

    def _read_group(self, start: int, end: int) -> Iterator[None]:
        """Read prompts `start` to `end`, but what the prefix cache knows of them."""
        prompts, known = self.prompts[start:end], self.prefix_cache
        desk = Desk(self.model, self.cache, len(prompts), len(prompts[-1]) + self.chunk)
        if known is None:
            desk.lay(self.first + start, len(prompts))
            yield from self._read_rows(desk, start, end, None)
            desk.close()
            return
        model = self.model.fingerprint
        known.fetch(model, prompts, self.cache, self.first + start, self.chunk)
        desk.lay(self.first + start, len(prompts))
        states: list[States] = [{} for _ in prompts]
        yield from self._read_rows(desk, start, end, states)
        desk.close()
        for place, mine in enumerate(states, start):
            slot = self.first + place
            known.keep(model, self.prompts[place], self.cache, slot, self.chunk, mine)

    def _read_rows(
        self, desk: Desk, start: int, end: int, states: list[States] | None
    ) -> Iterator[None]:
        """Read what the slots do not hold yet, row by row shorter ones leaving.

        Args:
            states: gets each row's states where a chunk ended; None where nobody wants them.
        """
        at = start  # the first row that is not complete
        while True:
            first = self.first + at
            prompts = self.prompts[at:end]
            held = self.cache.lengths[first : first + len(prompts)].copy()
            stop = (held.min() // self.chunk + 1) * self.chunk
            new = [prompt[done:stop] for prompt, done in zip(prompts, held, strict=True)]
            ended = sum(len(prompt) <= stop for prompt in prompts)
            # Only a chunk in which a prompt ends needs logits.
            if ended:
                self.logits[at : at + ended] = self._end(desk, new, first, at - start, ended)
            else:
                desk.forward(new, first, at - start, _no_logits(new))
            for row in range(at, end) if states is not None else ():
                assert states is not None
                if self.cache.lengths[self.first + row] == stop:
                    states[row - start][stop] = self.cache.state(self.first + row)[1]
            at += ended
            if at == end:
                return
            yield

    def _end(
        self, desk: Desk, new: Sequence[NDArray[np.int64]], first: int, place: int, ended: int
    ) -> NDArray[np.float32]:
        """Read a chunk in which the first `ended` rows end; their logits [ended, vocab].

        Where prompts are read apart (`Model.reads_apart`), their last tokens are not.
        """
        if not self.model.reads_apart(len(new) * max(map(len, new))):
            return desk.forward(new, first, place)[:ended, 0]
        before = [ids[:-1] for ids in new[:ended]] + [*new[ended:]]
        # A row that holds nothing cannot be left as it is: those of one token come first.
        some = next(row for row, ids in enumerate(before) if len(ids))
        desk.forward(before[some:], first + some, place + some, _no_logits(before[some:]))
        return desk.forward([ids[-1:] for ids in new[:ended]], first, place)[:, 0]


def _no_logits(new: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.zeros((len(new), 0), np.int64)


def prefill(
    model: Model,
    cache: Cache,
    prompts: Sequence[NDArray[np.int64]],
    first: int,
    prefix_cache: PrefixCache | None = None,
) -> NDArray[np.float32]:
    """Read `prompts`, shortest first, into the slots from `first` on, with nobody waiting.

    Returns:
        float32 [prompts, vocab]: the logits after the last token of each.
    """
    reading = Prefill(model, cache, prompts, first, prefix_cache)
    while not reading.done:
        reading.read()
    return reading.logits


def together(lengths: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """Which neighbours of rows are read together: (first, last + 1) of each group.

    Rows are padded to the longest of their group, and every call has a cost of its own; the
    groups are those of the least sum. Up to TOGETHER tokens go into a call.

    Args:
        lengths: of the prompts, in ascending order.
        chunk: tokens of a row that go into a call.
    """
    least = [0.0] + [float("inf")] * len(lengths)  # cost of the first rows, by their number
    starts = [0] * (len(lengths) + 1)
    for end in range(1, len(lengths) + 1):
        width = min(chunk, lengths[end - 1])
        for start in range(end - 1, -1, -1):
            if start < end - 1 and (end - start) * width > TOGETHER:
                break
            cost = least[start] + _cost(lengths[start:end], chunk)
            if cost < least[end]:
                least[end], starts[end] = cost, start
    groups = []
    end = len(lengths)
    while end:
        groups.append((starts[end], end))
        end = starts[end]
    return groups[::-1]


def _cost(lengths: Sequence[int], chunk: int) -> float:
    """Of reading rows together: tokens, padding included, and CALL for each call."""
    cost, at = 0.0, 0
    while at < lengths[-1]:
        going = sum(length > at for length in lengths)
        cost += CALL + going * min(chunk, lengths[-1] - at)
        at += chunk
    return cost
