"""The model that a command runs, and its settings."""

from __future__ import annotations

import functools
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

packed_option = click.option(
    "--packed",
    is_flag=True,
    help="run from packed weights kept on the disk, and keep them first: loads sooner, and "
    "processes share memory (see `fastgen info`)",
)


def prefill_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the flag --prefill-precision, and its old name --prompts."""

    @functools.wraps(command)
    def renamed(*args: Any, prompts: str | None, prefill_precision: str | None, **rest: Any) -> Any:
        if prompts is not None:
            say("fastgen: --prompts is now named --prefill-precision")
        return command(*args, prefill_precision=prefill_precision or prompts, **rest)

    shown = click.option(
        "--prefill-precision",
        metavar="same|int8",
        help="int8: a model in int8 or int4 reads prompts and steps with many rows faster, for up "
        "to a byte of memory a weight (see `fastgen info`) [default: as tuned, or same]",
    )
    return shown(click.option("--prompts", hidden=True)(renamed))


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give `command` the flags of how a model runs: `load` takes them."""
    return threads_option(prefill_option(packed_option(command)))


def load(
    model: str | None,
    threads: int | None,
    prefill_precision: str | None,
    packed: bool,
    argument: str = "--model",
) -> fastgen.CausalLM:
    """Load the model of that name; without one the demo, and stderr says so.

    Args:
        threads, prefill_precision, packed: see `fastgen.load`.
        argument: how the command is told the name.
    """
    if model is None:
        say(f"fastgen: no {argument} given, using the embedded demo model")
    return fastgen.load(model, threads=threads, prefill_precision=prefill_precision, packed=packed)
