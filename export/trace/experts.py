"""Mixtures of experts: one node a layer, whatever routes them, in float32 and in 8 or 4 bits.

Nearly every mixture of transformers is a module that holds the matrices of all experts and is
given hidden states, which experts each token goes to, and with which weights. While a model is
exported (`as_nodes`) such a module emits one node. `lay_out` turns it into onnxruntime's MoE, whose
kernel on a CPU

- does its own routing: softmax over logits, then the k best. Any weights w of any experts are
  expressed by logits of log w for these and of -1e30 for all others: its weights are w / sum(w),
  and the output is multiplied by sum(w). So each model's own router stays as it is, in float32.
- takes, of the gated kinds, `clamp(g) sigmoid(alpha clamp(g)) (clamp(u) + beta)` with the rows of
  both matrices in turns: the weights are put in that order while they are written, one matrix at a
  time. Which alpha, beta and limit a model's gate has is found by trying them.

A gate or an activation that the kernel lacks (GELU, squared ReLU) becomes a Loop over the experts
that some token goes to, each of which computes its tokens. Whatever else there is (a norm after
each expert) gathers each token's matrices, as transformers' own `batched_mm` does: exact, slow.

In 8 or 4 bits (`plan`, `quantize`) the node is QMoE. With a scale for each output channel its
activations stay in float32; with scales for blocks of inputs they are quantised in such blocks,
too, which is what makes it fast; where that costs too much in 8 bits, inputs with outliers stay
as they are. Scales of 4 bits are searched on the tokens of the calibration
text that came to each expert; there are too few of them for GPTQ. A Loop keeps codes of 8 bits and
makes floats of an expert's when it computes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import batched_mm_experts_forward

from fastgen.errors import UnsupportedModel
from fastgen.export.quantize import calibrate
from fastgen.export.quantize.gptq import search_scales
from fastgen.export.quantize.kernels import Kernel, block_codes, block_scales, codes_values
from fastgen.export.rewrite.edit import (
    MICROSOFT,
    add_initializer,
    add_lazily,
    constant,
    insert,
    product_of,
    take_place,
)

DOMAIN = "fastgen.export"  # of the node until it is laid out
ROUNDED = 0.02  # of an output in 8 bits: with more, its inputs reach too far to be quantised
NEVER = -1e30  # a router's logit for an expert that a token does not go to
LEAST = float(np.finfo(np.float32).tiny)  # a weight of zero has no logarithm

# What the kernel computes of a product that is not gated.
PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu, "silu": nn.functional.silu, "identity": lambda x: x,
}  # fmt: skip
# What a Loop computes, where the kernel does not: of a product, or of its gate.
LOOPED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu, "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "relu2": lambda x: nn.functional.relu(x).square(),
}  # fmt: skip
SAMPLE = 512  # tokens that an error is measured on
SMALLEST_BLOCK = 16  # of inputs that share a scale
TRIED = 4000  # numbers that an activation is tried on


@dataclass(frozen=True)
class Gate:
    """`clamp(g) sigmoid(alpha clamp(g)) (clamp(u) + beta)`; g is clamped from above only."""

    alpha: float
    beta: float
    limit: float | None

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)

    def attributes(self) -> dict[str, Any]:
        limit = {} if self.limit is None else {"swiglu_limit": self.limit}
        return {
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "activation_alpha": self.alpha,
            "activation_beta": self.beta,
        } | limit


# A model, as it is exported


@contextlib.contextmanager
def as_nodes(model: PreTrainedModel) -> Iterator[None]:
    """Run the experts of `model` as one node a layer, then as they ran again."""
    forms = {module: form for module in model.modules() if (form := _form(module)) is not None}
    try:
        for module, form in forms.items():
            module.forward = partial(_experts, module, form)
        yield
    finally:
        for module in forms:
            del module.forward


Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _experts(
    module: nn.Module,
    form: Form,
    hidden_states: torch.Tensor,  # [tokens, hidden]
    top_k_index: torch.Tensor,  # [tokens, k]
    top_k_weights: torch.Tensor,  # [tokens, k]
) -> torch.Tensor:  # [tokens, hidden]
    """The forward of a module with experts: its own while recording, `form` in the graph."""
    if torch.compiler.is_exporting():
        return form(hidden_states, top_k_index, top_k_weights)
    if bool((top_k_weights < 0).any()):
        raise UnsupportedModel("it gives some experts a negative weight")
    return type(module).forward(module, hidden_states, top_k_index, top_k_weights)


def _form(module: Any) -> Form | None:
    """What stands for the forward of a module with experts; None for other modules.

    Most have transformers' `use_experts_implementation`. The others are told by what they hold:
    dbrx's three flat matrices, longcat_flash's experts that do nothing.
    """
    if hasattr(module, "_is_expert_parallel"):
        activation = activation_of(module)
        if activation is None:
            return partial(batched_mm_experts_forward, module)
        return partial(_interfaced, module, activation)
    flat = getattr(module, "mlp", None)
    if all(hasattr(flat, name) for name in ("w1", "v1", "w2", "activation_fn")):
        return partial(_flat, module, _silu_gated(flat.activation_fn))
    if all(hasattr(module, name) for name in ("zero_expert_num", "gate_up_proj", "down_proj")):
        return partial(_some_idle, module, _silu_gated(module.act_fn))
    return None


def _interfaced(
    module: Any,
    activation: dict[str, Any],
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Experts under transformers' `use_experts_implementation`, which says how they are held."""
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    first, second = (getattr(module, name) for name in names)
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in names]
    return _emit(
        hidden_states,
        index,
        weights,
        [first, None],
        second,
        biases,
        activation,
        count=second.shape[0],
        transposed=(module.is_transposed, module.is_transposed),
        mixed=not module.is_concatenated,
    )


