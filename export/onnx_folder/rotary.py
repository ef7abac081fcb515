"""Rotations that are written out become RotaryEmbedding nodes, which `trim` puts into attention.

What is turned is found by how it is written, whose halves are swapped and one of them negated; that
both halves turn by the same angles is seen in a run.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.onnx_folder.shapes import Seen
from fastgen.export.rewrite.edit import (
    add_initializer,
    constant,
    insert,
    producer,
    rank,
    replace,
    set_type,
    sizes_of,
)

Part = tuple[ir.Value, int, int]  # numbers of each head of a value: from one to before another


def turn(graph: ir.Graph, seen: Seen) -> int:
    """Replace what rotates heads; says how often.

    Args:
        seen: of this very graph, whose shapes are known.
    """
    fired = 0
    cut: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Add" and rank(node.outputs[0]) == 4:
            fired += _turned(node, seen, cut)
    return fired


def _turned(node: ir.Node, seen: Seen, cut: dict[ir.Value, ir.Value]) -> bool:
    """x * cos + swapped(x) * sin, for heads [rows, heads, new, size], whole or their first part."""
    products = [producer(value, "Mul") for value in node.inputs]
    for one, other in (products, products[::-1]):
        if one is None or other is None:
            return False
        for half, sin in (other.inputs, other.inputs[::-1]):
            x = _swapped(half)
            if x is None or x not in one.inputs:
                continue
            cos = next(value for value in one.inputs if value is not x)
            angles = [half for value in (cos, sin) if (half := _half(value, seen)) is not None]
            size = sizes_of(x)[3]
            if len(angles) < 2 or size is None:
                continue
            if any(sizes_of(angle)[-1] != size for angle in (cos, sin)):
                continue
            for angle in angles:
                if angle not in cut:
                    cut[angle] = _cut(node, angle, size // 2)
            _put(node, x, [cut[angle] for angle in angles], size)
            return True
    return False


def _swapped(value: ir.Value | None) -> ir.Value | None:
    """x where `value` is its second half, negated, and then its first."""
    join = producer(value, "Concat")
    if value is None or join is None or len(join.inputs) != 2 or not _is_last(join, value):
        return None
    negated = producer(join.inputs[0], "Neg")
    if negated is None:
        return None
    second, first = _part(negated.inputs[0]), _part(join.inputs[1])
    if second is None or first is None or second[0] is not first[0]:
        return None
    x = first[0]
    size = sizes_of(x)[3]
    if size is None:
        return None
    return x if first[1:] == (0, size // 2) and second[1:] == (size // 2, size) else None


def _is_last(node: ir.Node, value: ir.Value) -> bool:
    """Tell if a node works along the last axis."""
    return node.attributes.get_int("axis", 0) in (-1, (rank(value) or 0) - 1)


def _part(value: ir.Value | None) -> Part | None:
    """The part that a Slice or a Split along the last axis takes."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in ("Slice", "Split"):
        return None
    source = node.inputs[0]
    size = sizes_of(source)[3] if rank(source) == 4 else None
    if value is None or source is None or size is None:
        return None
    if node.op_type == "Slice":
        given = [constant(v) if v is not None else None for v in [*node.inputs[1:], None, None][:4]]
        start, end, axis, step = (None if a is None else a.reshape(-1).tolist() for a in given)
        if start is None or end is None or axis not in ([3], [-1]) or step not in (None, [1]):
            return None
        return (source, *(min(size, at + size if at < 0 else at) for at in (start[0], end[0])))
    if not _is_last(node, source):
        return None
    index = list(node.outputs).index(value)
    lengths = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if lengths is None:
        count = len(node.outputs)
        lengths = np.full(count, size // count) if size % count == 0 else None
    if lengths is None:
        return None
    ends = np.cumsum(lengths).tolist()
    return source, int(ends[index] - lengths[index]), int(ends[index])


def _half(value: ir.Value | None, seen: Seen) -> ir.Value | None:
    """Angles [rows, new, size] behind a value [rows, 1, new, size], of which both halves agree."""
    spread = producer(value, "Unsqueeze")
    if value is None or spread is None or rank(spread.inputs[0]) != 3:
        return None
    axes = constant(spread.inputs[1])
    if axes is None or axes.reshape(-1).tolist() not in ([1], [-3]):
        return None
    for run in seen:
        array: NDArray[np.float32] | tuple[int, ...] | None = run.get(str(value.name))
        if array is None or isinstance(array, tuple) or array.ndim != 4:
            return None
        first, second = np.split(array, 2, axis=-1) if array.shape[-1] % 2 == 0 else (array, None)
        if second is None or not np.array_equal(first, second):
            return None
    return spread.inputs[0]


def _cut(node: ir.Node, angles: ir.Value, half: int) -> ir.Value:
    """The first half of angles [rows, new, size]."""
    assert node.graph is not None
    bounds = [
        add_initializer(node.graph, f"turned_{name}", np.array([at], np.int64))
        for name, at in (("start", 0), ("end", half), ("axis", 2))
    ]
    (cut,) = insert(node, "Slice", [angles, *bounds])
    set_type(cut, angles)
    cut.shape = ir.Shape([*list(angles.shape or ())[:-1], half])
    return cut


def _put(node: ir.Node, x: ir.Value, angles: list[ir.Value], size: int) -> None:
    """A RotaryEmbedding, over the whole head if the rest of it is joined behind."""
    out, whole = node.outputs[0], x
    part = _part(x)
    join = next(use.node for use in out.uses()) if len(out.uses()) == 1 else None
    attributes: dict[str, int] = {}
    if (
        part is not None
        and part[1:] == (0, size)
        and join is not None
        and join.op_type == "Concat"
        and list(join.inputs)[:1] == [out]
        and len(join.inputs) == 2
        and _part(join.inputs[1]) == (part[0], size, sizes_of(part[0])[3])
    ):
        whole, out = part[0], join.outputs[0]
        attributes["rotary_embedding_dim"] = size
    before = node
    (turned,) = insert(before, "RotaryEmbedding", [whole, *angles], attributes)
    replace(out, turned)
