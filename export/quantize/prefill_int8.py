"""A second graph for the prompts of a 4-bit model: its matrices in 8 bits per output channel.

The kernel of 4 bits unpacks them anew for every few tokens, which is fast for one and slow for
many. Each matrix is nearly one of int8 per output channel too, twice as large: rounding it to 8
bits adds less than a hundredth to the error that 4 bits have. Two small graphs read the model's own
weights file, for who has the memory (`fastgen.engine.prefill_int8`):

- `unpack.onnx` makes these matrices, and their scales.
- `prompts.onnx` is the model's graph with them, and without `lm_head`: it gives keys, values and
  states, but no logits. The values of its matrices are not in it: whoever opens it gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import onnx_ir.tape

from fastgen.export.quantize.activations import Activations
from fastgen.export.quantize.kernels import LEVELS, Kernel, integer_product
from fastgen.export.rewrite.edit import input_of, take_place, tensor_of
from fastgen.store.model_info import GRAPH, PROMPTS, UNPACK


def write(directory: Path) -> str:
    """Write both graphs beside `model.onnx`, if it can have them.

    Returns:
        Why it cannot; an empty text if it can.
    """
    model = ir.load(directory / GRAPH)
    if any(node.op_type == "QMoE" for node in model.graph):
        return "its experts go through a kernel that has no such form (QMoE)"
    _leave_out_logits(model)
    nodes = [node for node in model.graph if _is_packed(node)]
    if not nodes:
        return "none of its layers' matrices has 4 bits"
    if not all(map(_is_ours, nodes)):
        return "its matrices of 4 bits are not stored as those of `fastgen export` are"
    unpacking = _Unpacking(model.opset_imports[""])
    activations = Activations(model.graph)
    for node in nodes:
        codes, scales = unpacking.unpacked(node, model.graph)
        take_place(node, integer_product(node, codes, scales, activations))
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.save(model, directory / PROMPTS)
    ir.save(unpacking.model(), directory / UNPACK)
    return ""


def _leave_out_logits(model: ir.Model) -> None:
    """Drop them, and what only they need: `lm_head`, and most of the last layer."""
    graph = model.graph
    graph.outputs[:] = [value for value in graph.outputs if value.name != "logits"]
    ir.passes.common.RemoveUnusedNodesPass()(model)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]


def _is_packed(node: ir.Node) -> bool:
    """Tell if it is a product with a matrix of 4 bits, in the weights file."""
    if node.op_type != "MatMulNBits" or node.attributes.get_int("bits", 4) != 4:
        return False
    codes = node.inputs[1]
    return codes is not None and isinstance(codes.const_value, ir.ExternalTensor)


def _is_ours(node: ir.Node) -> bool:
    """Tell if it has scales in float32, packed zero points or none, and nothing else."""
    given = [value for value in node.inputs[2:] if value is not None]
    held = [value.const_value for value in given]
    kinds = [None if tensor is None else tensor.dtype for tensor in held]
    return len(held) == len(node.inputs[2:]) and kinds in (
        [ir.DataType.FLOAT],
        [ir.DataType.FLOAT, ir.DataType.UINT8],
    )


class _Unpacking:
    """The graph that makes the matrices, one after the other."""

    def __init__(self, opset: int) -> None:
        self._tape = ir.tape.Tape()
        self._opset = opset
        self._held: dict[str, ir.Value] = {}
        self._made: dict[str, tuple[ir.Value, ir.Value]] = {}  # by the name of the codes
        self._outputs: list[ir.Value] = []

    def unpacked(self, node: ir.Node, graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
        """Constants of `graph` that the matrix of a product will be: int8 [in, out], scales [out].

        Layers that share a matrix share them.
        """
        name = str(input_of(node, 1).name)
        if name not in self._made:
            codes, scales = self._unpack(node)
            self._outputs += [codes, scales]
            self._made[name] = _promised(graph, codes), _promised(graph, scales)
        return self._made[name]

    def model(self) -> ir.Model:
        graph = ir.Graph(
            [],
            self._outputs,
            nodes=self._tape.nodes,
            initializers=list(self._held.values()),
            name="unpack",
            opset_imports={"": self._opset},
        )
        return ir.Model(graph, ir_version=10)

    def _unpack(self, node: ir.Node) -> tuple[ir.Value, ir.Value]:
        op = self._tape.op
        size, out, block = (node.attributes[key].as_int() for key in ("K", "N", "block_size"))
        name, count = str(input_of(node, 1).name), -(-size // block)
        floats = {"to": int(ir.DataType.FLOAT)}
        held = input_of(node, 2)
        scales = self._constant(str(held.name), tensor_of(held))
        last, flat = (self._number(f"axis_{v}", [v], np.int64) for v in (2, 1))
        values = op(
            "Cast",
            [self._constant(name, _nibbles(node, 1, [out, count, block]))],
            attributes=floats,
        )
        values = op("Sub", [values, self._zero_points(node, out, count)])
        values = op("Mul", [values, op("Unsqueeze", [scales, last])])
        values = op("Reshape", [values, self._number(f"rows_{out}", [out, -1], np.int64)])
        if size % block:
            ends = [self._number(f"{v}", [v], np.int64) for v in (0, size, 1)]
            values = op("Slice", [values, *ends])
        largest = op("ReduceMax", [op("Abs", [values]), flat], attributes={"keepdims": 1})
        unit = op("Mul", [largest, self._number("1/levels", 1 / LEVELS[8], np.float32)])
        unit = op("Max", [unit, self._number("tiny", float(np.finfo(np.float32).tiny), np.float32)])
        codes = op("Round", [op("Div", [values, unit])])
        codes = op("Cast", [codes], attributes={"to": int(ir.DataType.INT8)})
        codes = op("Transpose", [codes], attributes={"perm": [1, 0]})
        unit = op("Reshape", [unit, self._number("flat", [-1], np.int64)])
        codes.name, unit.name = f"{name}.int8", f"{name}.channels"
        codes.dtype, codes.shape = ir.DataType.INT8, ir.Shape([size, out])
        unit.dtype, unit.shape = ir.DataType.FLOAT, ir.Shape([out])
        return codes, unit

    def _zero_points(self, node: ir.Node, out: int, count: int) -> ir.Value:
        """float32 [out, blocks, 1], or the middle code for all."""
        if len(node.inputs) == 3:
            return self._number("middle", Kernel(4).middle, np.float32)
        even = count + count % 2
        zeros = self._constant(str(input_of(node, 3).name), _nibbles(node, 3, [out, even]))
        zeros = self._tape.op("Cast", [zeros], attributes={"to": int(ir.DataType.FLOAT)})
        if even > count:
            ends = [self._number(f"{v}", [v], np.int64) for v in (0, count, 1)]
            zeros = self._tape.op("Slice", [zeros, *ends])
        return self._tape.op("Unsqueeze", [zeros, self._number("axis_2", [2], np.int64)])

    def _number(self, name: str, value: float | Sequence[int], dtype: type) -> ir.Value:
        return self._constant(name, ir.tensor(np.array(value, dtype), name=name))

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._held:
            value = ir.Value(name=name, const_value=tensor)
            value.shape, value.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
            self._held[name] = value
        return self._held[name]


def _promised(graph: ir.Graph, unpacked: ir.Value) -> ir.Value:
    """A constant whose values are given to the session: the file has others in their place."""
    assert unpacked.shape is not None and unpacked.dtype is not None
    size = int(math.prod(unpacked.shape.numpy()) * unpacked.dtype.itemsize)
    tensor = ir.ExternalTensor(
        f"{GRAPH}.data", 0, size, unpacked.dtype, name=str(unpacked.name), shape=unpacked.shape
    )
    value = ir.Value(name=unpacked.name, const_value=tensor, shape=unpacked.shape)
    value.dtype = unpacked.dtype
    graph.register_initializer(value)
    return value


def _nibbles(node: ir.Node, index: int, shape: Sequence[int]) -> ir.TensorProtocol:
    """The codes that the bytes of an input pack, as an array of uint4 of its own shape."""
    value = input_of(node, index)
    packed = tensor_of(value)
    if not isinstance(packed, ir.ExternalTensor):
        raw = np.frombuffer(packed.tobytes(), np.uint8)
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(shape)
        return ir.tensor(codes, dtype=ir.DataType.UINT4, name=str(value.name))
    return ir.ExternalTensor(
        packed.location,
        packed.offset,
        packed.length,
        ir.DataType.UINT4,
        name=str(value.name),
        shape=ir.Shape(shape),
        base_dir=packed.base_dir,
    )
