"""Calls of tools in an answer's text, where the chat template shows how the model writes them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from typing import Any

Found = list[dict[str, Any]]  # {"name": ..., "arguments": {...}} each
BEGIN, END = "<tool_call>", "</tool_call>"
Reader = Callable[[str], tuple[str, Found]]  # of a text: what is no call, and the calls


def reader(template: str) -> Reader | None:
    """What reads the calls that a template asks for; None where its form is not known."""
    if "<tool_call>" in template:
        return _tagged
    if "[TOOL_CALLS]" in template:
        return _listed
    if "ipython" in template and "parameters" in template:
        return _bare
    return None


def _tagged(text: str) -> tuple[str, Found]:
    """`<tool_call>{"name": "f", "arguments": {}}</tool_call>`, any number (Hermes, Qwen)."""
    calls: Found = []
    rest, at = [], 0
    while (start := text.find(BEGIN, at)) >= 0:
        end = text.find(END, start)
        stop = len(text) if end < 0 else end + len(END)
        found = _calls(text[start + len(BEGIN) : stop].removesuffix(END))
        calls += found
        rest += [text[at:start], "" if found else text[start:stop]]
        at = stop
    return "".join([*rest, text[at:]]).strip() if calls else text, calls


def _listed(text: str) -> tuple[str, Found]:
    """`[TOOL_CALLS][{"name": "f", "arguments": {}}]` (Mistral)."""
    before, mark, after = text.partition("[TOOL_CALLS]")
    calls = _calls(after) if mark else []
    return (before.strip(), calls) if calls else (text, [])


def _bare(text: str) -> tuple[str, Found]:
    """The whole text is `{"name": "f", "parameters": {}}` (Llama 3)."""
    calls = _calls(text.removeprefix("<|python_tag|>"))
    return ("", calls) if calls else (text, [])


def _calls(text: str) -> Found:
    """The calls that a JSON text is; none if it is something else or too deep."""
    try:
        content, _ = json.JSONDecoder().raw_decode(text.strip())
        json.dumps(content)
    except (ValueError, RecursionError):
        return []
    found = []
    for one in content if isinstance(content, list) else [content]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            return []
        arguments = one.get("arguments", one.get("parameters", {}))
        if not isinstance(arguments, dict):
            return []
        found.append({"name": one["name"], "arguments": arguments})
    return found


def in_message(calls: Found) -> list[dict[str, Any]]:
    """Calls as an OpenAI message has them."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": one["name"],
                "arguments": json.dumps(one["arguments"], ensure_ascii=False),
            },
        }
        for one in calls
    ]
