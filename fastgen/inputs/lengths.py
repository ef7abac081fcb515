"""The length of a text for which nobody sets one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LENGTHS = ("max_new_tokens", "max_length")  # the knobs that set a length

# New tokens of each kind of text.
NEW_TOKENS = {
    "generate": 20,  # `CausalLM.generate` and what is like it: transformers' own default
    "completion": 16,  # OpenAI's default for /v1/completions
    "text": 64,  # the command line, jobs, and conversations without a chat template
    "reply": 256,  # of a chat template: the default of transformers' pipelines
}


def default_length(
    kind: str, knobs: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> int | None:
    """The most new tokens of a text whose length nobody sets; None where somebody sets it.

    Args:
        kind: of text, one of `NEW_TOKENS`.
        knobs: of the call. A knob that is None here is not set, even if the model sets it.
        defaults: of the model (its generation config), where these count.
    """
    known = {**(defaults or {}), **knobs}
    return None if any(known.get(name) for name in LENGTHS) else NEW_TOKENS[kind]
