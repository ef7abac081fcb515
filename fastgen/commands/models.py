"""The model that a command runs, and its settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
prompts_option = click.option(
    "--prompts",
    metavar="same|int8",
    help="int8: a model in int4 reads long prompts as fast as one in int8, for a byte of memory a "
    "weight [default: as tuned, or same]",
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the flags of how a model runs: `load` takes them."""
    return threads_option(prompts_option(command))


def load(
    model: str | None, threads: int | None, prompts: str | None, argument: str = "--model"
) -> fastgen.CausalLM:
    """The model of that name; without one the demo, and stderr says so.

    Args:
        threads, prompts: see `fastgen.load`.
        argument: how the command is told the name.
    """
    if model is None:
        say(f"fastgen: no {argument} given, using the embedded demo model")
    return fastgen.load(model, threads=threads, prompts=prompts)
