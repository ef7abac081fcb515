"""Calls of `generate` that are run with settings which are no keywords of it."""

from __future__ import annotations

from typing import Any

import fastgen
from fastgen.engine.prefill import WHOLE, Chunks


def generate(model: fastgen.CausalLM, rows: Any, chunks: Chunks = WHOLE, **kwargs: Any) -> Any:
    """As `CausalLM.generate`, reading prompts by `chunks`."""
    call = model.call(rows, **kwargs)
    for _ in call.steps(chunks):
        pass
    return call.result()
