"""Prompts are read with keys and values in float32, also where those that stay are in 8 bits.

Attention to int8 codes is fast for one token and slow for many: the kernel makes floats of all keys
again for every few queries. So the graph attends to either (`export.quantize.kv_int8`), and a
prompt has a reader: its tokens see the exact keys of their own chunk, and those of earlier chunks
rounded as the codes have them. Whole chunks of a prefix cache are therefore what would be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.cache import Cache
from fastgen.engine.model import Model


class PromptReader:
    """Float32 keys and values of neighbouring slots; or these slots, if they are float32.

    Args:
        model: reads the prompts.
        cache: its slots keep what is read.
        rows, capacity: the most that can be read here.

    Attributes:
        floats: the cache that is read into; `cache` itself where that is float32.
    """

    def __init__(self, model: Model, cache: Cache, rows: int, capacity: int) -> None:
        self.model, self.cache, self.codes = model, cache, model.codes
        self._exact: dict[int, int] = {}  # the first token of a row whose floats are not rounded
        self.floats = cache
        if self.codes is not None:
            self.floats = model.borrow_cache(rows, capacity, reads_prompts=True)

    def load(self, first: int, rows: int) -> None:
        """Begin with the content of `rows` slots of the cache, from `first` on."""
        if self.codes is None:
            return
        for row in range(rows):
            held, states = self.cache.state(first + row)
            self.floats.begin(row)
            self.floats.restore(row, (held, states))
            self._fetch(row, first + row, 0, held)

    def forward(
        self,
        new: Sequence[NDArray[np.int64]],
        first: int,
        row: int,
        logits_positions: NDArray[np.int64] | None = None,
        many: bool | None = None,
    ) -> NDArray[np.float32]:
        """As `Model.forward`, for the slots from `first` on.

        Args:
            row: the index of the first of them among the rows that were loaded.
        """
        if self.codes is None:
            return self.model.forward(new, self.cache, first, logits_positions, many)
        for i in range(len(new)):
            if (start := self._exact.pop(row + i, None)) is not None:
                self._fetch(row + i, first + i, start, self.cache.lengths[first + i])
        logits = self.model.forward(new, self.floats, row, logits_positions, many)
        for i in range(len(new)):
            self._keep(row + i, first + i)
        return logits

    def forget(self, first: int, row: int, rows: int) -> None:
        """As `Cache.forget`, for rows that only this reader looks at."""
        self.cache.forget(first, rows)
        if self.codes is not None:
            self.floats.forget(row, rows)

    def _keep(self, row: int, slot: int) -> None:
        """Store what was read of a row. If there is more to come, it sees what was stored."""
        assert self.codes is not None
        start, (end, states) = int(self.cache.lengths[slot]), self.floats.state(row)
        self.codes.encode(self.floats.parts(row, start, end), self.cache.parts(slot, start, end))
        self.cache.restore(slot, (end, states))
        self._exact[row] = start

    def _fetch(self, row: int, slot: int, start: int, end: int) -> None:
        """Decode what is stored of a row."""
        assert self.codes is not None
        self.codes.decode(self.cache.parts(slot, start, end), self.floats.parts(row, start, end))

    def close(self) -> None:
        """Nothing more is read here: the memory goes back to the model."""
        if self.codes is not None:
            self.model.give_back(self.floats)
