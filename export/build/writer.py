"""A graph as it grows: nodes, constants, and tensors of a checkpoint that are read lazily."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.errors import ModelError
from fastgen.export.build import weights as held
from fastgen.export.build.decoder import Decoder, Linear, Part
from fastgen.export.build.weights import Weights
from fastgen.export.rewrite import contract
from fastgen.export.rewrite.edit import MICROSOFT
from fastgen.store.graph_io import GraphIO
from fastgen.store.jsonfile import some

OPSET, IR_VERSION = 23, 10
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
Dim = int | str


def ignored(decoder: Decoder) -> re.Pattern[str]:
    """Names of tensors that are in some checkpoints and mean nothing."""
    return re.compile("|".join(decoder.ignored))


class Writer:
    """One graph, and the numbers of each tensor that it has read."""

    def __init__(self, decoder: Decoder, weights: Weights, io: GraphIO) -> None:
        self.decoder = decoder
        self.weights = weights
        self.used: dict[str, int] = {}  # numbers of each tensor that the graph reads
        self.constants: dict[Any, ir.Value] = {}
        self.shapes: dict[Any, ir.Value] = {}
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, MICROSOFT: 1})
        self.model = ir.Model(self.graph, ir_version=IR_VERSION, producer_name="fastgen")
        self.graph.name = "main_graph"
        self.io = io
        self.inputs = {spec.name: contract.value(spec) for spec in io.inputs}
        self.graph.inputs.extend(self.inputs.values())

    # What the graph is made of

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[Dim] | ir.Shape | None,
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        dtype: ir.DataType = FLOAT,
    ) -> ir.Value:
        node = ir.node(op_type, inputs, attributes or {}, domain=domain)
        self.graph.append(node)
        (out,) = node.outputs
        out.shape, out.dtype = None if shape is None else ir.Shape(shape), dtype
        return out

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """A small one, once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"constant.{len(self.constants)}"
            self.constants[key] = self._initializer(name, ir.tensor(array, name=name))
        return self.constants[key]

    def number(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, const_value=tensor)
        value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
        self.graph.register_initializer(value)
        return value

    # Weights

    def tensor(self, name: str, shape: Sequence[int]) -> held.Tensor:
        """A tensor of the checkpoint, under its name there.

        Raises:
            ModelError: it is missing, or of another shape.
        """
        tensor = self.weights.get(self.named(name))
        if tensor is None:
            raise ModelError(f"it is not a whole causal language model: it lacks {name}")
        if tuple(tensor.shape) != tuple(shape):
            raise ModelError(
                f"it contradicts itself: {name} is {list(tensor.shape)} where config.json makes it "
                f"{list(shape)}"
            )
        return tensor

    def named(self, name: str) -> str:
        """The checkpoint's name of a tensor: those of models without a head leave `base` out."""
        other = self.decoder.also.get(name)
        if other is not None and other in self.weights:
            return other
        if name not in self.weights and name.startswith(self.decoder.base):
            return name.removeprefix(self.decoder.base)
        return name

    def use(self, name: str, count: int) -> None:
        self.used[self.named(name)] = self.used.get(self.named(name), 0) + count

    def lazily(
        self, name: str, make: Callable[[], NDArray[np.float32]], shape: Sequence[int]
    ) -> ir.Value:
        """A constant that is made whenever it is read, once for each name."""
        if name not in self.constants:
            tensor = ir.LazyTensor(
                lambda: ir.tensor(np.ascontiguousarray(make())), FLOAT, ir.Shape(shape), name=name
            )
            self.constants[name] = self._initializer(name, tensor)
        return self.constants[name]

    def vector(self, name: str, width: int, plus: float = 0.0) -> ir.Value:
        """A tensor of one dimension, with a number added."""
        if (name, plus) not in self.constants:
            tensor = self.tensor(name, [width])
            self.use(name, width)
            array = np.ascontiguousarray(held.whole(tensor) + np.float32(plus))
            value = self._initializer(name, ir.tensor(array, name=name))
            self.constants[name, plus] = value
        return self.constants[name, plus]

    def bias(self, part: Part, width: int) -> ir.Value:
        if part.rows is None:
            return self.vector(part.name, width)
        first, last, of = part.rows
        tensor = self.tensor(part.name, [width // (last - first) * of])
        self.use(part.name, width)
        name = f"{part.name}.{first}"
        return self._initializer(name, ir.tensor(held.taken(tensor, part.rows), name=name))

    def table(self, name: str, rows: int, width: int) -> ir.Value:
        """A matrix as it is stored."""
        if name not in self.constants:
            tensor = self.tensor(name, [rows, width])
            self.use(name, rows * width)
            self.lazily(name, partial(held.whole, tensor), [rows, width])
        return self.constants[name]

    def matrix(self, part: Part, into: int, out: int) -> ir.Value:
        """A matrix [in, out]."""
        first, last, of = part.rows or (0, out, out)
        stored = out // (last - first) * of
        tensor = self.tensor(part.name, [into, stored] if part.flat else [stored, into])
        self.use(part.name, into * out)
        name = part.name if part.flat and part.rows is None else f"{part.name}.T"
        name = name if part.rows is None else f"{part.name}.{first}"
        if part.flat:
            make = partial(_columns, tensor, part.rows)
        else:
            make = partial(held.transposed, tensor, part.rows)
        return self.lazily(name, make, [into, out])

    def check_all_used(self) -> None:
        """Every number of every tensor is read, once.

        Raises:
            ModelError: some are left, or are read again.
        """
        meaningless = ignored(self.decoder)
        left = [
            name
            for name, tensor in self.weights.items()
            if self.used.get(name) != held.size(tensor) and not meaningless.fullmatch(name)
        ]
        if left:
            names = some(sorted(left))
            raise ModelError(f"it has weights that its configuration does not: {names}")

    # Products and shapes

    def linear(self, x: ir.Value, linear: Linear) -> ir.Value:
        *places, into = dims(x)
        matrix = self.matrix(linear.weight, int(into), linear.width)
        shape = [*places, linear.width]
        x = self.node("MatMul", [x, matrix], shape)
        if linear.bias is None:
            return x
        return self.node("Add", [x, self.bias(linear.bias, linear.width)], shape)

    def transposed(self, x: ir.Value) -> ir.Value:
        a, b, c, d = dims(x)
        return self.node("Transpose", [x], [a, c, b, d], {"perm": [0, 2, 1, 3]})

    def reshaped(self, x: ir.Value, last: Sequence[int], shape: Sequence[Dim]) -> ir.Value:
        """[rows, new, *last]."""
        key = tuple(last)
        if key not in self.shapes:
            first = [self.length("rows"), self.length("new")]
            more = [self.ints(size) for size in last]
            self.shapes[key] = self.node(
                "Concat", [*first, *more], [2 + len(last)], {"axis": 0}, dtype=INT64
            )
        return self.node("Reshape", [x, self.shapes[key]], shape, {"allowzero": 1})

    def length(self, name: str) -> ir.Value:
        if name not in self.shapes:
            # (The trace asks the second layer's values for the number of rows.)
            second = self.io.key_values["float32"][:4][-1].past.name
            source, axis = (second, 0) if name == "rows" else ("input_ids", 1)
            self.shapes[name] = self.node(
                "Shape", [self.inputs[source]], [1], {"start": axis, "end": axis + 1}, dtype=INT64
            )
        return self.shapes[name]


def dims(x: ir.Value) -> list[Dim]:
    assert x.shape is not None
    return [dim if isinstance(dim, int) else str(dim.value) for dim in x.shape]


def _columns(tensor: held.Tensor, rows: tuple[int, int, int] | None) -> NDArray[np.float32]:
    """Of a matrix [in, out] some of its outputs."""
    array = held.whole(tensor)
    if rows is None:
        return array
    first, last, _ = rows
    return array[:, first:last]
