"""A second form of a model's matrices for many tokens: 8 bits per output channel.

The kernel of blocks (MatMulNBits) unpacks and scales them anew for every few tokens, which is fast
for one and slow for many. Each matrix is nearly one of int8 per output channel too, whose product
with activations of 8 bits a token is one sum of whole numbers. Two small graphs read the model's
own weights file, for who has the memory (`fastgen.engine.prefill_int8`):

- `unpack.onnx` makes these matrices, and their scales.
- `many_tokens.onnx` is the model's graph with its layers twice, in the two branches of an `If`: as
  they are, and with these matrices. The input `many_tokens` says which of them runs. The embedding
  and `lm_head` stand outside. The values of the second matrices are not in it: whoever opens it
  gives them.
- `many_tokens.uint8.onnx` is the same with these matrices in uint8, whose zero is 128, for
  processors on which products of uint8 and int8 overflow: the sums are the same, and exact there.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import onnx_ir.tape

from fastgen.export.quantize.activations import Activations
from fastgen.export.quantize.kernels import LEVELS, Kernel, integer_product
from fastgen.export.rewrite import contract
from fastgen.export.rewrite.edit import (
    MICROSOFT,
    add_initializer,
    input_of,
    insert,
    is_constant,
    set_type,
    take_place,
    tensor_of,
)
from fastgen.store import model_info
from fastgen.store.graph_io import MANY_TOKENS
from fastgen.store.model_info import GRAPH, UNPACK

PRODUCTS = ("MatMul", "FusedMatMul", "MatMulNBits")
GIVEN = (".second.int8", ".second.channels")  # how names of constants end that a session is given
SCALES = (ir.DataType.FLOAT, ir.DataType.BFLOAT16)
GROUP = 512  # inputs that are rounded together in groups, at most
HALVES = 8  # matrices of a kind from which on early and late ones are told apart


class Form(enum.Enum):
    """The way in which a matrix is multiplied with many tokens; the fastest first."""

    CHANNELS = "int8 per channel"
    GROUPS = f"int8 per channel and {GROUP} inputs"
    BLOCKS = "as with few"


@dataclass(frozen=True)
class Kind:
    """Matrices of the same shape that are read by the same kind of node.

    Attributes:
        members: their names.
        weights: of all of them.
    """

    name: str
    members: tuple[str, ...]
    weights: int


def kinds(directory: Path) -> list[Kind]:
    """The matrices that can have the second form, by kind, early and late ones apart."""
    by_kind: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for node in _products(ir.load(directory / GRAPH)):
        producer = input_of(node, 0).producer()
        kind = "input" if producer is None else producer.op_type
        size, out = (node.attributes[key].as_int() for key in ("K", "N"))
        by_kind.setdefault(f"{kind} {size} x {out}", []).append(_name(node))
        sizes[_name(node)] = size * out
    halves: dict[str, list[str]] = {}
    for kind, names in by_kind.items():
        if len(names) < HALVES:
            halves[kind] = names
        else:
            half = len(names) // 2
            halves[f"{kind}, early"], halves[f"{kind}, late"] = names[:half], names[half:]
    return [
        Kind(kind, tuple(names), sum(sizes[name] for name in names))
        for kind, names in halves.items()
    ]


def memory(directory: Path) -> int:
    """The bytes that the second branch's matrices take, also those that stay as they are.

    A session packs a copy of each for each of the branches.
    """
    (either,) = (
        node
        for node in ir.load(directory / model_info.MANY_TOKENS).graph
        if any(value.name == MANY_TOKENS.name for value in node.inputs if value is not None)
    )
    total = 0
    for node in either.attributes["then_branch"].as_graph().all_nodes():
        if node.op_type in (*PRODUCTS, "MatMulIntegerToFloat"):
            held = [_held(value) for value in node.inputs[1:4] if value is not None]
            total += sum(tensor_of(value).nbytes for value in held if is_constant(value))
    return total


def remove(directory: Path) -> None:
    """Remove both graphs, if they are there."""
    for name in (model_info.MANY_TOKENS, model_info.MANY_TOKENS_UINT8, UNPACK):
        (directory / name).unlink(missing_ok=True)


def write(directory: Path, forms: Mapping[str, Form] | None = None) -> str:
    """Write both graphs beside `model.onnx`, if it can have them.

    Args:
        forms: of matrices for many tokens, by name; CHANNELS for those that are not named.

    Returns:
        Why it cannot; an empty text if it can.
    """
    few, many = ir.load(directory / GRAPH), ir.load(directory / GRAPH)
    if any(node.op_type == "QMoE" for node in few.graph):
        return "its experts go through a kernel that has no such form (QMoE)"
    form_of = dict.fromkeys(map(_name, _products(many)), Form.CHANNELS) | dict(forms or {})
    nodes = [node for node in _products(many) if form_of[_name(node)] is not Form.BLOCKS]
    if not nodes:
        return "none of its layers' matrices is in blocks that could be anything else"
    if not all(map(_is_ours, nodes)):
        return "its matrices in blocks are not stored as those of `fastgen export` are"
    inner = _layers(few.graph, {_name(node) for node in nodes})
    unpacking = _Unpacking(many.opset_imports[""])
    activations = Activations(many.graph)
    for node in nodes:
        parts = _groups(node) if form_of[_name(node)] is Form.GROUPS else 1
        held = unpacking.unpacked(node, many.graph, parts)
        product = _grouped if parts > 1 else _whole
        name, new = _name(node), product(node, held, activations)
        take_place(node, new)
        new.name = name
    onnx_ir.passes.common.RemoveUnusedNodesPass()(many)
    _join(few, many, inner)
    ir.save(few, directory / model_info.MANY_TOKENS)
    _make_uint8(few.graph)
    ir.save(few, directory / model_info.MANY_TOKENS_UINT8)
    ir.save(unpacking.model(), directory / UNPACK)
    return ""


# --- the products --------------------------------------------------------------------------------

Held = Sequence[tuple[ir.Value, ir.Value]]  # codes [in, out] and scales [out] of each group


def _groups(node: ir.Node) -> int:
    """The fewest groups of at most GROUP inputs that are alike; 1 where those would be small."""
    size = node.attributes["K"].as_int()
    sizes = [part for part in range(GROUP // 4, GROUP + 1) if size % part == 0 and part % 16 == 0]
    return size // max(sizes) if sizes else 1


def _whole(node: ir.Node, held: Held, activations: Activations) -> ir.Value:
    """The product of activations that are rounded by token."""
    ((codes, scales),) = held
    return integer_product(node, codes, scales, activations)


def _grouped(node: ir.Node, held: Held, activations: Activations) -> ir.Value:
    """The sum of a product for each group of inputs, which are rounded by token and group."""
    x, count = input_of(node, 0), len(held)
    size = node.attributes["K"].as_int() // count
    assert x.shape is not None
    kept = [0] * (len(x.shape) - 1)
    apart = activations.constant(f"apart_{count}_{size}", np.array([*kept, count, size], np.int64))
    flat = activations.constant(f"flat_{len(kept)}", np.array([*kept, -1], np.int64))
    (parts,) = insert(node, "Reshape", [x, apart])
    parts.shape, parts.dtype = ir.Shape([*list(x.shape)[:-1], count, size]), ir.DataType.FLOAT
    rounded, scale = activations.quantized(parts, node)
    split = {"axis": len(kept), "num_outputs": count}
    every = zip(
        insert(node, "Split", [rounded], split, outputs=count),
        insert(node, "Split", [scale], split, outputs=count),
        held,
        strict=True,
    )
    one = activations.constant("1", np.array(1, np.float32))
    middle = activations.constant("128", np.array(128, np.uint8))
    total: ir.Value | None = None
    for some, its_scale, (codes, scales) in every:
        (mine,) = insert(node, "Reshape", [some, flat])
        (factor,) = insert(node, "Reshape", [its_scale, flat])
        inputs = [mine, codes, one, scales, middle]
        (sums,) = insert(node, "MatMulIntegerToFloat", inputs, domain=MICROSOFT)
        (sums,) = insert(node, "Mul", [sums, factor])
        total = sums if total is None else insert(node, "Add", [total, sums])[0]
    assert total is not None
    return total


# --- which matrices ------------------------------------------------------------------------------


def _products(model: ir.Model) -> list[ir.Node]:
    """The layers' products with matrices in blocks, in the order of the graph."""
    heads = _heads(model.graph)
    return [node for node in model.graph if _is_packed(node) and node not in heads]


