"""Mixtures of experts in 8 and 4 bits (`plan`, then `quantize`).

MoE becomes QMoE. With a scale for each output channel its activations stay in float32; with scales
for blocks of inputs they are quantised in such blocks, too, which is what makes it fast; where that
costs too much in 8 bits, inputs with outliers stay as they are. Scales of 4 bits are searched on
the tokens of the calibration text that came to each expert; there are too few of them for GPTQ. A
Loop keeps codes of 8 bits and makes floats of an expert's when it computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.quantize import calibrate
from fastgen.export.quantize.gptq import search_scales
from fastgen.export.quantize.kernels import Kernel, block_codes, block_scales, codes_values
from fastgen.export.rewrite.edit import (
    MICROSOFT,
    add_initializer,
    add_lazily,
    constant,
    insert,
    shape_of,
    take_place,
    tensor_of,
)
from fastgen.export.rewrite.mixture import LEAST, NEVER, Array, Mixture, mixtures

ROUNDED = 0.02  # of an output in 8 bits: with more, its inputs reach too far to be quantised
SAMPLE = 512  # tokens that an error is measured on
SMALLEST_BLOCK = 16  # of inputs that share a scale


@dataclass(frozen=True)
class Reached:
    """The experts of a layer that the calibration text came to, and those that it did not.

    Attributes:
        name: of the first matrix.
        experts: how many there are.
        unreached: those to which no token went; their scales are searched on all tokens.
    """

    name: str
    experts: int
    unreached: list[int]


@dataclass(frozen=True)
class Stored:
    """A matrix of each expert in codes.

    Attributes:
        kernel: bits, and inputs that share a scale.
        scales: float32 [experts, out, blocks].
        error: of its outputs on the calibration text, relative.
    """

    kernel: Kernel
    scales: Array
    error: float


def plan(
    model: ir.Model,
    kernel: Kernel,
    rows: Sequence[NDArray[np.int64]],
    shown: Callable[[int, int], None],
) -> tuple[dict[str, list[Stored]], list[Reached]]:
    """Plan the codes of each mixture's two matrices, by the tokens that come to each expert.

    Args:
        model: the graph in float32.
        kernel: wished for; blocks become smaller where they do not divide a matrix.
        rows: calibration ids.
        shown: called with the number of mixtures done and their total.
    """
    layers = mixtures(model.graph)
    plans: dict[str, list[Stored]] = {}
    reached: list[Reached] = []
    if not layers:
        return plans, reached
    wanted = [value for layer in layers for value in (layer.tokens, layer.logits)]
    with calibrate.values(model, wanted, rows) as seen:
        for layer in layers:
            shown(len(plans), len(layers))
            name, tokens = str(layer.weights[0].name), seen[layer.tokens]
            mine = seen[layer.logits] > NEVER / 2
            stored = _plan(layer, fitting(kernel, layer), tokens, mine)
            if kernel.bits == 8 and max(matrix.error for matrix in stored) > ROUNDED:
                stored = _plan(layer, Kernel(8), tokens, mine)
            plans[name] = stored
            unreached = np.flatnonzero(~mine.any(axis=0)).tolist()
            reached.append(Reached(name, mine.shape[1], unreached))
    return plans, reached


def fitting(kernel: Kernel, mixture: Mixture) -> Kernel:
    """`kernel`, or with blocks that divide both matrices' inputs; without, 8 bits by channel."""
    block, sizes = kernel.block, [shape_of(weight)[-1] for weight in mixture.weights]
    while mixture.node.op_type == "MoE" and block >= SMALLEST_BLOCK:
        if not any(size % block for size in sizes):
            return Kernel(kernel.bits, block)
        block //= 2
    return Kernel(8)


