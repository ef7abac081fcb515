"""fastgen score: how likely the texts of a file are."""

from __future__ import annotations

from typing import Any

import click

from fastgen.commands.models import load, model_option, run_options
from fastgen.commands.rows import do, job_flags, on_a_cluster, only_on_a_cluster, spread_flags
from fastgen.commands.say import clear_errors


@click.command()
@job_flags
@model_option
@run_options
@click.option("--tokens", "each", is_flag=True, help="the log-probability of every token too")
@spread_flags
def score(
    source: str,
    out: str,
    kind: str | None,
    keep: tuple[str, ...],
    restart: bool,
    quiet: bool,
    model: str | None,
    threads: int | None,
    prefill_precision: str | None,
    packed: bool,
    each: bool,
    **flags: Any,
) -> None:
    """Say how likely every text of IN is, an object a row in OUT, in IN's order.

    IN has JSON lines, {"text": ...} or {"ids": [...]}, with a "prefix" that comes before, if there
    is one; or text, one a line (.txt); or is a Parquet file with such columns. OUT has the sum of
    the log-probabilities, the number of tokens and the perplexity. A row with "options" is a
    decision: OUT has which of them follows its text, with a probability for each. It is killed,
    started again and wrong in single rows as `fastgen batch` is.
    """
    with clear_errors():
        from fastgen.jobs.job import RowJob
        from fastgen.jobs.scoring import ScoringWork
        from fastgen.jobs.source import RowSource

        if flags["address"] is not None:
            arguments = {"model": model, "keep": keep, "tokens": each, "threads": threads}
            arguments |= {"prefill_precision": prefill_precision, "packed": packed}
            on_a_cluster("Score", arguments, source, out, kind, restart, quiet, flags)
            return
        only_on_a_cluster(flags)
        rows = RowSource.of(source, kind)
        loaded = load(model, threads, prefill_precision, packed)
        work = ScoringWork(loaded, keep, each)
        work.check(rows.columns() or ())
        settings = {
            "command": "score",
            "model": loaded.model.fingerprint,
            "keep": sorted(keep),
            "tokens": each,
        }
        with RowJob(rows, out, settings, restart=restart) as job:
            do(job, work, quiet)
