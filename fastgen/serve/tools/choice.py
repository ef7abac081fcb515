"""The tools of a request: those there are, those that may be called, and whether one must be."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.inputs import validators
from fastgen.sampling import schema
from fastgen.serve.tools.form import Tools

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


@dataclass(frozen=True)
class Choice:
    """A request's tools.

    Attributes:
        tools: those that may be called: the schemas of their parameters by name.
        forced: whether one has to be called.
        named: whether it is said which one.
        several: whether an answer may call several times; one that is named is called once.
    """

    tools: Tools
    forced: bool = False
    named: bool = False
    several: bool = True


NOTHING = Choice({})


def chosen(tools: Any, choice: Any, several: bool) -> Choice:
    """Read `tools` and `tool_choice`.

    Raises:
        ValueError: they are not as OpenAI has them; the message begins with the field's name.
    """
    known = dict(map(_function, tools or ()))
    if len(known) < len(tools or ()):
        raise ValueError("tools: two have one name")
    if choice in (None, "auto"):
        return Choice(known, several=several)
    if choice == "none":
        return NOTHING
    if not known:
        raise ValueError("tool_choice needs tools")
    if choice == "required":
        return Choice(known, forced=True, several=several)
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return _allowed(known, choice.get("allowed_tools", choice), several)
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return Choice(_some(known, [choice]), forced=True, named=True, several=False)
    raise ValueError(
        'tool_choice must be "none", "auto", "required", a function or allowed_tools, got '
        f"{validators.shown(choice)}"
    )


def _function(tool: Any) -> tuple[str, Any]:
    """The name of a tool, and the schema of its parameters."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise ValueError(
            'tools must be functions, {"type": "function", "function": {"name": ...}}, got '
            f"{validators.shown(tool)}"
        )
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"tools: a name has 1 to 128 of A-Z, a-z, 0-9, _, -, ., : and /, got "
            f"{validators.shown(name)}"
        )
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ValueError(f"tools: the parameters of {name} must be a JSON schema")
    if not function.get("strict") or not parameters:
        return name, parameters
    try:
        return name, schema.strict(parameters)
    except ValueError as error:
        raise ValueError(f"tools: the parameters of {name}: {error}") from error


def _allowed(known: Tools, given: Any, several: bool) -> Choice:
    given = given if isinstance(given, Mapping) else {}
    mode, listed = given.get("mode", "auto"), given.get("tools")
    if mode not in ("auto", "required") or not isinstance(listed, list) or not listed:
        raise ValueError(
            'tool_choice: allowed_tools needs a mode, "auto" or "required", and a list of tools'
        )
    return Choice(_some(known, listed), forced=mode == "required", several=several)


def _some(known: Tools, listed: Sequence[Any]) -> dict[str, Any]:
    """Those of the tools that are named."""
    chosen = {}
    for tool in listed:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"tool_choice: {validators.shown(name)} is none of the tools: {', '.join(known)}"
            )
        chosen[name] = known[name]
    return chosen