def _flat(
    module: Any,
    activation: dict[str, Any],
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Gate, linear half and last matrix, each [experts * out, hidden]."""
    mlp = module.mlp
    return _emit(
        hidden_states,
        index,
        weights,
        [mlp.w1, mlp.v1],
        mlp.w2,
        [None, None],
        activation,
        count=module.num_experts,
        transposed=(False, True),
    )


def _some_idle(
    module: Any,
    activation: dict[str, Any],
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Experts, and numbers beyond theirs that stand for the token itself."""
    mine = weights * (index < module.num_routed_experts)
    out = _emit(
        hidden_states,
        index,
        mine,
        [module.gate_up_proj, None],
        module.down_proj,
        [None, None],
        activation,
        count=module.num_routed_experts,
        others=module.zero_expert_num,
    )
    return out + hidden_states * (weights - mine).sum(-1, keepdim=True)


def _silu_gated(activation: nn.Module) -> dict[str, Any]:
    x = torch.linspace(-30, 30, TRIED)
    if not _equal(activation(x), nn.functional.silu(x)):
        raise UnsupportedModel("its experts have another activation than SiLU")
    return Gate(1.0, 0.0, None).attributes()


def activation_of(module: nn.Module) -> dict[str, Any] | None:
    """The kernel's attributes for what a module does between its matrices; None if it has none.

    Found by trying all that the kernel has, with the numbers that the module's attributes suggest,
    and what a Loop has (whose gate and linear half follow each other: `swiglu_fusion` is 2).
    """
    if module.has_post_expert_norm:
        return None
    x = torch.linspace(-30, 30, TRIED)[torch.randperm(TRIED, generator=_seeded())].reshape(-1, 8)
    with torch.no_grad():
        if not module.has_gate:
            expected = module.act_fn(x)
            forms = PLAIN | LOOPED
            names = (name for name, form in forms.items() if _equal(form(x), expected))
            return next(({"activation_type": name} for name in names), None)
        expected = module._apply_gate(x)
        halves = x.chunk(2, dim=-1) if module.is_concatenated else (x[..., ::2], x[..., 1::2])
        alphas = {1.0} | _numbers(module, "alpha", "swiglu_alpha")
        limits = {None} | _numbers(module, "limit", "swiglu_limit")
        gates = (Gate(a, b, limit) for a in alphas for b in (0.0, 1.0) for limit in limits)
        found = next((g.attributes() for g in gates if _equal(g(*halves), expected)), None)
        names = (n for n, f in LOOPED.items() if _equal(f(halves[0]) * halves[1], expected))
        return found or next(({"activation_type": n, "swiglu_fusion": 2} for n in names), None)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def _numbers(module: nn.Module, *names: str) -> set[float]:
    found = (getattr(module, name, None) for name in names)
    return {float(one) for one in found if isinstance(one, float | int)}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _emit(
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    first: Sequence[torch.Tensor | None],
    second: torch.Tensor,
    biases: Sequence[torch.Tensor | None],
    activation: dict[str, Any],
    *,
    count: int,
    transposed: tuple[bool, bool] = (False, False),
    mixed: bool = False,
    others: int = 0,
) -> torch.Tensor:
    """The node, with the matrices as the model holds them, and how that is.

    Args:
        first: [experts, out, in], or its gate and its linear half.
        second: the other matrix of each expert.
        count: of experts.
        transposed: whether a matrix is [experts, in, out].
        mixed: whether gate and linear half are in turns already.
        others: that the index may name besides, and whose weight is zero.
    """
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = torch.full((tokens.shape[0], count + others), NEVER)
    logits = logits.scatter(1, index.long(), weights.clamp(min=LEAST).log())
    if others:
        logits = logits[:, :count]
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Experts",
        [tokens, logits, first[0], first[1], biases[0], second, biases[1]],
        activation
        | {
            "k": index.shape[-1],
            "mixed": int(mixed),
            "first_transposed": int(transposed[0]),
            "second_transposed": int(transposed[1]),
        },
        dtype=torch.float32,
        shape=tokens.shape,
        version=1,
    )
    return (out * weights.sum(-1, keepdim=True)).reshape(hidden_states.shape)


