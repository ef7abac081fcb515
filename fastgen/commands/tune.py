"""fastgen tune: what is fastest on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fastgen.commands.models import prefill_option
from fastgen.commands.say import clear_errors
from fastgen.engine import memory_estimate
from fastgen.store.model_info import ModelInfo
from fastgen.timing.tune import Workload

MOST = 10**9  # rows, tokens and rounds that `tune` takes for a wish, not a slip


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--rows", default=1, show_default=True, help="rows that are generated together")
@click.option("--prompt", default=64, show_default=True, help="tokens of the prompt")
@click.option("--new", default=32, show_default=True, help="tokens that are generated")
@click.option("--rounds", default=5, show_default=True, help="how often each is timed")
@prefill_option
@click.option("--max-kl", default=0.02, show_default=True, help="KL divergence allowed")
@click.option("--min-top1", default=0.9, show_default=True, help="equal likeliest tokens asked")
def tune(
    models: tuple[str, ...],
    rows: int,
    prompt: int,
    new: int,
    rounds: int,
    max_kl: float,
    min_top1: float,
    prefill_precision: str | None,
) -> None:
    """Measure what is fastest on this machine: threads, kernels, and which of MODELS.

    Each is a directory or a hub id. What is best for a model directory is saved in it (of a hub's,
    in the copy here) and used from then on, on this machine only.
    Given several exports of one model, say fp32, int8 and int4, the fastest is named whose report
    keeps the accuracy budget (--max-kl, --min-top1). With --prefill-precision int8, models are
    also tried with their matrices in int8 for many tokens, where they have that form: it takes
    memory besides (`fastgen info`; up to a tenth of the model need not be asked for). From how
    many tokens it pays is measured too.
    """
    from fastgen import first_use
    from fastgen.store import tuning
    from fastgen.timing import tune

    with clear_errors():
        for name, value in {"rows": rows, "prompt": prompt, "new": new, "rounds": rounds}.items():
            if value < 1:
                raise ValueError(f"--{name} must be positive, got {value}")
            if value > MOST:
                raise ValueError(f"--{name} must be at most {MOST:,}, got {value}")
        work = Workload(rows, prompt, new)
        directories = [first_use.directory(model) for model in models]
        for directory in directories:
            _check_room(directory, work, prefill_precision)
        if prefill_precision not in (None, *tuning.PREFILL_PRECISIONS):
            raise ValueError(f"--prefill-precision must be same or int8, got {prefill_precision!r}")
        if prefill_precision == "int8":
            infos = {directory: ModelInfo.read(directory) for directory in directories}
            if not any(info.can_read_prompts for info in infos.values()):
                infos[directories[0]].check_prompts(directories[0])
        every = {
            directory: tune.candidates(directory, prefill_precision)
            for directory in dict.fromkeys(directories)
        }
        allowed = [directory for directory in every if tune.within(directory, max_kl, min_top1)]
        candidates = [candidate for directory in every for candidate in every[directory]]
        steps = rounds * len(candidates)
        with click.progressbar(length=steps, label="measuring", file=sys.stderr) as bar:
            tune.measure(candidates, work, rounds, lambda: bar.update(1))
        chosen = [tune.best(group, new) for group in every.values()]
        for candidate in chosen:
            tuning.write(candidate.directory, candidate.measured)
        for line in tune.table(candidates, chosen, new):
            click.echo(line)
        if len(every) > 1:
            fastest = [candidate for candidate in chosen if candidate.directory in allowed]
            if not fastest:
                raise ValueError(f"no model has a KL divergence within {max_kl}: allow more")
            candidate = min(fastest, key=lambda candidate: candidate.seconds(new))
            click.echo(f"fastest within the budget: {candidate.directory} ({candidate.tuning})")


def _check_room(directory: Path, work: Workload, prefill_precision: str | None) -> None:
    """Raise a ValueError if what is timed cannot be in this machine's memory."""
    info = ModelInfo.read(directory)
    tokens = work.prompt + work.new
    tokens = tokens if info.max_length is None else min(tokens, info.max_length)
    parts = {
        "keys and values": work.rows * tokens * info.cache_bytes,
        "ids": work.rows * tokens * 8,
        "logits": work.rows * info.vocab_size * 2 * memory_estimate.FLOAT,
    }
    if prefill_precision == "int8":
        parts |= memory_estimate.of_second_form(info)
    memory_estimate.check(
        parts, f"lower --rows {work.rows}, --prompt {work.prompt} or --new {work.new}"
    )
