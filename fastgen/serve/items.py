"""Items of `/v1/responses`: those that a client sends, and the messages of a chat that they are."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastgen.inputs import validators
from fastgen.serve.refused import Refused

Item = dict[str, Any]
Message = dict[str, Any]

RULING = ("system", "developer")
ROLES = ("user", "assistant", *RULING)
TEXTS = ("input_text", "output_text", "text")
# The beginnings of the ids of items.
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc",
            "function_call_output": "fco"}  # fmt: skip


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def items_of(given: str | Sequence[Any] | None, known: Callable[[str], Item | None]) -> list[Item]:
    """The items of an `input`, each as OpenAI would list it.

    Args:
        known: gives the item of an earlier response that has this id.

    Raises:
        Refused: one that is of another kind, or is not whole.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_item(one, known) for one in given or ()]


def _item(given: Any, known: Callable[[str], Item | None]) -> Item:
    kind = given.get("type") or ("message" if "role" in given else None)
    if kind == "item_reference":
        found = known(str(given.get("id")))
        if found is None:
            raise Refused(404, f"input: there is no item {given.get('id')!r} here", param="input")
        return found
    if not isinstance(kind, str) or kind not in READ:
        raise _refused(
            f"an item has the type {', '.join(READ)} or item_reference, got "
            f"{validators.shown(kind)}"
        )
    made = READ[kind](given)
    name = given.get("id")
    return {"id": name if isinstance(name, str) else new_id(PREFIXES[kind]), "type": kind, **made}


def _message(given: Mapping[str, Any]) -> Item:
    role = given.get("role")
    if role not in ROLES:
        raise _refused(f"the role of a message is {', '.join(ROLES)}, got {validators.shown(role)}")
    content = given.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise _refused("the content of a message is a text or a list of parts")
    made = [_part(part, role == "assistant") for part in parts]
    return {"role": role, "content": made, "status": "completed"}


def _part(given: Any, said: bool) -> dict[str, Any]:
    """A part of a message; `said` by the model, or to it."""
    part = given if isinstance(given, Mapping) else {}
    kind = part.get("type")
    if said and kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "refusal", "refusal": part["refusal"]}
    if kind not in TEXTS:
        raise _refused(
            f"a part of a message is input_text or output_text, got {validators.shown(kind)}: "
            "nothing but text is read here"
        )
    if not isinstance(part.get("text"), str):
        raise _refused(f"the text of {kind} must be a text")
    if said:
        return {"type": "output_text", "text": part["text"], "annotations": []}
    return {"type": "input_text", "text": part["text"]}


def _call(given: Mapping[str, Any]) -> Item:
    for name in ("call_id", "name", "arguments"):
        if not isinstance(given.get(name), str):
            raise _refused(f"a function_call needs {name}, a text")
    found = {name: given[name] for name in ("call_id", "name", "arguments")}
    return {**found, "status": "completed"}


def _output(given: Mapping[str, Any]) -> Item:
    output = given.get("output")
    if not isinstance(given.get("call_id"), str):
        raise _refused("a function_call_output needs call_id, a text")
    if not isinstance(output, str | list):
        raise _refused("the output of a function_call_output is a text or a list of input_text")
    if isinstance(output, list):
        output = [_part(part, False) for part in output]
    return {"call_id": given["call_id"], "output": output, "status": "completed"}


def _reasoning(given: Mapping[str, Any]) -> Item:
    found = {name: _thoughts(given, name) for name in ("summary", "content")}
    if given.get("encrypted_content") and not found["content"] and not found["summary"]:
        raise _refused(
            "the thoughts of a reasoning item are read from its content; encrypted_content of "
            "others cannot be"
        )
    return {
        "summary": [{"type": "summary_text", "text": text} for text in found["summary"]],
        "content": [{"type": "reasoning_text", "text": text} for text in found["content"]],
        "status": "completed",
    }


def _thoughts(given: Mapping[str, Any], name: str) -> list[str]:
    parts = given.get(name) or []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    if not isinstance(parts, list) or not all(isinstance(text, str) for text in texts):
        raise _refused(f"the {name} of a reasoning item is a list of parts with a text")
    return [text for text in texts if isinstance(text, str)]


READ: dict[str, Callable[[Mapping[str, Any]], Item]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _output,
    "reasoning": _reasoning,
}


def _refused(what: str) -> Refused:
    return Refused(400, f"input: {what}", param="input")


# --- messages ------------------------------------------------------------------------------------


def messages_of(items: Iterable[Item], instructions: str | None) -> list[Message]:
    """The messages of a chat that items are, after instructions for the model.

    Items that one answer is made of become one message of the assistant's again.

    Raises:
        Refused: the output of a call that is not there; there are none.
    """
    made: list[Message] = []
    if instructions is not None:
        made.append({"role": "system", "content": instructions})
    calls: set[str] = set()
    for item in items:
        if item["type"] == "function_call":
            calls.add(item["call_id"])
            _turn(made, "tool_calls").setdefault("tool_calls", []).append(_in_message(item))
        elif item["type"] == "function_call_output":
            if item["call_id"] not in calls:
                raise _refused(f"no function_call has the call_id {item['call_id']!r}")
            output = _content(item["output"])
            made.append({"role": "tool", "tool_call_id": item["call_id"], "content": output})
        elif item["type"] == "reasoning":
            thought = _text(item["content"]) or _text(item["summary"])
            if thought:
                _turn(made, "reasoning_content")["reasoning_content"] = thought
        elif item["role"] == "assistant":
            _turn(made, "content")["content"] = _content(item["content"])
        elif instructions is not None and len(made) == 1 and item["role"] in RULING:
            # Most templates have room for one system message.
            made[0]["content"] += f"\n\n{_text(item['content'])}"
        else:
            made.append({"role": item["role"], "content": _content(item["content"])})
    if not made[instructions is not None :]:
        raise _refused("it has nothing that could be answered")
    return made


def _turn(made: list[Message], part: str) -> Message:
    """The assistant's message that a part goes into: the last one, where it can come next there."""
    last = made[-1] if made else None
    follows = {"reasoning_content": (), "content": ("tool_calls", "reasoning_content"),
               "tool_calls": ("content", "tool_calls", "reasoning_content")}[part]  # fmt: skip
    if last is None or last["role"] != "assistant" or not _holds_only(last, follows):
        made.append({"role": "assistant"})
    return made[-1]


def _holds_only(message: Message, parts: Sequence[str]) -> bool:
    return message.keys() - {"role"} <= {*parts}


def _in_message(item: Item) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _content(parts: str | Sequence[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    """Parts as a chat has them: one is a text."""
    if isinstance(parts, str) or len(parts) == 1:
        return _text(parts)
    return [{"type": "text", "text": _text([part])} for part in parts]


def _text(parts: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of parts."""
    if isinstance(parts, str):
        return parts
    return "\n".join(str(part.get("text") or part.get("refusal") or "") for part in parts)
