"""The graph's contract (`fastgen.store.graph_io`) for graphs that are being written."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from fastgen.store.graph_io import Declared, GraphIO, TensorSpec


def data_type(spec: TensorSpec) -> ir.DataType:
    """The type of an input or output, as onnx_ir calls it."""
    return ir.DataType[spec.type.removeprefix("tensor(").removesuffix(")").upper()]


def value(spec: TensorSpec) -> ir.Value:
    """Make a value with the name, the type and the shape of an input or output."""
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(data_type(spec)))


def declare(value: ir.Value, spec: TensorSpec) -> None:
    """Give a value the name, the type and the shape of an input or output."""
    value.name, value.shape, value.dtype = spec.name, ir.Shape(spec.shape), data_type(spec)


def check(model: ir.Model, io: GraphIO, step: str) -> None:
    """Compare a graph's inputs and outputs with what is expected after a step of the export.

    Args:
        step: of the export, for the error.

    Raises:
        ModelError: see `GraphIO.check`.
    """
    graph = model.graph
    io.check(f"the graph after {step}", _declared(graph.inputs), _declared(graph.outputs))


def _declared(values: Iterable[ir.Value]) -> Iterable[Declared]:
    for one in values:
        kind = "unknown" if one.dtype is None else f"tensor({one.dtype.name.lower()})"
        shape = [] if one.shape is None else list(one.shape)
        yield str(one.name), kind, shape