# The graph, as it was converted


def lay_out(model: ir.Model) -> None:
    """Turn each `Experts` into the kernel's node, in place.

    The kernel's matrices are made of the model's when they are written, one at a time.
    """
    found = [node for node in model.graph if node.domain == DOMAIN]
    if not found:
        return
    del model.opset_imports[DOMAIN]
    for node in found:
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        mixed, *transposed = (
            bool(given.pop(name)) for name in ("mixed", "first_transposed", "second_transposed")
        )
        tokens, logits, gate, up, first_bias, second, second_bias = _filled(node.inputs, 7)
        count = int(logits.shape[-1])
        looped = given["activation_type"] in LOOPED.keys() - PLAIN.keys() or (
            given.get("swiglu_fusion") == 2
        )
        in_turns = given.get("swiglu_fusion") == 1 and not mixed
        first = _made(model.graph, partial(_first, count, transposed[0], in_turns), gate, up)
        second = _made(model.graph, partial(_second, count, transposed[1]), second)
        if in_turns and first_bias is not None:
            first_bias = _made(model.graph, partial(_in_turns, count), first_bias)
        if looped:
            form = Looped(given["activation_type"], "swiglu_fusion" in given)
            out = _loop(node, form, tokens, logits, (first, second), (first_bias, second_bias))
        else:
            inputs = [tokens, logits, first, first_bias, second, second_bias]
            (out,) = insert(node, "MoE", inputs, given, domain=MICROSOFT)
        take_place(node, out)
    _plain_products(model.graph)
    ir.passes.common.RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class Looped:
    """What an expert of a Loop does between its matrices; written in the name of its body."""

    kind: str
    gated: bool

    def __str__(self) -> str:
        return f"experts {self.kind} {'gated' if self.gated else 'plain'}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1) if self.gated else (x, 1.0)
        return LOOPED[self.kind](gate) * up

    def nodes(self, body: _Body, x: ir.Value) -> ir.Value:
        gate, up = x, None
        if self.gated:
            gate, up = body.add("Split", [x], {"axis": -1, "num_outputs": 2}, outputs=2)
        if self.kind.startswith("gelu"):
            approximate = "tanh" if self.kind == "gelu_tanh" else "none"
            (out,) = body.add("Gelu", [gate], {"approximate": approximate})
        else:
            (out,) = body.add("Relu", [gate])
        if self.kind == "relu2":
            (out,) = body.add("Mul", [out, out])
        return out if up is None else body.add("Mul", [out, up])[0]