def _name(node: ir.Node) -> str:
    return str(node.outputs[0].name)


def _is_packed(node: ir.Node) -> bool:
    """Tell if it is a product with a matrix in blocks of 4 or 8 bits, in the weights file."""
    if node.op_type != "MatMulNBits" or node.attributes.get_int("bits", 4) not in LEVELS:
        return False
    codes = node.inputs[1]
    return codes is not None and isinstance(codes.const_value, ir.ExternalTensor)


def _is_ours(node: ir.Node) -> bool:
    """Tell if it has scales in four or two bytes, whole zero points or none, and nothing else."""
    given = [_held(value) for value in node.inputs[2:] if value is not None]
    if len(given) != len(node.inputs[2:]) or not all(map(is_constant, given)):
        return False
    scales, *zeros = (tensor_of(value).dtype for value in given)
    return scales in SCALES and zeros in ([], [ir.DataType.UINT8])


def _held(value: ir.Value) -> ir.Value:
    """The constant that becomes `value` on loading; itself, if it is one or is none."""
    node = value.producer()
    return input_of(node, 0) if node is not None and _makes_constant(node) else value


def _makes_constant(node: ir.Node) -> bool:
    return node.op_type == "Cast" and is_constant(node.inputs[0])


def _heads(graph: ir.Graph) -> set[ir.Node]:
    """The products that logits are made of: the first ones on the way back from them."""
    heads: set[ir.Node] = set()
    waiting = [value for value in graph.outputs if value.name == "logits"]
    seen = set(waiting)
    while waiting:
        node = waiting.pop().producer()
        if node is None:
            continue
        if node.op_type in PRODUCTS and is_constant(node.inputs[1]):
            heads.add(node)
            continue
        for value in node.inputs:
            if value is not None and value not in seen:
                seen.add(value)
                waiting.append(value)
    return heads


