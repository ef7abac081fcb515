"""The values of attention, turned by head: in the product that makes them, and the next one."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from fastgen.export.quantize.rotation import Floats, Rotation, by_columns
from fastgen.export.rewrite.edit import (
    constant,
    constant_input,
    input_of,
    is_constant,
    is_float,
    only_use,
    rank,
    reader_of,
    remake,
    shape_of,
    sizes_of,
)


def attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    """Attention nodes whose cached values are theirs alone."""
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    return [node for node in nodes if node.inputs[4] is not None and only_use(node.inputs[4])]


def turn_values(graph: ir.Graph, node: ir.Node) -> bool:
    """Turn the values of a layer by head, and what reads them back. Whether it could be done."""
    past = input_of(node, 4)
    size = sizes_of(past)[-1] if past.shape is not None else None
    after = reader_of(node.outputs[0])
    if size is None or past.dtype != ir.DataType.FLOAT or after is None:
        return False
    reads = after.op_type == "MatMul" and is_constant(after.inputs[1])
    if not reads or not _is_own_matrix(after.inputs[1]):
        return False
    count = node.attributes.get_int("kv_num_heads", 0) * size
    written = written_by(node, count)
    if written is None:
        return False
    writers, start = written
    rotation = Rotation(size, signed=False)
    for writer, index in writers:
        remake(writer, index, partial(_turned_part, rotation, slice(start, start + count)))
    remake(after, 1, partial(_turned_rows, rotation))
    return True


def _is_own_matrix(value: ir.Value | None) -> bool:
    return only_use(value) and rank(value) == 2 and is_float(value)


def written_by(node: ir.Node, count: int) -> tuple[list[tuple[ir.Node, int]], int] | None:
    """The product (and the bias) that makes a layer's values, and their first column in it."""
    value, start = node.inputs[2], 0
    if value is None:  # packed: queries, keys and values
        value = input_of(node, 0)
        width = sizes_of(value)[-1] if value.shape is not None else None
        if node.inputs[1] is not None or width is None:
            return None
        start = width - count
    if not only_use(value):
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Split":
        sizes = constant(producer.inputs[1]) if len(producer.inputs) > 1 else None
        if sizes is None or not only_use(producer.inputs[0]):
            return None
        start = int(sizes[: producer.outputs.index(value)].sum())
        producer = input_of(producer, 0).producer()
    writers = []
    if producer is not None and producer.op_type == "Add":
        index = constant_input(producer) if any(map(is_constant, producer.inputs)) else None
        if index is None or len(shape_of(producer.inputs[index])) != 1:
            return None
        writers.append((producer, index))
        other = input_of(producer, 1 - index)
        producer = other.producer() if only_use(other) else None
    if producer is None or producer.op_type != "MatMul" or not is_constant(producer.inputs[1]):
        return None
    if not _is_own_matrix(producer.inputs[1]):
        return None
    return [*writers, (producer, 1)], start


def _turned_part(rotation: Rotation, columns: slice, array: Floats) -> Floats:
    """The array with some of its columns turned by head."""
    turned = array.copy()
    heads = array[..., columns].reshape(-1, rotation.size)
    turned[..., columns] = rotation.forward(heads).reshape(turned[..., columns].shape)
    return turned


def _turned_rows(rotation: Rotation, matrix: Floats) -> Floats:
    """A matrix [heads * size, out] that reads what was turned by head."""

    def change(columns: Floats) -> Floats:
        heads = columns.reshape(-1, rotation.size, columns.shape[1])
        return rotation.of_columns(heads).reshape(columns.shape)

    return by_columns(change, matrix)
