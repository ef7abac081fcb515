"""Layers with a window are shown what they see, and not what lies long before it.

GroupQueryAttention takes a window as a mask: it computes every score and drops those outside. So a
layer with a window of W tokens counts from a later token on: the runtime binds its keys and values
there (`fastgen.model`) and says which one that is, in the input `window_start.{W}`, int32 []. The
node is told of so many tokens fewer, and what it gives is the same.
"""

from __future__ import annotations

import onnx_ir as ir
from fastgen.export.cache import PAST_AND_SCALE, POSITIONS
from fastgen.export.trim import insert

from fastgen.model import window_start

# Inputs of GroupQueryAttention, by place.
SEQLENS, TOTAL, BIAS = 5, 6, 10


def bound(model: ir.Model) -> list[int | None]:
    """Let the layers with windows count from `window_start.{W}` on, in place.

    Returns:
        The window of each layer, in the order of the graph's inputs; None where it counts all
        tokens, as one does whose scores something is added to. Empty if all do.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    found: dict[str, int | None] = {}
    counts: dict[int, tuple[ir.Value, ir.Value]] = {}
    for node in [one for one in graph if one.op_type == "GroupQueryAttention"]:
        past = str(node.inputs[PAST_AND_SCALE["k"][0]].name)
        window = node.attributes.get_int("local_window_size", -1)
        if window < 1 or (len(node.inputs) > BIAS and node.inputs[BIAS] is not None):
            found[past] = None
            continue
        found[past] = window
        if window not in counts:
            counts[window] = _counts(graph, window, inputs)
        for place, value in zip((SEQLENS, TOTAL), counts[window], strict=True):
            node.replace_input_with(place, value)
        if node.attributes.get_int("do_rotary", 0):  # it would count positions as it counts keys
            node.replace_input_with(POSITIONS, inputs["position_ids"])
    return [found[name] for name in inputs if name in found] if counts else []


def _counts(graph: ir.Graph, window: int, inputs: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """`seqlens_k` and `total_sequence_length` from the first token on that is shown."""
    start = ir.Value(
        name=window_start(window), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32)
    )
    graph.inputs.append(start)
    before = graph[0]
    (seqlens,) = insert(before, "Sub", [inputs["seqlens_k"], start])
    (total,) = insert(before, "Sub", [inputs["total_sequence_length"], start])
    return seqlens, total