# --- two branches --------------------------------------------------------------------------------


def _layers(graph: ir.Graph, replaced: Collection[str]) -> list[ir.Node]:
    """The nodes that differ in both forms or follow one that does, but for what makes logits; and
    what makes their constants.
    """
    after_head = _followed(graph, _heads(graph))
    changed = [node for node in graph if _name(node) in replaced]
    inner = _followed(graph, changed) - after_head
    inner |= {
        node
        for node in graph
        if _makes_constant(node) and all(use.node in inner for use in node.outputs[0].uses())
    }
    return [node for node in graph if node in inner]


def _followed(graph: ir.Graph, nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """Some nodes, and all that read what they make, also within their own graphs."""
    found, made = set(nodes), {value for node in nodes for value in node.outputs}
    for node in graph:  # in an order in which they can be run
        if node not in found and made.isdisjoint(_read(node)):
            continue
        found.add(node)
        made.update(node.outputs)
    return found


def _read(node: ir.Node) -> set[ir.Value]:
    """All that a node reads, and nodes of graphs within it."""
    within = [node]
    for attribute in node.attributes.values():
        for graph in _graphs(attribute):
            within += list(graph.all_nodes())
    return {value for each in within for value in each.inputs if value is not None}


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def _join(few: ir.Model, many: ir.Model, inner: Sequence[ir.Node]) -> None:
    """Put `inner`, nodes of `few`, and what `many` has in their place, into branches of an If."""
    graph = few.graph
    within = {each for node in inner for each in _with_inner(node)}
    inside = {value for node in inner for value in node.outputs}
    outside = {
        str(value.name): value
        for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]
        if value not in inside
    }
    leaving = [
        value
        for node in inner
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in within for use in value.uses())
    ]
    names = [str(value.name) for value in leaving]
    others = [
        node for node in many.graph if not any(str(value.name) in outside for value in node.outputs)
    ]
    made = {str(value.name): value for node in others for value in node.outputs}
    second = _branch(many.graph, others, [made[name] for name in names], outside, "many")
    asked = contract.value(MANY_TOKENS)
    graph.inputs.append(asked)
    either = ir.node("If", [asked], num_outputs=len(leaving))
    graph.insert_before(inner[0], either)
    for old, new in zip(leaving, either.outputs, strict=True):
        new.name = old.name
        set_type(new, old)
        for use in list(old.uses()):
            if use.node not in within:
                use.node.replace_input_with(use.idx, new)
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
    first = _branch(graph, inner, leaving, {}, "few")
    either.attributes["then_branch"] = ir.AttrGraph("then_branch", second)
    either.attributes["else_branch"] = ir.AttrGraph("else_branch", first)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    # A session is given values of the outermost graph's constants only.
    for value in list(many.graph.initializers.values()):
        if str(value.name).endswith(GIVEN):
            del many.graph.initializers[str(value.name)]
            graph.register_initializer(value)


