"""Every knob of `Params` as a flag of its own, made from the one list."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

from fastgen.inputs.knob import Notation, kind_of
from fastgen.inputs.params import Params


def knob_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` one flag for every knob; those that are not set stay None."""
    for knob in reversed(dataclasses.fields(Params)):
        flag, default = "--" + knob.name.replace("_", "-"), knob.default
        shown = "" if default is None else f" [default: {str(default).lower()}]"
        options: dict[str, Any] = {"default": None, "help": knob.metadata["help"] + shown}
        kind = kind_of(knob)
        if kind.repeats:
            options |= {"multiple": True, "default": ()}
        elif kind.notation == "bool":
            flag = f"{flag}/--no-{flag[2:]}"
        else:
            options |= OPTIONS[kind.notation]
        command = click.option(flag, **options)(command)
    return command


def json_or_text(value: str) -> Any:
    """The value of a JSON text; any other text as it is."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


OPTIONS: dict[Notation, dict[str, Any]] = {
    "int": {"type": int},
    "float": {"type": float},
    "text": {"metavar": "TEXT"},
    "json": {"type": json_or_text, "metavar": "JSON"},
}


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
