"""Mixtures of experts in a graph: onnxruntime's MoE, or a Loop for a gate that MoE lacks.

While a model is traced, a mixture is one node (`DOMAIN`::Experts) that holds the matrices as the
model does. `lay_out` turns it into MoE, whose kernel on a CPU

- does its own routing: softmax over logits, then the k best. Any weights w of any experts are
  expressed by logits of log w for these and of `NEVER` for all others: its weights are w / sum(w),
  and the output is multiplied by sum(w). So each model's own router stays as it is, in float32.
- takes, of the gated kinds, `clamp(g) sigmoid(alpha clamp(g)) (clamp(u) + beta)` with the rows of
  both matrices interleaved: the weights are put in that order while they are written, one matrix
  at a time.

A gate or an activation that the kernel lacks (GELU, squared ReLU) becomes a Loop over the experts
that some token goes to, each of which computes its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from fastgen.export.rewrite.edit import (
    MICROSOFT,
    add_initializer,
    add_lazily,
    input_of,
    insert,
    product_of,
    sizes_of,
    take_place,
    tensor_of,
)

DOMAIN = "fastgen.export"  # of the node until it is laid out
NEVER = -1e30  # a router's logit for an expert that a token does not go to
LEAST = float(np.finfo(np.float32).tiny)  # a weight of zero has no logarithm

Array = NDArray[np.float32]
Activation = Callable[[Array], Array]


def _relu(x: Array) -> Array:
    return np.maximum(x, np.float32(0))


def _sigmoid(x: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(np.float32(0), -x)), np.float32)


def _gelu(x: Array) -> Array:
    error = np.frompyfunc(math.erf, 1, 1)(x / np.float32(math.sqrt(2))).astype(np.float32)
    return np.asarray(x * (1 + error) / 2, np.float32)


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x**3)
    return np.asarray(x * (1 + np.tanh(inner)) / 2, np.float32)


# Activations that the kernel computes of a product that is not gated.
PLAIN: dict[str, Activation] = {
    "relu": _relu, "silu": lambda x: x * _sigmoid(x), "identity": lambda x: x,
}  # fmt: skip
# Activations of a Loop, where the kernel lacks them: of a product, or of its gate.
LOOPED: dict[str, Activation] = {
    "relu": _relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu2": lambda x: _relu(x) ** 2,
}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """`clamp(g) sigmoid(alpha clamp(g)) (clamp(u) + beta)`; g is clamped from above only."""

    alpha: float
    beta: float
    limit: float | None

    def __call__(self, gate: Array, up: Array) -> Array:
        if self.limit is not None:
            limit = np.float32(self.limit)
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        alpha, beta = np.float32(self.alpha), np.float32(self.beta)
        return gate * _sigmoid(alpha * gate) * (up + beta)

    def attributes(self) -> dict[str, Any]:
        limit = {} if self.limit is None else {"swiglu_limit": self.limit}
        return {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": self.alpha,
            "activation_beta": self.beta,
        } | limit


@dataclass(frozen=True)
class Looped:
    """The activation of an expert in a Loop; it is written in the name of the Loop's body."""

    kind: str
    gated: bool

    def __str__(self) -> str:
        return f"experts {self.kind} {'gated' if self.gated else 'plain'}"

    def __call__(self, x: Array) -> Array:
        if not self.gated:
            return LOOPED[self.kind](x)
        gate, up = np.split(x, 2, axis=-1)
        return LOOPED[self.kind](gate) * up

    def nodes(self, tape: Tape, x: ir.Value) -> ir.Value:
        """The same as nodes of the body."""
        gate, up = x, None
        if self.gated:
            gate, up = tape.op_multi_out(
                "Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2
            )
        if self.kind.startswith("gelu"):
            approximate = "tanh" if self.kind == "gelu_tanh" else "none"
            out = tape.op("Gelu", [gate], {"approximate": approximate})
        else:
            out = tape.op("Relu", [gate])
        if self.kind == "relu2":
            out = tape.op("Mul", [out, out])
        return out if up is None else tape.op("Mul", [out, up])


# Layout