def _make_uint8(graph: ir.Graph) -> None:
    """Let the matrices that a session is given be of uint8, with 128 for zero."""
    middle = add_initializer(graph, "second.middle", np.array(128, np.uint8))
    for value in graph.initializers.values():
        if not str(value.name).endswith(GIVEN[0]):
            continue
        tensor = tensor_of(value)
        assert isinstance(tensor, ir.ExternalTensor)
        value.const_value = _seen_as(value, ir.DataType.UINT8, tensor.shape.numpy())
        value.dtype = ir.DataType.UINT8
        for use in value.uses():
            use.node.resize_inputs(6)
            use.node.replace_input_with(5, middle)


def _branch(
    graph: ir.Graph,
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    outside: dict[str, ir.Value],
    name: str,
) -> ir.Graph:
    """A graph of some nodes of `graph`, with names of their own, and their constants.

    Args:
        outside: what they read from there on, by the name of what they read until now.
    """
    within = {each for node in nodes for each in _with_inner(node)}
    constants: list[ir.Value] = []
    for value in list(graph.initializers.values()):
        mine = [use for use in value.uses() if use.node in within]
        if not mine:
            continue
        if str(value.name).endswith(GIVEN):
            continue
        copy = ir.Value(
            name=f"{value.name}.{name}", const_value=value.const_value, shape=value.shape
        )
        if value.dtype is not None:
            copy.dtype = value.dtype
        for use in mine:
            use.node.replace_input_with(use.idx, copy)
        constants.append(copy)
    for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
        if str(value.name) in outside and outside[str(value.name)] is not value:
            for use in list(value.uses()):
                if use.node in within:
                    use.node.replace_input_with(use.idx, outside[str(value.name)])
    for node in nodes:
        for each in _with_inner(node):
            if each.name:
                each.name = f"{each.name}.{name}"
            for value in each.outputs:
                value.name = f"{value.name}.{name}"
    for output in list(graph.outputs):
        if output in outputs:
            graph.outputs.remove(output)
    graph.remove(nodes)
    return ir.Graph([], outputs, nodes=nodes, initializers=constants, name=name)


def _with_inner(node: ir.Node) -> list[ir.Node]:
    graphs = [graph for attribute in node.attributes.values() for graph in _graphs(attribute)]
    return [node, *(inner for graph in graphs for inner in graph.all_nodes())]


# --- what makes the matrices ---------------------------------------------------------------------


