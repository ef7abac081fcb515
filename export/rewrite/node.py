"""GroupQueryAttention, the node that attention becomes: its inputs by index, and its attributes."""

from __future__ import annotations

from typing import Any

INPUTS = 17
SEQLENS, TOTAL, POSITIONS, BIAS, SINK, QUERIES = 5, 6, 9, 10, 11, 16
PAST_AND_SCALE = {"k": (3, 12), "v": (4, 13)}  # the inputs of keys and of values
HEAD_STEP = 8  # sizes of heads are multiples of it
FURTHEST = 1 << 21  # positions up to which a mask is looked at; a longer window is no window


def attributes(
    num_heads: int, kv_heads: int, scale: float, window: int | None, softcap: float
) -> dict[str, Any]:
    """Its attributes.

    Args:
        window: tokens that a query sees, itself included; None for all.
        softcap: of the scores; 0 for none.
    """
    given: dict[str, Any] = {"num_heads": num_heads, "kv_num_heads": kv_heads, "scale": scale}
    if window is not None:
        given["local_window_size"] = window
    if softcap:
        given["softcap"] = softcap
    return given
