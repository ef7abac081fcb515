"""Nodes that turn and quantise activations."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.quantize import rotation
from fastgen.export.rewrite.edit import add_initializer, insert, set_type


class Activations:
    """Turned and quantised activations, each made once however many products read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._turned: dict[tuple[ir.Value, int], ir.Value] = {}
        self._made: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._constants: dict[str, ir.Value] = {}
        self._zeros: dict[str, ir.Value] = {}

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = add_initializer(self._graph, name, array)
        return self._constants[name]

    def turned(self, x: ir.Value, size: int, before: ir.Node) -> ir.Value:
        """float32 in the shape of x, with each `size` channels multiplied by a Hadamard matrix."""
        if (x, size) not in self._turned:
            assert x.shape is not None
            same, name = [0] * (len(x.shape) - 1), f"rank_{len(x.shape)}"
            apart = self.constant(f"apart_{size}_{name}", np.array([*same, -1, size], np.int64))
            again = self.constant(f"again_{name}", np.array([*same, -1], np.int64))
            matrix = self.constant(f"hadamard_{size}", rotation.hadamard(size))
            (parts,) = insert(before, "Reshape", [x, apart])
            (mixed,) = insert(before, "MatMul", [parts, matrix])
            (reshaped,) = insert(before, "Reshape", [mixed, again])
            set_type(reshaped, x)
            self._turned[x, size] = reshaped
        return self._turned[x, size]

    def quantized(self, x: ir.Value, before: ir.Node) -> tuple[ir.Value, ir.Value]:
        """uint8 [rows, new, in] and scales [rows, new, 1]: by each token's largest value.

        A token of zeros has the scale zero, and its products are zero: that is right.
        """
        if x not in self._made:
            last = self.constant("last_axis", np.array([-1], np.int64))
            (size,) = insert(before, "Abs", [x])
            (size,) = insert(before, "ReduceMax", [size, last], {"keepdims": 1})
            (scale,) = insert(
                before, "Mul", [size, self.constant("1/127", np.array(1 / 127, np.float32))]
            )
            zero = self._zero_points(x, scale, before)
            width = x.shape[-1] if x.shape is not None else None
            assert isinstance(width, int)
            (codes,) = insert(
                before, "QuantizeLinear", [x, scale, zero], {"axis": -1, "block_size": width}
            )
            self._made[x] = codes, scale
        return self._made[x]

    def _zero_points(self, x: ir.Value, scale: ir.Value, before: ir.Node) -> ir.Value:
        """uint8 128 in the shape of `scale`: one for all activations of a shape."""
        assert x.shape is not None
        key = str(list(x.shape)[:-1])
        if key not in self._zeros:
            (shape,) = insert(before, "Shape", [scale])
            node = ir.node("ConstantOfShape", [shape], {"value": ir.tensor(np.array([128], "u1"))})
            self._graph.insert_before(before, node)
            self._zeros[key] = node.outputs[0]
        return self._zeros[key]
