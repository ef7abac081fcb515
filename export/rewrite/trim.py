"""Rewriting rules on the exported graph: the same numbers from fewer nodes and less memory.

A node costs a microsecond or two beside its arithmetic, and a decoder has hundreds. Each rule is
a function `graph -> number of places` that changes the graph in place; `trim` runs them in order.
A rule knows operators, never models: where its pattern does not hold, it does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from fastgen.export.rewrite.edit import (
    MICROSOFT,
    add_initializer,
    add_lazily,
    clean_up,
    constant,
    flag,
    input_of,
    insert,
    is_constant,
    only_use,
    producer,
    product_of,
    rank,
    reader_of,
    replace,
    routers,
    same_shape,
    set_type,
    shape_of,
    sizes_of,
    take_place,
    tensor_of,
)

LARGEST_TABLE = 1 << 16  # positions for which a table of rotations is worth its memory


def trim(model: ir.Model, max_length: int | None) -> dict[str, int]:
    """Apply every rule.

    Args:
        model: the exported graph; changed in place.
        max_length: positions that the model was made for; None for any number.

    Returns:
        How often each rule fired.
    """
    graph = model.graph
    model.opset_imports.setdefault(MICROSOFT, 1)
    rules = (
        partial(share_tied_weights, graph),
        partial(products_without_reshapes, graph),
        partial(rotate_flat, graph),
        partial(drop_round_trips, graph),
        partial(pack_attention, model, max_length),
        partial(merge_products, graph),
    )
    fired = {}
    for rule in rules:
        fired[rule.func.__name__] = rule()
        clean_up(model)  # a rule must not see readers that nobody reads
    return fired


def rotations_are_tabled(model: ir.Model) -> bool:
    """True if some rotation comes from a table, which ends at the model's last position."""
    return any(
        node.op_type == "GroupQueryAttention" and node.attributes.get_int("do_rotary", 0)
        for node in model.graph
    )


# The rules


def share_tied_weights(graph: ir.Graph) -> int:
    """A matrix that is another one transposed (a tied `lm_head`) reads that one instead.

    torch's exporter transposes the weight of a Linear: in a node, or (small ones) into a second
    copy. The fused product transposes while it packs, so the embedding serves both.
    """
    tables = [input_of(node, 0) for node in graph if node.op_type == "Gather"]
    tables = [table for table in tables if rank(table) == 2 and is_constant(table)]
    fired = 0
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        weight = _transposed_weight(node.inputs[1], tables)
        if weight is not None:
            (product,) = insert(
                node, "FusedMatMul", [node.inputs[0], weight], {"transB": 1}, domain=MICROSOFT
            )
            take_place(node, product)
            fired += 1
    return fired


def _transposed_weight(value: ir.Value | None, tables: Sequence[ir.Value]) -> ir.Value | None:
    """The initializer that `value` is the transposition of."""
    transpose = producer(value, "Transpose")
    if transpose is not None and rank(transpose.inputs[0]) == 2:
        return transpose.inputs[0] if is_constant(transpose.inputs[0]) else None
    if not is_constant(value):
        return None
    shape = shape_of(value)[::-1]
    alike = (table for table in tables if shape_of(table) == shape)
    tensor = tensor_of(value)
    return next((t for t in alike if _equal(tensor_of(t).numpy(), tensor.numpy().T)), None)


def products_without_reshapes(graph: ir.Graph) -> int:
    """Reshape, Gemm, Reshape on [rows, new, in] is MatMul and Add: neither needs two dimensions."""
    fired = 0
    for node in list(graph):
        before = producer(node.inputs[0], "Reshape") if node.op_type == "Gemm" else None
        after = reader_of(node.outputs[0])
        if before is None or after is None or after.op_type != "Reshape":
            continue
        x, out = input_of(before, 0), after.outputs[0]
        if not _same_widths(node, x, out):
            continue
        product = product_of(node, x, out)
        if product is not None:
            replace(out, product)
            graph.remove([after, node], safe=True)
            fired += 1
    return fired


