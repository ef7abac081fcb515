"""Keys and values in 8 bits: their codes, and the numbers that these stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.errors import ModelError

Parts = Sequence[NDArray[Any]]  # of a row, as `Cache.read` gives them


class Codes:
    """The scales of a model's keys and values in int8.

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
