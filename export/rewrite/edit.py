"""Reading and changing a graph, as every pass over one does it: values, constants, nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def only_use(value: ir.Value) -> bool:
    """True if exactly one node reads `value`, and the graph does not return it."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The array of an initializer; None for what is computed."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer, whose array may be large: it is not read."""
    return value is not None and value.const_value is not None and value.is_initializer()


def shape_of(constant: ir.Value) -> list[int]:
    """The shape of an initializer's array, whatever the graph says."""
    return [int(size) for size in constant.const_value.shape]


def same_shape(one: ir.Value | None, other: ir.Value | None) -> bool:
    """True if both shapes are known and equal, symbolic dimensions by name."""
    if one is None or other is None or one.shape is None or other.shape is None:
        return False
    named = [[d if isinstance(d, int) else d.value for d in v.shape] for v in (one, other)]
    return named[0] == named[1] and None not in named[0]


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions; None where the shape is not known."""
    return None if value is None or value.shape is None else len(value.shape)


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
    value.shape, value.dtype = tensor.shape, tensor.dtype
    graph.register_initializer(value)
    return value


def changed(
    graph: ir.Graph,
    old: ir.Value,
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> ir.Value:
    """Add `change` of a constant; a matrix is computed whenever it is read."""
    tensor, name, shape = old.const_value, f"{old.name}{CHANGED}", shape_of(old)
    if len(shape) == 1:
        return add_initializer(graph, name, change(tensor.numpy()))
    return add_lazily(graph, name, lambda: change(tensor.numpy()), shape, ir.DataType.FLOAT)


def transposed(graph: ir.Graph, matrix: ir.Value) -> ir.Value:
    """Add the transposition of a constant [a, b], once; it is computed whenever it is read."""
    tensor, name = matrix.const_value, f"{matrix.name}.T"
    earlier = graph.initializers.get(name)
    if earlier is not None and isinstance(earlier.const_value, ir.LazyTensor):  # one of ours
        return earlier
    return add_lazily(graph, name, lambda: tensor.numpy().T, shape_of(matrix)[::-1], tensor.dtype)


# Changing nodes


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int | float | str | Sequence[int]] | None = None,
    *,
    domain: str = "",
    outputs: int = 1,
) -> tuple[ir.Value, ...]:
    """Insert a node in front of `before`, and return its outputs."""
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, num_outputs=outputs)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return tuple(node.outputs)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old` read `new`; a graph output keeps its name."""
    new.shape, new.dtype = old.shape, old.dtype
    if old.is_graph_output():
        old.name, new.name = f"{old.name}_replaced", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def take_place(node: ir.Node, new: ir.Value) -> None:
    """Remove `node`, whose only output `new` stands for."""
    replace(node.outputs[0], new)
    assert node.graph is not None
    node.graph.remove(node, safe=True)


def remake(
    node: ir.Node, index: int, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> None:
    """Let a node read `change` of the constant that it reads at an index."""
    node.replace_input_with(index, changed(node.graph, node.inputs[index], change))


def product_of(gemm: ir.Node, x: ir.Value, out: ir.Value) -> ir.Value | None:
    """Insert MatMul and Add in front of a Gemm, which they compute for an `x` of any rank.

    Args:
        x: read in place of what the Gemm reads.
        out: a value whose type the product has.

    Returns:
        The sum; None for a Gemm that is more than a product with a constant, and a sum.
    """
    attributes, matrix = gemm.attributes, gemm.inputs[1]
    scales = (attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0))
    if scales != (1, 1) or attributes.get_int("transA", 0) or not is_constant(matrix):
        return None
    if attributes.get_int("transB", 0):
        matrix = transposed(gemm.graph, matrix)
    (product,) = insert(gemm, "MatMul", [x, matrix])
    product.shape, product.dtype = out.shape, out.dtype
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        (product,) = insert(gemm, "Add", [product, gemm.inputs[2]])
    return product


def clean_up(model: ir.Model) -> None:
    """Drop nodes and constants that nothing reads, and compute equal things once."""
    ir.passes.common.CommonSubexpressionEliminationPass()(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