def lay_out(model: ir.Model) -> None:
    """Turn each `Experts` into the kernel's node, in place.

    The kernel's matrices are made of the model's when they are written, one at a time.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    if not nodes:
        return
    del model.opset_imports[DOMAIN]
    for node in nodes:
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        mixed, *transposed = (
            bool(given.pop(name)) for name in ("mixed", "first_transposed", "second_transposed")
        )
        _, _, gate, up, first_bias, second, second_bias = _filled(node.inputs, 7)
        tokens, logits = input_of(node, 0), input_of(node, 1)
        count = _experts(logits)
        looped = given["activation_type"] in LOOPED.keys() - PLAIN.keys() or (
            given.get("swiglu_fusion") == 2
        )
        in_turns = given.get("swiglu_fusion") == 1 and not mixed
        first = _arranged(model.graph, partial(_first, count, transposed[0], in_turns), gate, up)
        second = _arranged(model.graph, partial(_second, count, transposed[1]), second)
        if in_turns and first_bias is not None:
            first_bias = _arranged(model.graph, partial(_in_turns, count), first_bias)
        if looped:
            form = Looped(given["activation_type"], "swiglu_fusion" in given)
            out = _loop(node, form, tokens, logits, (first, second), (first_bias, second_bias))
        else:
            inputs = [tokens, logits, first, first_bias, second, second_bias]
            (out,) = insert(node, "MoE", inputs, given, domain=MICROSOFT)
        take_place(node, out)
    _plain_products(model.graph)
    ir.passes.common.RemoveUnusedNodesPass()(model)


def _loop(
    before: ir.Node,
    form: Looped,
    tokens: ir.Value,
    logits: ir.Value,
    matrices: Sequence[ir.Value],
    biases: Sequence[ir.Value | None],
) -> ir.Value:
    """The output of MoE, expert by expert: only those that some token goes to, and its tokens."""
    graph = before.graph
    assert graph is not None
    first, last = (add_initializer(graph, f"axis {i}", np.array([i], np.int64)) for i in (0, -1))
    outer = Tape()
    weights = outer.op("Softmax", [logits], {"axis": -1})
    most = outer.op("ReduceMax", [weights, first], {"keepdims": 0})
    reached = outer.op("Squeeze", [outer.op("NonZero", [most]), first])
    count = outer.op("Size", [reached])
    zeros = outer.op("ConstantOfShape", [outer.op("Shape", [tokens])])

    name, inner = f"{matrices[0].name}.loop", Tape()
    kinds = (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT)
    shapes = (ir.Shape([]), ir.Shape([]), tokens.shape)
    step, going, so_far = (
        ir.Value(name=f"{name}.{part}", type=ir.TensorType(kind), shape=size)
        for part, kind, size in zip(("step", "going", "so_far"), kinds, shapes, strict=True)
    )
    expert = inner.op("Gather", [reached, step])
    mine = inner.op("Gather", [weights, expert], {"axis": 1})
    rows = inner.op("Squeeze", [inner.op("NonZero", [mine]), first])
    x = inner.op("Gather", [tokens, rows])
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        inputs = [x, inner.op("Gather", [matrix, expert])]
        inputs += [] if bias is None else [inner.op("Gather", [bias, expert])]
        x = inner.op("Gemm", inputs, {"transB": 1})
        x = form.nodes(inner, x) if i == 0 else x
    weight = inner.op("Unsqueeze", [inner.op("Gather", [mine, rows]), last])
    x = inner.op("Mul", [x, weight])
    total = inner.op(
        "ScatterND", [so_far, inner.op("Unsqueeze", [rows, last]), x], {"reduction": "add"}
    )
    still = inner.op("Identity", [going])
    for value, like in ((still, going), (total, so_far)):
        value.type, value.shape = like.type, like.shape
    for i, node in enumerate(inner.nodes):  # names of their own in the whole model
        for j, value in enumerate(node.outputs):
            value.name = f"{name}.{i}.{j}"
    body = ir.Graph([step, going, so_far], [still, total], nodes=inner.nodes, name=str(form))
    out = outer.op("Loop", [count, None, zeros], {"body": body})
    graph.insert_before(before, outer.nodes)
    return out


def _experts(logits: ir.Value) -> int:
    """The number of experts of a router's logits [tokens, experts]."""
    count = sizes_of(logits)[-1]
    assert count is not None
    return count


def _filled(inputs: Sequence[ir.Value | None], count: int) -> list[ir.Value | None]:
    """The first `count` inputs, with None for those that are left out at the end."""
    return [*inputs, *[None] * count][:count]


def _plain_products(graph: ir.Graph) -> None:
    """A Gemm becomes MatMul and Add, as all other rules know them.

    Experts that every token goes to are computed on [tokens, hidden], where torch's exporter
    writes a Gemm.
    """
    for node in list(graph):
        if node.op_type == "Gemm":
            product = product_of(node, input_of(node, 0), node.outputs[0])
            if product is not None:
                take_place(node, product)


