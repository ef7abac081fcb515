"""Rotations that take outliers out of what is quantised, folded into the weights (QuaRot, Ashkboos
et al. 2024, arXiv 2404.00456; for LayerNorm as in SliceGPT, arXiv 2401.15024).

The residual stream of a decoder is only ever added to, normed and multiplied by matrices. Turned by
an orthogonal matrix R everywhere, a model says what it said: what writes to the stream is
multiplied by R, what reads it by R transposed, and a norm without weights does not notice. A
channel that was a hundred times as large as its neighbours is then spread over all of them, and 8
or 4 bits hold them well. The values of attention are turned by head in the same way.

Where a head shares its matrix with the embedding, the matrix is turned for both, and one small
product stays behind the last norm, whose weights stand between; else nothing stays in the graph.

Operators decide, not models: where the stream goes through anything else (norms behind a product,
experts, a second reader), it is left as it is. What comes out is compared with the original before
it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from fastgen.export.quantize.rotate_values import attention_nodes, turn_values
from fastgen.export.quantize.rotation import Floats, Rotation, by_columns, by_rows
from fastgen.export.rewrite.edit import (
    add_initializer,
    changed,
    clean_up,
    constant,
    constant_input,
    flag,
    graph_of,
    input_of,
    insert,
    is_constant,
    is_float,
    only_use,
    rank,
    reader_of,
    remake,
    replace,
    shape_of,
    sizes_of,
    tensor_of,
)

NORMS = {"RMSNormalization": False, "LayerNormalization": True}  # whether it takes the mean off
PRODUCT = "rotation"  # what the matrices of products that stay are called
ENDS = 2  # places where the stream may be entered or left by a product of its own, at most


def rotate(model: ir.Model) -> list[str]:
    """Turn what can be turned, in place; weights are made when they are written.

    Returns:
        What was turned, in words; empty if nothing was.
    """
    graph = model.graph
    done = []
    heads = sum(turn_values(graph, node) for node in attention_nodes(graph))
    if heads:
        done.append(f"values of {heads} layers")
    stream = _stream(graph)
    if stream is not None:
        stream.turn()
        done.append(f"residual stream of {stream.size}")
    clean_up(model)
    return done


# The residual stream


def _stream(graph: ir.Graph) -> Stream | None:
    """The residual stream, where it can be turned."""
    norms = [node for node in graph if _is_norm(node)]
    if not norms:
        return None
    stream = Stream(graph, shape_of(norms[-1].inputs[1])[0])
    stream.take(input_of(norms[-1], 0))
    return stream if stream.can_be_turned() else None


def _is_norm(node: ir.Node) -> bool:
    """True if it norms the last axis, by weights that are known."""
    return (
        node.op_type in NORMS
        and rank(node.inputs[0]) == 3
        and node.attributes.get_int("axis", -1) in (-1, 2)
        and all(is_constant(value) for value in node.inputs[1:] if value is not None)
        and all(not value.uses() for value in node.outputs[1:])
    )


@dataclass
class Stream:
    """Values that are turned together, and the nodes around them.

    Attributes:
        size: of their last axis.
        values: all that are parts of it.
        writers: products [.., size] that are added to it.
        biases: nodes that add a constant [size].
        tables: embeddings, nodes that take rows of a matrix [.., size].
        entries: values that are made in another way, and have to be turned.
        norms: that read it.
        readers: products that read it without a norm.
        ends: whether something else reads it, that has no place here.
    """

    graph: ir.Graph
    size: int
    values: set[ir.Value] = field(default_factory=set)
    writers: list[ir.Node] = field(default_factory=list)
    biases: list[ir.Node] = field(default_factory=list)
    tables: list[ir.Node] = field(default_factory=list)
    entries: list[ir.Value] = field(default_factory=list)
    norms: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)
    ends: bool = False

    def take(self, value: ir.Value) -> None:
        """Take `value` in, and all that has to be turned with it."""
        pending = [value]
        while pending:
            current = pending.pop()
            if current in self.values:
                continue
            self.values.add(current)
            pending += self._made_of(current)
            for use in current.uses():
                pending += self._read_by(use.node, use.idx)
            self.ends |= current.is_graph_output()

    def _made_of(self, value: ir.Value) -> list[ir.Value]:
        """Inputs of its node that are of the stream too."""
        node = value.producer()
        if node is None:
            self.entries.append(value)
            return []
        kind = node.op_type
        if kind == "Add":
            parts = [
                source for source in node.inputs if source is not None and not is_constant(source)
            ]
            if len(parts) == 1 and _is_vector(node, self.size):
                self.biases.append(node)
                return parts
            if len(parts) == 2 and all(self._fits(part) for part in parts):
                return parts
        if kind == "Mul" and (scaled := _scaled(node)) is not None:
            return [scaled]
        if kind == "MatMul" and is_constant(node.inputs[1]) and rank(node.inputs[1]) == 2:
            self.writers.append(node)
        elif kind == "Gather" and self._is_table(node):
            self.tables.append(node)
        else:
            self.entries.append(value)
        return []

    def _is_table(self, node: ir.Node) -> bool:
        table = node.inputs[0]
        return (
            node.attributes.get_int("axis", 0) == 0
            and is_constant(table)
            and is_float(table)
            and len(shape_of(table)) == 2
            and shape_of(table)[1] == self.size
        )

    def _read_by(self, node: ir.Node, index: int) -> list[ir.Value]:
        """Outputs of a node that reads it that are of the stream too."""
        kind = node.op_type
        if kind == "Shape":
            return []
        if kind == "Add" or (kind == "Mul" and _scaled(node) is not None):
            return [node.outputs[0]]
        if _is_norm(node) and index == 0:
            self.norms.append(node)
        elif kind == "MatMul" and index == 0 and is_constant(node.inputs[1]):
            self.readers.append(node)
        else:
            self.ends = True
        return []

    def _fits(self, value: ir.Value | None) -> bool:
        return rank(value) == 3 and sizes_of(value)[-1] == self.size

    @property
    def _last(self) -> list[ir.Node]:
        """Norms whose weights cannot go into what reads them."""
        return [node for node in self.norms if _products_of(node.outputs[0]) is None]

    @property
    def _centred(self) -> bool:
        return any(NORMS[node.op_type] for node in self.norms)

    def _tied(self) -> dict[ir.Value, list[ir.Node]]:
        """The heads that share each embedding's matrix."""
        heads: dict[ir.Value, list[ir.Node]] = {}
        for node in self.tables:
            table = input_of(node, 0)
            heads[table] = [use.node for use in table.uses() if use.node not in self.tables]
        return heads

    def can_be_turned(self) -> bool:
        kinds = {node.op_type for node in self.norms}
        matrices = [node.inputs[1] for node in self.writers + self.readers]
        for norm in self.norms:
            matrices += [product.inputs[1] for product in _products_of(norm.outputs[0]) or ()]
        shared = [node for nodes in self._tied().values() for node in nodes]
        heads = [head for norm in self._last for head in _heads(norm.outputs[0]) or ()]
        return (
            not self.ends
            and bool(self.writers)
            and len(kinds) == 1
            and not (self._centred and self.readers)
            and len(self.entries) + len(self.tables) > 0
            and len(self.entries) <= ENDS
            and len(self._last) <= ENDS
            and all(node in heads for node in shared)
            and len(set(matrices)) == len(matrices)
            and all(only_use(value) for value in matrices)
            and all(is_float(value) for value in matrices)
        )

    # Turning it. x' = x T with T = M R; M takes the mean off, where the norms do.

    def turn(self) -> None:
        rotation = Rotation(self.size)
        into = partial(_into, rotation, self._centred)
        for node in self.writers:
            remake(node, 1, into)
        for node in self.biases:
            remake(node, constant_input(node), into)
        for node in self.readers:
            remake(node, 1, partial(_out_of, rotation, None))
        last = self._last
        for norm in self.norms:
            (self._leave if norm in last else self._fold)(norm, rotation)
        for value in self.entries:
            _behind(value, into(np.eye(self.size, dtype=np.float32)), f"{PRODUCT}.in")
        for table, heads in self._tied().items():
            self._turn_table(table, heads, rotation, into)

    def _turn_table(
        self,
        table: ir.Value,
        heads: Sequence[ir.Node],
        rotation: Rotation,
        into: Callable[[Floats], Floats],
    ) -> None:
        """Turn an embedding, and what is behind the heads that share its matrix."""
        readers = [node for node in self.tables if node.inputs[0] is table]
        change = partial(by_rows, rotation.forward) if heads else into
        turned = changed(self.graph, table, change)
        for node in readers:
            node.replace_input_with(0, turned)
            if heads and self._centred:  # the heads read its mean too
                matrix = _out_of(rotation, None, into(np.eye(self.size, dtype=np.float32)))
                _behind(node.outputs[0], matrix, f"{PRODUCT}.in")
        for head in heads:
            head.replace_input_with(1, turned)

    def _fold(self, norm: ir.Node, rotation: Rotation) -> None:
        """A norm's weights go into the products that read it."""
        weight, bias = _weights(norm)
        for product in _products_of(norm.outputs[0]) or ():
            if bias is not None:
                _add_bias(self.graph, product, bias)
            remake(product, 1, partial(_out_of, rotation, weight))
        self._plain(norm)

    def _leave(self, norm: ir.Node, rotation: Rotation) -> None:
        """A product behind a norm that has its weights, and turns back what is not turned itself.

        Heads that share the embedding's matrix are turned as that is; others take no harm.
        """
        weight, bias = _weights(norm)
        name = input_of(norm, 1).name
        heads = _heads(norm.outputs[0]) or []
        shared = {node.inputs[0] for node in self.tables}
        normed = self._plain(norm)
        if heads and bias is None and not any(head.inputs[1] in shared for head in heads):
            for head in heads:
                _fold_into_head(head, rotation, weight)
            return
        matrix = _out_of(rotation, None, np.diag(weight))
        if heads:
            matrix = rotation.forward(matrix)
            bias = None if bias is None else rotation.forward(bias)
        for head in heads:
            if head.inputs[1] not in shared:  # see `_turn_table`
                _fold_into_head(head, rotation, None)
        for value in dict.fromkeys(input_of(head, 0) for head in heads) if heads else (normed,):
            back = _behind(value, matrix, f"{PRODUCT}.out")
            if bias is not None:
                uses = back.uses()
                added = add_initializer(self.graph, f"{name}.bias", bias)
                (whole,) = insert(_first(uses), "Add", [back, added])
                _read_instead(back, whole, uses)

    def _plain(self, norm: ir.Node) -> ir.Value:
        """The output of the norm without weights; the mean that one takes off is zero already."""
        ones = add_initializer(self.graph, "ones", np.ones(self.size, np.float32))
        if norm.op_type == "RMSNormalization":
            norm.replace_input_with(1, ones)
            return norm.outputs[0]
        attributes = {"axis": -1, "epsilon": norm.attributes.get_float("epsilon", 1e-5)}
        (normed,) = insert(norm, "RMSNormalization", [norm.inputs[0], ones], attributes)
        replace(norm.outputs[0], normed)
        self.graph.remove(norm, safe=True)
        return normed