def _same_widths(gemm: ir.Node, x: ir.Value, out: ir.Value) -> bool:
    """True if x [rows, new, in] and out [rows, new, out] have the sizes of the Gemm's matrix."""
    if rank(x) != 3 or rank(out) != 3 or not is_constant(gemm.inputs[1]):
        return False
    shape = shape_of(gemm.inputs[1])
    shape = shape[::-1] if flag(gemm, "transB") else shape
    return [sizes_of(x)[-1], sizes_of(out)[-1]] == shape


def rotate_flat(graph: ir.Graph) -> int:
    """Rotate [rows, new, heads * dim] where it is split into heads, transposed, and back again."""
    fired = 0
    for node in list(graph):
        if node.op_type != "RotaryEmbedding" or rank(node.inputs[0]) != 4:
            continue
        split = _split_heads(node.inputs[0])
        join = _joined_heads(node.outputs[0])
        heads = sizes_of(node.inputs[0])[1]
        if heads is None or split is None or join is None or not same_shape(split, join):
            continue
        attributes = {
            "num_heads": heads,
            "interleaved": node.attributes.get_int("interleaved", 0),
            "rotary_embedding_dim": node.attributes.get_int("rotary_embedding_dim", 0),
        }
        (flat,) = insert(node, "RotaryEmbedding", [split, *node.inputs[1:]], attributes)
        replace(join, flat)
        fired += 1
    return fired


def drop_round_trips(graph: ir.Graph) -> int:
    """Reshapes that lead back to a shape there was before, or stay where they are."""
    fired = 0
    for node in list(graph):
        if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
            continue
        sources = [input_of(node, 0)]
        while (earlier := producer(sources[-1], "Reshape")) is not None:
            sources.append(input_of(earlier, 0))
        for source in reversed(sources):
            if same_shape(source, node.outputs[0]):
                node.outputs[0].replace_all_uses_with(source)
                fired += 1
                break
    return fired


def pack_attention(model: ir.Model, max_length: int | None) -> int:
    """One product for queries, keys and values, and the rotation inside the attention node."""
    graph = model.graph
    tables: dict[tuple[ir.Value, ir.Value], tuple[ir.Value, ir.Value] | None] = {}
    fired = 0
    for node in list(graph):
        if node.op_type != "GroupQueryAttention" or node.inputs[1] is None:
            continue
        packed = _packed(graph, node)
        if packed is None:
            continue
        source, rotation = packed
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if rotation is not None and not _kernel_rotates(node, rotation):
            continue
        inputs = [source, None, None, *node.inputs[3:]]
        if rotation is not None:
            cos, sin = input_of(rotation, 1), input_of(rotation, 2)
            if (cos, sin) not in tables:
                tables[cos, sin] = _rotation_tables(model, cos, sin, max_length)
            table = tables[cos, sin]
            if table is None:
                continue
            inputs[7:9] = table
            attributes["do_rotary"] = 1
            attributes["rotary_interleaved"] = rotation.attributes.get_int("interleaved", 0)
        outputs = insert(
            node, "GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3
        )
        for old, new in zip(node.outputs, outputs, strict=True):
            replace(old, new)
        fired += 1
    return fired


def _kernel_rotates(node: ir.Node, rotation: ir.Node) -> bool:
    """True if the attention node can: head sizes, and the parts that turn, are multiples of 16."""
    size, half = sizes_of(node.inputs[3])[3], (sizes_of(rotation.inputs[1]) or [None])[-1]
    return size is not None and size % 16 == 0 and (half is None or half % 8 == 0)


def merge_products(graph: ir.Graph) -> int:
    """Products of one activation with several matrices are one product, split afterwards."""
    fired = 0
    apart = routers(graph)
    for value in [output for node in list(graph) for output in node.outputs]:
        siblings = [
            use.node
            for use in value.uses()
            if use.node.op_type == "MatMul"
            and use.node not in apart
            and use.idx == 0
            and rank(use.node.inputs[1]) == 2
            and is_constant(use.node.inputs[1])
        ]
        if len(siblings) < 2:
            continue
        order = {node: index for index, node in enumerate(graph)}
        siblings.sort(key=lambda node: order[node])
        matrices = [input_of(node, 1) for node in siblings]
        sizes = [shape_of(matrix)[1] for matrix in matrices]
        name = f"{matrices[0].name}.merged"
        merged = _side_by_side(graph, name, matrices)
        (product,) = insert(siblings[0], "MatMul", [value, merged])
        _set_width(product, value, sum(sizes))
        lengths = add_initializer(graph, f"{name}.sizes", np.array(sizes, np.int64))
        parts = insert(
            siblings[0], "Split", [product, lengths], {"axis": -1}, outputs=len(siblings)
        )
        for node, part in zip(siblings, parts, strict=True):
            take_place(node, part)
        fired += 1
    return fired


