"""Weights that stay in their own type and file, and become float32 whenever they are used.

To the model they are float32. An operator that reads one gets it cast, and the cast goes with the
operator: so a model is run, exactly as in float32, in the memory of its largest matrix.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as trees
from transformers import PreTrainedModel

from fastgen.export.rewrite.edit import tensor_of

LARGE = 1 << 16  # numbers of a weight for which it pays; smaller ones are cast once
PART = 1 << 20  # numbers of a weight that are cast at a time for a product
HALVES = (torch.bfloat16, torch.float16)


class Stored(torch.Tensor):
    """A float32 tensor that is held in fewer bits.

    Attributes:
        held: what it is cast from.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Stored:
        stored = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=torch.float32, device=held.device
        )
        stored.held = held
        return stored

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in VIEWS:
            return cls(func(args[0].held))
        if func._schema.is_mutable and args and isinstance(args[0], cls):
            raise RuntimeError(f"{func} would change a weight that is only read")
        if func is torch.ops.aten.embedding.default and isinstance(args[0], cls):
            return func(args[0].held, *args[1:], **(kwargs or {})).float()
        if func in PRODUCTS and isinstance(args[-1], cls) and not kwargs:
            return _product(func, args)
        args, kwargs = trees.tree_map_only(cls, cast, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Stored({self.held.dtype}, {tuple(self.held.shape)})"


# What only looks at a weight otherwise, and products with one on the right.
VIEWS = (torch.ops.aten.detach.default, torch.ops.aten.t.default)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _product(func: Any, args: Any) -> torch.Tensor:
    """A product with a weight, some outputs at a time: what is cast fits into a cache."""
    *bias, x, weight = args
    size, out = weight.shape
    step = max(1, PART // size)
    parts = []
    for at in range(0, out, step):
        part = weight.held[:, at : at + step].float()
        some = [
            one[..., at : at + step] if one.ndim and one.shape[-1] == out else one for one in bias
        ]
        parts.append(func(*some, x, part))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def cast(weight: Stored) -> torch.Tensor:
    return weight.held.float().contiguous()


def keep(model: PreTrainedModel) -> bool:
    """Let a model that was loaded in its own types compute in float32, in place.

    Returns:
        False, with nothing done, where a buffer has fewer bits: what it was before is lost.
    """
    if any(buffer.dtype in HALVES for buffer in model.buffers()):
        return False
    parameters: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or weight.dtype not in HALVES:
                continue
            if id(weight) not in parameters:
                stays = weight.numel() > LARGE and weight.is_contiguous()
                data = Stored(weight.data) if stays else weight.data.float()
                parameters[id(weight)] = torch.nn.Parameter(data, requires_grad=False)
            module._parameters[name] = parameters[id(weight)]
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.dtype = torch.float32
    return True


@dataclass(frozen=True)
class StandIn:
    """A float32 array by whose address a weight is known again in what a trace makes of it.

    Attributes:
        array: a vector as long as the weight; a large one is never touched and takes no memory.
        weight: what it stands for, contiguous.
    """

    array: NDArray[np.float32]
    weight: torch.Tensor

    def behind(self, view: NDArray[np.float32]) -> torch.Tensor | None:
        """The part of the weight that a view of the array is of; None if it is of something else.

        torch's exporter transposes weights, and splits them.
        """
        offset = (view.ctypes.data - self.array.ctypes.data) // self.array.itemsize
        if not 0 <= offset < len(self.array):
            return None
        strides = [stride // self.array.itemsize for stride in view.strides]
        held = self.weight.held if isinstance(self.weight, Stored) else self.weight.detach()
        return held.as_strided(view.shape, strides, held.storage_offset() + offset)


@contextmanager
def standing_in(
    model: PreTrainedModel, known_again: Sequence[torch.nn.Module] = ()
) -> Iterator[list[StandIn]]:
    """Let arrays stand in for weights that are `Stored`, so that tracing reads no large one.

    Args:
        known_again: modules for all of whose weights others stand in. Small ones are random
            numbers: torch's exporter makes one of those that are equal.
    """
    known = {part for module in known_again for part in module.modules()}
    random = np.random.default_rng(0)
    stand_ins: list[StandIn] = []
    parameters: dict[int, torch.nn.Parameter] = {}
    places = []
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or not (isinstance(weight, Stored) or module in known):
                continue
            if id(weight) not in parameters:
                size = weight.numel()
                array = np.zeros(size, np.float32) if size > LARGE else random.random(size, "f4")
                empty = torch.from_numpy(array).view(weight.shape)
                parameters[id(weight)] = torch.nn.Parameter(empty, requires_grad=False)
                stand_ins.append(StandIn(array, weight))
            places.append((module, name, weight))
            module._parameters[name] = parameters[id(weight)]
    try:
        yield stand_ins
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


def settle(graph: ir.Graph, stand_ins: Sequence[StandIn]) -> None:
    """Let a graph that was traced with stand-ins read what they stood for."""
    for value in graph.initializers.values() if stand_ins else ():
        tensor = tensor_of(value)
        if isinstance(tensor, ir.LazyTensor) or tensor.dtype != ir.DataType.FLOAT:
            continue
        view = tensor.numpy()
        held = next(
            (part for stand_in in stand_ins if (part := stand_in.behind(view)) is not None), None
        )
        if held is not None:
            value.const_value = read_lazily(held, str(tensor.name))


def read_lazily(held: torch.Tensor, name: str) -> ir.LazyTensor:
    """A constant of the graph that is cast whenever it is read."""
    read = partial(_array, held)
    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(held.shape), name=name)


def _array(held: torch.Tensor) -> ir.TensorProtocol:
    return ir.tensor(held.float().contiguous().numpy())  # torch transposes faster than numpy


def spill(model: PreTrainedModel, directory: Path) -> int:
    """Move the large weights of a float32 model to a file that is mapped, in place.

    The file has no name that stays: it goes with the model.

    Args:
        directory: on a disk with room for them.

    Returns:
        Its bytes.
    """
    large = {id(p): p for p in model.parameters() if p.numel() > LARGE}.values()
    size = sum(weight.numel() for weight in large)
    if not size:
        return 0
    with tempfile.TemporaryFile(dir=directory) as file:
        held = np.memmap(file, np.float32, "w+", shape=(size,))
    at = 0
    for weight in large:
        mine = torch.from_numpy(held[at : at + weight.numel()]).view(weight.shape)
        weight.data = mine.copy_(weight.data)
        at += weight.numel()
    return held.nbytes
