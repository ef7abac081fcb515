"""Which model a command runs, and with how many threads."""

from __future__ import annotations

import click

import fastgen
from fastgen.commands.say import say

model_option = click.option(
    "--model",
    "-m",
    help="directory or hub id of a model, exported on first use if need be [default: the demo]",
)
threads_option = click.option(
    "--threads", type=int, help="threads of a step [default: physical cores]"
)


def load(model: str | None, threads: int | None, argument: str = "--model") -> fastgen.CausalLM:
    """The model of that name; without one the demo, and stderr says so.

    Args:
        argument: how the command is told the name.
    """
    if model is None:
        say(f"fastgen: no {argument} given, using the embedded demo model")
    return fastgen.load(model, threads=threads)