def _arranged(graph: ir.Graph, make: Callable[..., Array], *sources: ir.Value | None) -> ir.Value:
    """An initializer that is made of others when it is read."""
    constants = [source for source in sources if source is not None]
    held = [tensor_of(constant) for constant in constants]
    shape = make(*(np.broadcast_to(np.float32(0), tensor.shape.numpy()) for tensor in held)).shape
    name = f"{constants[0].name}.experts"

    def read() -> Array:
        return make(*(tensor.numpy() for tensor in held))

    return add_lazily(graph, name, read, shape, ir.DataType.FLOAT)


def _first(
    count: int, transposed: bool, in_turns: bool, gate: Array, up: Array | None = None
) -> Array:
    """[experts, out, in] of the first matrix, or of its two halves."""
    if up is not None:
        gate, up = (half.reshape(count, -1, half.shape[-1]) for half in (gate, up))
        return np.stack([gate, up], axis=2).reshape(count, -1, gate.shape[-1])
    gate = gate[:count]
    gate = gate.swapaxes(1, 2) if transposed else gate
    return _in_turns(count, gate) if in_turns else gate


def _in_turns(count: int, both: Array) -> Array:
    """[experts, gate then linear half, ...] with the rows of both in turns."""
    halves = both.reshape(count, 2, -1, *both.shape[2:])
    return halves.swapaxes(1, 2).reshape(both.shape)


def _second(count: int, transposed: bool, matrix: Array) -> Array:
    matrix = matrix.reshape(count, -1, matrix.shape[-1])
    return matrix.swapaxes(1, 2) if transposed else matrix


# Reading mixtures


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer, as the graph holds them.

    Attributes:
        node: MoE, or a Loop.
        tokens, logits: what it reads, [tokens, hidden] and [tokens, experts].
        weights: its two matrices, [experts, out, in] each.
        biases: [experts, out] each, where there are any.
        between: what an expert does with the output of its first matrix.
    """

    node: ir.Node
    tokens: ir.Value
    logits: ir.Value
    weights: tuple[ir.Value, ir.Value]
    biases: tuple[ir.Value | None, ir.Value | None]
    between: Activation


def mixtures(graph: ir.Graph) -> list[Mixture]:
    """The mixtures of a graph, in its order."""
    each = (_mixture(node) if node.op_type == "MoE" else _looped(node) for node in graph)
    return [mixture for mixture in each if mixture is not None]


def _mixture(node: ir.Node) -> Mixture:
    _, _, _, first_bias, _, second_bias = _filled(node.inputs, 6)
    tokens, logits, first, second = (input_of(node, index) for index in (0, 1, 2, 4))
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    between = PLAIN.get(given["activation_type"])
    if between is None:
        gate = Gate(given["activation_alpha"], given["activation_beta"], given.get("swiglu_limit"))

        def between(x: Array) -> Array:
            return gate(x[:, 0::2], x[:, 1::2])

    return Mixture(node, tokens, logits, (first, second), (first_bias, second_bias), between)


def _looped(node: ir.Node) -> Mixture | None:
    """A mixture that `_loop` wrote; None for other nodes."""
    body = node.attributes["body"].as_graph() if node.op_type == "Loop" else None
    name, *form = (body.name or "").split() if body is not None else [""]
    if body is None or name != "experts":
        return None
    tokens = _input_above(input_of(node, 2), "Shape")
    logits = _input_above(input_of(node, 0), "Softmax")
    first, second = (inner for inner in body if inner.op_type == "Gemm")
    weights = (
        _input_above(input_of(first, 1), "Gather"),
        _input_above(input_of(second, 1), "Gather"),
    )
    biases = _bias_of(first), _bias_of(second)
    return Mixture(node, tokens, logits, weights, biases, Looped(form[0], form[1] == "gated"))


def _bias_of(gemm: ir.Node) -> ir.Value | None:
    """The biases of all experts, of which a Gemm adds those of one."""
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    return None if bias is None else _input_above(bias, "Gather")


def _input_above(value: ir.Value, op_type: str) -> ir.Value:
    """The first input of the closest node of a type on the way up from `value`."""
    node = value.producer()
    if node is None:
        raise ValueError(f"no {op_type} leads to {value}")
    above = input_of(node, 0)
    return above if node.op_type == op_type else _input_above(above, op_type)
