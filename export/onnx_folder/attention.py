"""Attention becomes one GroupQueryAttention node a layer, on the engine's buffers.

Folders write it in two ways. GroupQueryAttention nodes of other tools read other lengths; they are
given ours. Where keys are joined (`present = Concat(past, new)`), the nodes from there to the sum
of values are found, and what they compute is read from a run of them, not from how they are
written: which scale, which cap, which keys a query sees. If one number of all that attention
computes is not what GroupQueryAttention would compute, the folder is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel
from fastgen.export.onnx_folder.signature import Signature
from fastgen.export.rewrite.edit import (
    MICROSOFT,
    add_initializer,
    constant,
    input_of,
    insert,
    rank,
    sizes_of,
)
from fastgen.export.rewrite.node import (
    BIAS,
    HEAD_STEP,
    INPUTS,
    POSITIONS,
    QUERIES,
    SEQLENS,
    TOTAL,
    attributes,
)

HIDDEN = -1e4  # a score below it is of a key that is not seen

BETWEEN = {"Transpose", "Reshape", "Expand", "Unsqueeze", "Squeeze", "Mul", "Div", "Cast", "Tile"}
SCORES = {"Mul", "Div", "Add", "Where", "Cast", "Tanh", "Reshape", "Max", "Identity", "Sub"}
WEIGHTS = {"Cast", "Where", "Identity", "Dropout", "Reshape"}


@dataclass(frozen=True)
class Feed:
    """The contract's inputs that attention reads."""

    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    query_seqlens: ir.Value


@dataclass
class Joined:
    """Attention over joined keys, as it is written.

    Attributes:
        layer: its number.
        new: the new keys and values, [rows, kv_heads, new, size].
        scores: the product of queries and keys; `values` that of weights and values.
        softmax: between them.
    """

    layer: int
    new: tuple[ir.Value, ir.Value]
    present: tuple[ir.Value, ir.Value]
    scores: ir.Node
    softmax: ir.Node
    values: ir.Node


def refused(layer: int, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"layer {layer}: {reason}")


def is_grouped(node: ir.Node) -> bool:
    return node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT


def refuse_unknown(graph: ir.Graph, signature: Signature) -> None:
    """Refuse attention that is not known, before anything is run."""
    for layer in range(signature.layers):
        for kind in range(2):
            node = writer(graph, signature, layer, kind)
            if not is_grouped(node) and node.op_type not in ("Concat", "Cast", "Identity"):
                raise refused(
                    layer,
                    f"its attention is {node.op_type} ({node.name}): only "
                    "GroupQueryAttention and joined keys (Concat) can be rewritten",
                )
    for node in graph:
        if node.op_type in ("MultiHeadAttention", "Attention"):
            raise UnsupportedModel(
                f"its attention is {node.op_type} ({node.name}): only GroupQueryAttention and "
                "joined keys (Concat) can be rewritten. Folders of onnxruntime-genai for float16 "
                "on a CPU are of this kind: take the one in fp32 or int4"
            )


def writer(graph: ir.Graph, signature: Signature, layer: int, kind: int) -> ir.Node:
    """The node that gives a present key (0) or value (1)."""
    name = signature.present[2 * layer + kind]
    value = next(value for value in graph.outputs if value.name == name)
    node = value.producer()
    if node is None:
        raise refused(layer, f"{name} is an input of the graph")
    return node


# GroupQueryAttention of others


def turn_apart(graph: ir.Graph) -> None:
    """Rotations by a table and positions become those of ONNX, whose angles are given.

    `trim` knows these, and puts them into the attention node.
    """
    for node in list(graph):
        if node.op_type != "RotaryEmbedding" or node.domain != MICROSOFT:
            continue
        x, positions, cos, sin = node.inputs[:4]
        if rank(x) != 3 or rank(cos) != 2 or rank(positions) != 2:
            continue
        turned = node.attributes.get_int("rotary_embedding_dim", 0)
        heads = node.attributes.get_int("num_heads", 0)
        width, half = sizes_of(x)[2], sizes_of(cos)[1]
        if not heads:
            if width is None or half is None:
                continue
            heads = width // (2 * half)
        angles = [insert(node, "Gather", [table, positions])[0] for table in (cos, sin)]
        attributes = {
            "num_heads": heads, "rotary_embedding_dim": turned,
            "interleaved": node.attributes.get_int("interleaved", 0),
        }  # fmt: skip
        (out,) = insert(node, "RotaryEmbedding", [x, *angles], attributes)
        out.type, out.shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(out)
        graph.remove(node, safe=True)


