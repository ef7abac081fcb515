"""Reasoning: where a prompt begins it, and how long it may become."""

from __future__ import annotations

from fastgen.serve.tools.reader import Marks


def inside(prompt: str, marks: Marks | None) -> bool:
    """Whether an answer to a prompt begins within reasoning, as the prompt ends with its mark."""
    return marks is not None and prompt.rstrip().endswith(marks.begin.rstrip())
