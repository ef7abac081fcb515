"""Prompts on their way into the cache: a chunk at a time, several rows together, known ones first.

Where rows run meanwhile, one chunk is read, they step, and the next one is read. Which rows are
read together and how far `cuts` says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.cache import Cache
from fastgen.engine.cuts import Cuts, groups
from fastgen.engine.model import Model
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.prompt_reader import PromptReader

CHUNK = 256  # tokens of one row that are read at a time
TOGETHER = 512  # tokens of several rows that are read at a time


@dataclass(frozen=True)
class Chunks:
    """Tokens that are read at a time.

    Attributes:
        row: of one prompt. Chunks end at its multiples, for every row, and maybe in between (see
            `cuts`); a multiple of `prefix_cache.BLOCK` where a prefix cache is used.
        together: of several prompts, padding included.
        step: of rows that run, padding included, unless there are more rows: forced tokens and
            guesses.
    """

    row: int = CHUNK
    together: int = TOGETHER
    step: int = sys.maxsize

    @classmethod
    def of(cls, tokens: int) -> Chunks:
        """Chunks where others wait for the end of each: never more than so many tokens."""
        return cls(tokens, tokens, tokens)

    @property
    def margin(self) -> int:
        """Tokens with which a row may be padded where it is read together with longer ones."""
        return max(self.row, CHUNK)


WHOLE = Chunks()  # where nobody waits

States = dict[int, list[NDArray[np.float32]]]  # of a row, by how many tokens were read


class Prefill:
    """Prompts that are being read into the slots from `first` on, which become empty for it.

    Args:
        prompts: int64 [length] each, shortest first.
        prefix_cache: where their keys and values are kept, if anywhere.
        chunks: tokens that are read at a time.

    Attributes:
        first: the slot of the first prompt; what moves the slots sets it anew.
        logits: float32 [prompts, vocab]: those after the last token of each that has been read.
        reused: of each prompt, the tokens that the prefix cache knew.
        done: whether all have been.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        prompts: Sequence[NDArray[np.int64]],
        first: int,
        prefix_cache: PrefixCache | None = None,
        chunks: Chunks = WHOLE,
    ) -> None:
        self.model, self.cache, self.prompts, self.first = model, cache, prompts, first
        self.prefix_cache, self.chunk = prefix_cache, chunks.row
        self._cuts = cuts_of(model, chunks)
        self.logits = np.empty((len(prompts), model.info.vocab_size), np.float32)
        self.reused = [0] * len(prompts)
        self.done = False
        for slot in range(first, first + len(prompts)):
            cache.begin(slot)
        self._chunks = self._read_all()

    @property
    def left(self) -> int:
        """The number of tokens that are still to be read."""
        held = self.cache.lengths[self.first : self.first + len(self.prompts)]
        return sum(map(len, self.prompts)) - int(held.sum())

    def read(self) -> None:
        """Read one chunk."""
        next(self._chunks, None)

    def _read_all(self) -> Iterator[None]:
        lengths = [len(prompt) for prompt in self.prompts]
        short = sum(not self.model.reads_as_many(length) for length in lengths)
        for start, end in [*self._groups(0, short), *self._groups(short, len(lengths))]:
            if start:
                yield
            yield from self._read_group(start, end)
        self.done = True

    def _groups(self, start: int, end: int) -> list[tuple[int, int]]:
        """The first of prompts `start` to `end` that are read together, and the last + 1."""
        prompts, known = self.prompts[start:end], None
        if self.prefix_cache is not None:
            model = self.model.fingerprint
            known = self.prefix_cache.sharing(model, prompts, self.cache, self.chunk).known
        found = self._cuts.together([len(prompt) for prompt in prompts], known)
        return [(start + first, start + last) for first, last in found]

    def _read_group(self, start: int, end: int) -> Iterator[None]:
        """Read prompts `start` to `end`, but what the prefix cache knows of them."""
        prompts, known = self.prompts[start:end], self.prefix_cache
        if known is not None:
            model = self.model.fingerprint
            known.fetch(model, prompts, self.cache, self.first + start, self.chunk)
            held = self.cache.lengths[self.first + start : self.first + end]
            self.reused[start:end] = held.tolist()
        reader = PromptReader(self.model, self.cache, len(prompts), len(prompts[-1]) + self.chunk)
        reader.load(self.first + start, len(prompts))
        states: list[States] | None = None if known is None else [{} for _ in prompts]
        yield from self._read_rows(reader, start, prompts, states)
        reader.close()
        if known is not None and states is not None:
            for index, (text, mine) in enumerate(zip(prompts, states, strict=True), start):
                known.keep(model, text, self.cache, self.first + index, self.chunk, mine)

    def _read_rows(
        self,
        reader: PromptReader,
        start: int,
        texts: Sequence[NDArray[np.int64]],
        states: list[States] | None,
    ) -> Iterator[None]:
        """Read what the slots do not hold yet, row by row shorter ones leaving.

        Args:
            texts: the prompts from `start` on.
            states: gets each row's states where a chunk ended; None where nobody wants them.
        """
        at, end = start, start + len(texts)
        many = self.model.reads_as_many(len(texts[0]))
        while True:  # `at` is the first row that is not complete
            first = self.first + at
            prompts = texts[at - start :]
            held = self.cache.lengths[first : first + len(prompts)].copy()
            stop = self._cuts.stop([len(prompt) for prompt in prompts], int(held.min()))
            new = [prompt[done:stop] for prompt, done in zip(prompts, held, strict=True)]
            ended = sum(len(prompt) <= stop for prompt in prompts)
            # Only a call in which a prompt ends needs logits.
            positions = None if ended else np.zeros((len(new), 0), np.int64)
            logits = reader.forward(new, first, at - start, positions, many)
            if ended:
                self.logits[at : at + ended] = logits[:ended, 0]
            if states is None:  # no prefix cache wants what was read first
                reader.forget(first, at - start, len(new))
            for row in range(at, end) if states is not None else ():
                assert states is not None
                if self.cache.lengths[self.first + row] == stop:
                    states[row - start][stop] = self.cache.state(self.first + row)[1]
            at += ended
            if at == end:
                return
            yield


def cuts_of(model: Model, chunks: Chunks) -> Cuts:
    """The places where prompts of a model may be cut."""
    # Keys in 8 bits are rounded between calls, and recurrences go through a chunk at a time.
    between = model.codes is None and not model.info.states
    return Cuts(chunks.row, chunks.together, between, groups(model.info.layers))


def prefill(
    model: Model,
    cache: Cache,
    prompts: Sequence[NDArray[np.int64]],
    first: int,
    prefix_cache: PrefixCache | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> NDArray[np.float32]:
    """Read `prompts`, shortest first, into the slots from `first` on, with nobody waiting.

    Args:
        stopped: asked before each chunk: whether to stop there.

    Returns:
        float32 [prompts, vocab]: the logits after the last token of each that was read whole.
    """
    reading = Prefill(model, cache, prompts, first, prefix_cache)
    while not reading.done and not stopped():
        reading.read()
    return reading.logits
