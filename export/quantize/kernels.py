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
from numpy.typing import NDArray

from fastgen.export.quantize import parts, rotation
from fastgen.export.quantize.activations import Activations
from fastgen.export.rewrite.edit import (
    CHANGED,
    MICROSOFT,
    add_initializer,
    add_lazily,
    clean_up,
    input_of,
    insert,
    is_constant,
    rank,
    remake,
    routers,
    shape_of,
    take_place,
    tensor_of,
)

Floats = NDArray[np.float32]
Codes = NDArray[np.int8 | np.uint8]
LEVELS = {8: 127, 4: 7}  # codes reach from -LEVELS to LEVELS where there are no zero points


@dataclass(frozen=True)
class Kernel:
    """A form in which a matrix is stored and multiplied.

    Attributes:
        bits: of a code.
        block: inputs that share a scale; 0 for all inputs of an output channel (W8A8).
        turned: inputs that a Hadamard matrix mixes before they are multiplied (see `rotate`); 0
            for none.
        zero_points: whether each block says which code is zero, so that its codes reach from its
            smallest weight to its largest; without, zero is the middle one.
    """

    bits: int
    block: int = 0
    turned: int = 0
    zero_points: bool = False

    def __str__(self) -> str:
        shared = f", blocks of {self.block}" if self.block else " per channel"
        shared += " with zero points" if self.zero_points else ""
        return f"int{self.bits}{shared}{', turned' if self.turned else ''}"

    @property
    def weight_bits(self) -> float:
        """Bits of a weight, with its share of a scale and a zero point; see `short`."""
        shared = 16 + (self.bits if self.zero_points else 0)
        return self.bits + (shared / self.block if self.block else 0)

    @property
    def middle(self) -> int:
        """The code that is zero where there are no zero points."""
        return 1 << (self.bits - 1)


W8A8 = Kernel(8)


@dataclass(frozen=True)
class Choice:
    """The kernel of a product, with its scales and codes where they are not the usual ones.

    Attributes:
        kernel: how it is stored.
        scales: float32 [out, blocks], or [out] for a kernel per channel; None for the largest.
        codes: int8 [in, out] per channel, else as `block_codes` gives them, where they are not the
            nearest ones.
        zeros: uint8 [out, blocks], the zero points.
    """

    kernel: Kernel
    scales: Floats | None = None
    codes: Codes | None = None
    zeros: NDArray[np.uint8] | None = None

    def of_columns(self, some: slice) -> Choice:
        """The same choice for some of the outputs."""
        scales = None if self.scales is None else self.scales[some]
        codes = self.codes
        if codes is not None:
            codes = codes[some] if self.kernel.block else codes[:, some]
        zeros = None if self.zeros is None else self.zeros[some]
        return Choice(self.kernel, scales, codes, zeros)


@dataclass(frozen=True)
class Product:
    """A product of an activation with a constant matrix.

    Attributes:
        transposed: whether the graph holds it as [out, in] (a `lm_head`, often an embedding too).
    """

    node: ir.Node
    name: str
    transposed: bool

    @property
    def input(self) -> ir.Value:
        """The activation [.., in] that it reads."""
        return input_of(self.node, 0)

    @property
    def weight(self) -> Floats:
        """float32 [in, out]; it is read each time, and may be made then."""
        held: Floats = tensor_of(self.node.inputs[1]).numpy()
        return held.T if self.transposed else held

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        rows, columns = shape_of(self.node.inputs[1])
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def is_head(self) -> bool:
        """True if it gives the logits: it runs at the asked positions only."""
        shape = self.input.shape
        return shape is not None and "keep" in [getattr(dim, "value", dim) for dim in shape]


def products(graph: ir.Graph) -> list[Product]:
    """Every product with a constant matrix, in the order of the graph.

    Routers stay as they are, and small matrices that are for each head of a token. Each has a name
    of its own, also where layers share a matrix.
    """
    result = []
    apart = routers(graph)
    seen: Counter[str] = Counter()
    for node in graph:
        if node.op_type not in ("MatMul", "FusedMatMul") or rank(node.inputs[1]) != 2:
            continue
        if node in apart or (rank(node.inputs[0]) or 0) > 3:
            continue
        held = input_of(node, 1)
        if not is_constant(held) or tensor_of(held).dtype != ir.DataType.FLOAT:
            continue
        transposed = node.op_type == "FusedMatMul"
        name = str(held.name).replace(CHANGED, "")
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}.{seen[name]}"
        result.append(Product(node, unique, transposed))
    return result


