"""Scripts that others wrote, run by the process of the tests."""

from __future__ import annotations

import contextlib
import io
from typing import Any


def output_of(script: str) -> str:
    """What a script prints. What it imports is there already, and graphs are traced once."""
    said = io.StringIO()
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(said):
        exec(compile(script, "<script>", "exec"), names)
    return said.getvalue()
