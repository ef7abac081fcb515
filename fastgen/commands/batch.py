"""fastgen batch: a file of prompts becomes a file of texts."""

from __future__ import annotations

import time
from typing import Any

import click

from fastgen.commands.knobs import given, knob_flags
from fastgen.commands.models import load, model_option, run_options
from fastgen.commands.rows import (
    SPREAD,
    do,
    job_flags,
    on_a_cluster,
    only_on_a_cluster,
    spread_flags,
)
from fastgen.commands.say import clear_errors


@click.command()
@job_flags
@model_option
@run_options
@click.option("--ids", is_flag=True, help="give the tokens too")
@click.option("--max-rows", type=click.IntRange(1), help="rows that run together [default: 64]")
@spread_flags
@knob_flags
def batch(
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
    ids: bool,
    max_rows: int | None,
    **others: Any,
) -> None:
    """Continue every prompt of IN, and write an object a row to OUT, in IN's order.

    IN has JSON lines: {"prompt": ...}, {"messages": [...]} or {"input_ids": [...]} with knobs of
    their own, or lines of OpenAI's batch API. Or it has text, a prompt a line (.txt), or is a
    Parquet file with such columns (.parquet). OUT ends in .jsonl or .parquet; - is standard input
    and output.

    What is done is kept in OUT.part: killed at any moment and started again, it goes on. A row
    that is no good has an "error" in its place; then the exit code is 1. The flags of knobs are
    for rows that say nothing else. --seed is the job's: each row draws from a seed made of it and
    of the row's number.

    With --ray, IN may be a directory or a URI, and OUT is a directory of files or its URI. Actors
    that die are replaced and their rows done again; there is no OUT.part.
    """
    with clear_errors():
        from fastgen.engine.schedule import MAX_ROWS
        from fastgen.inputs import params, validators
        from fastgen.jobs.generation import GenerationWork
        from fastgen.jobs.job import RowJob
        from fastgen.jobs.request import RowReader
        from fastgen.jobs.source import RowSource

        flags = {name: others.pop(name) for name in SPREAD}
        wanted = given(others)
        seed = wanted.pop("seed", None)
        if seed is not None:
            seed = validators.integer("--seed", seed)
        if flags["address"] is not None:
            arguments = {"model": model, "keep": keep, "seed": seed or 0, "ids": ids, **wanted}
            arguments |= {
                "threads": threads,
                "prefill_precision": prefill_precision,
                "packed": packed,
            }
            arguments |= {"max_rows": max_rows or MAX_ROWS, "created": int(time.time())}
            on_a_cluster("Generate", arguments, source, out, kind, restart, quiet, flags)
            return
        only_on_a_cluster(flags)
        rows = RowSource.of(source, kind)
        loaded = load(model, threads, prefill_precision, packed)
        params.resolve(loaded.generation_config.to_dict(), None, wanted)
        RowReader(loaded, wanted, keep).check(rows.columns() or ())
        settings = {
            "command": "batch",
            "model": loaded.model.fingerprint,
            "knobs": wanted,
            "keep": sorted(keep),
            "ids": ids,
        }
        with RowJob(rows, out, settings, seed=seed, restart=restart) as job:
            begun = job.begun
            reader = RowReader(loaded, wanted, keep, begun["seed"], ids, begun["created"])
            do(job, GenerationWork(reader, max_rows or MAX_ROWS), quiet)
