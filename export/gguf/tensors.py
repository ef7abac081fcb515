"""Tensors of a GGUF file in float32, read in parts: ggml's types, by the library `gguf`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.export.build.weights import Tensor
from fastgen.export.gguf.file import Held


def library() -> Any:
    """The library `gguf`.

    Raises:
        ImportError: it is not installed; `opening` looks for it first.
    """
    import gguf

    return gguf


def block_sizes() -> dict[int, tuple[int, int]]:
    """Of each type that can be read: (numbers, bytes) of a block."""
    sizes = library().GGML_QUANT_SIZES
    return {int(kind): size for kind, size in sizes.items() if _is_readable(kind, size[1])}


def _is_readable(kind: Any, size: int) -> bool:
    """True if the library dequantises a type, whose blocks have that many bytes."""
    try:
        library().dequantize(np.zeros(size, np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def type_name(kind: int) -> str:
    """ggml's name of a type, such as "Q4_K"."""
    return str(library().GGMLQuantizationType(kind).name)


@dataclass(frozen=True)
class Stored:
    """A tensor as the file has it. See `Tensor`."""

    held: Held

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    def read(self, rows: slice) -> NDArray[np.float32]:
        gguf = library()
        first, last, _ = rows.indices(self.shape[0])
        data = self.held.data.reshape(self._lines, -1)
        if len(self.shape) == 1:
            flat = gguf.dequantize(data, gguf.GGMLQuantizationType(self.held.kind)).reshape(-1)
            return np.asarray(flat[first:last], np.float32)
        each = math.prod(self.shape[1:-1])
        taken = np.ascontiguousarray(data[first * each : last * each])
        values = gguf.dequantize(taken, gguf.GGMLQuantizationType(self.held.kind))
        return np.asarray(values, np.float32).reshape(last - first, *self.shape[1:])

    @property
    def _lines(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class _Changed:
    """A tensor whose rows are another's, in another order or with other numbers."""

    inner: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape


@dataclass(frozen=True)
class Unpermuted(_Changed):
    """Queries or keys of llama's kind: a file has the two that turn together side by side, and
    transformers has half a head between them.

    Attributes:
        heads: of the tensor's rows.
    """

    heads: int

    def read(self, rows: slice) -> NDArray[np.float32]:
        first, last, _ = rows.indices(self.shape[0])
        size = self.shape[0] // self.heads
        begin, end = first // size, -(-last // size)
        whole = self.inner.read(slice(begin * size, end * size))
        pairs = whole.reshape(end - begin, size // 2, 2, *self.shape[1:])
        unpermuted = pairs.swapaxes(1, 2).reshape(whole.shape)
        return np.ascontiguousarray(unpermuted[first - begin * size : last - begin * size])


@dataclass(frozen=True)
class Lowered(_Changed):
    """Weights of a norm to which transformers adds 1, and the file has it added."""

    def read(self, rows: slice) -> NDArray[np.float32]:
        return self.inner.read(rows) - np.float32(1)


@dataclass(frozen=True)
class Regrouped(_Changed):
    """Queries, keys and values of GPT-NeoX: a file has those of all heads one after the other, and
    transformers those of each head.
    """

    heads: int

    def read(self, rows: slice) -> NDArray[np.float32]:
        first, last, _ = rows.indices(self.shape[0])
        size = self.shape[0] // self.heads // 3
        pieces = []
        while first < last:
            group, within = divmod(first, size)
            head, which = divmod(group, 3)
            count = min(size - within, last - first)
            at = (which * self.heads + head) * size + within
            pieces.append(self.inner.read(slice(at, at + count)))
            first += count
        return np.concatenate(pieces) if pieces else self.inner.read(slice(0, 0))


@dataclass(frozen=True)
class Row:
    """A vector as a matrix of one row."""

    inner: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.inner.shape)

    def read(self, rows: slice) -> NDArray[np.float32]:
        return self.inner.read(slice(None))[None][rows]
