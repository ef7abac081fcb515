"""A form of ours, for models whose template knows no tools: they are told of them in words.

Calls are written as Hermes models write them. It is for whoever asks for it: a model that was
trained to call tools in another way does better in that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastgen.serve.tools.hermes import BEGIN, END, Hermes

ASKS = """You have these tools, one in each line:
{tools}

To call one, write nothing but
{begin}
{{"name": "the tool's name", "arguments": {{"a parameter": "its value"}}}}
{end}
You are then told what it returned. Answer in words when you know enough."""
RETURNED = "<tool_response>\n{content}\n</tool_response>"

Message = dict[str, Any]


class Plain(Hermes):
    name = "plain"

    def shown(self, call: str) -> bool:
        return False


def told(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Message]:
    """Messages as a template without tools can show them."""
    out: list[Message] = []
    for message in map(_written, messages):
        if out and message["role"] == "user" == out[-1]["role"]:
            out[-1] = {**out[-1], "content": f"{_text(out[-1])}\n{_text(message)}"}
        else:
            out.append(message)
    if tools:
        lines = "\n".join(json.dumps(one.get("function", one), ensure_ascii=False) for one in tools)
        asks = ASKS.format(tools=lines, begin=BEGIN, end=END)
        if out and out[0]["role"] in ("system", "developer"):
            out[0] = {**out[0], "content": f"{_text(out[0])}\n\n{asks}"}
        else:
            out.insert(0, {"role": "system", "content": asks})
    return out


def _written(message: Message) -> Message:
    """A call, or what a tool returned, in words; other messages as they are."""
    if message.get("role") == "tool":
        return {"role": "user", "content": RETURNED.format(content=_text(message))}
    calls = message.get("tool_calls")
    if not calls:
        return message
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    blocks = [_text(message)] if message.get("content") else []
    return {**kept, "content": "\n".join([*blocks, *map(_call, calls)])}


def _call(call: Any) -> str:
    function = call.get("function", {}) if isinstance(call, dict) else {}
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name", ""), ensure_ascii=False)
    return f'{BEGIN}\n{{"name": {name}, "arguments": {arguments}}}\n{END}'


def _text(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(one.get("text", "")) for one in content if isinstance(one, dict))
    return content if isinstance(content, str) else ""
