"""fastgen bench: how fast models are on this machine, as a table and as a picture."""

from __future__ import annotations

import datetime
import shutil
import sys
from pathlib import Path
from typing import Any

import click

from fastgen import first_use
from fastgen.commands.say import clear_errors, in_json, say
from fastgen.store import files
from fastgen.store.model_info import ModelInfo

MOST = 10**6  # of anything that is counted: more is a slip


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Positive integers between commas, each once: "1,8,32"."""

    name = "N,N,..."

    def convert(self, value: Any, param: Any, context: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
            self.fail(f"{value!r} is no list of numbers such as 1,8,32", param, context)
        numbers = tuple(dict.fromkeys(int(part) for part in parts))
        for number in numbers:
            if not 0 < number <= MOST:
                self.fail(f"{number} is not from 1 to {MOST:,}", param, context)
        return numbers


NUMBERS = Numbers()


@click.command()
@click.argument("models", metavar="[DIR]...", nargs=-1)
@click.option("--prompt", type=NUMBERS, help="tokens of the prompts [default: 64,512]")
@click.option("--rows", type=NUMBERS, help="rows that are generated together [default: 1,8,32]")
@click.option("--beams", type=NUMBERS, help="widths of the beam search [default: 4]")
@click.option(
    "--new", type=click.IntRange(2, MOST), default=32, show_default=True, help="new tokens of a row"
)
@click.option(
    "--threads",
    type=NUMBERS,
    help="threads to compare; the rest runs with the most of them [default: 1, 2, 4 and "
    "so on up to the physical cores; the rest as each model is tuned]",
)
@click.option(
    "--rounds",
    type=click.IntRange(1, MOST),
    default=3,
    show_default=True,
    help="how often each is timed",
)
@click.option("--png", type=click.Path(path_type=Path), help="draw a picture into this file")
@click.option(
    "--json",
    "as_json",
    type=click.Path(path_type=Path),
    help="write all that was measured into this file",
)
def bench(
    models: tuple[str, ...],
    prompt: tuple[int, ...] | None,
    rows: tuple[int, ...] | None,
    beams: tuple[int, ...] | None,
    new: int,
    threads: tuple[int, ...] | None,
    rounds: int,
    png: Path | None,
    as_json: Path | None,
) -> None:
    """Time models on this machine.

    Each DIR is a model directory or a hub id; without one it is the embedded demo model.

    Prompts are read, and one row, many rows and beams are generated, all of a forced length, with
    several numbers of threads. Models take turns, and medians of the rounds count. What does not
    fit into a model's positions or the memory is left out, if it was not asked for.

    A last table has what llama.cpp's llama-bench measures by default: pp512, a prompt of 512
    tokens, and tg128, 128 tokens with nothing before them, in tokens a second, mean and standard
    deviation of the rounds. A model with fewer positions reads fewer, and the name says so.
    """
    from fastgen.timing import measure, plot

    with clear_errors():
        if png is not None:
            plot.drawable()
            files.check_writable("--png", png)
        if as_json is not None:
            files.check_writable("--json", as_json)
        if not models:
            say("fastgen: no DIR given, using the embedded demo model")
        given = list(dict.fromkeys(models))
        directories = dict(zip(measure.labels(given), map(first_use.directory, given), strict=True))
        directories = directories or {"demo": first_use.directory(None)}
        infos = {name: ModelInfo.read(directory) for name, directory in directories.items()}
        asked = measure.CaseOptions(prompt, rows, beams, threads, new)
        timed, notes = measure.cases(infos, asked)
        for note in notes:
            say(note)
        loads = measure.planned(directories, timed, threads)
        results = [result for load in loads for result in load]
        with click.progressbar(
            length=rounds * len(results), label="measuring", file=sys.stderr
        ) as bar:
            measure.measure(directories, loads, rounds, lambda: bar.update(1))
        machine = measure.machine()
        click.echo(f"{plot.of_machine(machine)}\n")
        width = shutil.get_terminal_size().columns
        for line in plot.lines(results, width, sys.stdout.encoding or "ascii"):
            click.echo(line)
        if as_json is not None:
            with files.atomic_file("--json", as_json) as file:
                file.write_text(_record(machine, infos, results, rounds), encoding="utf-8")
        if png is not None:
            with files.atomic_file("--png", png) as file:
                plot.png(results, machine, rounds, file)


def _record(
    machine: dict[str, Any], infos: dict[str, ModelInfo], results: list[Any], rounds: int
) -> str:
    """All that was measured, as JSON."""
    models = {
        name: {
            "name": info.name,
            "model_type": info.model_type,
            "precision": info.precision,
            "cache_precision": info.cache_precision,
            "parameters": info.parameters,
            "bytes": sum(info.files.values()),
            "max_length": info.max_length,
        }
        for name, info in infos.items()
    }
    record = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "rounds": rounds,
        "models": models,
        "results": [result.to_dict() for result in results],
    }
    return in_json(record, indent=2) + "\n"
