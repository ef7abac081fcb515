"""A GGUF file as it lies on disk: metadata and tensors, checked before anything is allocated.

The format is llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A file comes
from a stranger: every length is compared with what is left of the file before it is believed.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.errors import ModelError, UnsupportedModel
from fastgen.store import jsonfile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the tensors' bytes, where the file does not say another
ADVICE = "download the file again"
MOST_FIELDS = 1 << 16
MOST_TENSORS = 1 << 18
MOST_DIMENSIONS = 4
DEEPEST = 4  # arrays within each other
# Types of values: what struct calls them. Text and arrays have a length before them.
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class Held:
    """A tensor's bytes in the file.

    Attributes:
        shape: as numpy and torch count: rows first, the contiguous dimension last.
        kind: ggml's number of its type.
        data: uint8 [bytes], mapped.
    """

    shape: tuple[int, ...]
    kind: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class File:
    """A GGUF file.

    Attributes:
        path: where it lies.
        metadata: its values by name; arrays of numbers are numpy's, arrays of texts are lists.
        tensors: by ggml's names.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Held]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        """A value of the architecture: `name` without its prefix."""
        return self.metadata.get(f"{self.architecture}.{name}", default)


def read(path: Path, sizes: dict[int, tuple[int, int]]) -> File:
    """Read a file's metadata, and map its tensors.

    Args:
        sizes: of each type (numbers, bytes) of a block.

    Raises:
        ModelError: it is no GGUF file, it is damaged or truncated, or it is one part of several.
        UnsupportedModel: its version, its byte order, or a type of tensors is not known.
    """
    jsonfile.check_fetched(path)
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise jsonfile.damaged(path, str(error), ADVICE) from error
    try:
        return _Reader(path, mapped, sizes).file()
    except _Short as error:
        raise jsonfile.damaged(path, str(error), ADVICE) from error


class _Short(Exception):
    """The file says something that it cannot hold."""


class _Reader:
    """A position in a mapped file."""

    def __init__(self, path: Path, mapped: mmap.mmap, sizes: dict[int, tuple[int, int]]) -> None:
        self.path = path
        self.mapped = mapped
        self.sizes = sizes
        self.at = len(MAGIC)

    def file(self) -> File:
        version = self.scalar("I")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
                raise UnsupportedModel(f"{self.path} is a big-endian GGUF file")
            raise UnsupportedModel(f"{self.path} is GGUF of version {version}, not of {VERSIONS}")
        count, fields = self.count(MOST_TENSORS, "tensors"), self.count(MOST_FIELDS, "values")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            name = self.text()
            if name in metadata:
                raise _Short(f"it has {name!r} twice")
            metadata[name] = self.value(self.scalar("I"))
        if (parts := metadata.get("split.count", 1)) not in (0, 1):
            raise ModelError(
                f"{self.path} is one of {parts} parts of a model: put them together "
                "(llama-gguf-split --merge) and name the whole"
            )
        described = [self.description() for _ in range(count)]
        return File(self.path, metadata, self.tensors(described, metadata))

    def take(self, size: int) -> bytes:
        """The next bytes."""
        if not 0 <= size <= len(self.mapped) - self.at:
            raise _Short(f"it ends at byte {len(self.mapped):,} and {size:,} more are told of")
        self.at += size
        return self.mapped[self.at - size : self.at]

    def scalar(self, kind: str) -> Any:
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))
        return value

    def count(self, most: int, what: str) -> int:
        number = self.scalar("Q")
        if number > most:
            raise _Short(f"it tells of {number:,} {what}")
        return int(number)

    def text(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode()
        except UnicodeDecodeError as error:
            raise _Short(f"a text before byte {self.at:,} is not UTF-8") from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == TEXT:
            return self.text()
        if kind != ARRAY or depth >= DEEPEST:
            raise _Short(f"a value before byte {self.at:,} is of the unknown type {kind}")
        inner, length = self.scalar("I"), self.scalar("Q")
        if inner in SCALARS:
            width = struct.calcsize(SCALARS[inner])
            return np.frombuffer(self.take(width * length), f"<{SCALARS[inner]}").copy()
        if length > len(self.mapped) - self.at:  # each takes some bytes
            raise _Short(f"an array of {length:,} values begins at byte {self.at:,}")
        return [self.value(inner, depth + 1) for _ in range(length)]

    def description(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, type and offset."""
        name, dimensions = self.text(), self.scalar("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Short(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))
        return name, shape[::-1], self.scalar("I"), self.scalar("Q")

    def tensors(
        self, described: list[tuple[str, tuple[int, ...], int, int]], metadata: dict[str, Any]
    ) -> dict[str, Held]:
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise _Short(f"its alignment is {alignment!r}")
        begin = -(-self.at // alignment) * alignment
        whole = np.frombuffer(self.mapped, np.uint8)
        tensors: dict[str, Held] = {}
        for name, shape, kind, offset in described:
            if kind not in self.sizes:
                raise UnsupportedModel(f"{self.path} has {name} in ggml's type {kind}")
            block, width = self.sizes[kind]
            numbers = math.prod(shape)
            if not numbers or numbers > 2**50 or shape[-1] % block:
                raise _Short(f"{name!r} has the shape {shape} in blocks of {block}")
            first, size = begin + offset, numbers // block * width
            if first + size > len(whole):
                raise _Short(f"{name!r} would end at byte {first + size:,} of {len(whole):,}")
            if name in tensors:
                raise _Short(f"it has {name!r} twice")
            tensors[name] = Held(shape, kind, whole[first : first + size])
        return tensors
