"""Shapes of a graph's values, found by running it twice, and shape arithmetic without it.

Two runs in which every named dimension has another size tell which is which: a dimension that is
the same in both is a constant, one that is 2 and then 3 is the rows. Graphs of torch's older
exporter compute hundreds of shapes from others; what turns out to be constant becomes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.onnx_folder import plain
from fastgen.export.onnx_folder.prepare import skip
from fastgen.export.rewrite.edit import add_initializer, clean_up, constant, flag, input_of
from fastgen.export.rewrite.edit import shape_of as shape_of_constant

LARGEST = 64  # numbers of a shape, or of what one is made of
Seen = Sequence[Mapping[str, Any]]  # of two runs: arrays, or shapes of large ones


def observe(model: ir.Model, feeds: Sequence[dict[str, NDArray[Any]]]) -> Seen:
    """All values of a graph in two runs."""
    values = [output for node in model.graph for output in node.outputs if output.name]
    return plain.observe(model, values, feeds)


def shape_of(observed: Any) -> tuple[int, ...]:
    return observed if isinstance(observed, tuple) else tuple(observed.shape)


def name_shapes(graph: ir.Graph, seen: Seen, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Give every value its type and shape.

    Args:
        sizes: what each named dimension was in the two runs.
    """
    names = {pair: name for name, pair in sizes.items()}
    for node in graph:
        for value in node.outputs:
            name = str(value.name)
            if name not in seen[0]:
                continue
            both = [shape_of(run[name]) for run in seen]
            if len(both[0]) != len(both[1]):
                value.shape = None
                continue
            dims = [a if a == b else names.get((a, b)) for a, b in zip(*both, strict=True)]
            value.shape = ir.Shape(dims)
            array = seen[0][name]
            if not isinstance(array, tuple):
                value.dtype = ir.DataType.from_numpy(array.dtype)
            elif value.dtype is None:
                value.dtype = ir.DataType.FLOAT
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            value.shape, value.dtype = ir.Shape(shape_of_constant(value)), value.const_value.dtype
            assert name == value.name


def fold(model: ir.Model, seen: Seen, sizes: Mapping[str, tuple[int, int]]) -> int:
    """Shapes that are constant become so, and what only computed them goes.

    Args:
        seen: of this very graph.

    Returns:
        How many values were replaced.
    """
    graph, fired = model.graph, 0
    derived = _derived(graph)
    for node in list(graph):
        for value in node.outputs:
            name = str(value.name)
            if value not in derived or value.is_graph_output() or name not in seen[0]:
                continue
            array, other = (run[name] for run in seen)
            if isinstance(array, tuple) or array.size > LARGEST or array.shape != other.shape:
                continue
            if np.array_equal(array, other) and _may_be_constant(array):
                value.replace_all_uses_with(add_initializer(graph, f"{name}.known", array))
                fired += 1
    for node in list(graph):
        if node.op_type == "Reshape" and constant(node.inputs[1]) is None:
            fired += _fold_reshape(graph, node, seen, derived)
        elif node.op_type == "Expand":
            before, after = (str(value.name) for value in (input_of(node, 0), node.outputs[0]))
            if before in seen[0] and all(shape_of(r[before]) == shape_of(r[after]) for r in seen):
                skip(graph, node)
                fired += 1
    clean_up(model)
    return fired


def _derived(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on the shapes of others alone."""
    derived: set[ir.Value] = set()
    for node in graph:
        sources = [value for value in node.inputs if value is not None]
        inner = any(
            attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
        )
        if node.op_type in ("Shape", "Size") or (
            not inner
            and sources
            and all(value in derived or constant(value) is not None for value in sources)
            and any(value in derived for value in sources)
        ):
            derived |= {*node.outputs}
    return derived


def _may_be_constant(array: NDArray[Any]) -> bool:
    """Whole numbers, and a single other one (the root of a size, say).

    What is true in both runs may be false in a longer one.
    """
    return array.dtype.kind in "iu" or (array.dtype.kind == "f" and array.size == 1)


def _fold_reshape(graph: ir.Graph, node: ir.Node, seen: Seen, derived: set[ir.Value]) -> int:
    """A Reshape to a constant: 0 where a dimension stays, -1 for one that is not known."""
    shape = input_of(node, 1)
    given = [source for run in seen if (source := _shape_in(input_of(node, 0), run)) is not None]
    if shape not in derived or len(given) < len(seen) or flag(node, "allowzero"):
        return 0
    wanted = [shape_of(run[str(node.outputs[0].name)]) for run in seen]
    target = []
    for axis, (a, b) in enumerate(zip(*wanted, strict=True)):
        stays = all(
            axis < len(source) and source[axis] == w[axis]
            for source, w in zip(given, wanted, strict=True)
        )
        target.append(a if a == b and a != 0 else 0 if stays else -1)
    if target.count(-1) > 1:
        return 0
    array = np.array(target, np.int64)
    node.replace_input_with(1, add_initializer(graph, f"{shape.name}.to", array))
    return 1


def _shape_in(value: ir.Value, run: Mapping[str, Any]) -> tuple[int, ...] | None:
    if value.name is not None and value.name in run:
        return shape_of(run[value.name])
    held = constant(value)
    return None if held is None else held.shape