def _heads(value: ir.Value) -> list[ir.Node] | None:
    """The products that read `value` at some of its positions; None if anything else reads it."""
    heads: list[ir.Node] = []
    for use in value.uses():
        node = use.node
        if node.op_type == "Shape":
            continue
        if node.op_type in ("Gather", "GatherElements") and use.idx == 0:
            if node.attributes.get_int("axis", 0) != 1:
                return None
            behind = _heads(node.outputs[0])
            if behind is None:
                return None
            heads += behind
        elif _is_head(node) and use.idx == 0:
            heads.append(node)
        else:
            return None
    return None if value.is_graph_output() else heads


def _fold_into_head(head: ir.Node, rotation: Rotation, weight: Floats | None) -> None:
    """Let a head read what is turned, and is to be multiplied by `weight`."""
    change = partial(_out_of, rotation, weight)
    if head.op_type == "FusedMatMul":
        remake(head, 1, lambda matrix: change(matrix.T).T)
    else:
        remake(head, 1, change)


def _is_head(node: ir.Node) -> bool:
    """True if it is a product with a matrix, [size, out] or, transposed, [out, size]."""
    fused = node.op_type == "FusedMatMul" and (
        flag(node, "transB")
        and not flag(node, "transA")
        and node.attributes.get_float("alpha", 1.0) == 1
    )
    return (
        (fused or node.op_type == "MatMul")
        and is_constant(node.inputs[1])
        and len(shape_of(node.inputs[1])) == 2
        and is_float(node.inputs[1])
    )


