"""A graph that runs a piece at a time on many rows, while its matrices are replaced.

A piece ends before a node. What nodes from there on read of those before it is kept: a few values
of each token. Weights stay in their file, and matrices that replace others are given to a piece as
the values are that it goes on from: nothing is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from fastgen.export.quantize import calibrate
from fastgen.export.quantize.kernels import Floats
from fastgen.export.rewrite import onnx_file
from fastgen.export.rewrite.edit import input_of, is_constant, tensor_of

State = dict[str, NDArray[Any]]  # what is kept of a batch, by name
AT_ONCE = 1024  # tokens that go through a piece together, about


def can_be_cut(graph: ir.Graph) -> bool:
    """True if its nodes hold no graphs of their own, and the type of what they make is known."""
    held = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return all(
        all(attribute.type not in held for attribute in node.attributes.values())
        and all(value.dtype is not None for value in node.outputs if value.uses())
        for node in graph
    )


@dataclass(frozen=True)
class Piece:
    """Some nodes of a graph as one of their own. Values have the names of their places in it, so
    that pieces of layers that are alike are the same.

    Attributes:
        read: what the names of its inputs are in the whole graph.
        matrices: the constants, and what replaces some, that are given to it: by its own names.
    """

    model: ir.Model
    read: Mapping[str, str]
    matrices: Mapping[str, NDArray[Any]]


class Sessions:
    """Sessions of pieces, one for all that are the same."""

    def __init__(self) -> None:
        self._held: dict[bytes, onnxruntime.InferenceSession] = {}

    def of(self, model: ir.Model) -> onnxruntime.InferenceSession:
        content = ir.to_proto(model).SerializeToString()
        if content not in self._held:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.enable_cpu_mem_arena = False  # each would keep what its largest batch took
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self._held[content] = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        return self._held[content]


class Passage:
    """The way of some rows through a graph, from its inputs on.

    Attributes:
        at: the number of nodes that are done.
        batches: of rows, in the order in which they go.
    """

    def __init__(self, model: ir.Model, rows: Sequence[NDArray[np.int64]]) -> None:
        """
        Args:
            model: a graph that can be cut (see `can_be_cut`).
        """
        self.at = 0
        self.batches = calibrate.batches(rows, AT_ONCE)
        self._model, self._rows, self._sessions = model, rows, Sessions()
        self._nodes = list(model.graph)
        self._index = {node: index for index, node in enumerate(self._nodes)}
        self._last = {
            value: max(self._index[use.node] for use in value.uses())
            for node in self._nodes
            for value in node.outputs
            if value.uses()
        }
        self._states: list[State] = [{} for _ in self.batches]

    def index(self, node: ir.Node) -> int:
        """The number of nodes before it."""
        return self._index[node]

    def copy(self) -> Passage:
        """Another way from here on."""
        other = Passage(self._model, self._rows)
        other._sessions = self._sessions
        other.at, other._states = self.at, [dict(state) for state in self._states]
        return other

    def has(self, value: ir.Value) -> bool:
        """True if it is kept at this place."""
        return str(value.name) in self._states[0]

    def seen(self, value: ir.Value, batch: int) -> Floats:
        """float32 [tokens, size] of a value that is kept, of the rows of a batch."""
        return self.batches[batch].real(self._states[batch][str(value.name)])

    def run(self, end: int, replaced: Mapping[ir.Node, Floats]) -> None:
        """Run to the node `end`.

        Args:
            replaced: matrices that take the place of products' own.
        """
        kept = [value for value in self._made(end) if self._last[value] >= end]
        made = [value for value in kept if self._index[_producer(value)] >= self.at]
        if made:
            self._run(end, made, replaced)
        names = {str(value.name) for value in kept}
        for state in self._states:
            for name in state.keys() - names:
                del state[name]
        self.at = end

    def _made(self, end: int) -> Iterator[ir.Value]:
        """Values that nodes before `end` make and others read."""
        for node in self._nodes[:end]:
            yield from (value for value in node.outputs if value in self._last)

    def _run(self, end: int, made: Sequence[ir.Value], replaced: Mapping[ir.Node, Floats]) -> None:
        piece = self._piece(end, made, replaced)
        session = self._sessions.of(piece.model)
        names = [str(value.name) for value in piece.model.graph.outputs]
        inputs = calibrate.declared(session)
        for batch, state in zip(self.batches, self._states, strict=True):
            known = {name: state[old] for name, old in piece.read.items() if old in state}
            asked = [
                (piece.read[name], kind, shape)
                for name, kind, shape in inputs
                if name not in known and name not in piece.matrices
            ]
            fed = calibrate.feeds(asked, batch)
            begun = {name: fed[old] for name, old in piece.read.items() if old in fed}
            out = session.run(names, {**known, **begun, **piece.matrices})
            state.update(zip((str(value.name) for value in made), out, strict=True))

    def _piece(
        self, end: int, made: Sequence[ir.Value], replaced: Mapping[ir.Node, Floats]
    ) -> Piece:
        """The nodes up to `end` that `made` comes of."""
        wanted, nodes = set(made), list[ir.Node]()
        for node in reversed(self._nodes[self.at : end]):
            if not wanted.isdisjoint(node.outputs):
                nodes.insert(0, node)
                wanted.update(value for value in node.inputs if value is not None)
        copies: dict[ir.Value, ir.Value] = {}
        inputs, constants, inner = list[ir.Value](), list[ir.Value](), list[ir.Node]()
        read: dict[str, str] = {}
        matrices: State = {}

        numbers = itertools.count()

        def named(like: ir.Value) -> ir.Value:
            return ir.Value(name=f"value.{next(numbers)}", shape=like.shape, type=like.type)

        def copied(value: ir.Value) -> ir.Value:
            copies[value] = named(value)
            return copies[value]

        def given(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in copies:
                return None if value is None else copies[value]
            copy = copied(value)
            if not is_constant(value):
                inputs.append(copy)
                read[str(copy.name)] = str(value.name)
            elif (tensor := tensor_of(value)).nbytes > onnx_file.INLINE:
                inputs.append(copy)
                matrices[str(copy.name)] = tensor.numpy()
            else:
                copy.const_value = ir.tensor(tensor.numpy(), name=copy.name)
                constants.append(copy)
            return copy

        def matrix(node: ir.Node) -> ir.Value:
            inputs.append(named(input_of(node, 1)))
            matrices[str(inputs[-1].name)] = np.ascontiguousarray(replaced[node])
            return inputs[-1]

        for node in nodes:
            taken = [
                matrix(node) if node in replaced and index == 1 else given(value)
                for index, value in enumerate(node.inputs)
            ]
            outputs = [copied(value) for value in node.outputs]
            attributes = list(node.attributes.values())
            inner.append(ir.Node(node.domain, node.op_type, taken, attributes, outputs=outputs))
        graph = ir.Graph(
            inputs,
            [copies[value] for value in made],
            nodes=inner,
            initializers=constants,
            opset_imports=self._model.graph.opset_imports,
            name="piece",
        )
        model = ir.Model(graph, ir_version=self._model.ir_version)
        return Piece(model, read, matrices)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
