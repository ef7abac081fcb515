"""A graph that runs a piece at a time on many rows, while its matrices are replaced.

A piece ends before a node. What nodes from there on read of those before it is kept, of each row,
in files: nothing here is as large as what flows through the graph, or as its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.quantize import calibrate
from fastgen.export.quantize.kernels import Floats
from fastgen.export.rewrite.edit import is_constant

State = dict[str, NDArray[Any]]  # what is kept of a row, by name


def can_be_cut(graph: ir.Graph) -> bool:
    """True if its nodes hold no graphs of their own, and the type of what they make is known."""
    held = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return all(
        all(attribute.type not in held for attribute in node.attributes.values())
        and all(value.dtype is not None for value in node.outputs if value.uses())
        for node in graph
    )


class Passage:
    """The way of some rows through a graph, from its inputs on.

    Attributes:
        at: the number of nodes that are done.
    """

    def __init__(self, model: ir.Model, rows: Sequence[NDArray[np.int64]], directory: Path) -> None:
        """
        Args:
            model: a graph that can be cut (see `can_be_cut`).
            directory: of the file that its weights are in.
        """
        self.at = 0
        self._model, self._rows, self._directory = model, rows, directory
        self._nodes = list(model.graph)
        self._index = {node: index for index, node in enumerate(self._nodes)}
        self._last = {
            value: max(self._index[use.node] for use in value.uses())
            for node in self._nodes
            for value in node.outputs
            if value.uses()
        }
        self._states: list[State] = [{} for _ in rows]

    def index(self, node: ir.Node) -> int:
        """The number of nodes before it."""
        return self._index[node]

    def copy(self) -> Passage:
        """Another way from here on."""
        other = Passage(self._model, self._rows, self._directory)
        other.at, other._states = self.at, [dict(state) for state in self._states]
        return other

    def has(self, value: ir.Value) -> bool:
        """True if it is kept at this place."""
        return str(value.name) in self._states[0]

    def seen(self, value: ir.Value, rows: slice) -> Floats:
        """float32 [tokens, size] of a value that is kept, of some rows."""
        held = [state[str(value.name)] for state in self._states[rows]]
        return np.concatenate([array.reshape(-1, array.shape[-1]) for array in held])

    def run(self, end: int, replaced: Mapping[ir.Node, Floats]) -> None:
        """Run to the node `end`.

        Args:
            replaced: matrices that take the place of products' own.
        """
        kept = [value for value in self._made(end) if self._last[value] >= end]
        made = [value for value in kept if self._index[_producer(value)] >= self.at]
        if made:
            self._run(self._piece(end, made, replaced), made)
        names = {str(value.name) for value in kept}
        for state in self._states:
            for name in state.keys() - names:
                del state[name]
        self.at = end

    def _made(self, end: int) -> Iterator[ir.Value]:
        """Values that nodes before `end` make and others read."""
        for node in self._nodes[:end]:
            yield from (value for value in node.outputs if value in self._last)

    def _run(self, piece: ir.Model, made: Sequence[ir.Value]) -> None:
        session = calibrate.opened(piece, self._directory)
        read = [value.name for value in session.get_inputs()]
        names = [str(value.name) for value in made]
        with calibrate.shelf(self._directory) as kept:
            for row, state in zip(self._rows, self._states, strict=True):
                given = calibrate.feeds(session, row, known=state)
                given |= {name: state[name] for name in read if name in state}
                out = session.run(names, given)
                state.update((name, kept(array)) for name, array in zip(names, out, strict=True))

    def _piece(
        self, end: int, made: Sequence[ir.Value], replaced: Mapping[ir.Node, Floats]
    ) -> ir.Model:
        """The nodes up to `end` that `made` comes of, with what they read as inputs."""
        wanted, nodes = set(made), list[ir.Node]()
        for node in reversed(self._nodes[self.at : end]):
            if not wanted.isdisjoint(node.outputs):
                nodes.insert(0, node)
                wanted.update(value for value in node.inputs if value is not None)
        copies: dict[ir.Value, ir.Value] = {}
        inputs, constants, inner = list[ir.Value](), list[ir.Value](), list[ir.Node]()

        def copied(value: ir.Value) -> ir.Value:
            copies[value] = ir.Value(name=value.name, shape=value.shape, type=value.type)
            return copies[value]

        def given(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in copies:
                return None if value is None else copies[value]
            copy = copied(value)
            if is_constant(value):
                copy.const_value = value.const_value
            (constants if is_constant(value) else inputs).append(copy)
            return copy

        def matrix(node: ir.Node) -> ir.Value:
            value = node.inputs[1]
            assert value is not None
            name = f"{value.name}.{len(constants)}"
            constants.append(ir.Value(name=name, const_value=ir.tensor(replaced[node], name=name)))
            return constants[-1]

        for node in nodes:
            read = [
                matrix(node) if node in replaced and index == 1 else given(value)
                for index, value in enumerate(node.inputs)
            ]
            outputs = [copied(value) for value in node.outputs]
            attributes = list(node.attributes.values())
            inner.append(ir.Node(node.domain, node.op_type, read, attributes, outputs=outputs))
        graph = ir.Graph(
            inputs,
            [copies[value] for value in made],
            nodes=inner,
            initializers=constants,
            opset_imports=self._model.graph.opset_imports,
            name="piece",
        )
        return ir.Model(graph, ir_version=self._model.ir_version)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