def regroup(graph: ir.Graph, node: ir.Node, layer: int, signature: Signature, feed: Feed) -> None:
    """Give a GroupQueryAttention node the contract's lengths."""
    pasts = signature.past[2 * layer : 2 * layer + 2]
    given = [None if value is None else value.name for value in node.inputs[3:5]]
    if given != pasts:
        raise refused(layer, f"GroupQueryAttention ({node.name}) reads {given}, expected {pasts}")
    inputs = [*node.inputs, *[None] * INPUTS][:INPUTS]
    if inputs[BIAS] is not None:
        raise refused(layer, f"GroupQueryAttention ({node.name}) adds {input_of(node, BIAS).name}")
    if inputs[12] is not None or inputs[13] is not None:
        raise refused(layer, f"GroupQueryAttention ({node.name}) keeps keys in {node.attributes}")
    inputs[SEQLENS], inputs[TOTAL] = feed.seqlens_k, feed.total_sequence_length
    inputs[QUERIES], inputs[POSITIONS] = feed.query_seqlens, None
    theirs = {name: attribute.value for name, attribute in node.attributes.items()}
    _replace(
        graph,
        node,
        insert(node, "GroupQueryAttention", inputs, theirs, domain=MICROSOFT, outputs=3),
    )


def _replace(graph: ir.Graph, node: ir.Node, outputs: Sequence[ir.Value]) -> None:
    for old, new in zip(node.outputs, outputs, strict=False):
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        name = old.name
        old.name, new.name = f"{name}.theirs", name
    graph.remove(node, safe=True)


# Joined keys


def joined(graph: ir.Graph, layer: int, signature: Signature) -> Joined:
    """Find the nodes of a layer's attention."""
    new, present = [], []
    for kind in range(2):
        node = writer(graph, signature, layer, kind)
        past = signature.past[2 * layer + kind]
        if node.op_type != "Concat" or len(node.inputs) != 2 or input_of(node, 0).name != past:
            raise refused(
                layer,
                f"{node.outputs[0].name} comes from {node.op_type} ({node.name}), which is not "
                "known as attention: expected Concat(past, new) or GroupQueryAttention",
            )
        if node.attributes.get_int("axis", 0) not in (2, -2):
            raise refused(layer, f"Concat ({node.name}) joins tokens along another axis than 2")
        new.append(input_of(node, 1))
        present.append(node.outputs[0])
    scores = _product(layer, present[0])
    softmax = _follow(layer, scores, SCORES, "Softmax")
    values = _product(layer, present[1])
    if _follow(layer, softmax, WEIGHTS, "MatMul") is not values:
        raise refused(layer, "the weights of its Softmax do not go to its values")
    return Joined(layer, (new[0], new[1]), (present[0], present[1]), scores, softmax, values)


def _product(layer: int, value: ir.Value) -> ir.Node:
    """The one product whose second factor is made of `value`."""
    products, pending = [], [value]
    while pending:
        for use in pending.pop().uses():
            if use.node.op_type == "MatMul" and use.idx == 1:
                products.append(use.node)
            elif use.node.op_type in BETWEEN and (use.idx == 0 or use.node.op_type == "Mul"):
                pending += use.node.outputs
            elif use.node.op_type != "Shape":
                raise refused(
                    layer,
                    f"{value.name} goes to {use.node.op_type} ({use.node.name}), which is "
                    "not known as a part of attention",
                )
    if len(set(products)) != 1:
        raise refused(layer, f"{value.name} goes to {len(set(products))} products, expected 1")
    return products[0]


def _follow(layer: int, node: ir.Node, through: set[str], to: str) -> ir.Node:
    """The next `to` behind `node`, through operators that are known."""
    while True:
        uses = [
            use.node for use in node.outputs[0].uses() if use.node.op_type not in ("Shape", "IsNaN")
        ]
        if len(set(uses)) != 1:
            raise refused(layer, f"{node.op_type} ({node.name}) has {len(set(uses))} readers")
        node = uses[0]
        if node.op_type == to:
            return node
        if node.op_type not in through:
            raise refused(
                layer, f"{node.op_type} ({node.name}) is not known between its queries and values"
            )


@dataclass(frozen=True)
class Meaning:
    """The sizes and settings of a layer's attention."""

    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    window: int | None