# What the rules ask


def _set_width(product: ir.Value, like: ir.Value, width: int) -> None:
    """The type of a product: that of its activation with another last dimension."""
    set_type(product, like)
    if like.shape is not None:
        product.shape = ir.Shape([*list(like.shape)[:-1], width])


def _side_by_side(graph: ir.Graph, name: str, matrices: Sequence[ir.Value]) -> ir.Value:
    """Matrices [in, out] as one, joined when it is read."""
    held = [tensor_of(matrix) for matrix in matrices]
    shape = [shape_of(matrices[0])[0], sum(shape_of(matrix)[1] for matrix in matrices)]
    return add_lazily(graph, name, partial(_joined, held), shape, held[0].dtype)


def _joined(held: Sequence[ir.TensorProtocol]) -> NDArray[np.generic]:
    return np.concatenate([tensor.numpy() for tensor in held], axis=1)


def _equal(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    """Equality of large matrices, by blocks of rows: no third copy in memory."""
    step = max(1, (1 << 22) // one.shape[1])
    return all(
        np.array_equal(one[i : i + step], other[i : i + step]) for i in range(0, len(one), step)
    )


def _split_heads(value: ir.Value | None) -> ir.Value | None:
    """x [rows, new, heads * dim] if `value` is its [rows, heads, new, dim]."""
    transpose = producer(value, "Transpose")
    if transpose is None or list(transpose.attributes.get_ints("perm", ())) != [0, 2, 1, 3]:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    return None if reshape is None or rank(reshape.inputs[0]) != 3 else reshape.inputs[0]


def _joined_heads(value: ir.Value) -> ir.Value | None:
    """The [rows, new, heads * dim] that `value` [rows, heads, new, dim] becomes, and only that."""
    for op_type in ("Transpose", "Reshape"):
        node = reader_of(value)
        if node is None or node.op_type != op_type:
            return None
        perm = list(node.attributes.get_ints("perm", ()))
        if op_type == "Transpose" and perm != [0, 2, 1, 3]:
            return None
        value = node.outputs[0]
    return value if rank(value) == 3 else None


def _packed(graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Node | None] | None:
    """One value that holds queries, keys and values of an attention node, and their rotation."""
    query, key, value = node.inputs[:3]
    rotation, other = producer(query, "RotaryEmbedding"), producer(key, "RotaryEmbedding")
    if (rotation is None) != (other is None):
        return None
    if rotation is not None and other is not None:
        if not _same_rotation(rotation, other) or not all(only_use(v) for v in (query, key)):
            return None
        query, key = rotation.inputs[0], other.inputs[0]
    split = producer(query, "Split")
    if split is not None and [query, key, value] == list(split.outputs):
        return input_of(split, 0), rotation
    parts = [part for one in (query, key, value) if (part := _linear(one)) is not None]
    if len(parts) < 3 or len({part.x for part in parts}) != 1:
        return None
    x, matrices = parts[0].x, [part.matrix for part in parts]
    matrix = _side_by_side(graph, f"{matrices[0].name}.packed", matrices)
    width = shape_of(matrix)[1]
    first = min((part.node for part in parts), key=list(graph).index)
    (product,) = insert(first, "MatMul", [x, matrix])
    _set_width(product, x, width)
    if any(part.bias is not None for part in parts):
        bias = np.concatenate([part.bias_or_zeros() for part in parts])
        added = add_initializer(graph, f"{matrix.name}.bias", bias)
        (product,) = insert(first, "Add", [product, added])
        _set_width(product, x, width)
    return product, rotation


@dataclass(frozen=True)
class _Linear:
    """A product of x with a constant [in, out], and perhaps the sum with a constant [out]."""

    x: ir.Value
    matrix: ir.Value
    node: ir.Node
    bias: ir.Value | None

    def bias_or_zeros(self) -> NDArray[Any]:
        if self.bias is None:
            return np.zeros(shape_of(self.matrix)[1], np.float32)
        return tensor_of(self.bias).numpy()


def _linear(value: ir.Value | None) -> _Linear | None:
    """`value` as a linear function with constants, if it is one."""
    bias = None
    add = producer(value, "Add")
    if add is not None:
        bias = next((v for v in add.inputs if constant(v) is not None and rank(v) == 1), None)
        if bias is None or not only_use(value):
            return None
        value = next(v for v in add.inputs if v is not bias)
    product = producer(value, "MatMul")
    if product is None or not only_use(value) or not is_constant(product.inputs[1]):
        return None
    if rank(product.inputs[1]) != 2:
        return None
    return _Linear(input_of(product, 0), input_of(product, 1), product, bias)


def _same_rotation(one: ir.Node, other: ir.Node) -> bool:
    """True if two rotations turn by the same angles."""
    if flag(one, "interleaved") != flag(other, "interleaved"):
        return False
    pairs = zip(one.inputs[1:3], other.inputs[1:3], strict=True)
    return all(a is b or _same_value(a, b) for a, b in pairs)


def _same_value(one: ir.Value | None, other: ir.Value | None) -> bool:
    """True if two values come from equal nodes of the same inputs."""
    a = None if one is None else one.producer()
    b = None if other is None else other.producer()
    return (
        a is not None
        and b is not None
        and a.op_type == b.op_type
        and a.domain == b.domain
        and list(a.inputs) == list(b.inputs)
    )


def _rotation_tables(
    model: ir.Model, cos: ir.Value, sin: ir.Value, max_length: int | None
) -> tuple[ir.Value, ir.Value] | None:
    """Tables [positions, dim / 2] of what the graph itself computes for each position.

    None if the angles depend on more than the position, or the table would be too large.
    """
    if max_length is None or max_length > LARGEST_TABLE:
        return None
    arrays = evaluate(model, [cos, sin], np.arange(max_length, dtype=np.int64)[None])
    if arrays is None or any(a.ndim != 3 or a.shape[:2] != (1, max_length) for a in arrays):
        return None
    cosines, sines = (array[0] for array in arrays)
    return (
        add_initializer(model.graph, "rotation.cos", cosines),
        add_initializer(model.graph, "rotation.sin", sines),
    )


def evaluate(
    model: ir.Model, values: Sequence[ir.Value], position_ids: NDArray[np.int64]
) -> list[NDArray[np.float32]] | None:
    """Compute `values` of the graph from `position_ids` alone; None if they need more."""
    needed: list[ir.Node] = []
    pending = [value.producer() for value in values]
    while pending:
        node = pending.pop()
        if node is None or node in needed:
            continue
        needed.append(node)
        for value in node.inputs:
            if value is None or constant(value) is not None:
                continue
            if value.is_graph_input() and value.name != "position_ids":
                return None
            pending.append(value.producer())
    session = onnxruntime.InferenceSession(
        _part_of(model, needed, values).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return list(session.run(None, {"position_ids": position_ids}))


def _part_of(
    model: ir.Model, needed: Sequence[ir.Node], values: Sequence[ir.Value]
) -> onnx.ModelProto:
    """A model of the nodes `needed`, which give `values` from the positions."""
    order = {node: index for index, node in enumerate(model.graph)}
    nodes = sorted(needed, key=lambda node: order[node])
    constants = {
        str(value.name): array
        for node in nodes
        for value in node.inputs
        if value is not None and (array := constant(value)) is not None
    }
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "rotation",
        [onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, [1, None])],
        [
            onnx.helper.make_tensor_value_info(str(v.name), onnx.TensorProto.FLOAT, None)
            for v in values
        ],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [onnx.helper.make_opsetid(name, v) for name, v in model.opset_imports.items()]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