def _behind(value: ir.Value, matrix: Floats, name: str) -> ir.Value:
    """A product with `matrix` that is read in place of `value`."""
    uses = value.uses()
    before = _first(uses)
    held = add_initializer(graph_of(before), name, matrix)
    (turned,) = insert(before, "MatMul", [value, held])
    _read_instead(value, turned, uses)
    return turned


def _read_instead(old: ir.Value, new: ir.Value, uses: Collection[tuple[ir.Node, int]]) -> None:
    new.shape, new.dtype = old.shape, ir.DataType.FLOAT
    for node, index in uses:
        node.replace_input_with(index, new)


def _into(rotation: Rotation, centred: bool, matrix: Floats) -> Floats:
    """matrix T, of a matrix [.., size] that writes to the stream."""

    def change(rows: Floats) -> Floats:
        if centred:
            rows = rows - rows.mean(axis=-1, keepdims=True, dtype=np.float64).astype(np.float32)
        return rotation.forward(rows)

    return change(matrix) if matrix.ndim == 1 else by_rows(change, matrix)


def _out_of(rotation: Rotation, weight: Floats | None, matrix: Floats) -> Floats:
    """R^T diag(weight) matrix, of a matrix [size, out] that reads the stream."""

    def change(columns: Floats) -> Floats:
        return rotation.of_columns(columns if weight is None else columns * weight[:, None])

    return by_columns(change, matrix)