class _Unpacking:
    """The graph that makes the matrices, one after the other."""

    def __init__(self, opset: int) -> None:
        self._tape = ir.tape.Tape()
        self._opset = opset
        self._held: dict[str, ir.Value] = {}
        self._made: dict[tuple[str, int], Held] = {}  # by the name of the codes, and groups
        self._outputs: list[ir.Value] = []

    def unpacked(self, node: ir.Node, graph: ir.Graph, groups: int) -> Held:
        """Constants of `graph` that the matrix of a product will be, by groups of inputs.

        Layers that share a matrix share them.
        """
        key = str(input_of(node, 1).name), groups
        if key not in self._made:
            made = self._unpack(node, groups)
            self._outputs += [value for pair in made for value in pair]
            self._made[key] = [
                (_promised(graph, codes), _promised(graph, scales)) for codes, scales in made
            ]
        return self._made[key]

    def model(self) -> ir.Model:
        graph = ir.Graph(
            [],
            self._outputs,
            nodes=self._tape.nodes,
            initializers=list(self._held.values()),
            name="unpack",
            opset_imports={"": self._opset},
        )
        return ir.Model(graph, ir_version=10)

    def _unpack(self, node: ir.Node, groups: int) -> Held:
        op, number = self._tape.op, self._number
        size, out, block = (node.attributes[key].as_int() for key in ("K", "N", "block_size"))
        bits, count = node.attributes.get_int("bits", 4), -(-size // block)
        name, held = str(input_of(node, 1).name), _held(input_of(node, 2))
        kept = _seen_as(held, tensor_of(held).dtype, [out, count])
        scales = self._constant(str(held.name), kept)
        if kept.dtype != ir.DataType.FLOAT:
            scales = op("Cast", [scales], attributes={"to": int(ir.DataType.FLOAT)})
        codes = self._constant(name, _codes(node, 1, [out, count, block], bits))
        values = op("Cast", [codes], attributes={"to": int(ir.DataType.FLOAT)})
        values = op("Sub", [values, self._zero_points(node, out, count, bits)])
        values = op("Mul", [values, op("Unsqueeze", [scales, number("2", [2], np.int64)])])
        values = op("Reshape", [values, number(f"rows_{out}", [out, -1], np.int64)])
        if size % block:
            ends = [number(f"{v}", [v], np.int64) for v in (0, size, 1)]
            values = op("Slice", [values, *ends])
        ends = [number(f"{v}", [v], np.int64) for v in range(0, size + 1, size // groups)]
        last = number("1", [1], np.int64)
        made = []
        for group in range(groups):
            mine = (
                op("Slice", [values, ends[group], ends[group + 1], last]) if groups > 1 else values
            )
            pair = self._nearest(mine)
            shapes = ir.Shape([size // groups, out]), ir.Shape([out])
            for value, end, shape in zip(pair, GIVEN, shapes, strict=True):
                value.name, value.shape = f"{name}.{group}_of_{groups}{end}", shape
            made.append(pair)
        return made

    def _nearest(self, values: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Codes int8 [in, out] and scales [out] of a matrix float32 [out, in]."""
        op, number = self._tape.op, self._number
        largest = op(
            "ReduceMax",
            [op("Abs", [values]), number("1", [1], np.int64)],
            attributes={"keepdims": 1},
        )
        unit = op("Mul", [largest, number("1/levels", 1 / LEVELS[8], np.float32)])
        unit = op("Max", [unit, number("tiny", float(np.finfo(np.float32).tiny), np.float32)])
        codes = op("Round", [op("Div", [values, unit])])
        codes = op("Cast", [codes], attributes={"to": int(ir.DataType.INT8)})
        codes = op("Transpose", [codes], attributes={"perm": [1, 0]})
        unit = op("Reshape", [unit, number("flat", [-1], np.int64)])
        codes.dtype, unit.dtype = ir.DataType.INT8, ir.DataType.FLOAT
        return codes, unit

    def _zero_points(self, node: ir.Node, out: int, count: int, bits: int) -> ir.Value:
        """float32 [out, blocks, 1], or the middle code for all."""
        if len(node.inputs) == 3:
            return self._number(f"middle_{bits}", Kernel(bits).middle, np.float32)
        even = count + count % 2 if bits == 4 else count
        zeros = self._constant(str(input_of(node, 3).name), _codes(node, 3, [out, even], bits))
        zeros = self._tape.op("Cast", [zeros], attributes={"to": int(ir.DataType.FLOAT)})
        if even > count:
            ends = [self._number(f"{v}", [v], np.int64) for v in (0, count, 1)]
            zeros = self._tape.op("Slice", [zeros, *ends])
        return self._tape.op("Unsqueeze", [zeros, self._number("2", [2], np.int64)])

    def _number(self, name: str, value: float | Sequence[int], dtype: type) -> ir.Value:
        return self._constant(name, ir.tensor(np.array(value, dtype), name=name))

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._held:
            value = ir.Value(name=name, const_value=tensor)
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            self._held[name] = value
        return self._held[name]


def _promised(graph: ir.Graph, unpacked: ir.Value) -> ir.Value:
    """A constant whose values are given to the session: the file has others in their place."""
    assert unpacked.shape is not None and unpacked.dtype is not None
    size = int(math.prod(unpacked.shape.numpy()) * unpacked.dtype.itemsize)
    tensor = ir.ExternalTensor(
        f"{GRAPH}.data", 0, size, unpacked.dtype, name=str(unpacked.name), shape=unpacked.shape
    )
    value = ir.Value(name=unpacked.name, const_value=tensor, shape=unpacked.shape)
    value.dtype = unpacked.dtype
    graph.register_initializer(value)
    return value


def _codes(node: ir.Node, index: int, shape: Sequence[int], bits: int) -> ir.TensorProtocol:
    """The codes that an input holds, of 4 bits packed in bytes, or of 8: in a shape of its own."""
    dtype = ir.DataType.UINT4 if bits == 4 else ir.DataType.UINT8
    return _seen_as(input_of(node, index), dtype, shape)


def _seen_as(value: ir.Value, dtype: ir.DataType, shape: Sequence[int]) -> ir.TensorProtocol:
    """The bytes of a constant as numbers of another type and shape."""
    held = tensor_of(value)
    if isinstance(held, ir.ExternalTensor):
        return ir.ExternalTensor(
            held.location,
            held.offset,
            held.length,
            dtype,
            name=str(value.name),
            shape=ir.Shape(shape),
            base_dir=held.base_dir,
        )
    raw = np.frombuffer(held.tobytes(), np.uint8)
    if dtype == ir.DataType.UINT4:
        raw = np.stack([raw & 15, raw >> 4], axis=-1)
    else:
        raw = raw.view(dtype.numpy())
    return ir.tensor(raw.reshape(shape), dtype=dtype, name=str(value.name))
