"""A mixture of experts in a graph that is built: the nodes that a trace of it gives.

The node, and the way in which it is told its weights, are `rewrite.mixture`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.build import weights as held
from fastgen.export.build.decoder import Experts, Stack
from fastgen.export.build.writer import FLOAT, INT64, Dim, Writer, dims
from fastgen.export.quantize import parts
from fastgen.export.rewrite.edit import MICROSOFT
from fastgen.export.rewrite.mixture import LEAST, NEVER, Gate

TOKENS = "rows*new"  # a dimension
SUMMING = {"keepdims": 1, "noop_with_empty_axes": 0}


def flat(to: Writer, x: ir.Value) -> ir.Value:
    """[rows, new, width] as [tokens, width]."""
    width = int(dims(x)[-1])
    return to.node("Reshape", [x, to.ints(-1, width)], [TOKENS, width], {"allowzero": 1})


def write(to: Writer, tokens: ir.Value, experts: Experts, shared: ir.Value | None) -> ir.Value:
    """The output of a mixture [tokens, width].

    Args:
        shared: that of the part which every token goes to.
    """
    weights, index = _routed(to, tokens, experts)
    out = _by_experts(to, tokens, _logits(to, weights, index, experts), experts)
    out = to.node("Mul", [out, _sum(to, weights)], tokens.shape)
    if shared is None:
        return out
    if experts.shared_gate is not None:
        gate = to.linear(tokens, experts.shared_gate)
        gate = to.node("Sigmoid", [gate], gate.shape)
        shared = to.node("Mul", [gate, shared], shared.shape)
    return to.node("Add", [out, shared], out.shape)


def _routed(to: Writer, tokens: ir.Value, experts: Experts) -> tuple[ir.Value, ir.Value]:
    """The weights of the experts that each token goes to, and their numbers."""
    scores = to.linear(tokens, experts.router)
    if experts.weighs == "all":
        scores = to.node("Softmax", [scores], scores.shape, {"axis": -1})
    given = {"axis": -1, "largest": 1, "sorted": 1}
    node = ir.node("TopK", [scores, to.ints(experts.chosen)], given, num_outputs=2)
    to.graph.append(node)
    chosen: list[Dim] = [TOKENS, experts.chosen]
    for value, dtype in zip(node.outputs, (FLOAT, INT64), strict=True):
        value.shape, value.dtype = ir.Shape(chosen), dtype
    weights, index = node.outputs
    if experts.weighs == "chosen":
        weights = to.node("Softmax", [weights], chosen, {"axis": experts.softmax_axis})
    if experts.sums_to_one:
        weights = to.node("Div", [weights, _sum(to, weights)], chosen)
    return weights, index


def _sum(to: Writer, weights: ir.Value) -> ir.Value:
    return to.node("ReduceSum", [weights, to.ints(-1)], [TOKENS, 1], SUMMING)


def _logits(to: Writer, weights: ir.Value, index: ir.Value, experts: Experts) -> ir.Value:
    """The logits [tokens, experts] that the node makes these weights of."""
    count = experts.router.width
    if ("nowhere", count) not in to.shapes:
        scalars = [to.node("Squeeze", [to.length(name)], [], dtype=INT64) for name in LENGTHS]
        number = to.node("Mul", scalars, [], dtype=INT64)
        number = to.node("Reshape", [number, to.ints(-1)], [1], {"allowzero": 0}, dtype=INT64)
        shape = to.node("Concat", [number, to.ints(count)], [2], {"axis": 0}, dtype=INT64)
        nowhere = to.node("Expand", [to.number(NEVER), shape], [TOKENS, count])
        to.shapes["nowhere", count] = nowhere
    least = to.node("Clip", [weights, to.number(LEAST)], weights.shape)
    logarithms = to.node("Log", [least], weights.shape)
    inputs = [to.shapes["nowhere", count], index, logarithms]
    given = {"axis": 1, "reduction": "none"}
    return to.node("ScatterElements", inputs, [TOKENS, count], given)


LENGTHS = ("rows", "new")


def _by_experts(to: Writer, tokens: ir.Value, logits: ir.Value, experts: Experts) -> ir.Value:
    """The weighted mean of what each token's experts make of it."""
    count, inner, width = experts.router.width, experts.width, int(dims(tokens)[-1])
    halves = [experts.gate] + ([] if experts.up is None else [experts.up])
    rows = inner if experts.up is not None else 2 * inner
    splits = experts.up is None and not experts.in_turns
    first = _matrices(to, halves, (count, rows, width), splits)
    second = _matrices(to, [experts.down], (count, width, inner))
    inputs = [tokens, logits, first, None, second]
    if experts.biases is not None:
        firsts, last = experts.biases
        inputs[3] = _bias(to, firsts, count, 2 * inner)
        inputs.append(to.table(last, count, width))
    gate = Gate(experts.alpha, experts.beta, experts.limit)
    given = gate.attributes() | {"k": experts.chosen}
    return to.node("MoE", inputs, tokens.shape, given, domain=MICROSOFT)


def _bias(to: Writer, names: Sequence[str], count: int, width: int) -> ir.Value:
    """Biases of the first matrices [experts, width]: of one tensor, or of two in turns."""
    if len(names) == 1:
        return to.table(names[0], count, width)
    tensors = [to.tensor(name, [count, width // 2]) for name in names]
    for name in names:
        to.use(name, count * width // 2)
    array = np.stack([held.whole(tensor) for tensor in tensors], axis=2).reshape(count, width)
    return to.constant(array)


def _matrices(
    to: Writer, stacks: Sequence[Stack], shape: tuple[int, int, int], splits: bool = False
) -> ir.Value:
    """The matrices of all experts [experts, out, in]: those of two stacks with their rows in turns.

    Args:
        shape: of a stack.
        splits: whether the rows of the only stack are two halves, which are put in turns.
    """
    count, out, into = shape
    tensors = []
    for stack in stacks:
        stored = [into, out] if stack.flat else [out, into]
        stored = [count, *stored] if stack.together else stored
        tensors.append([to.tensor(name, stored) for name in stack.names])
        for name in stack.names:
            to.use(name, math.prod(stored))
    name = f"{stacks[0].names[0]}.experts"
    make = partial(_stacked, tensors, stacks[0], splits)
    return to.lazily(name, make, [count, out * len(stacks), into])


def _stacked(
    stacks: Sequence[Sequence[held.Tensor]], form: Stack, splits: bool
) -> NDArray[np.float32]:
    arrays = [_whole(tensors, form) for tensors in stacks]
    if splits:
        arrays = np.split(arrays[0], 2, axis=1)
    if len(arrays) == 1:
        return arrays[0]
    count, out, into = arrays[0].shape
    return np.stack(arrays, axis=2).reshape(count, len(arrays) * out, into)


def _whole(tensors: Sequence[held.Tensor], form: Stack) -> NDArray[np.float32]:
    if not form.together:
        return np.stack([held.whole(tensor) for tensor in tensors])
    if not form.flat:
        return held.whole(tensors[0])
    count, into, out = tensors[0].shape
    turned = np.empty((count, out, into), np.float32)

    def fill(rows: slice) -> None:
        turned[rows] = tensors[0].read(rows).swapaxes(1, 2)

    parts.each(count, into * out, fill)
    return turned