def meaning(nodes: Joined, seen: Mapping[str, Any], longer: Mapping[str, Any]) -> Meaning:
    """Read what attention computes from a run, and compare every number of it.

    Args:
        seen: all values of a run with a past, without padding.
        longer: the scores that go to the softmax, [1, heads, new, total], of a long run.
    """
    layer = nodes.layer

    def array_of(value: ir.Value) -> NDArray[np.float64]:
        array = seen[str(value.name)] if value.name in seen else constant(value)
        if array is None or isinstance(array, tuple):
            raise refused(layer, f"{value.name} could not be looked at")
        return np.asarray(array, np.float64)

    keys, held = (array_of(value) for value in nodes.present)
    rows, kv_heads, total, size = keys.shape
    new = array_of(nodes.new[0]).shape[2]
    query, turned = (array_of(input_of(nodes.scores, index)) for index in range(2))
    query = _four(layer, query, rows, new, size)
    heads = query.shape[1]
    if size % HEAD_STEP or held.shape[3] != size:
        raise refused(
            layer,
            f"its keys have {size} numbers a head, its values {held.shape[3]}: expected one "
            f"multiple of {HEAD_STEP}",
        )
    if heads % kv_heads:
        raise refused(layer, f"{heads} heads of queries for {kv_heads} of keys")
    spread = np.repeat(keys, heads // kv_heads, axis=1).swapaxes(2, 3)
    turned = turned.reshape(*_leading(turned, rows), size, total)
    of_keys = _ratio(layer, turned, spread, "its keys")
    scores = array_of(input_of(nodes.softmax, 0)).reshape(rows, heads, new, total)
    raw = query @ spread * of_keys
    shown = scores > HIDDEN
    scale, softcap = _scaled(layer, raw[shown], scores[shown], _cap(nodes, array_of))
    weights = np.where(shown, scores, -np.inf)
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = weights @ np.repeat(held, heads // kv_heads, axis=1)
    given = array_of(nodes.values.outputs[0]).reshape(out.shape)
    if not np.allclose(out, given, rtol=1e-3, atol=1e-4 * (np.abs(out).max() or 1)):
        raise refused(layer, "its sum of values is not what its Softmax weighs")
    window = _window(layer, np.asarray(longer[str(input_of(nodes.softmax, 0).name)]))
    return Meaning(heads, kv_heads, size, float(scale * of_keys), softcap, window)


def _leading(array: NDArray[Any], rows: int) -> tuple[int, int]:
    """[rows, heads] of what may be joined as [rows * heads]."""
    if array.ndim == 3:
        return (rows, array.shape[0] // rows)
    return array.shape[0], array.shape[1]


def _four(layer: int, query: NDArray[Any], rows: int, new: int, size: int) -> NDArray[Any]:
    if query.ndim == 3 and query.shape[0] % rows == 0:
        query = query.reshape(rows, -1, *query.shape[1:])
    if query.ndim != 4 or query.shape[2:] != (new, size):
        raise refused(layer, f"its queries have the shape {query.shape}")
    return query


def _ratio(layer: int, one: NDArray[Any], other: NDArray[Any], what: str) -> float:
    """The factor between two arrays that are otherwise equal."""
    if one.shape != other.shape and one.ndim == 4 and other.shape[1] % one.shape[1] == 0:
        one = np.repeat(one, other.shape[1] // one.shape[1], axis=1)  # not spread over the heads
    if one.shape == other.shape:
        index = np.unravel_index(np.abs(other).argmax(), other.shape)
        factor = float(one[index] / other[index]) if other[index] else 1.0
        if np.allclose(one, other * factor, rtol=1e-4, atol=1e-5 * np.abs(one).max()):
            return factor
    raise refused(layer, f"{what} are not those that it keeps, spread over its heads")


def _cap(nodes: Joined, array_of: Any) -> float:
    """The factor behind a Tanh between the scores and their softmax; 0 where there is none."""
    node, after, cap = nodes.scores, False, 1.0
    while node is not nodes.softmax:
        node = next(
            use.node for use in node.outputs[0].uses() if use.node.op_type not in ("Shape", "IsNaN")
        )
        if node.op_type == "Tanh":
            after = True
        elif after and node.op_type in ("Mul", "Div"):
            others = [array_of(v) for v in node.inputs if v is not None]
            factor = next((float(v.reshape(-1)[0]) for v in others if v.size == 1), 1.0)
            cap *= factor if node.op_type == "Mul" else 1 / factor
    return cap if after else 0.0


def _scaled(
    layer: int, raw: NDArray[Any], scores: NDArray[Any], softcap: float
) -> tuple[float, float]:
    """The scale that leads from products to scores, which must be the same for all."""
    plain = np.arctanh(np.clip(scores / softcap, -1, 1)) * softcap if softcap else scores
    usable = np.isfinite(plain) & (np.abs(scores) < 0.9 * softcap if softcap else True)
    if not usable.any():
        raise refused(layer, "its scores are all at their cap")
    raw, plain = raw[usable], plain[usable]
    scale = float((raw @ plain) / (raw @ raw)) if raw.any() else 1.0
    if not np.allclose(plain, raw * scale, rtol=1e-3, atol=1e-4 * np.abs(plain).max()):
        raise refused(
            layer,
            "something is added to its scores that depends on places (ALiBi, say) or on more: "
            "GroupQueryAttention has no place for it in folders",
        )
    return scale, softcap


def _window(layer: int, scores: NDArray[Any]) -> int | None:
    """Count the keys that a query sees, itself included; None for all."""
    new, total = scores.shape[-2:]
    shown = scores.reshape(-1, new, total)
    shown = shown > HIDDEN
    if not (shown == shown[:1]).all():
        raise refused(layer, "its heads see different keys")
    if shown.all():
        return None  # made for one new token, which sees all: so do ours, and no later ones
    counts = []
    for query in range(new):
        last = total - new + query
        seen = np.flatnonzero(shown[0, query])
        if not len(seen) or seen[-1] != last or seen[0] != last - len(seen) + 1:
            raise refused(layer, "its mask is neither causal nor a window")
        counts.append((len(seen), last + 1))
    if all(count == most for count, most in counts):
        return None
    if len({count for count, _ in counts}) != 1:
        raise refused(layer, "its mask is neither causal nor a window")
    return counts[0][0]


def group(
    graph: ir.Graph, nodes: Joined, means: Meaning, signature: Signature, feed: Feed, ids: ir.Value
) -> None:
    """Put GroupQueryAttention in the place of the nodes from queries to their sums of values."""
    before, query = nodes.values, nodes.scores.inputs[0]
    assert query is not None
    flat = add_initializer(graph, "flat_heads", np.array([0, 0, -1], np.int64))
    sizes = [means.num_heads, means.head_dim]
    if rank(query) == 3:  # [rows * heads, new, size]
        query = _reshaped(graph, before, query, ids, ["rows", sizes[0], "new", sizes[1]])
    parts: list[ir.Value] = []
    for part in (query, *nodes.new):
        (turned,) = insert(before, "Transpose", [part], {"perm": [0, 2, 1, 3]})
        parts += insert(before, "Reshape", [turned, flat])
    pasts = {value.name: value for value in graph.inputs}
    inputs: list[ir.Value | None] = [None] * INPUTS
    inputs[:3] = parts
    inputs[3:5] = [pasts[name] for name in signature.past[2 * nodes.layer : 2 * nodes.layer + 2]]
    inputs[SEQLENS], inputs[TOTAL] = feed.seqlens_k, feed.total_sequence_length
    inputs[QUERIES] = feed.query_seqlens
    ours = attributes(means.num_heads, means.kv_heads, means.scale, means.window, means.softcap)
    out, *present = insert(before, "GroupQueryAttention", inputs, ours, domain=MICROSOFT, outputs=3)
    shape = add_initializer(graph, "split_heads", np.array([0, 0, *sizes], np.int64))
    (split,) = insert(before, "Reshape", [out, shape])
    (output,) = insert(before, "Transpose", [split], {"perm": [0, 2, 1, 3]})
    if rank(nodes.values.outputs[0]) == 3:
        output = _reshaped(graph, before, output, ids, [-1, "new", sizes[1]])
    nodes.values.outputs[0].replace_all_uses_with(output)
    for old, new in zip(nodes.present, present, strict=True):
        name = old.name
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = f"{name}.joined", name


def take_scales(graph: ir.Graph) -> int:
    """Queries that are multiplied by a number are not: attention has one to multiply with."""
    fired = 0
    for node in graph:
        if not is_grouped(node) or not node.attributes.get_float("scale", 0.0):
            continue
        value = node.inputs[0]
        while value is not None and len(value.uses()) == 1:
            before = value.producer()
            if before is None:
                break
            factor = _factor(before)
            value = input_of(before, 0 if factor is None else factor[0])
            if factor is not None:
                scale = node.attributes.get_float("scale", 0.0) * factor[1]
                node.attributes["scale"] = ir.AttrFloat32("scale", scale)
                before.outputs[0].replace_all_uses_with(value)
                fired += 1
            elif before.op_type not in ("Transpose", "Reshape"):
                break
    return fired


def _factor(node: ir.Node) -> tuple[int, float] | None:
    """The input that a node multiplies by a number, and the number; None for other nodes."""
    if node.op_type not in ("Mul", "Div"):
        return None
    for index in (1, 0):
        held = constant(node.inputs[index])
        if held is None or held.size != 1 or (node.op_type == "Div" and index == 0):
            continue
        number = float(held.reshape(-1)[0])
        return 1 - index, number if node.op_type == "Mul" else 1 / number
    return None


def _reshaped(
    graph: ir.Graph, before: ir.Node, value: ir.Value, ids: ir.Value, dims: Sequence[int | str]
) -> ir.Value:
    """`value` in a shape of which some dimensions are those of the ids [rows, new]."""
    parts = []
    for dim in dims:
        if isinstance(dim, int):
            parts.append(add_initializer(graph, f"size_{dim}", np.array([dim], np.int64)))
        else:
            start = 0 if dim == "rows" else 1
            parts += insert(before, "Shape", [ids], {"start": start, "end": start + 1})
    (shape,) = insert(before, "Concat", parts, {"axis": 0})
    (out,) = insert(before, "Reshape", [value, shape])
    return out