class _Body:
    """The nodes of a graph that is being written; values have names of their own in the model."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []

    def add(
        self, kind: str, inputs: Sequence[ir.Value | None], attributes: Any = None, outputs: int = 1
    ) -> Sequence[ir.Value]:
        node = ir.node(kind, inputs, attributes or {}, num_outputs=outputs)
        for place, value in enumerate(node.outputs):
            value.name = f"{self.name}.{len(self.nodes)}.{place}"
        self.nodes.append(node)
        return node.outputs


def _loop(
    before: ir.Node,
    form: Looped,
    tokens: ir.Value,
    logits: ir.Value,
    matrices: Sequence[ir.Value],
    biases: Sequence[ir.Value | None],
) -> ir.Value:
    """What MoE gives, expert by expert: only those that some token goes to, and only its tokens."""
    graph = before.graph
    assert graph is not None
    first, last = (add_initializer(graph, f"axis {i}", np.array([i], np.int64)) for i in (0, -1))
    (weights,) = insert(before, "Softmax", [logits], {"axis": -1})
    (most,) = insert(before, "ReduceMax", [weights, first], {"keepdims": 0})
    (came,) = insert(before, "NonZero", [most])
    (came,) = insert(before, "Squeeze", [came, first])
    (count,) = insert(before, "Size", [came])
    (shape,) = insert(before, "Shape", [tokens])
    (zeros,) = insert(before, "ConstantOfShape", [shape])

    body = _Body(f"{matrices[0].name}.loop")
    kinds = (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.FLOAT)
    shapes = (ir.Shape([]), ir.Shape([]), tokens.shape)
    step, going, so_far = (
        ir.Value(name=f"{body.name}.{name}", type=ir.TensorType(kind), shape=size)
        for name, kind, size in zip(("step", "going", "so_far"), kinds, shapes, strict=True)
    )
    (expert,) = body.add("Gather", [came, step])
    (mine,) = body.add("Gather", [weights, expert], {"axis": 1})
    (places,) = body.add("NonZero", [mine])
    (places,) = body.add("Squeeze", [places, first])
    (x,) = body.add("Gather", [tokens, places])
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        inputs = [x, body.add("Gather", [matrix, expert])[0]]
        inputs += [] if bias is None else body.add("Gather", [bias, expert])
        (x,) = body.add("Gemm", inputs, {"transB": 1})
        x = form.nodes(body, x) if i == 0 else x
    (weight,) = body.add("Gather", [mine, places])
    (weight,) = body.add("Unsqueeze", [weight, last])
    (x,) = body.add("Mul", [x, weight])
    (places,) = body.add("Unsqueeze", [places, last])
    (total,) = body.add("ScatterND", [so_far, places, x], {"reduction": "add"})
    (still,) = body.add("Identity", [going])
    for value, like in ((still, going), (total, so_far)):
        value.type, value.shape = like.type, like.shape
    inner = ir.Graph([step, going, so_far], [still, total], nodes=body.nodes, name=str(form))
    node = ir.Node("", "Loop", [count, None, zeros], [ir.AttrGraph("body", inner)], num_outputs=1)
    graph.insert_before(before, node)
    return node.outputs[0]


def _filled(inputs: Sequence[ir.Value | None], count: int) -> list[ir.Value | None]:
    """With None for those that are not there at the end."""
    return [*inputs, *[None] * count][:count]


def _plain_products(graph: ir.Graph) -> None:
    """A Gemm becomes MatMul and Add, as all other rules know them.

    Experts that every token goes to are computed on [tokens, hidden], where torch's exporter
    writes a Gemm.
    """
    for node in list(graph):
        if node.op_type == "Gemm":
            product = product_of(node, node.inputs[0], node.outputs[0])
            if product is not None:
                take_place(node, product)


Array = NDArray[np.float32]


def _made(graph: ir.Graph, make: Callable[..., Array], *sources: ir.Value | None) -> ir.Value:
    """An initializer that is made of others when it is read."""
    held = [source.const_value for source in sources if source is not None]
    shape = make(*(np.broadcast_to(np.float32(0), one.shape.numpy()) for one in held)).shape
    name = f"{sources[0].name}.experts"

    def read() -> Array:
        return make(*(one.numpy() for one in held))

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


# 8 and 4 bits


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
    between: Callable[[torch.Tensor], torch.Tensor]


def mixtures(graph: ir.Graph) -> list[Mixture]:
    found = (_mixture(node) if node.op_type == "MoE" else _looped(node) for node in graph)
    return [one for one in found if one is not None]


def _mixture(node: ir.Node) -> Mixture:
    tokens, logits, first, first_bias, second, second_bias = _filled(node.inputs, 6)
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    between = PLAIN.get(given["activation_type"])
    if between is None:
        gate = Gate(given["activation_alpha"], given["activation_beta"], given.get("swiglu_limit"))

        def between(x: torch.Tensor) -> torch.Tensor:
            return gate(x[:, 0::2], x[:, 1::2])

    return Mixture(node, tokens, logits, (first, second), (first_bias, second_bias), between)


def _looped(node: ir.Node) -> Mixture | None:
    """A mixture that `_loop` wrote; None for other nodes."""
    body = node.attributes["body"].as_graph() if node.op_type == "Loop" else None
    name, *form = (body.name or "").split() if body is not None else [""]
    if body is None or name != "experts":
        return None
    tokens = _behind(node.inputs[2], "Shape").inputs[0]
    logits = _behind(node.inputs[0], "Softmax").inputs[0]
    gathered = [
        [None if value is None else _behind(value, "Gather").inputs[0] for value in inputs[1:]]
        for inputs in (_filled(one.inputs, 3) for one in body if one.op_type == "Gemm")
    ]
    weights, biases = zip(*gathered, strict=True)
    return Mixture(node, tokens, logits, weights, biases, Looped(form[0], form[1] == "gated"))


def _behind(value: ir.Value, kind: str) -> ir.Node:
    """The first node of that kind on the way up from `value`."""
    node = value.producer()
    while node.op_type != kind:
        node = node.inputs[0].producer()
    return node


@dataclass(frozen=True)
class Reached:
    """Which experts of a layer the calibration text came to.

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
    """How each mixture's two matrices are stored, by the name of the first: by what comes to each.

    Args:
        model: the graph in float32.
        kernel: wished for; blocks become smaller where they do not divide a matrix.
        rows: calibration ids.
        shown: called with the number of mixtures done and their total.
    """
    found = mixtures(model.graph)
    plans: dict[str, list[Stored]] = {}
    reached = []
    if not found:
        return plans, reached
    wanted = [value for one in found for value in (one.tokens, one.logits)]
    with calibrate.values(model, wanted, rows) as seen:
        for one in found:
            shown(len(plans), len(found))
            tokens, mine = seen[one.tokens], seen[one.logits] > NEVER / 2
            stored = _plan(one, fitting(kernel, one), tokens, mine)
            if kernel.bits == 8 and max(matrix.error for matrix in stored) > ROUNDED:
                stored = _plan(one, Kernel(8), tokens, mine)
            plans[str(one.weights[0].name)] = stored
            unreached = np.flatnonzero(~mine.any(axis=0)).tolist()
            reached.append(Reached(str(one.weights[0].name), mine.shape[1], unreached))
    return plans, reached


