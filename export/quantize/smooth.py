"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outlier channels move into the weights.

An activation channel that is large for every token forces a coarse scale on all others. Dividing
it by s and multiplying its row of the matrix by s changes nothing but the ranges. The division is
folded into what makes the activation: the weights of a norm, or, for a gated feed-forward part,
the columns of the matrix whose output the gate multiplies. Elsewhere nothing is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from fastgen.export.quantize import parts
from fastgen.export.quantize.calibrate import output_error
from fastgen.export.quantize.kernels import Choice, Floats, Kernel, Product
from fastgen.export.rewrite.edit import add_initializer, constant, input_of, remake, tensor_of

STRENGTHS = (0.3, 0.5, 0.7)  # the paper's alpha; the best on the calibration text is taken
SAMPLE = 128  # tokens that an error is measured on
COLUMNS = 256  # outputs that they are measured on
GAIN = 0.9  # an error that does not fall below this share is not worth a change

# Where a norm keeps what multiplies its output: the inputs that are divided, by operator.
FOLDED = {"LayerNormalization": (1, 2), "RMSNormalization": (1,)}


@dataclass(frozen=True)
class FoldTarget:
    """A node that scales of an activation's channels can be folded into.

    Attributes:
        node: the norm, or the product whose columns are divided.
        column: the first of these columns; None for a norm.
    """

    node: ir.Node
    column: int | None = None


def fold_target(value: ir.Value, readers: Sequence[Product]) -> FoldTarget | None:
    """The node that scales of the channels of `value` can be folded into; None if there is none.

    Args:
        value: an activation.
        readers: the products that will be quantised and read it; nothing else may.
    """
    node = value.producer()
    if node is None or len(value.uses()) != len(readers):
        return None
    if any(reader.transposed or reader.is_head for reader in readers):
        return None
    if node.op_type in FOLDED and value is node.outputs[0]:
        return FoldTarget(node)
    return _gated(node) if node.op_type == "Mul" else None


def _gated(node: ir.Node) -> FoldTarget | None:
    """The columns behind the linear side of `act(gate) * up`: a product's, whole or a part of it.

    The gate's side goes through its activation, which cannot be scaled.
    """
    for side in (1, 0):
        value = node.inputs[side]
        column = 0
        producer = None if value is None else value.producer()
        if producer is not None and producer.op_type == "Split":
            sizes = None if len(producer.inputs) < 2 else constant(producer.inputs[1])
            if value is None or sizes is None or len(value.uses()) != 1:
                continue
            column = int(sizes[: producer.outputs.index(value)].sum())
            whole = input_of(producer, 0)
            producer = whole.producer() if len(whole.uses()) == 1 else None
        elif value is None or len(value.uses()) != 1:
            continue
        if (
            producer is not None
            and producer.op_type == "MatMul"
            and constant(producer.inputs[1]) is not None
        ):
            return FoldTarget(producer, column)
    return None


def best_scales(x: Floats, weights: Sequence[Floats], kernel: Kernel) -> Floats | None:
    """Scales of the channels of an activation, or None where they do not help.

    Args:
        x: float32 [tokens, in], from the calibration text.
        weights: float32 [in, out] of each product that reads it.
        kernel: how they will be quantised.

    Returns:
        float32 [in]: the activation is to be divided by it, the weights' rows multiplied.
    """
    weight = weights[0] if len(weights) == 1 else np.concatenate(weights, axis=1)
    reach_x, reach_w = np.abs(x).max(axis=0), _reach(weight)
    sample = x[:: max(1, len(x) // SAMPLE)]
    weight = np.ascontiguousarray(weight[:, :: max(1, weight.shape[1] // COLUMNS)])
    exact = sample @ weight
    least = GAIN * output_error(sample, weight, Choice(kernel), exact)
    best = None
    for strength in STRENGTHS:
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = reach_x**strength / reach_w ** (1 - strength)
        scales = np.where(np.isfinite(scales) & (scales > 0), scales, 1).astype(np.float32)
        scales /= np.exp(np.log(scales).mean())
        error = output_error(sample / scales, weight * scales[:, None], Choice(kernel), exact)
        if error < least:
            best, least = scales, error
    return best


def _reach(weight: Floats) -> Floats:
    """float32 [in]: the largest absolute value of each row of a matrix [in, out]."""
    largest = parts.each(weight.shape[1], len(weight), lambda some: _largest(weight[:, some]))
    return np.asarray(np.max(largest, axis=0))


def _largest(weight: Floats) -> Floats:
    return np.asarray(np.abs(weight).max(axis=1))


def fold(graph: ir.Graph, target: FoldTarget, scales: Floats, readers: Sequence[Product]) -> None:
    """Divide an activation by `scales` [in] where it is made; its readers make up for it."""
    if target.column is None:
        fold_into_norm(graph, target.node, scales)
    else:
        columns = slice(target.column, target.column + len(scales))
        remake(target.node, 1, partial(_divided, columns, scales))
    for product in readers:
        remake(product.node, 1, partial(_multiplied, scales))


def _divided(columns: slice, scales: Floats, matrix: Floats) -> Floats:
    divided = matrix.copy()
    divided[:, columns] /= scales
    return divided


def _multiplied(scales: Floats, matrix: Floats) -> Floats:
    return np.asarray(matrix * scales[:, None])


def fold_into_norm(graph: ir.Graph, norm: ir.Node, scales: Floats) -> None:
    """Divide the channels of the first output of `norm` by `scales`."""
    for index in FOLDED[norm.op_type]:
        held = norm.inputs[index] if index < len(norm.inputs) else None
        if held is not None:
            name, divided = f"{held.name}.smooth", tensor_of(held).numpy() / scales
            norm.replace_input_with(index, add_initializer(graph, name, divided))
