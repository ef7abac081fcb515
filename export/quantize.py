"""Weights in 8 or 4 bits: what replaces each product, and the embedding, in the graph.

Two kernels of onnxruntime do the work:

- `W8A8`: codes int8 per output channel; each token's activation is quantised to 8 bits by its own
  largest value; the product is an exact integer sum. A row's result cannot depend on its
  neighbours, and many tokens at once are fast.
- `NBits` (MatMulNBits): codes of 8 or 4 bits with a scale for each block of inputs; activations
  are quantised by block inside the kernel. The most exact, and the fastest for a few tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from fastgen.export import parts
from fastgen.export.trim import (
    MICROSOFT,
    add_initializer,
    add_lazily,
    clean_up,
    constant,
    insert,
    rank,
    routers,
    take_place,
)
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LEVELS = {8: 127, 4: 7}  # codes reach from -LEVELS to LEVELS
STEPS = 16  # of a scale in two levels: a code of 4 bits times a step still fits into 8


@dataclass(frozen=True)
class Kernel:
    """How a matrix is stored and multiplied.

    Attributes:
        bits: of a code.
        block: inputs that share a scale; 0 for all inputs of an output channel (W8A8).
    """

    bits: int
    block: int = 0

    def __str__(self) -> str:
        return f"int{self.bits}" + (f", blocks of {self.block}" if self.block else " per channel")


W8A8 = Kernel(8)


@dataclass(frozen=True)
class Choice:
    """What becomes of a product.

    Attributes:
        kernel: how it is stored.
        scales: float32 [out, blocks], for kernels with blocks; None for the blocks' largest.
        codes: as `block_codes` gives them, where they are not the nearest ones.
        rows: float32 [in]: each input is divided by it elsewhere, so its weights are multiplied.
        columns: float32 [out]: each output is to be divided by it.
    """

    kernel: Kernel
    scales: Floats | None = None
    codes: NDArray[np.uint8] | None = None
    rows: Floats | None = None
    columns: Floats | None = None


@dataclass(frozen=True)
class Product:
    """A product of an activation with a constant matrix.

    Attributes:
        weight: float32 [in, out].
        transposed: whether the graph holds it as [out, in] (a `lm_head`, often an embedding too).
    """

    node: ir.Node
    name: str
    weight: Floats
    transposed: bool

    @property
    def is_head(self) -> bool:
        """Whether it gives the logits: it runs at the asked positions only."""
        shape = self.node.inputs[0].shape
        return shape is not None and "keep" in [getattr(dim, "value", dim) for dim in shape]


def products(graph: ir.Graph) -> list[Product]:
    """Every product with a constant matrix, in the order of the graph.

    Routers stay as they are, and small matrices that are for each head of a token. Each has a name
    of its own, also where layers share a matrix.
    """
    found = []
    apart = routers(graph)
    seen: Counter[str] = Counter()
    for node in graph:
        if node.op_type not in ("MatMul", "FusedMatMul") or rank(node.inputs[1]) != 2:
            continue
        if node in apart or (rank(node.inputs[0]) or 0) > 3:
            continue
        weight = constant(node.inputs[1])
        if weight is None or weight.dtype != np.float32:
            continue
        transposed = node.op_type == "FusedMatMul"
        matrix = weight.T if transposed else weight
        name = str(node.inputs[1].name)
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}.{seen[name]}"
        found.append(Product(node, unique, matrix, transposed))
    return found


def quantize(
    model: ir.Model,
    choose: Callable[[Product], Choice | None],
) -> None:
    """Replace products (and embeddings that share their matrix) by quantised ones, in place.

    Args:
        model: the trimmed graph.
        choose: what becomes of each product; None leaves it in float32.
    """
    graph = model.graph
    activations = Activations(graph)
    for product in products(graph):
        choice = choose(product)
        if choice is None:
            continue
        if choice.kernel.block == 0:
            _replace_w8a8(graph, product, choice, activations)
        else:
            _replace_nbits(graph, product, choice)
    clean_up(model)


# Codes. Matrices are large: what is made of them is made of a few outputs at a time.


@dataclass(frozen=True)
class Scaled:
    """A matrix [in, out] with its rows multiplied and its columns divided, read by columns.

    Attributes:
        weight: float32 [in, out].
        rows, columns: see `Choice`.
    """

    weight: Floats
    rows: Floats | None = None
    columns: Floats | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def __getitem__(self, place: slice) -> Floats:
        part = self.weight[:, place]
        if self.rows is not None:
            part = part * self.rows[:, None]
        return part if self.columns is None else part / self.columns[place]

    def whole(self) -> Floats:
        """The matrix [in, out], laid out as `weight` is."""
        return self[:]


Matrix = Floats | Scaled


def _by_columns(weight: Matrix) -> Scaled:
    return weight if isinstance(weight, Scaled) else Scaled(weight)


def channel_scales(weight: Matrix) -> Floats:
    """[out]: the largest weight of each output takes the largest code."""
    matrix = _by_columns(weight)
    size, out = matrix.shape
    scales = np.empty(out, np.float32)

    def part(some: slice) -> None:
        scales[some] = np.abs(matrix[some]).max(axis=0) / np.float32(127)

    parts.each(out, size, part)
    scales[scales == 0] = 1
    return scales


def channel_codes(weight: Matrix, scales: Floats | None = None) -> tuple[NDArray[np.int8], Floats]:
    """int8 [in, out] and scales [out] of a matrix [in, out]: symmetric, per output channel."""
    matrix = _by_columns(weight)
    size, out = matrix.shape
    scales = channel_scales(matrix) if scales is None else scales
    codes = np.empty((size, out), np.int8)

    def part(some: slice) -> None:
        values = matrix[some] / scales[some]
        codes[:, some] = np.rint(values, out=values)

    parts.each(out, size, part)
    return codes, scales


def multiplied(codes: NDArray[np.int8], scales: Floats) -> Floats:
    """The matrix [in, out] that codes per channel stand for."""
    values = np.empty(codes.shape, np.float32)

    def part(some: slice) -> None:
        np.multiply(codes[:, some], scales[some], out=values[:, some])

    parts.each(codes.shape[1], len(codes), part)
    return values


def block_scales(weight: Matrix, kernel: Kernel) -> Floats:
    """[out, blocks]: the largest weight of each block takes the largest code."""
    matrix = _by_columns(weight)
    size, out = matrix.shape
    scales = np.empty((out, -(-size // kernel.block)), np.float32)

    def part(some: slice) -> None:
        largest = np.abs(blocks(matrix[some], kernel.block)).max(axis=-1)
        scales[some] = largest / np.float32(LEVELS[kernel.bits])

    parts.each(out, size, part)
    scales[scales == 0] = 1
    return scales


def in_two_levels(scales: Floats) -> Floats:
    """Scales [out, blocks] as whole numbers, 1 to STEPS, times one number for each output.

    So a matrix of 4 bits is exactly one of 8 bits per output channel, for kernels that want that
    (QServe, Lin et al. 2024, arXiv 2405.04532). The largest of each output is STEPS times its
    number, which can be told from it; the number has 16 significant bits, so that none of its
    products with codes and steps is rounded.
    """
    unit = scales.max(axis=1, keepdims=True) / np.float32(STEPS)
    unit = (unit.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
    steps = np.clip(np.rint(scales / unit), 1, STEPS)
    return np.asarray(steps * unit, np.float32)


def block_codes(weight: Matrix, kernel: Kernel, scales: Floats) -> NDArray[np.uint8]:
    """uint8 [out, blocks, block] (8 bits) or [out, blocks, block / 2] (4 bits, low half first)."""
    matrix = _by_columns(weight)
    size, out = matrix.shape
    low, high = (-128, 127) if kernel.bits == 8 else (-8, 7)
    made = np.empty((*scales.shape, kernel.block * kernel.bits // 8), np.uint8)

    def part(some: slice) -> None:
        values = blocks(matrix[some], kernel.block)
        values /= scales[some, :, None]
        np.clip(np.rint(values, out=values), low, high, out=values)
        values -= low
        codes = values.astype(np.uint8)
        made[some] = codes if kernel.bits == 8 else codes[..., 0::2] | (codes[..., 1::2] << 4)

    parts.each(out, size, part)
    return made


def codes_values(codes: NDArray[np.uint8], kernel: Kernel, scales: Floats, size: int) -> Floats:
    """The matrix [size, out] that block codes stand for."""
    middle = np.float32(128 if kernel.bits == 8 else 8)
    values = np.empty((*scales.shape, kernel.block), np.float32)

    def part(some: slice) -> None:
        mine = codes[some]
        if kernel.bits == 4:
            mine = np.stack([mine & 15, mine >> 4], axis=-1).reshape(*mine.shape[:2], -1)
        np.subtract(mine, middle, out=values[some], dtype=np.float32)
        values[some] *= scales[some, :, None]

    parts.each(len(codes), size, part)
    return join_blocks(values, size)


def blocks(weight: Floats, block: int) -> Floats:
    """[in, out] as [out, blocks, block], the last block filled with zeros."""
    size, out = weight.shape
    padded = np.zeros((out, -(-size // block) * block), np.float32)
    padded[:, :size] = weight.T
    return padded.reshape(out, -1, block)


def join_blocks(parts: Floats, size: int) -> Floats:
    """[out, blocks, block] as [in, out] again."""
    return parts.reshape(len(parts), -1)[:, :size].T


# Nodes


class Activations:
    """Quantised activations, each made once however many products read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._constants: dict[str, ir.Value] = {}
        self._zeros: dict[str, ir.Value] = {}

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = add_initializer(self._graph, name, array)
        return self._constants[name]

    def quantized(self, x: ir.Value, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """uint8 [rows, new, in] and scales [rows, new, 1]: by each token's largest value.

        A token of zeros has the scale zero, and its products are zero: that is right.
        """
        if x not in self._made:
            last = self.constant("last_axis", np.array([-1], np.int64))
            (size,) = insert(before, "Abs", [x])
            (size,) = insert(before, "ReduceMax", [size, last], {"keepdims": 1})
            (scale,) = insert(
                before, "Mul", [size, self.constant("1/127", np.array(1 / 127, np.float32))]
            )
            zero = self._zero_points(x, scale, before)
            width = x.shape[-1] if x.shape is not None else None
            assert isinstance(width, int)
            (codes,) = insert(
                before, "QuantizeLinear", [x, scale, zero], {"axis": -1, "block_size": width}
            )
            self._made[x] = codes, scale
        return self._made[x]

    def _zero_points(self, x: ir.Value, scale: ir.Value, before: ir.Node) -> ir.Value:
        """uint8 128 in the shape of `scale`: one for all activations of a shape."""
        assert x.shape is not None
        key = str(list(x.shape)[:-1])
        if key not in self._zeros:
            (shape,) = insert(before, "Shape", [scale])
            node = ir.node("ConstantOfShape", [shape], {"value": ir.tensor(np.array([128], "u1"))})
            self._graph.insert_before(before, node)
            self._zeros[key] = node.outputs[0]
        return self._zeros[key]


def _replace_w8a8(
    graph: ir.Graph, product: Product, choice: Choice, activations: Activations
) -> None:
    node = product.node
    weight = Scaled(product.weight, choice.rows, choice.columns)
    scales = channel_scales(weight)
    codes = add_lazily(
        graph,
        f"{product.name}.codes",
        lambda: channel_codes(weight, scales)[0],
        weight.shape,
        ir.DataType.INT8,
    )
    held = add_initializer(graph, f"{product.name}.scales", scales)
    take_place(node, integer_product(node, codes, held, activations))


def integer_product(
    node: ir.Node, codes: ir.Value, scales: ir.Value, activations: Activations
) -> ir.Value:
    """The product of what `node` reads with int8 codes [in, out] and float32 scales [out]."""
    x, scale = activations.quantized(node.inputs[0], node)
    (sums,) = insert(
        node,
        "MatMulIntegerToFloat",
        [
            x,
            codes,
            activations.constant("1", np.array(1, np.float32)),
            scales,
            activations.constant("128", np.array(128, np.uint8)),
        ],
        domain=MICROSOFT,
    )
    (out,) = insert(node, "Mul", [sums, scale])
    return out


def _replace_nbits(graph: ir.Graph, product: Product, choice: Choice) -> None:
    node, kernel = product.node, choice.kernel
    weight = Scaled(product.weight, choice.rows, choice.columns)
    size, out = weight.shape
    if choice.scales is None:
        scales = block_scales(weight, kernel)
    elif choice.columns is None:
        scales = choice.scales
    else:  # codes do not depend on what the columns are divided by
        scales = choice.scales / choice.columns[:, None]
        if kernel.bits == 4:  # the division may have rounded
            scales = in_two_levels(scales)
    name = f"{product.name}.codes"
    if choice.codes is None:
        make = partial(block_codes, weight, kernel, scales)
        shape = [*scales.shape, kernel.block * kernel.bits // 8]
        codes = add_lazily(graph, name, make, shape, ir.DataType.UINT8)
    else:
        codes = add_initializer(graph, name, choice.codes)
    scale = add_initializer(graph, f"{product.name}.scales", scales)
    attributes = {"K": size, "N": out, "bits": kernel.bits, "block_size": kernel.block}
    (result,) = insert(
        node, "MatMulNBits", [node.inputs[0], codes, scale],
        attributes | {"accuracy_level": 4}, domain=MICROSOFT,
    )  # fmt: skip
    weight = node.inputs[1]
    take_place(node, result)
    if product.transposed:
        for use in list(weight.uses()):
            if use.node.op_type == "Gather":
                _gather_codes(graph, use.node, codes, scale, kernel, size)


def _gather_codes(
    graph: ir.Graph, gather: ir.Node, codes: ir.Value, scales: ir.Value, kernel: Kernel, size: int
) -> None:
    """The embedding from the codes of the product that shares its matrix."""
    ids = gather.inputs[1]
    (mine,) = insert(gather, "Gather", [codes, ids], {"axis": 0})  # [rows, new, blocks, block]
    (scale,) = insert(gather, "Gather", [scales, ids], {"axis": 0})  # [rows, new, blocks]
    if kernel.bits == 4:
        mine = _unpacked(graph, gather, mine)
    (mine,) = insert(gather, "Cast", [mine], {"to": int(ir.DataType.FLOAT)})
    middle = np.array(128 if kernel.bits == 8 else 8, np.float32)
    (mine,) = insert(gather, "Sub", [mine, add_initializer(graph, "middle_code", middle)])
    (scale,) = insert(gather, "Unsqueeze", [scale, _integers(graph, "last_axis", [-1])])
    (mine,) = insert(gather, "Mul", [mine, scale])
    (mine,) = insert(gather, "Reshape", [mine, _integers(graph, "flat", [0, 0, -1])])
    if size % kernel.block:
        ends = [_integers(graph, name, [v]) for name, v in (("0", 0), ("size", size), ("2", 2))]
        (mine,) = insert(gather, "Slice", [mine, *ends])
    take_place(gather, mine)


def _unpacked(graph: ir.Graph, before: ir.Node, codes: ir.Value) -> ir.Value:
    """Two codes of each byte, low half first: [..., block / 2] to [..., block]."""
    halves = []
    (low,) = insert(before, "BitwiseAnd", [codes, add_initializer(graph, "15", np.uint8(15)[...])])
    shift = add_initializer(graph, "4", np.array(4, np.uint8))
    (high,) = insert(before, "BitShift", [codes, shift], {"direction": "RIGHT"})
    for half in (low, high):
        halves += insert(before, "Unsqueeze", [half, _integers(graph, "last_axis", [-1])])
    (pairs,) = insert(before, "Concat", halves, {"axis": -1})
    shape = _integers(graph, "pairs", [0, 0, 0, -1])
    (out,) = insert(before, "Reshape", [pairs, shape])
    return out


def _integers(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    return add_initializer(graph, name, np.array(values, np.int64))
