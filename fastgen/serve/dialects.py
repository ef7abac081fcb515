"""Fields that clients of OpenAI and of vLLM send besides: honoured, let go, or refused by name.

null is no field: typed clients send it for whatever they do not use, unknown names too. vLLM's
fields become knobs. What changes no token is let go, with a warning in the log; what would change
the answer is accepted with the one value that asks for nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastgen.inputs import validators

LOG = logging.getLogger(__name__)

# For what happens elsewhere, or says who asks.
INERT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
)
# About how fast, where or in which order: no token changes.
LET_GO = (
    "prediction", "prompt_cache_retention", "priority", "request_id", "cache_salt",
    "spaces_between_special_tokens", "detokenize", "guided_decoding_backend",
    "include_reasoning",
)  # fmt: skip
# For the chat template, where it names them; else let go.
OF_TEMPLATES = ("reasoning_effort", "verbosity")
# What asks for nothing with this value, and for something that is not done here with any other.
ONLY: dict[str, Any] = {
    "modalities": ["text"],
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "return_tokens_as_token_ids": False,
    "return_token_ids": False,
    "bad_words": [],
    "logits_processors": [],
}
ONLY_COMPLETIONS: dict[str, Any] = {"add_special_tokens": True}
ONLY_CHATS: dict[str, Any] = {
    "add_special_tokens": False,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "echo": False,
    "best_of": 1,
    "function_call": "none",
    "functions": [],
}


class Sent(BaseModel):
    """An object that a client sends: a field that is null is not given, whatever its name."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, sent: Any) -> Any:
        return given(sent) if isinstance(sent, dict) else sent


def given(sent: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in sent.items() if value is not None}


def shared() -> dict[str, Any]:
    """Fields of both kinds of requests, for pydantic's `create_model`."""
    let_go = "accepted, and changes nothing"
    return {
        "min_tokens": (int | None, Field(None, ge=0, description="as min_new_tokens")),
        "ignore_eos": (bool | None, Field(None, description="go on after the end of text")),
        "stop_token_ids": (
            list[int] | None,
            Field(None, description="tokens that end the text besides its end"),
        ),
        **{name: (Any, Field(None, description=let_go)) for name in (*INERT, *LET_GO)},
        **only(ONLY),
    }


def only(accepted: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that have one value."""
    return {
        name: (Any, Field(None, description=f"{value!r} alone is accepted"))
        for name, value in accepted.items()
    }


def odd(sent: Mapping[str, Any], accepted: Mapping[str, Any]) -> tuple[str, str] | None:
    """A field that has another value than the accepted one, and what is to be said of it."""
    for name, value in accepted.items():
        if name in sent and (type(sent[name]), sent[name]) != (type(value), value):
            got = validators.shown(sent[name])
            return name, f"{name} must be {value!r}, got {got}: nothing else is done"
    return None


def knobs(sent: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that vLLM's fields stand for.

    Args:
        defaults: the model's own knobs.

    Raises:
        ValueError: two fields that say different things of one.
    """
    out: dict[str, Any] = {}
    if "min_tokens" in sent:
        if sent.get("min_new_tokens", sent["min_tokens"]) != sent["min_tokens"]:
            raise ValueError("min_tokens and min_new_tokens say different lengths")
        out["min_new_tokens"] = sent["min_tokens"]
    if sent.get("top_k") == -1:
        out["top_k"] = 0
    if sent.get("ignore_eos") and "eos_token_id" in sent:
        raise ValueError("ignore_eos and eos_token_id exclude each other")
    if sent.get("ignore_eos") or sent.get("stop_token_ids"):
        own = (
            None
            if sent.get("ignore_eos")
            else sent.get("eos_token_id", defaults.get("eos_token_id"))
        )
        ends = own if isinstance(own, list | tuple) else [] if own is None else [own]
        out["eos_token_id"] = [*ends, *sent.get("stop_token_ids", ())] or None
    return out


def for_template(sent: Mapping[str, Any], template: str) -> dict[str, Any]:
    """The fields of `OF_TEMPLATES` that the template names."""
    return {name: sent[name] for name in OF_TEMPLATES if name in sent and name in template}


class FieldLog:
    """Tells the log once of each field that is let go."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, sent: Mapping[str, Any], used: Mapping[str, Any]) -> None:
        """Tell of what was sent and is neither used nor inert."""
        for name in (*LET_GO, *OF_TEMPLATES):
            if name in sent and name not in used and name not in self._known:
                self._known.add(name)
                LOG.warning("%s is accepted, and changes nothing: said once", name)