def quantize(
    model: ir.Model,
    choose: Callable[[Product], Choice | None],
) -> None:
    """Replace products (and embeddings that share their matrix) by quantised ones, in place.

    Args:
        model: the trimmed graph.
        choose: the choice for each product; None leaves it in float32.
    """
    graph = model.graph
    activations = Activations(graph)
    for product in products(graph):
        choice = choose(product)
        if choice is None:
            continue
        if choice.kernel.turned:
            _turn(product, choice.kernel.turned, activations)
        if choice.kernel.block == 0:
            _replace_w8a8(graph, product, choice, activations)
        else:
            _replace_nbits(graph, product, choice)
    clean_up(model)


# Codes. Matrices are large: what is made of them is made of a few outputs at a time.


def channel_scales(weight: Floats) -> Floats:
    """[out]: the largest weight of each output takes the largest code."""
    size, out = weight.shape
    scales = np.empty(out, np.float32)

    def part(some: slice) -> None:
        scales[some] = np.abs(weight[:, some]).max(axis=0) / np.float32(127)

    parts.each(out, size, part)
    scales[scales == 0] = 1
    return scales


def channel_codes(weight: Floats, scales: Floats | None = None) -> tuple[NDArray[np.int8], Floats]:
    """int8 [in, out] and scales [out] of a matrix [in, out]: symmetric, per output channel."""
    size, out = weight.shape
    scales = channel_scales(weight) if scales is None else scales
    codes = np.empty((size, out), np.int8)

    def part(some: slice) -> None:
        values = weight[:, some] / scales[some]
        codes[:, some] = np.rint(values, out=values)

    parts.each(out, size, part)
    return codes, scales


def multiplied(codes: Codes, scales: Floats) -> Floats:
    """The matrix [in, out] that codes per channel stand for."""
    values = np.empty(codes.shape, np.float32)

    def part(some: slice) -> None:
        np.multiply(codes[:, some], scales[some], out=values[:, some])

    parts.each(codes.shape[1], len(codes), part)
    return values