def fitting(kernel: Kernel, mixture: Mixture) -> Kernel:
    """`kernel`, or with blocks that divide both matrices' inputs; without, 8 bits by channel."""
    block, sizes = kernel.block, [int(weight.shape[-1]) for weight in mixture.weights]
    while mixture.node.op_type == "MoE" and block >= SMALLEST_BLOCK:
        if not any(size % block for size in sizes):
            return Kernel(kernel.bits, block)
        block //= 2
    return Kernel(8)


def _plan(mixture: Mixture, kernel: Kernel, tokens: Array, mine: NDArray[np.bool_]) -> list[Stored]:
    """Scales for both matrices of each expert, on its tokens; on all where none came to it."""
    weights = [constant(weight) for weight in mixture.weights]
    biases = [constant(bias) for bias in mixture.biases]
    scales: tuple[list[Array], list[Array]] = [], []
    sums = np.zeros((2, 2))  # of each matrix: squared outputs, squared errors
    for expert in range(mine.shape[1]):
        came = mine[:, expert]
        x = tokens[came] if came.any() else tokens[:: max(1, len(tokens) // SAMPLE)]
        for i, bias in enumerate(biases):
            matrix = weights[i][expert].T
            found = _scales(matrix, kernel, x)
            scales[i].append(found)
            exact = x @ matrix
            if came.any():
                some = slice(None, None, max(1, len(x) // SAMPLE))
                off = exact[some] - _output(x[some], matrix, kernel, found)
                sums[i] += np.square(exact[some]).sum(), np.square(off).sum()
            if i == 0:
                exact = exact if bias is None else exact + bias[expert]
                x = np.asarray(mixture.between(torch.from_numpy(exact)))
    errors = np.sqrt(sums[:, 1] / np.maximum(sums[:, 0], LEAST))
    return [
        Stored(kernel, np.stack(one), float(error))
        for one, error in zip(scales, errors, strict=True)
    ]


def _scales(matrix: Array, kernel: Kernel, x: Array) -> Array:
    """[out, blocks] for a matrix [in, out] and its inputs [tokens, in]."""
    whole = _whole(kernel, len(matrix))
    if kernel.bits == 8:
        return block_scales(matrix, whole)
    return search_scales(matrix, whole, np.square(x).mean(axis=0))


def _output(x: Array, matrix: Array, kernel: Kernel, scales: Array) -> Array:
    """What the kernel makes of x [tokens, in]: with blocks, it quantises x as well."""
    whole = _whole(kernel, len(matrix))
    codes = block_codes(matrix, whole, scales)
    x = calibrate.quantized_input(x, kernel) if kernel.block else x
    return x @ codes_values(codes, whole, scales, len(matrix))


def _whole(kernel: Kernel, size: int) -> Kernel:
    """With all inputs of a channel as the one block that they are."""
    return Kernel(kernel.bits, kernel.block or size)


def quantize(model: ir.Model, plans: dict[str, list[Stored]]) -> list[tuple[str, Stored]]:
    """Replace each mixture by its form in codes, in place; returns what became of each matrix.

    Codes are made of the matrices when they are written.
    """
    made = []
    for mixture in mixtures(model.graph):
        stored = plans[str(mixture.weights[0].name)]
        made += [(str(w.name), one) for w, one in zip(mixture.weights, stored, strict=True)]
        replace = _in_kernel if mixture.node.op_type == "MoE" else _in_loop
        replace(model.graph, mixture, stored)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    return made


def _in_kernel(graph: ir.Graph, mixture: Mixture, stored: Sequence[Stored]) -> None:
    kernel = stored[0].kernel
    codes = [_in_codes(graph, w, one, 128) for w, one in zip(mixture.weights, stored, strict=True)]
    attributes = {name: attribute.value for name, attribute in mixture.node.attributes.items()}
    attributes |= {"expert_weight_bits": kernel.bits}
    if kernel.block:  # activations in 8 bits, as those of MatMulNBits
        attributes |= {"block_size": kernel.block, "accuracy_level": 4}
    first, second = mixture.biases
    inputs = [mixture.tokens, mixture.logits, *codes[0], first, *codes[1], second]
    (result,) = insert(mixture.node, "QMoE", inputs, attributes, domain=MICROSOFT)
    take_place(mixture.node, result)


def _in_loop(graph: ir.Graph, mixture: Mixture, stored: Sequence[Stored]) -> None:
    for weight, one in zip(mixture.weights, stored, strict=True):
        codes, scales = _in_codes(graph, weight, one, 0)
        (use,) = weight.uses()
        (mine,) = insert(use.node, "Gather", [codes, use.node.inputs[1]])
        (scale,) = insert(use.node, "Gather", [scales, use.node.inputs[1]])
        (floats,) = insert(use.node, "DequantizeLinear", [mine, scale], {"axis": 0})
        for place, value in enumerate((mine, scale, floats)):
            value.name = f"{codes.name}.{place}"
        use.node.outputs[0].dtype = ir.DataType.FLOAT
        take_place(use.node, floats)


def _in_codes(
    graph: ir.Graph, weight: ir.Value, stored: Stored, zero: int
) -> tuple[ir.Value, ir.Value]:
    """Codes, made when they are written, and scales [experts, out] or [experts, out, blocks]."""
    count, out, size = (int(dim) for dim in weight.shape)
    kernel, name = stored.kernel, str(weight.name)
    make = partial(_codes, weight.const_value, kernel, stored.scales, zero)
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
    out = [block_codes(one.T, whole, scale) for one, scale in zip(matrices, scales, strict=True)]
    codes = np.stack(out).reshape(*matrices.shape[:2], -1)
    return codes if zero else (codes ^ np.uint8(128)).view(np.int8)
