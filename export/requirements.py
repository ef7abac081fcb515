"""The memory and disk that an export needs, told before it begins; and which way it goes.

Weights stay in files. Those of a checkpoint in float32 are mapped as they are. Others become
float32 in a file of their own, which is mapped too; where the machine has not room to keep that
at hand, they stay in their own type and file, and each becomes float32 whenever it is used
(`stored`). What is written is written a matrix at a time.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import ModelError
from fastgen.export import bundle
from fastgen.export.prove import quality
from fastgen.export.quantize import calibrate
from fastgen.export.quantize.recipe import RECIPES
from fastgen.export.source import checkpoint
from fastgen.system.cpu import memory_bytes

FLOAT = 4  # bytes
LIBRARIES = 600 << 20  # of memory: torch, transformers, and what they hold of a graph
COPIES = 10  # of a layer's largest matrix, while it is quantised; two may be packed into one
MOMENTS = 4  # matrices [in, in] in float64, of its inputs
FOLLOWED = 4  # arrays [calibration tokens, in], of what matrices that follow each other read
LOGITS = 6  # arrays [row, vocabulary], while texts are compared
ORIGINAL = "the original in float32"
AT_HAND = 0.4  # of the machine's memory: float32 weights up to here are kept in a file of their own

# Bytes of a weight in what is written, and in the memory of what runs it.
WRITTEN = {"fp32": 4.0, "int8": 1.1, "int4": 0.9}


@dataclass(frozen=True)
class Size:
    """The size of a checkpoint, as it says.

    Attributes:
        weights: how many it has.
        largest: numbers of its largest matrix, but for those of the vocabulary.
        widest: inputs of a matrix, at most.
        widths: inputs of all matrices together.
        vocabulary: the largest first dimension.
        is_float32: whether all can be used as they are.
    """

    weights: int
    largest: int
    widest: int
    widths: int
    vocabulary: int
    is_float32: bool


@dataclass(frozen=True)
class Needs:
    """Bytes, at most, part by part.

    Attributes:
        own_types: whether weights stay in their own type until they are used.
        memory: that the system could not have back.
        disk: beside the model, for a while and in the end.
    """

    own_types: bool
    memory: dict[str, int]
    disk: dict[str, int]

    def check(self, out: Path) -> None:
        """Raise a ModelError for what cannot fit into this machine, or beside `out`."""
        there = memory_bytes()
        if there is not None and sum(self.memory.values()) > there:
            raise ModelError(
                f"exporting it needs up to {_told(self.memory)} of memory, "
                f"the machine has {there / 1e9:,.1f} GB: choose a coarser precision, or a larger "
                "machine"
            )
        parent = bundle.parent(out)
        free = shutil.disk_usage(parent).free
        if sum(self.disk.values()) > free:
            raise ModelError(
                f"exporting it needs up to {_told(self.disk)} of disk, "
                f"{parent} has {free / 1e9:,.1f} GB free: choose another place for OUT"
            )

    def summary(self) -> str:
        memory, disk = sum(self.memory.values()), sum(self.disk.values())
        way = "weights stay in their own type; " if self.own_types else ""
        return f"{way}needs up to {memory / 1e9:,.1f} GB of memory, {disk / 1e9:,.1f} GB of disk"


def _told(parts: dict[str, int]) -> str:
    each = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items() if size > 5e7)
    total = sum(parts.values())
    return f"{total:,} bytes ({total / 1e9:,.1f} GB: {each})"


# Tokens of activations that are kept, and those whose moments are made at once.
SEEN = calibrate.SAMPLE + calibrate.TOGETHER + calibrate.ROW
JUDGED = 2 * quality.TOKENS  # tokens whose logits are kept, to choose kernels by and to judge


def needs(
    size: Size, precision: str, steps: int, may_stay: bool = True, machine: int | None = None
) -> Needs:
    """Estimate what exporting a checkpoint takes.

    Args:
        precision: "fp32", "int8" or "int4".
        steps: how often it is quantised: weights, keys and values, both or none.
        may_stay: whether its weights can stay in their own type.
        machine: bytes of memory that there are; None for those of this machine.
    """
    floats = FLOAT * size.weights
    written = int(WRITTEN[precision] * size.weights)
    there = memory_bytes() if machine is None else machine
    own = may_stay and not size.is_float32 and there is not None and floats > AT_HAND * there
    cast = 0 if size.is_float32 or own else floats
    quantised = precision != "fp32"
    moments = MOMENTS * 8 * size.widest**2 if quantised else 0
    working = FLOAT * (COPIES * size.largest + LOGITS * calibrate.ROW * size.vocabulary) + moments
    tokens = RECIPES[precision].tokens if precision == "int4" else 0
    memory = {
        "libraries": LIBRARIES,
        "weights": max(cast, written),
        "work": working,
        "text": FLOAT * FOLLOWED * tokens * size.widest,
    }
    disk = {
        ORIGINAL: cast,
        "the graph in float32": floats if steps else 0,
        "with keys and values in int8": floats if steps == 2 else 0,
        "the graph turned": floats if quantised and steps else 0,
        "activations": FLOAT * SEEN * size.widths if quantised else 0,
        "moments": FLOAT * size.widest * size.widths // 2 if quantised else 0,
        "codes": written if quantised else 0,
        "a copy that writes text": int(WRITTEN["int8"] * size.weights) if steps else 0,
        "logits": FLOAT * JUDGED * size.vocabulary if steps else 0,
        "what is written": written,
    }
    return Needs(own, memory, disk)


def of_checkpoint(directory: Path) -> Size | None:
    """Read the safetensors files of a directory; None if there are none that can be read."""
    shapes: list[tuple[str, list[int]]] = []
    for path in sorted(directory.glob("*.safetensors")):
        header = checkpoint.header(path)
        if header is None:
            return None
        shapes += [(entry["dtype"], entry["shape"]) for entry in header.values()]
    return of_shapes(shapes) if shapes else None


def of_model(model: Any, is_mapped: bool) -> Size:
    """The size of a transformers model.

    Args:
        is_mapped: whether its weights need no file of their own: they are in one, or the caller's.
    """
    seen = {id(p): p for p in model.parameters()}.values()
    return of_shapes([("F32" if is_mapped else "BF16", list(p.shape)) for p in seen])


def of_shapes(shapes: Sequence[tuple[str, Sequence[int]]]) -> Size:
    """The size of tensors of these types, as safetensors calls them, and shapes."""
    matrices = [shape for _, shape in shapes if len(shape) > 1]
    vocabulary = max((shape[0] for shape in matrices), default=0)
    inner = [shape[-2:] for shape in matrices if shape[0] != vocabulary]
    return Size(
        weights=sum(math.prod(shape) for _, shape in shapes),
        largest=max(map(math.prod, inner), default=0),
        widest=max((max(shape) for shape in inner), default=0),
        widths=sum(shape[-1] for shape in matrices),
        vocabulary=vocabulary,
        is_float32=all(kind == "F32" for kind, _ in shapes if kind[0] in "BF"),
    )


@dataclass
class Budget:
    """The memory and disk of this machine, and what a transformers model may take of it.

    Attributes:
        out: where it is exported to.
        precision: that is made.
        parts: how many of it are quantised.
        needs: of the model, as they turn out.
        spilled: bytes of a file with its weights in float32.
    """

    out: Path
    precision: str
    parts: int
    needs: Needs | None = None
    spilled: int = 0

    @property
    def spills(self) -> bool:
        """True if its weights go to a file of their own."""
        return self.needs is not None and self.needs.disk[ORIGINAL] > 0

    def in_own_types(self, directory: Path) -> bool:
        """True if the weights of a checkpoint stay as they are; raises for what cannot fit."""
        size = of_checkpoint(directory)
        return size is not None and self.settle(size).own_types

    def settle(self, size: Size, may_stay: bool = True) -> Needs:
        """Find out what a model needs, and raise a ModelError for what cannot fit."""
        self.needs = needs(size, self.precision, self.parts, may_stay)
        self.needs.check(self.out)
        return self.needs