def block_scales(weight: Floats, kernel: Kernel) -> Floats:
    """[out, blocks]: the largest weight of each block takes the largest code."""
    size, out = weight.shape
    scales = np.empty((out, -(-size // kernel.block)), np.float32)

    def part(some: slice) -> None:
        largest = np.abs(blocks(weight[:, some], kernel.block)).max(axis=-1)
        scales[some] = largest / np.float32(LEVELS[kernel.bits])

    parts.each(out, size, part)
    scales[scales == 0] = 1
    return scales


def block_grid(weight: Floats, kernel: Kernel) -> tuple[Floats, NDArray[np.uint8] | None]:
    """Scales and zero points [out, blocks] of the whole range of each block; see `gptq`."""
    if not kernel.zero_points:
        return block_scales(weight, kernel), None
    size, out = weight.shape
    scales = np.empty((out, -(-size // kernel.block)), np.float32)
    zeros = np.empty(scales.shape, np.uint8)

    def part(some: slice) -> None:
        held = Range.of(blocks(weight[:, some], kernel.block), kernel, axis=-1)
        scales[some], zeros[some] = held.scale, held.zero_point(held.scale)

    parts.each(out, size, part)
    return scales, zeros


@dataclass(frozen=True)
class Range:
    """The range of some weights, for codes with a zero point.

    Zero is in every range, so that it is one of the codes.

    Attributes:
        low, high: its ends.
        last: the largest code; the smallest is 0.
    """

    low: Floats
    high: Floats
    last: np.float32

    @classmethod
    def of(cls, weights: Floats, kernel: Kernel, axis: int) -> Range:
        """The range along an axis."""
        low, high = weights.min(axis=axis).clip(None, 0), weights.max(axis=axis).clip(0)
        return cls(low, high, np.float32(2 * kernel.middle - 1))

    @property
    def scale(self) -> Floats:
        """The scale with which the codes reach from end to end; 1 where all weights are 0."""
        whole = (self.high - self.low) / self.last
        whole[whole == 0] = 1
        return whole

    def zero_point(self, scale: Floats) -> Floats:
        """The zero point with which the middle code is the middle of the range."""
        middle = (self.last - (self.high + self.low) / scale) / 2
        return np.clip(np.rint(middle), 0, self.last)


def short(scales: Floats) -> Floats:
    """Scales that the upper halves of their floats say: they are stored in two bytes (bfloat16)."""
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    return ((bits + np.uint32(1 << 15)) & np.uint32(0xFFFF0000)).view(np.float32)


def codes_shape(scales: Floats, kernel: Kernel) -> tuple[int, ...]:
    """The shape of block codes with scales [out, blocks]."""
    return *scales.shape, kernel.block * kernel.bits // 8


def block_codes(
    weight: Floats,
    kernel: Kernel,
    scales: Floats,
    zeros: NDArray[np.uint8] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """uint8 [out, blocks, block] (8 bits) or [out, blocks, block / 2] (4 bits, low half first).

    Args:
        out: to be filled; None for a new array.
    """
    size, count = weight.shape
    packed_codes = np.empty(codes_shape(scales, kernel), np.uint8) if out is None else out

    def part(some: slice) -> None:
        values = blocks(weight[:, some], kernel.block)
        values /= scales[some, :, None]
        np.rint(values, out=values)
        values += kernel.middle if zeros is None else zeros[some, :, None]
        codes = np.clip(values, 0, 2 * kernel.middle - 1, out=values).astype(np.uint8)
        packed_codes[some] = codes if kernel.bits == 8 else packed(codes)

    parts.each(count, size, part)
    return packed_codes


def packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes of 4 bits in each byte, low half first: [..., n] to [..., n / 2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def codes_values(
    codes: Codes,
    kernel: Kernel,
    scales: Floats,
    size: int,
    zeros: NDArray[np.uint8] | None = None,
) -> Floats:
    """The matrix [size, out] that block codes stand for."""
    values = np.empty((*scales.shape, kernel.block), np.float32)

    def part(some: slice) -> None:
        mine = codes[some]
        if kernel.bits == 4:
            mine = np.stack([mine & 15, mine >> 4], axis=-1).reshape(*mine.shape[:2], -1)
        middle = np.float32(kernel.middle) if zeros is None else zeros[some, :, None]
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


def _replace_w8a8(
    graph: ir.Graph, product: Product, choice: Choice, activations: Activations
) -> None:
    node, name, tensor = product.node, f"{product.name}.codes", tensor_of(product.node.inputs[1])
    scales = channel_scales(product.weight) if choice.scales is None else choice.scales
    if choice.codes is None:
        make = partial(_channel_codes_of, tensor, product.transposed, scales)
        codes = add_lazily(graph, name, make, product.shape, ir.DataType.INT8)
    else:
        codes = add_initializer(graph, name, choice.codes)
    held = add_initializer(graph, f"{product.name}.scales", scales)
    take_place(node, integer_product(node, codes, held, activations))


def integer_product(
    node: ir.Node, codes: ir.Value, scales: ir.Value, activations: Activations
) -> ir.Value:
    """The product of what `node` reads with int8 codes [in, out] and float32 scales [out]."""
    x, scale = activations.quantized(input_of(node, 0), node)
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


def _turn(product: Product, size: int, activations: Activations) -> None:
    """Turn what a product reads, and its matrix, which leaves the product as it is."""
    node = product.node
    node.replace_input_with(0, activations.turned(input_of(node, 0), size, node))
    remake(node, 1, partial(turned_matrix, size, product.transposed))


def turned_matrix(size: int, transposed: bool, matrix: Floats) -> Floats:
    """A matrix [in, out], or [out, in] if it is transposed, for inputs that are turned."""
    if transposed:
        return rotation.turned(matrix, size)
    return rotation.by_columns(partial(rotation.turned_columns, size=size), matrix)


def _channel_codes_of(
    tensor: ir.TensorProtocol, transposed: bool, scales: Floats
) -> NDArray[np.int8]:
    weight = tensor.numpy()
    return channel_codes(weight.T if transposed else weight, scales)[0]


def _block_codes_of(
    tensor: ir.TensorProtocol, transposed: bool, kernel: Kernel, scales: Floats
) -> NDArray[np.uint8]:
    weight = tensor.numpy()
    return block_codes(weight.T if transposed else weight, kernel, scales)


def _replace_nbits(graph: ir.Graph, product: Product, choice: Choice) -> None:
    node, kernel = product.node, choice.kernel
    size, out = product.shape
    scales = block_scales(product.weight, kernel) if choice.scales is None else choice.scales
    name = f"{product.name}.codes"
    if choice.codes is None:
        make = partial(
            _block_codes_of, tensor_of(node.inputs[1]), product.transposed, kernel, scales
        )
        codes = add_lazily(graph, name, make, codes_shape(scales, kernel), ir.DataType.UINT8)
    else:
        codes = add_initializer(graph, name, choice.codes)
    scale = _scales(graph, product, scales)
    zeros = []
    if choice.zeros is not None:
        zeros.append(_zero_points(graph, product.name, choice.zeros, kernel.bits))
    attributes = {"K": size, "N": out, "bits": kernel.bits, "block_size": kernel.block}
    (result,) = insert(
        node,
        "MatMulNBits",
        [node.inputs[0], codes, scale, *zeros],
        attributes | {"accuracy_level": 4},
        domain=MICROSOFT,
    )
    weight = input_of(node, 1)
    take_place(node, result)
    if product.transposed:
        for use in list(weight.uses()):
            if use.node.op_type == "Gather":
                _gather_codes(graph, use.node, (codes, scale, *zeros), kernel, size)


def _scales(graph: ir.Graph, product: Product, scales: Floats) -> ir.Value:
    """Scales float32 [out, blocks]: those of two bytes become so on loading, as constants do."""
    name = f"{product.name}.scales"
    if product.transposed or not np.array_equal(short(scales), scales):
        return add_initializer(graph, name, scales)
    halves = (scales.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    held = add_initializer(graph, name, halves.view(ir.DataType.BFLOAT16.numpy()))
    (scale,) = insert(product.node, "Cast", [held], {"to": int(ir.DataType.FLOAT)})
    scale.shape, scale.dtype = held.shape, ir.DataType.FLOAT
    return scale


def _zero_points(graph: ir.Graph, name: str, zeros: NDArray[np.uint8], bits: int) -> ir.Value:
    """Zero points [out, blocks] as the kernel has them: those of 4 bits two of an output a byte."""
    if bits == 8:
        return add_initializer(graph, f"{name}.zeros", zeros)
    even = np.zeros((len(zeros), zeros.shape[1] + zeros.shape[1] % 2), np.uint8)
    even[:, : zeros.shape[1]] = zeros
    return add_initializer(graph, f"{name}.zeros", packed(even))


def _gather_codes(
    graph: ir.Graph, gather: ir.Node, held: Sequence[ir.Value], kernel: Kernel, size: int
) -> None:
    """The embedding from the codes, scales and zero points of the product that shares its matrix.

    Zero points are those of 8 bits, or none.
    """
    ids, last = gather.inputs[1], _integers(graph, "last_axis", [-1])
    # [rows, new, blocks, block] and twice [rows, new, blocks]
    mine, scale, *zeros = (insert(gather, "Gather", [one, ids], {"axis": 0})[0] for one in held)
    if kernel.bits == 4:
        assert not zeros, "an embedding of 4 bits has no zero points"
        mine = _unpacked(graph, gather, mine)
    (mine,) = insert(gather, "Cast", [mine], {"to": int(ir.DataType.FLOAT)})
    middle = add_initializer(graph, "middle_code", np.array(kernel.middle, np.float32))
    if zeros:
        (middle,) = insert(gather, "Cast", zeros, {"to": int(ir.DataType.FLOAT)})
        (middle,) = insert(gather, "Unsqueeze", [middle, last])
    (mine,) = insert(gather, "Sub", [mine, middle])
    (scale,) = insert(gather, "Unsqueeze", [scale, last])
    (mine,) = insert(gather, "Mul", [mine, scale])
    (mine,) = insert(gather, "Reshape", [mine, _integers(graph, "flat", [0, 0, -1])])
    if size % kernel.block:
        ends = [_integers(graph, name, [v]) for name, v in (("0", 0), ("size", size), ("2", 2))]
        (mine,) = insert(gather, "Slice", [mine, *ends])
    take_place(gather, mine)


def _unpacked(graph: ir.Graph, before: ir.Node, codes: ir.Value) -> ir.Value:
    """Two codes of each byte, low half first: [..., block / 2] to [..., block]."""
    halves: list[ir.Value] = []
    lowest = add_initializer(graph, "15", np.array(15, np.uint8))
    (low,) = insert(before, "BitwiseAnd", [codes, lowest])
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