def _plan(mixture: Mixture, kernel: Kernel, tokens: Array, mine: NDArray[np.bool_]) -> list[Stored]:
    """Scales for both matrices of each expert, on its tokens; on all where none came to it."""
    weights = [tensor_of(weight).numpy() for weight in mixture.weights]
    biases = [constant(bias) for bias in mixture.biases]
    scales: tuple[list[Array], list[Array]] = [], []
    sums = np.zeros((2, 2))  # of each matrix: squared outputs, squared errors
    for expert in range(mine.shape[1]):
        came = mine[:, expert]
        x = tokens[came] if came.any() else tokens[:: max(1, len(tokens) // SAMPLE)]
        for i, bias in enumerate(biases):
            matrix = weights[i][expert].T
            scales[i].append(_scales(matrix, kernel, x))
            exact = x @ matrix
            if came.any():
                some = slice(None, None, max(1, len(x) // SAMPLE))
                off = exact[some] - _output(x[some], matrix, kernel, scales[i][-1])
                sums[i] += np.square(exact[some]).sum(), np.square(off).sum()
            if i == 0:
                exact = exact if bias is None else exact + bias[expert]
                x = mixture.between(exact)
    errors = np.sqrt(sums[:, 1] / np.maximum(sums[:, 0], LEAST))
    return [
        Stored(kernel, np.stack(scale), float(error))
        for scale, error in zip(scales, errors, strict=True)
    ]


def _scales(matrix: Array, kernel: Kernel, x: Array) -> Array:
    """[out, blocks] for a matrix [in, out] and its inputs [tokens, in]."""
    whole = _whole(kernel, len(matrix))
    if kernel.bits == 8:
        return block_scales(matrix, whole)
    return search_scales(matrix, whole, np.square(x).mean(axis=0))


def _output(x: Array, matrix: Array, kernel: Kernel, scales: Array) -> Array:
    """The kernel's product with x [tokens, in]: with blocks, it quantises x as well."""
    whole = _whole(kernel, len(matrix))
    codes = block_codes(matrix, whole, scales)
    x = calibrate.quantized_input(x, kernel) if kernel.block else x
    return x @ codes_values(codes, whole, scales, len(matrix))


def _whole(kernel: Kernel, size: int) -> Kernel:
    """The kernel with all inputs of a channel as one block, where it has no blocks."""
    return Kernel(kernel.bits, kernel.block or size)


def quantize(model: ir.Model, plans: dict[str, list[Stored]]) -> list[tuple[str, Stored]]:
    """Replace each mixture by its form in codes, in place.

    Codes are made of the matrices when they are written.

    Returns:
        The name of each matrix, and the form in which it is stored.
    """
    matrices = []
    for mixture in mixtures(model.graph):
        stored = plans[str(mixture.weights[0].name)]
        matrices += [
            (str(w.name), matrix) for w, matrix in zip(mixture.weights, stored, strict=True)
        ]
        replace = _in_kernel if mixture.node.op_type == "MoE" else _in_loop
        replace(model.graph, mixture, stored)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return matrices


def _in_kernel(graph: ir.Graph, mixture: Mixture, stored: Sequence[Stored]) -> None:
    kernel = stored[0].kernel
    codes = [
        _in_codes(graph, w, matrix, 128) for w, matrix in zip(mixture.weights, stored, strict=True)
    ]
    attributes = {name: attribute.value for name, attribute in mixture.node.attributes.items()}
    attributes |= {"expert_weight_bits": kernel.bits}
    if kernel.block:  # activations in 8 bits, as those of MatMulNBits
        attributes |= {"block_size": kernel.block, "accuracy_level": 4}
    first, second = mixture.biases
    inputs = [mixture.tokens, mixture.logits, *codes[0], first, *codes[1], second]
    (result,) = insert(mixture.node, "QMoE", inputs, attributes, domain=MICROSOFT)
    take_place(mixture.node, result)


def _in_loop(graph: ir.Graph, mixture: Mixture, stored: Sequence[Stored]) -> None:
    for weight, matrix in zip(mixture.weights, stored, strict=True):
        codes, scales = _in_codes(graph, weight, matrix, 0)
        (use,) = weight.uses()
        (mine,) = insert(use.node, "Gather", [codes, use.node.inputs[1]])
        (scale,) = insert(use.node, "Gather", [scales, use.node.inputs[1]])
        (floats,) = insert(use.node, "DequantizeLinear", [mine, scale], {"axis": 0})
        for index, value in enumerate((mine, scale, floats)):
            value.name = f"{codes.name}.{index}"
        use.node.outputs[0].dtype = ir.DataType.FLOAT
        take_place(use.node, floats)


def _in_codes(
    graph: ir.Graph, weight: ir.Value, stored: Stored, zero: int
) -> tuple[ir.Value, ir.Value]:
    """Codes, made when they are written, and scales [experts, out] or [experts, out, blocks]."""
    count, out, size = shape_of(weight)
    kernel, name = stored.kernel, str(weight.name)
    make = partial(_codes, tensor_of(weight), kernel, stored.scales, zero)
    shape = (count, out, size * kernel.bits // 8)
    dtype = ir.DataType.UINT8 if zero else ir.DataType.INT8
    codes = add_lazily(graph, f"{name}.codes", make, shape, dtype)
    scales = stored.scales if kernel.block else stored.scales[..., 0]
    return codes, add_initializer(graph, f"{name}.scales", scales)


def _codes(
    weight: ir.TensorProtocol, kernel: Kernel, scales: Array, zero: int
) -> NDArray[np.uint8 | np.int8]:
    """[experts, out, in * bits / 8]: bytes, or int8 where `zero` is the code of zero."""
    matrices = weight.numpy()
    whole = _whole(kernel, matrices.shape[-1])
    out = [
        block_codes(matrix.T, whole, scale) for matrix, scale in zip(matrices, scales, strict=True)
    ]
    codes = np.stack(out).reshape(*matrices.shape[:2], -1)
    return codes if zero else (codes ^ np.uint8(128)).view(np.int8)
