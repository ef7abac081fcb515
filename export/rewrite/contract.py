"""The graph's contract (`fastgen.store.graph_io`) for graphs that are being written."""

from __future__ import annotations

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


def spec(value: ir.Value) -> TensorSpec:
    """A value as the contract describes it."""
    return TensorSpec.declared(*_declaration(value))


def check(model: ir.Model, io: GraphIO, step: str) -> None:
    """Compare a graph's inputs and outputs with what is expected after a step of the export.

    Args:
        step: of the export, for the error.

    Raises:
        ModelError: see `GraphIO.check`.
    """
    graph = model.graph
    inputs, outputs = map(_declaration, graph.inputs), map(_declaration, graph.outputs)
    io.check(f"the graph after {step}", inputs, outputs)


def _declaration(value: ir.Value) -> Declared:
    kind = "unknown" if value.dtype is None else f"tensor({value.dtype.name.lower()})"
    shape = () if value.shape is None else value.shape
    return str(value.name), kind, [n if isinstance(n, int) else n.value for n in shape]
