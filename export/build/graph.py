"""A decoder's description and its weights to the graph that a trace of it gives.

What `trim` makes of a trace is left to `trim` here too: products that are packed or merged, tables
of rotations. Weights are constants that are read when they are wanted, and not kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from fastgen.errors import UnsupportedModel
from fastgen.export.build import mixture
from fastgen.export.build.decoder import (
    Attention,
    Decoder,
    Embedding,
    Experts,
    FeedForward,
    Head,
    Layer,
    Norm,
    Part,
    Rotary,
)
from fastgen.export.build.weights import Weights
from fastgen.export.build.writer import FLOAT, INT64, Dim, Writer, dims
from fastgen.export.rewrite import contract
from fastgen.export.rewrite.edit import MICROSOFT
from fastgen.export.rewrite.node import (
    HEAD_STEP,
    INPUTS,
    QUERIES,
    SEQLENS,
    SINK,
    TOTAL,
    attributes,
)
from fastgen.store.graph_io import GraphIO


def write(decoder: Decoder, weights: Weights) -> ir.Model:
    """The graph by the contract, of all the weights and of nothing else.

    Raises:
        ModelError: a tensor is missing, is of another shape than the description has, or is left.
        UnsupportedModel: the attention node takes no heads of that size.
    """
    writer = _Graph(decoder, weights)
    writer.write()
    writer.check_all_used()
    return writer.model


class _Graph(Writer):
    """The graph of a decoder."""

    def __init__(self, decoder: Decoder, weights: Weights) -> None:
        super().__init__(decoder, weights, _io(decoder))
        self.angles: dict[Any, tuple[ir.Value, ir.Value]] = {}

    def write(self) -> None:
        decoder = self.decoder
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

    def norm(self, x: ir.Value, norm: Norm) -> ir.Value:
        width = int(dims(x)[-1])
        weight = self.vector(norm.weight, width, 1.0 if norm.plus_one else 0.0)
        if norm.kind == "layer":
            bias = None if norm.bias is None else self.vector(norm.bias, width)
            attributes = {"stash_type": 1, "epsilon": norm.eps, "axis": -1}
            inputs = [x, weight] + ([] if bias is None else [bias])
            return self.node("LayerNormalization", inputs, x.shape, attributes)
        if norm.kind == "centred":
            *places, _ = dims(x)
            attributes = {"keepdims": 1, "noop_with_empty_axes": 0}
            mean = self.node("ReduceMean", [x, self.ints(-1)], [*places, 1], attributes)
            x = self.node("Sub", [x, mean], x.shape)
        attributes = {"axis": -1, "epsilon": norm.eps, "stash_type": 1}
        return self.node("RMSNormalization", [x, weight], x.shape, attributes)

    def feed(self, x: ir.Value, feed: FeedForward | Experts) -> ir.Value:
        if isinstance(feed, Experts):
            return self.mixed(x, feed)
        if feed.gate is None:
            return self.linear(self.activated(self.linear(x, feed.up), feed.activation), feed.down)
        gate = self.linear(x, feed.gate)
        up = self.linear(x, feed.up)
        both = self.node("Mul", [self.activated(gate, feed.activation), up], up.shape)
        return self.linear(both, feed.down)

    def mixed(self, x: ir.Value, experts: Experts) -> ir.Value:
        tokens = mixture.flat(self, x)
        shared = None if experts.shared is None else self.feed(tokens, experts.shared)
        out = mixture.write(self, tokens, experts, shared)
        *_, width = dims(x)
        return self.reshaped(out, [int(width)], dims(x))

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
        width, vocabulary = int(dims(x)[-1]), self.decoder.vocabulary
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
        value = self.clipped(self.linear(x, attention.value), attention)
        inputs: list[ir.Value | None] = [None] * INPUTS
        inputs[:3] = query, key, value
        inputs[3:5] = (self.inputs[pair.past.name] for pair in pairs)
        inputs[SEQLENS] = self.inputs["seqlens_k"]
        inputs[TOTAL] = self.inputs["total_sequence_length"]
        inputs[QUERIES] = self.inputs["query_seqlens"]
        if attention.sinks is not None:
            inputs[SINK] = self.vector(attention.sinks, heads)
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
            x = self.clipped(x, attention)
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

    def clipped(self, x: ir.Value, attention: Attention) -> ir.Value:
        """Queries, keys or values, none larger than is allowed."""
        if attention.clip is None:
            return x
        ends = [self.number(-attention.clip), self.number(attention.clip)]
        return self.node("Clip", [x, *ends], x.shape)

    def rotated(self, x: ir.Value, attention: Attention, heads: int) -> ir.Value:
        rotary = attention.rotary
        assert rotary is not None
        cos, sin = self.cosines(rotary)
        part = 2 * len(rotary.inverse)
        attributes = {"interleaved": int(rotary.interleaved), "num_heads": heads}
        if len(dims(x)) == 3 or part != attention.head_dim:
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


def _io(decoder: Decoder) -> GraphIO:
    """The inputs and outputs of a decoder's graph."""
    layers = tuple((layer.attention.kv_heads, layer.attention.head_dim) for layer in decoder.layers)
    for _, head_dim in layers:
        if head_dim % HEAD_STEP:
            raise UnsupportedModel(f"its heads are of the size {head_dim}")
    return GraphIO(decoder.vocabulary, layers)
