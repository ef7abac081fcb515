"""The command line: one file a command. Every knob of `Params` is a flag of its own."""

from __future__ import annotations

import click

import fastgen
from fastgen.commands.batch import batch
from fastgen.commands.bench import bench
from fastgen.commands.chat import chat
from fastgen.commands.export import export
from fastgen.commands.generate import generate
from fastgen.commands.info import info
from fastgen.commands.say import one_line, say
from fastgen.commands.score import score
from fastgen.commands.serve import serve
from fastgen.commands.tune import tune
from fastgen.system.interrupt import QUIET_EXIT


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fastgen.__version__, prog_name="fastgen")
def cli() -> None:
    """Run small language models on a CPU: transformers' generate, without torch."""


for command in (batch, bench, chat, score, export, generate, info, serve, tune):
    cli.add_command(command)


def run(arguments: list[str]) -> int:
    """Run a command line; returns the exit code. What went wrong is one line on stderr."""
    try:
        code = cli.main(arguments, standalone_mode=False, prog_name="fastgen")
    except click.exceptions.Abort:  # which click makes of Ctrl-C
        return QUIET_EXIT
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        return 2
    except click.ClickException as error:
        say(f"fastgen: {one_line(error.format_message())}")
        return 2
    return code if isinstance(code, int) else 0
