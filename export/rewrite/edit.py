"""Reading and changing a graph, as every pass over one does it: values, constants, nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
from numpy.typing import NDArray

MICROSOFT = "com.microsoft"
CHANGED = ".changed"  # how the name of a constant ends that was made of another


# Reading a graph


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node behind `value` if it is an `op_type`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def only_use(value: ir.Value | None) -> bool:
    """True if exactly one node reads `value`, and the graph does not return it."""
    return value is not None and len(value.uses()) == 1 and not value.is_graph_output()


def reader_of(value: ir.Value | None) -> ir.Node | None:
    """The node that alone reads `value`; None if there are others, or the graph returns it."""
    if value is None or not only_use(value):
        return None
    return next(use.node for use in value.uses())


def input_of(node: ir.Node, index: int) -> ir.Value:
    """The value that a node reads at an index.

    Raises:
        ValueError: that input is left out.
    """
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"{node.op_type} {node.name} lacks its input {index}")
    return value


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that a node is in.

    Raises:
        ValueError: it is in none.
    """
    if not isinstance(node.graph, ir.Graph):
        raise ValueError(f"{node.op_type} {node.name} is in no graph")
    return node.graph


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor of a constant.

    Raises:
        ValueError: it is computed, or left out.
    """
    if value is None or value.const_value is None:
        raise ValueError(f"{value} is no constant")
    return value.const_value


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer; None for what is computed."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer, whose array may be large: it is not read."""
    return value is not None and value.const_value is not None and value.is_initializer()


def is_float(constant: ir.Value | None) -> bool:
    """True for an initializer in float32."""
    return tensor_of(constant).dtype == ir.DataType.FLOAT


def constant_input(node: ir.Node) -> int:
    """The index of the first constant that a node reads."""
    return next(index for index, value in enumerate(node.inputs) if is_constant(value))


def shape_of(constant: ir.Value | None) -> list[int]:
    """The shape of an initializer's array, whatever the graph says."""
    return list(tensor_of(constant).shape.numpy())


def sizes_of(value: ir.Value | None) -> list[int | None]:
    """The sizes of dimensions, None for a symbolic one; empty where the shape is not known."""
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else None for size in value.shape]


def same_shape(one: ir.Value | None, other: ir.Value | None) -> bool:
    """True if both shapes are known and equal, symbolic dimensions by name."""
    if one is None or other is None or one.shape is None or other.shape is None:
        return False
    first, second = (
        [size if isinstance(size, int) else size.value for size in shape]
        for shape in (one.shape, other.shape)
    )
    return first == second and None not in first


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions; None where the shape is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def flag(node: ir.Node, name: str) -> bool:
    """An attribute that is 0 or 1; 0 where it is left out."""
    return node.attributes.get_int(name, 0) != 0


def routers(graph: ir.Graph) -> set[ir.Node]:
    """Products that choose among experts: the last ones before the k largest are taken.

    Their choice jumps where two experts are close: they stay by themselves, and in float32.
    """
    products: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    pending = [node.inputs[0] for node in graph if node.op_type == "TopK"]
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is None or node in seen or node.op_type == "Shape":
            continue
        seen.add(node)
        if node.op_type == "MatMul" and is_constant(node.inputs[1]):
            products.add(node)
        else:
            pending += node.inputs
    return products


# Adding constants


def add_initializer(
    graph: ir.Graph, name: str, array: NDArray[np.generic] | np.generic
) -> ir.Value:
    """Add a constant to the graph, under a name that is free."""
    return _add(graph, name, ir.tensor(np.asarray(array, order="C")))


def add_lazily(
    graph: ir.Graph,
    name: str,
    make: Callable[[], NDArray[np.generic]],
    shape: Sequence[int],
    dtype: ir.DataType,
) -> ir.Value:
    """Add a constant whose array is made whenever it is read, and not kept."""
    tensor = ir.LazyTensor(lambda: ir.tensor(np.ascontiguousarray(make())), dtype, ir.Shape(shape))
    return _add(graph, name, tensor)


def _add(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    free, number = name, 0
    while free in graph.initializers:
        number += 1
        free = f"{name}.{number}"
    tensor.name = free
    value = ir.Value(name=free, const_value=tensor)
    value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
    graph.register_initializer(value)
    return value


def changed(
    graph: ir.Graph,
    old: ir.Value,
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> ir.Value:
    """Add `change` of a constant; a matrix is computed whenever it is read."""
    tensor, name, shape = tensor_of(old), f"{old.name}{CHANGED}", shape_of(old)
    if len(shape) == 1:
        return add_initializer(graph, name, change(tensor.numpy()))
    return add_lazily(graph, name, lambda: change(tensor.numpy()), shape, ir.DataType.FLOAT)


def transposed(graph: ir.Graph, matrix: ir.Value) -> ir.Value:
    """Add the transposition of a constant [a, b], once; it is computed whenever it is read."""
    tensor, name = tensor_of(matrix), f"{matrix.name}.T"
    earlier = graph.initializers.get(name)
    if earlier is not None and isinstance(earlier.const_value, ir.LazyTensor):  # one of ours
        return earlier
    return add_lazily(graph, name, lambda: tensor.numpy().T, shape_of(matrix)[::-1], tensor.dtype)


# Changing nodes


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    *,
    domain: str = "",
    outputs: int = 1,
) -> tuple[ir.Value, ...]:
    """Insert a node in front of `before`, and return its outputs."""
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs)
    graph_of(before).insert_before(before, node)
    return tuple(node.outputs)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old` read `new`; a graph output keeps its name."""
    set_type(new, old)
    if old.is_graph_output():
        old.name, new.name = f"{old.name}_replaced", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def set_type(value: ir.Value, like: ir.Value) -> None:
    """Give `value` the shape and dtype of another, as far as they are known."""
    value.shape = like.shape
    if like.dtype is not None:
        value.dtype = like.dtype


def take_place(node: ir.Node, new: ir.Value) -> None:
    """Remove `node`, whose only output `new` stands for."""
    replace(node.outputs[0], new)
    graph_of(node).remove(node, safe=True)


def remake(
    node: ir.Node, index: int, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> None:
    """Let a node read `change` of the constant that it reads at an index."""
    node.replace_input_with(index, changed(graph_of(node), input_of(node, index), change))


def product_of(gemm: ir.Node, x: ir.Value, out: ir.Value) -> ir.Value | None:
    """Insert MatMul and Add in front of a Gemm, which they compute for an `x` of any rank.

    Args:
        x: read in place of what the Gemm reads.
        out: a value whose type the product has.

    Returns:
        The sum; None for a Gemm that is more than a product with a constant, and a sum.
    """
    attributes, matrix = gemm.attributes, input_of(gemm, 1)
    scales = (attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0))
    if scales != (1, 1) or flag(gemm, "transA") or not is_constant(matrix):
        return None
    if flag(gemm, "transB"):
        matrix = transposed(graph_of(gemm), matrix)
    (product,) = insert(gemm, "MatMul", [x, matrix])
    set_type(product, out)
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        (product,) = insert(gemm, "Add", [product, gemm.inputs[2]])
    return product


def clean_up(model: ir.Model) -> None:
    """Drop nodes and constants that nothing reads, and compute equal things once."""
    ir.passes.common.CommonSubexpressionEliminationPass()(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
