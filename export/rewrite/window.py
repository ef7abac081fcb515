"""Layers with a window are shown what they see, and not what lies long before it.

GroupQueryAttention takes a window as a mask: it computes every score and drops those outside. So a
layer with a window of W tokens counts from a later token on: the runtime binds its keys and values
there (`fastgen.engine.model`) and says which one that is, in the input `window_start.{W}`,
int32 []. The node is told of so many tokens fewer, and what it gives is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from fastgen.export.rewrite import contract
from fastgen.export.rewrite.edit import input_of, insert
from fastgen.export.rewrite.node import BIAS, PAST_AND_SCALE, POSITIONS, SEQLENS, TOTAL
from fastgen.store.graph_io import layer_and_half, window_start


def bound(model: ir.Model) -> list[int | None]:
    """Let the layers with windows count from `window_start.{W}` on, in place.

    Returns:
        The window of each layer; None where it counts all tokens, as one does whose scores
        something is added to. Empty if all do.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    layers = [name for name in inputs if (layer_and_half(name) or ("", ""))[1] == "key"]
    nodes: dict[str, list[ir.Node]] = {name: [] for name in layers}
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            past = str(input_of(node, PAST_AND_SCALE["k"][0]).name)
            nodes.setdefault(past, []).append(node)
    windows = [_window(nodes[name]) for name in layers]
    known = sorted({window for window in windows if window is not None})
    counts = {window: _counts(graph, window, inputs) for window in known}
    for name, window in zip(layers, windows, strict=True):
        if window is None:
            continue
        for node in nodes[name]:
            for index, value in zip((SEQLENS, TOTAL), counts[window], strict=True):
                node.replace_input_with(index, value)
            if node.attributes.get_int("do_rotary", 0):  # positions are not counted as keys are
                node.replace_input_with(POSITIONS, inputs["position_ids"])
    return windows if counts else []


def _window(nodes: Sequence[ir.Node]) -> int | None:
    """Of the nodes that attend to the keys of a layer; None if one of them counts all tokens."""
    windows = {node.attributes.get_int("local_window_size", -1) for node in nodes}
    added = any(len(node.inputs) > BIAS and node.inputs[BIAS] is not None for node in nodes)
    (window,) = windows if len(windows) == 1 else (-1,)
    return None if window < 1 or added else window


def _counts(graph: ir.Graph, window: int, inputs: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k` and `total_sequence_length` from the first token on that is shown."""
    start = contract.value(window_start(window))
    graph.inputs.append(start)
    before = graph[0]
    (seqlens,) = insert(before, "Sub", [inputs["seqlens_k"], start])
    (total,) = insert(before, "Sub", [inputs["total_sequence_length"], start])
    return seqlens, total
