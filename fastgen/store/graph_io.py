"""What a graph takes and gives: the contract between the export and the engine."""

from __future__ import annotations

GRAIN = 256  # tokens by which it moves what a layer with a window is shown first


def window_start(window: int) -> str:
    """The graph's input that says which token such layers are shown first."""
    return f"window_start.{window}"


def first_shown(held: int, window: int, grain: int = GRAIN) -> int:
    """Where rows of at least `held` tokens begin for a layer with a window.

    The same for all that a chunk may begin with, which so adds up its sums alike.
    """
    return max(0, held // grain * grain - -(-window // grain) * grain)
