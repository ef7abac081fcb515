"""A decoder's description and its weights to the graph that a trace of it gives.

What `trim` makes of a trace is left to `trim` here too: products that are packed or merged, tables
of rotations. Weights are constants that are read when they are wanted, and not kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.errors import ModelError, UnsupportedModel
from fastgen.export.build import weights as held
from fastgen.export.build.decoder import (
    Attention,
    Decoder,
    Embedding,
    FeedForward,
    Head,
    Layer,
    Linear,
    Norm,
    Part,
    Rotary,
)
from fastgen.export.build.weights import Weights
from fastgen.export.rewrite import contract
from fastgen.export.rewrite.edit import MICROSOFT
from fastgen.export.rewrite.node import HEAD_STEP, INPUTS, QUERIES, SEQLENS, TOTAL, attributes
from fastgen.store.graph_io import GraphIO
from fastgen.store.jsonfile import some

OPSET, IR_VERSION = 23, 10
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
Dim = int | str
END = np.iinfo(np.int64).max


def write(decoder: Decoder, weights: Weights) -> ir.Model:
    """The graph by the contract, of all the weights and of nothing else.

    Raises:
        ModelError: a tensor is missing, is of another shape than the description has, or is left.
        UnsupportedModel: the attention node takes no heads of that size.
    """
    writer = _Writer(decoder, weights)
    writer.write()
    writer.check_all_used()
    return writer.model


def ignored(decoder: Decoder) -> re.Pattern[str]:
    """Names of tensors that are in some checkpoints and mean nothing."""
    return re.compile("|".join(decoder.ignored))


class _Writer:
    """One graph, as it grows."""

    def __init__(self, decoder: Decoder, weights: Weights) -> None:
        self.decoder = decoder
        self.weights = weights
        self.used: dict[str, int] = {}  # numbers of each tensor that the graph reads
        self.constants: dict[Any, ir.Value] = {}
        self.angles: dict[Any, tuple[ir.Value, ir.Value]] = {}
        self.shapes: dict[Any, ir.Value] = {}
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, MICROSOFT: 1})
        self.model = ir.Model(self.graph, ir_version=IR_VERSION, producer_name="fastgen")
        self.graph.name = "main_graph"
        self.io = _io(decoder)
        self.inputs: dict[str, ir.Value] = {}

    def write(self) -> None:
        decoder = self.decoder
        self.inputs = {spec.name: contract.value(spec) for spec in self.io.inputs}
        self.graph.inputs.extend(self.inputs.values())
        x = self.embed(decoder.embedding)
        present = []
        for number, layer in enumerate(decoder.layers):
            x, kept = self.layer(x, layer, number)
            present += kept
        if decoder.norm is not None:
            x = self.norm(x, decoder.norm)
        logits = self.head(x, decoder.head, decoder.embedding)
        logits.name = self.io.logits.name
        self.graph.outputs.extend([logits, *present])

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

    # The parts of a decoder

    def embed(self, embedding: Embedding) -> ir.Value:
        table = self.table(embedding.table, self.decoder.vocabulary, embedding.width)
        ids, positions = self.inputs["input_ids"], self.inputs["position_ids"]
        x = self.node("Gather", [table, ids], ["rows", "new", embedding.width], {"axis": 0})
        if embedding.times is not None:
            x = self.node("Mul", [x, self.number(embedding.times)], x.shape)
        if embedding.project is not None:
            x = self.linear(x, embedding.project)
        if embedding.positions is not None:
            assert self.decoder.limit is not None
            count, width = self.decoder.limit + embedding.offset, self.decoder.width
            learned = self.table(embedding.positions, count, width)
            if embedding.offset:
                more = self.constant(np.array(embedding.offset, np.int64))
                positions = self.node("Add", [positions, more], ["rows", "new"], dtype=INT64)
            embedded = self.node(
                "Gather", [learned, positions], ["rows", "new", width], {"axis": 0}
            )
            x = self.node("Add", [x, embedded], x.shape)
        return x

    def layer(self, x: ir.Value, layer: Layer, number: int) -> tuple[ir.Value, list[ir.Value]]:
        """The stream after a layer, and the keys and values that it keeps."""
        read = x if layer.before_attention is None else self.norm(x, layer.before_attention)
        attended, kept = self.attention(read, layer.attention, number)
        if layer.parallel:
            other = read if layer.before_feed is None else self.norm(x, layer.before_feed)
            fed = self.feed(other, layer.feed)
            first, second, third = (
                {"stream": x, "attention": attended, "feed": fed}[word]
                for word in layer.parallel.split()
            )
            both = self.node("Add", [first, second], x.shape)
            return self.node("Add", [both, third], x.shape), kept
        x = self.added(x, attended, layer.after_attention, layer)
        read = x if layer.before_feed is None else self.norm(x, layer.before_feed)
        return self.added(x, self.feed(read, layer.feed), layer.after_feed, layer), kept

    def added(self, x: ir.Value, more: ir.Value, norm: Norm | None, layer: Layer) -> ir.Value:
        """The stream with what a part gives."""
        if norm is not None and not layer.norms_stream:
            more = self.norm(more, norm)
        if layer.times != 1.0:
            more = self.node("Mul", [more, self.number(layer.times)], more.shape)
        x = self.node("Add", [x, more], x.shape)
        return self.norm(x, norm) if norm is not None and layer.norms_stream else x

    def linear(self, x: ir.Value, linear: Linear) -> ir.Value:
        *places, into = _dims(x)
        matrix = self.matrix(linear.weight, int(into), linear.width)
        shape = [*places, linear.width]
        x = self.node("MatMul", [x, matrix], shape)
        if linear.bias is None:
            return x
        return self.node("Add", [x, self.bias(linear.bias, linear.width)], shape)

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        width = int(_dims(x)[-1])
        weight = self.vector(norm.weight, width, 1.0 if norm.plus_one else 0.0)
        if norm.kind == "layer":
            bias = None if norm.bias is None else self.vector(norm.bias, width)
            attributes = {"stash_type": 1, "epsilon": norm.eps, "axis": -1}
            inputs = [x, weight] + ([] if bias is None else [bias])
            return self.node("LayerNormalization", inputs, x.shape, attributes)
        if norm.kind == "centred":
            *places, _ = _dims(x)
            attributes = {"keepdims": 1, "noop_with_empty_axes": 0}
            mean = self.node("ReduceMean", [x, self.ints(-1)], [*places, 1], attributes)
            x = self.node("Sub", [x, mean], x.shape)
        attributes = {"axis": -1, "epsilon": norm.eps, "stash_type": 1}
        return self.node("RMSNormalization", [x, weight], x.shape, attributes)

    def feed(self, x: ir.Value, feed: FeedForward) -> ir.Value:
        if feed.gate is None:
            return self.linear(self.activated(self.linear(x, feed.up), feed.activation), feed.down)
        gate = self.linear(x, feed.gate)
        up = self.linear(x, feed.up)
        both = self.node("Mul", [self.activated(gate, feed.activation), up], up.shape)
        return self.linear(both, feed.down)

    def activated(self, x: ir.Value, name: str) -> ir.Value:
        if name in GELUS:
            return self.node("Gelu", [x], x.shape, {"approximate": GELUS[name]})
        if name in ("silu", "swish"):
            return self.node("Mul", [x, self.node("Sigmoid", [x], x.shape)], x.shape)
        if name == "relu":
            return self.node("Relu", [x], x.shape)
        if name == "gelu_new":
            return self._gelu_new(x)
        raise UnsupportedModel(f"its activation is {name!r}")

    def _gelu_new(self, x: ir.Value) -> ir.Value:
        """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as it is written out."""
        half = self.node("Mul", [x, self.number(0.5)], x.shape)
        inner = self.node("Pow", [x, self.number(3.0)], x.shape)
        inner = self.node("Mul", [inner, self.number(0.044715)], x.shape)
        inner = self.node("Add", [x, inner], x.shape)
        inner = self.node("Mul", [inner, self.number(math.sqrt(2.0 / math.pi))], x.shape)
        inner = self.node("Tanh", [inner], x.shape)
        inner = self.node("Add", [inner, self.number(1.0)], x.shape)
        return self.node("Mul", [half, inner], x.shape)

    def head(self, x: ir.Value, head: Head, embedding: Embedding) -> ir.Value:
        """Logits at the positions that are asked for."""
        width, vocabulary = int(_dims(x)[-1]), self.decoder.vocabulary
        if head.project is not None:
            x = self.linear(x, head.project)
            width = head.project.width
        index = self.node(
            "Unsqueeze",
            [self.inputs["logits_positions"], self.ints(-1)],
            ["rows", "keep", 1],
            dtype=INT64,
        )
        index = self.node(
            "Expand", [index, self.ints(1, 1, width)], ["rows", "keep", width], dtype=INT64
        )
        x = self.node("GatherElements", [x, index], ["rows", "keep", width], {"axis": 1})
        shape: list[Dim] = ["rows", "keep", vocabulary]
        if head.weight is None:
            table = self.table(embedding.table, vocabulary, width)
            x = self.node("FusedMatMul", [x, table], shape, {"transB": 1}, domain=MICROSOFT)
        else:
            x = self.node("MatMul", [x, self.matrix(Part(head.weight), width, vocabulary)], shape)
        if head.bias is not None:
            x = self.node("Add", [x, self.vector(head.bias, vocabulary)], shape)
        if head.times is not None:
            x = self.node("Mul", [x, self.number(head.times)], shape)
        if head.divide is not None:
            x = self.node("Div", [x, self.number(head.divide)], shape)
        if head.cap is not None:
            x = self.node("Div", [x, self.number(head.cap)], shape)
            x = self.node("Mul", [self.node("Tanh", [x], shape), self.number(head.cap)], shape)
        return x

    # Attention

    def attention(
        self, x: ir.Value, attention: Attention, number: int
    ) -> tuple[ir.Value, list[ir.Value]]:
        """The result of attention, and its keys and values with those of the new tokens."""
        pairs = self.io.key_values["float32"][2 * number : 2 * number + 2]
        heads, kv_heads = attention.heads, attention.kv_heads
        query = self.turned(self.linear(x, attention.query), attention, heads, attention.query_norm)
        key = self.turned(self.linear(x, attention.key), attention, kv_heads, attention.key_norm)
        value = self.linear(x, attention.value)
        inputs: list[ir.Value | None] = [None] * INPUTS
        inputs[:3] = query, key, value
        inputs[3:5] = (self.inputs[pair.past.name] for pair in pairs)
        inputs[SEQLENS] = self.inputs["seqlens_k"]
        inputs[TOTAL] = self.inputs["total_sequence_length"]
        inputs[QUERIES] = self.inputs["query_seqlens"]
        ours = attributes(heads, kv_heads, attention.scale, attention.window, attention.softcap)
        node = ir.node("GroupQueryAttention", inputs, ours, domain=MICROSOFT, num_outputs=3)
        self.graph.append(node)
        output, *kept = node.outputs
        output.shape = ir.Shape(["rows", "new", heads * attention.head_dim])
        output.dtype = FLOAT
        for pair, present in zip(pairs, kept, strict=True):
            contract.declare(present, pair.present)
        return self.linear(output, attention.out), kept

    def turned(self, x: ir.Value, attention: Attention, heads: int, norm: Norm | None) -> ir.Value:
        """Queries or keys [rows, new, heads * size], normed and turned."""
        if norm is not None and attention.norm_place == "together":
            x, norm = self.norm(x, norm), None
        if norm is None:
            return x if attention.rotary is None else self.rotated(x, attention, heads)
        size = attention.head_dim
        x = self.reshaped(x, [-1, size], ["rows", "new", heads, size])
        if attention.norm_place == "split":
            x, norm = self.norm(x, norm), None
        x = self.transposed(x)
        if norm is not None and attention.norm_place == "heads":
            x, norm = self.norm(x, norm), None
        if attention.rotary is not None:
            x = self.rotated(x, attention, heads)
        if norm is not None:
            x = self.norm(x, norm)
        return self.reshaped(self.transposed(x), [-1], ["rows", "new", heads * size])

    def transposed(self, x: ir.Value) -> ir.Value:
        a, b, c, d = _dims(x)
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

    def rotated(self, x: ir.Value, attention: Attention, heads: int) -> ir.Value:
        rotary = attention.rotary
        assert rotary is not None
        cos, sin = self.cosines(rotary)
        part = 2 * len(rotary.inverse)
        attributes = {"interleaved": int(rotary.interleaved), "num_heads": heads}
        if len(_dims(x)) == 3 or part != attention.head_dim:
            attributes["rotary_embedding_dim"] = 0 if part == attention.head_dim else part
        return self.node("RotaryEmbedding", [x, cos, sin], x.shape, attributes)

    def cosines(self, rotary: Rotary) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines [rows, new, turned / 2]."""
        if rotary.key not in self.angles:
            places = ["rows", "new"]
            if "positions" not in self.shapes:
                positions = self.node(
                    "Unsqueeze",
                    [self.inputs["position_ids"], self.ints(2)],
                    [*places, 1],
                    dtype=INT64,
                )
                self.shapes["positions"] = self.node(
                    "Cast", [positions], [*places, 1], {"to": int(FLOAT)}
                )
            shape: list[Dim] = [*places, len(rotary.inverse)]
            inverse = self.constant(rotary.inverse)
            angles = self.node("Mul", [self.shapes["positions"], inverse], shape)
            both = [self.node(name, [angles], shape) for name in ("Cos", "Sin")]
            if rotary.scale != 1.0:
                scale = self.number(rotary.scale)
                both = [self.node("Mul", [table, scale], shape) for table in both]
            self.angles[rotary.key] = (both[0], both[1])
        return self.angles[rotary.key]


GELUS = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}


def _dims(x: ir.Value) -> list[Dim]:
    assert x.shape is not None
    return [dim if isinstance(dim, int) else str(dim.value) for dim in x.shape]


def _io(decoder: Decoder) -> GraphIO:
    """The inputs and outputs of a decoder's graph."""
    layers = tuple((layer.attention.kv_heads, layer.attention.head_dim) for layer in decoder.layers)
    for _, head_dim in layers:
        if head_dim % HEAD_STEP:
            raise UnsupportedModel(f"its heads are of the size {head_dim}")
    return GraphIO(decoder.vocabulary, layers)


def _columns(tensor: held.Tensor, rows: tuple[int, int, int] | None) -> NDArray[np.float32]:
    """Of a matrix [in, out] some of its outputs."""
    array = held.whole(tensor)
    if rows is None:
        return array
    first, last, _ = rows
    return array[:, first:last]
