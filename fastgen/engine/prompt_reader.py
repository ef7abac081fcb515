"""Where prompts are read: keys and values in float32, also where those that stay are in 8 bits.

Attention to int8 codes is fast for one token and slow for many: the kernel makes floats of all keys
again for every few queries. So the graph attends to either (`export.cache`), and a prompt is read
at a desk: its tokens see the exact keys of their own chunk, and what earlier chunks left as the
codes say it. Whole chunks that a prefix cache knew are therefore what would be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.cache import Cache
from fastgen.engine.model import Model


class Desk:
    """Float32 keys and values of neighbouring slots; or these slots, if they are float32.

    Args:
        model: what reads them.
        cache: whose slots keep what is read.
        rows, capacity: that can be read here.

    Attributes:
        floats: the cache that is read into; `cache` itself where that is float32.
    """

    def __init__(self, model: Model, cache: Cache, rows: int, capacity: int) -> None:
        self.model, self.cache, self.codes = model, cache, model.codes
        self._exact: dict[int, int] = {}  # the first token of a row whose floats are not rounded
        self.floats = cache
        if self.codes is not None:
            self.floats = model.borrow_cache(rows, capacity, reads_prompts=True)

    def lay(self, first: int, rows: int) -> None:
        """Begin with what `rows` slots of the cache from `first` on hold."""
        if self.codes is None:
            return
        for place in range(rows):
            held, states = self.cache.state(first + place)
            self.floats.begin(place)
            self.floats.restore(place, (held, states))
            self._fetch(place, first + place, 0, held)

    def forward(
        self,
        new: Sequence[NDArray[np.int64]],
        first: int,
        place: int,
        logits_positions: NDArray[np.int64] | None = None,
        apart: bool = False,
    ) -> NDArray[np.float32]:
        """As `Model.forward`, for the slots from `first` on.

        Args:
            place: which of the rows that were laid here the first one is.
        """
        if self.codes is None:
            return self.model.forward(new, self.cache, first, logits_positions, apart)
        for row in range(len(new)):
            if (start := self._exact.pop(place + row, None)) is not None:
                self._fetch(place + row, first + row, start, self.cache.lengths[first + row])
        logits = self.model.forward(new, self.floats, place, logits_positions, apart)
        for row in range(len(new)):
            self._keep(place + row, first + row)
        return logits

    def forget(self, first: int, place: int, rows: int) -> None:
        """As `Cache.forget`, for rows that nobody but the reader looks at."""
        self.cache.forget(first, rows)
        if self.codes is not None:
            self.floats.forget(place, rows)

    def _keep(self, place: int, slot: int) -> None:
        """Store what was read of a row. If there is more to come, it sees what was stored."""
        assert self.codes is not None
        start, (end, states) = int(self.cache.lengths[slot]), self.floats.state(place)
        self.codes.encode(self.floats.parts(place, start, end), self.cache.parts(slot, start, end))
        self.cache.restore(slot, (end, states))
        self._exact[place] = start

    def _fetch(self, place: int, slot: int, start: int, end: int) -> None:
        """What is stored of a row, as floats."""
        assert self.codes is not None
        self.codes.decode(self.cache.parts(slot, start, end), self.floats.parts(place, start, end))

    def close(self) -> None:
        """Nothing more is read here: the memory goes back to the model."""
        if self.codes is not None:
            self.model.give_back(self.floats)
