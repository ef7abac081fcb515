"""A product of its own for the values of attention, which take more bits than queries and keys.

What is wrong with a value is added up over all tokens that attend to it, as all do to a text's
first; queries and keys only say how much. In SmolLM2 a thirtieth of the layers' weights makes
values, and nearly all of what the whole product costs.
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from fastgen.export.quantize.rotate_values import attention_nodes, written_by
from fastgen.export.quantize.rotation import Floats
from fastgen.export.rewrite.edit import (
    add_lazily,
    input_of,
    insert,
    shape_of,
    sizes_of,
    take_place,
    tensor_of,
)


def split(graph: ir.Graph) -> int:
    """Cut values off the products that make queries, keys and values; the number of products."""
    return sum(_split(graph, node) for node in attention_nodes(graph))


def _split(graph: ir.Graph, attention: ir.Node) -> bool:
    size = sizes_of(attention.inputs[4])[-1:]
    if not size or size[0] is None:
        return False
    count = attention.attributes.get_int("kv_num_heads", 0) * size[0]
    written = written_by(attention, count)
    if written is None:
        return False
    writers, start = written
    node, _ = writers[-1]
    matrix, out = input_of(node, 1), node.outputs[0]
    rows, width = shape_of(matrix)
    if start == 0 or start + count != width or out.shape is None or out.dtype is None:
        return False
    made = []
    for name, columns in (("others", slice(0, start)), ("values", slice(start, width))):
        part = partial(_columns, tensor_of(matrix), columns)
        shape = rows, columns.stop - columns.start
        held = add_lazily(graph, f"{matrix.name}.{name}", part, shape, ir.DataType.FLOAT)
        (value,) = insert(node, "MatMul", [node.inputs[0], held])
        value.shape, value.dtype = ir.Shape([*list(out.shape)[:-1], shape[1]]), out.dtype
        made.append(value)
    (whole,) = insert(node, "Concat", made, {"axis": -1})
    take_place(node, whole)
    return True


def _columns(tensor: ir.TensorProtocol, columns: slice) -> Floats:
    array: Floats = tensor.numpy()
    return array[:, columns]
