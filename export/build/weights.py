"""Tensors of a checkpoint, mapped and read in parts: float32 whatever they are stored in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel
from fastgen.export.quantize import parts
from fastgen.export.source import checkpoint
from fastgen.store import jsonfile

BLOCK = 64  # rows that are transposed at a time: what they fill fits into a cache


class Tensor(Protocol):
    """A tensor that is read when it is wanted.

    Attributes:
        shape: of all.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, rows: slice) -> NDArray[np.float32]:
        """Some neighbours of its first dimension, in float32."""


Weights = Mapping[str, Tensor]


def as_it_is(held: NDArray[Any]) -> NDArray[np.float32]:
    return held.astype(np.float32, copy=False)


def _widened(held: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    wide = held.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


# How a type of safetensors lies in a file, and how it becomes float32.
Types = Mapping[str, tuple[str, Callable[[NDArray[Any]], NDArray[np.float32]]]]
TYPES: Types = {
    "F32": ("<f4", as_it_is),
    "F16": ("<f2", as_it_is),
    "BF16": ("<u2", _widened),
    "F64": ("<f8", as_it_is),
}


@dataclass(frozen=True)
class Mapped:
    """A tensor of a safetensors file. See `Tensor`."""

    held: NDArray[Any]
    convert: Callable[[NDArray[Any]], NDArray[np.float32]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    def read(self, rows: slice) -> NDArray[np.float32]:
        return self.convert(self.held[rows])


def of_safetensors(directory: Path, more: Types = MappingProxyType({})) -> dict[str, Mapped]:
    """All tensors of a directory's safetensors files, which are whole (`checkpoint.check`).

    Args:
        more: types besides those of floats.

    Raises:
        UnsupportedModel: there are none, or one is of a float type that is not known.
        ModelError: a header contradicts itself.
    """
    files = checkpoint.weights(directory)
    if not files or any(path.suffix != ".safetensors" for path in files):
        raise UnsupportedModel(f"{directory} has no weights in safetensors")
    tensors: dict[str, Mapped] = {}
    for path in files:
        header = checkpoint.header(path) or {}
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
        held = np.memmap(path, np.uint8, "r")
        for name, entry in header.items():
            kind = {**TYPES, **more}.get(entry["dtype"])
            if kind is None:
                if entry["dtype"][0] == "F" or entry["dtype"][:2] == "BF":
                    raise UnsupportedModel(f"its weights are of the type {entry['dtype']}")
                continue  # masks and counters
            first, last = entry["data_offsets"]
            numbers = math.prod(entry["shape"])
            if not 0 <= first <= last or last - first != np.dtype(kind[0]).itemsize * numbers:
                problem = f"{name} has {last - first} bytes for the shape {entry['shape']}"
                raise jsonfile.damaged(path, problem, checkpoint.ADVICE)
            array = held[begin + first : begin + last].view(kind[0]).reshape(entry["shape"])
            tensors[name] = Mapped(array, kind[1])
    return tensors


def size(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def whole(tensor: Tensor) -> NDArray[np.float32]:
    """A tensor, its rows read on all cores."""
    if len(tensor.shape) < 2:
        return tensor.read(slice(None))
    out = np.empty(tensor.shape, np.float32)

    def fill(rows: slice) -> None:
        out[rows] = tensor.read(rows)

    parts.each(tensor.shape[0], int(np.prod(tensor.shape[1:])), fill)
    return out


def taken(tensor: Tensor, rows: tuple[int, int, int]) -> NDArray[np.float32]:
    """Rows `first` to `last` of each `of` rows of a tensor."""
    first, last, of = rows
    pieces = [tensor.read(slice(at + first, at + last)) for at in range(0, tensor.shape[0], of)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def transposed(tensor: Tensor, rows: tuple[int, int, int] | None) -> NDArray[np.float32]:
    """[out, in] as [in, out], for those rows alone."""
    outputs, width = tensor.shape
    first, last, of = rows or (0, outputs, outputs)
    each = last - first
    out = np.empty((width, outputs // of * each), np.float32)

    def fill(places: slice) -> None:
        for at in range(places.start, places.stop, BLOCK):
            stop = min(at + BLOCK, places.stop)
            out[:, at:stop] = _rows(tensor, at, stop, first, each, of).T

    parts.each(out.shape[1], width, fill)
    return out


def _rows(
    tensor: Tensor, start: int, stop: int, first: int, each: int, of: int
) -> NDArray[np.float32]:
    """Rows `start` to `stop` of those that are taken: of each `of` rows `each` from `first` on."""
    pieces = []
    while start < stop:
        group, within = divmod(start, each)
        count = min(each - within, stop - start)
        at = group * of + first + within
        pieces.append(tensor.read(slice(at, at + count)))
        start += count
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
