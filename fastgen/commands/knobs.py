"""Every knob of `Params` as a flag of its own, made from the one list."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from fastgen.inputs.params import Params


def knob_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` one flag for every knob; those that are not set stay None."""
    for knob in reversed(dataclasses.fields(Params)):
        flag, default = "--" + knob.name.replace("_", "-"), knob.default
        shown = "" if default is None else f" [default: {str(default).lower()}]"
        options: dict[str, Any] = {"default": None, "help": knob.metadata["help"] + shown}
        kind = str(knob.type)
        if kind == "bool":
            flag = f"{flag}/--no-{flag[2:]}"
        elif kind.removesuffix(" | None") in ("int", "float"):
            options["type"] = {"int": int, "float": float}[kind.removesuffix(" | None")]
        elif kind == "str | None":
            options["metavar"] = "TEXT"
        elif kind == "tuple[str, ...] | None":
            options["multiple"] = True
            options["default"] = ()
        else:
            options |= {"type": json_or_text, "metavar": "JSON"}
        command = click.option(flag, **options)(command)
    return command


def json_or_text(value: str) -> Any:
    """What a JSON text says; what is not JSON is taken as text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def given(knobs: dict[str, Any]) -> dict[str, Any]:
    """The knobs that were set, by the command that runs; None is one that was switched off.

    Raises:
        ValueError: a text in one is not Unicode: the arguments were not UTF-8.
    """
    source = click.get_current_context().get_parameter_source
    out = {k: value for k, value in knobs.items() if source(k) is not ParameterSource.DEFAULT}
    for name, value in out.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} is not UTF-8, got {value!r}") from error
    return out
