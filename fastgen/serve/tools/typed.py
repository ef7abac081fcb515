"""Arguments that a model writes as plain texts, a name and a value each, as JSON."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastgen.serve.tools.json_text import is_object
from fastgen.serve.tools.reader import AnswerReader, Out, Steps, TextBuffer

KINDS: dict[type, str] = {
    str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null",
    list: "array", dict: "object",
}  # fmt: skip
EVERY = frozenset(KINDS.values())
DEEP = 20  # schemas within one another that are looked at


def kinds(schema: Any, root: Any, deep: int = 0) -> frozenset[str]:
    """The types of a value of a schema, in JSON Schema's words."""
    if not isinstance(schema, dict) or deep > DEEP:
        return EVERY
    types = EVERY
    if isinstance(schema.get("type"), str):
        types &= {schema["type"]}
    elif isinstance(schema.get("type"), list):
        types &= frozenset(map(str, schema["type"]))
    if "number" in types:
        types |= {"integer"}
    if isinstance(schema.get("enum"), list):
        types &= {KINDS.get(type(value), "object") for value in schema["enum"]} | _integers(schema)
    if "const" in schema:
        types &= {KINDS.get(type(schema["const"]), "object")}
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            types &= frozenset().union(*(kinds(part, root, deep + 1) for part in schema[name]))
    for part in schema.get("allOf") or ():
        types &= kinds(part, root, deep + 1)
    if isinstance(schema.get("$ref"), str):
        types &= kinds(target(schema["$ref"], root), root, deep + 1)
    return types


def _integers(schema: Any) -> set[str]:
    return {"number"} if any(type(one) is int for one in schema["enum"]) else set()


def target(reference: str, root: Any) -> Any:
    """The target of a schema's `$ref`; None where there is none."""
    node = root
    for part in reference.removeprefix("#").split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        node = node.get(part) if isinstance(node, dict) else None
    return node


def property_of(parameters: Any, name: str) -> Any:
    """The schema of a parameter; True where it has none."""
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties.get(name, True) if isinstance(properties, dict) else True


def as_json(raw: str, allowed: frozenset[str]) -> str:
    """A text as the JSON of what it is to be."""
    if allowed == {"string"}:
        return json.dumps(raw, ensure_ascii=False)
    value, ok = _parsed(raw.strip())
    kind = KINDS.get(type(value), "")
    fits = kind in allowed or (kind == "integer" and "number" in allowed)
    if ok and (fits or "string" not in allowed):
        return json.dumps(value, ensure_ascii=False)
    if ok and kind == "number" and "integer" in allowed and value == int(value):
        return json.dumps(int(value))
    return json.dumps(raw, ensure_ascii=False)


def _parsed(raw: str) -> tuple[Any, bool]:
    """A text read as JSON, or else as a literal of Python's; and whether that was possible."""
    if is_object(f'{{"a": {raw}}}'):
        return json.loads(raw), True
    if raw.lower() in ("true", "false"):
        return raw.lower() == "true", True
    if raw in ("None", "undefined"):
        return None, True
    if raw[:1] not in ("[", "{"):
        return None, False
    try:
        value = ast.literal_eval(raw)
        return json.loads(json.dumps(value, allow_nan=False)), True
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None, False


class Parameters:
    """Turns names and texts into the arguments of a call, as they come.

    Args:
        reader: whose events they are.
        parameters: the tool's schema.
    """

    def __init__(self, reader: AnswerReader, parameters: Any) -> None:
        self._reader, self._schema = reader, parameters
        self._said: set[str] = set()

    def read(
        self,
        name: str,
        body: Callable[[Out], Steps[bool]],
        allowed: frozenset[str] | None = None,
    ) -> Steps[bool]:
        """Read the value of a parameter; False where it has no end.

        Args:
            body: passes on its text.
            allowed: what it may be, where the text says so itself.
        """
        out: Out = self._reader.arguments
        if name in self._said:  # said again: the first one counts
            return (yield from body(lambda _: None))
        out(f"{', ' if self._said else '{'}{json.dumps(name, ensure_ascii=False)}: ")
        self._said.add(name)
        if allowed is None:
            allowed = kinds(property_of(self._schema, name), self._schema)
        if allowed == {"string"}:
            out('"')
            whole = yield from body(lambda piece: out(json.dumps(piece, ensure_ascii=False)[1:-1]))
            out('"')
            return whole
        held: list[str] = []
        whole = yield from body(held.append)
        if whole:
            out(as_json("".join(held), allowed))
        return whole

    def end(self) -> None:
        self._reader.arguments("}" if self._said else "{}")


def closed(
    text: TextBuffer,
    close: str,
    after: Sequence[str],
    newline: bool,
    lost: Mapping[str, Sequence[str]],
    out: Out,
) -> Steps[bool]:
    """Pass on a value up to `close`; within it `close` may stand, if nothing of `after` follows.

    Args:
        newline: whether a line break before `close` is not the value's.
        lost: marks that end it too, where `close` is forgotten, each with what has to follow then
            (nothing: anything); they are not taken.
    """
    held = ""  # a line break that may be the last one

    def push(piece: str) -> None:
        nonlocal held
        piece = held + piece
        held = "\n" if newline and piece.endswith("\n") else ""
        if piece := piece.removesuffix(held):
            out(piece)

    while True:
        mark = yield from text.until([close, *lost], push)
        if mark is None:
            return False
        if mark != close:
            if (yield from _follows(text, mark, lost[mark])):
                return True
            push(mark)
            continue
        space = yield from text.space()
        for one in after:
            there = yield from text.peek(len(one))
            if there == one:
                return True
        if not (yield from text.peek()):
            return True
        push(mark + space)


def _follows(text: TextBuffer, mark: str, after: Sequence[str]) -> Steps[bool]:
    """True if one of `after` follows a mark; then the mark is given back, or else the space is."""
    space = yield from text.space()
    follows = not after
    for wanted in after:
        follows = follows or (yield from text.peek(max(1, len(wanted)))) == wanted
    text.put_back(mark + space if follows else space)
    return follows