def _products_of(value: ir.Value) -> list[ir.Node] | None:
    """The products that read `value` and a matrix; None if anything else reads it."""
    nodes = [use.node for use in value.uses() if use.node.op_type != "Shape"]
    plain = all(
        node.op_type == "MatMul"
        and node.inputs[0] is value
        and is_constant(node.inputs[1])
        and rank(node.inputs[1]) == 2
        for node in nodes
    )
    return nodes if plain and nodes and not value.is_graph_output() else None


def _weights(norm: ir.Node) -> tuple[Floats, Floats | None]:
    weight, *rest = (constant(value) for value in norm.inputs[1:] if value is not None)
    assert weight is not None
    bias = rest[0] if rest else None
    return weight.astype(np.float32), None if bias is None else bias.astype(np.float32)


def _add_bias(graph: ir.Graph, product: ir.Node, bias: Floats) -> None:
    """Add bias W behind a product with W; to the constant that is added there already, if any."""
    matrix = input_of(product, 1)
    more = np.asarray(bias @ tensor_of(matrix).numpy(), np.float32)
    out = product.outputs[0]
    uses, node = out.uses(), reader_of(out)
    if node is not None and node.op_type == "Add" and _is_vector(node, len(more)):
        remake(node, constant_input(node), lambda array: array + more)
        return
    held = add_initializer(graph, f"{matrix.name}.bias", more)
    (added,) = insert(_first(uses), "Add", [out, held])
    _read_instead(out, added, uses)


def _first(uses: Collection[tuple[ir.Node, int]]) -> ir.Node:
    """The earliest node of some uses in a graph."""
    nodes = [node for node, _ in uses]
    return next(node for node in graph_of(nodes[0]) if node in nodes)


def _is_vector(node: ir.Node, size: int) -> bool:
    """True if it adds a constant [size] that is its own."""
    held = [value for value in node.inputs if is_constant(value)]
    return len(held) == 1 and shape_of(held[0]) == [size] and is_float(held[0])


def _scaled(node: ir.Node) -> ir.Value | None:
    """The value that a node multiplies by one constant number."""
    for value, other in (node.inputs, node.inputs[::-1]):
        if is_constant(other) and math.prod(shape_of(other)) == 1 and not is_constant(value):
            return value
    return None
