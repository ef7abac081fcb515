"""Keys and values in 8 bits: how far each channel reaches on text, and the nodes that store it so.

GroupQueryAttention stores what it gets (keys after their rotation) as `rint(x / scale)`, int8,
with a constant scale for each channel of each head; a value that reaches further saturates. So
the scales must hold for all texts and, since a rotated key depends on its position, for all
positions: the rows that calibrate begin at positions spread over all that the model was made for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from fastgen.export import calibrate
from fastgen.export.quantize import Floats
from fastgen.export.trim import add_initializer
from numpy.typing import NDArray

DTYPES = {"fp32": "float32", "int8": "int8"}  # of each cache precision
TOKENS = 4 * calibrate.TOKENS  # of calibration, at most: text that was not seen saturates
MARGIN = 1.1  # on what was seen; more costs resolution
FURTHEST = 1 << 15  # positions that are calibrated where the model has no limit
LONG = 1024  # tokens of a row that is measured: errors of a cache show in long contexts

# Inputs of GroupQueryAttention, by place.
POSITIONS = 9
PAST_AND_SCALE = {"k": (3, 12), "v": (4, 13)}


def reach(
    model: ir.Model, rows: Sequence[NDArray[np.int64]], limit: int | None
) -> dict[str, Floats]:
    """The largest absolute value in each channel of each stored key and value, on `rows`.

    Args:
        model: the trimmed graph, with a cache in float32.
        rows: calibration ids.
        limit: positions that the model was made for; None without limit.

    Returns:
        float32 [kv_heads, head_dim], by the name of the graph's input for the past.
    """
    positioned = model.clone()
    (positions,) = (value for value in positioned.graph.inputs if value.name == "position_ids")
    for node in _attention(positioned):
        if node.attributes.get_int("do_rotary", 0):  # without positions it counts from zero
            node.replace_input_with(POSITIONS, positions)
    # What is stored for each past, whatever the order of the graph's outputs.
    present = {
        str(node.inputs[past].name): str(node.outputs[place + 1].name)
        for node in _attention(positioned)
        for place, (past, _) in enumerate(PAST_AND_SCALE.values())
    }
    last = (limit or FURTHEST) - max(len(row) for row in rows)
    found: dict[str, Floats] = {}
    with calibrate.place(positioned) as directory:
        session = calibrate.running(positioned, list(present.values()), directory)
        for row, start in zip(rows, np.linspace(0, last, len(rows)).astype(int), strict=True):
            stored = session.run(list(present.values()), calibrate.feeds(session, row, int(start)))
            for name, array in zip(present, stored, strict=True):
                largest = np.abs(array).max(axis=(0, 2))
                found[name] = np.maximum(found.get(name, 0), largest)
    return found


def quantize(model: ir.Model, reached: dict[str, Floats]) -> None:
    """Store keys and values in int8, in place.

    Args:
        model: the trimmed graph.
        reached: what `reach` found.
    """
    for node in _attention(model):
        for kind, (past, scale) in PAST_AND_SCALE.items():
            value, present = node.inputs[past], node.outputs[past - 2]
            assert value is not None
            constant = scales(reached[str(value.name)])
            node.replace_input_with(
                scale, add_initializer(model.graph, f"{value.name}.scale", constant)
            )
            name = f"{kind}_quant_type"
            node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
            value.dtype = present.dtype = ir.DataType.INT8
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)


def scales(reached: Floats) -> Floats:
    """[1, kv_heads, 1, head_dim] from [kv_heads, head_dim]; a silent channel has the largest."""
    bounds = MARGIN * np.where(reached == 0, reached.max() or 1, reached)
    return np.asarray(bounds / 127, np.float32)[None, :, None, :]


def long_rows(rows: Sequence[NDArray[np.int64]], limit: int | None) -> list[NDArray[np.int64]]:
    """`rows` joined to rows of LONG tokens, or as many as the model takes; no shorter rest."""
    ids = np.concatenate(rows)
    length = min(LONG, limit or LONG, len(ids))
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def _attention(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type == "GroupQueryAttention")
