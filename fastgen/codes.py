"""Keys and values in 8 bits where rows step, in float32 where prompts are read.

Attention to int8 codes is fast for one token and slow for many: the kernel makes floats of all keys
again for every few queries. So the graph attends to either (`export.cache`), and a prompt is read
at a `Desk`: its tokens see the exact keys of their own chunk, and what earlier chunks left as the
codes say it. A chunk that a prefix cache knew is therefore the same as one that was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastgen.cache import Cache
from fastgen.jsonfile import ModelError

if TYPE_CHECKING:
    from fastgen.model import Model

SCALES = "cache_scales.npy"  # float32, flat: of each layer's keys, then values, by channel

Floats = NDArray[np.float32]
Parts = Sequence[NDArray[Any]]  # of a row, as `Cache.read` gives them


class Codes:
    """What the codes of a model's keys and values stand for.

    Args:
        path: of the file with the scales.
        layers: (kv_heads, head_dim) of each layer.

    Raises:
        ModelError: the file does not have the model's scales.
    """

    def __init__(self, path: Path, layers: Sequence[tuple[int, int]]) -> None:
        sizes = [2 * heads * dim for heads, dim in layers]
        if not path.is_file():
            raise ModelError(
                f"{path.parent} has keys and values in int8 and no {path.name}, as exports of "
                "older versions: export the model again"
            )
        try:
            flat = np.load(path, allow_pickle=False)
            if flat.shape != (sum(sizes),) or flat.dtype != np.float32 or not (flat > 0).all():
                raise ValueError(f"expected {sum(sizes):,} positive float32 numbers")
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{path} is damaged ({error}): copy or export the model again"
            ) from error
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        self._scales = [  # in the order of `Cache.read`
            np.concatenate(
                [
                    part.reshape(2, heads, 1, dim)
                    for part, layer in zip(parts, layers, strict=True)
                    if layer == (heads, dim)
                ]
            )
            for heads, dim in dict.fromkeys(layers)
        ]
        self._inverse = [1 / scales for scales in self._scales]

    def encode(self, floats: Parts, codes: Parts) -> None:
        """Write the codes of keys and values, as the kernel makes them: the nearest."""
        for part, inverse, out in zip(floats, self._inverse, codes, strict=True):
            scaled = np.empty(part.shape[1:], np.float32)  # of a layer: near the processor
            for half, scale, code in zip(part, inverse, out, strict=True):
                np.multiply(half, scale, out=scaled)
                np.rint(scaled, out=scaled)
                np.clip(scaled, -128, 127, out=scaled)
                code[...] = scaled

    def decode(self, codes: Parts, floats: Parts) -> None:
        """Write the keys and values that codes stand for."""
        for part, scales, out in zip(codes, self._scales, floats, strict=True):
            np.multiply(part, scales, out=out)


class Desk:
    """Where prompts are read: float32 keys and values of neighbouring slots, or the slots.

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
    ) -> Floats:
        """As `Model.forward`, for the slots from `first` on.

        Args:
            place: which of the rows that were laid here the first one is.
        """
        if self.codes is None:
            return self.model.forward(new, self.cache, first, logits_positions)
        for row in range(len(new)):
            if (start := self._exact.pop(place + row, None)) is not None:
                self._fetch(place + row, first + row, start, self.cache.lengths[first + row])
        logits = self.model.forward(new, self.floats, place, logits_positions)
        for row in range(len(new)):
            self._keep(place + row, first + row)
        return logits

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
