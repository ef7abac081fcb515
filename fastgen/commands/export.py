"""fastgen export: a transformers model becomes a model directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from fastgen import extras
from fastgen.commands.say import clear_errors
from fastgen.hub import CACHE_PRECISION, kind
from fastgen.interrupt import ended_at_once


@click.command()
@click.argument("model")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option(
    "--precision",
    help="fp32, int8 or int4 [default: int8]; of an ONNX folder also its own: q4, q8, fp16, q4f16, "
    "bnb4 ... [default: q4, else q8, else fp32]",
)
@click.option(
    "--cache-precision",
    default=CACHE_PRECISION,
    show_default=True,
    help="of keys and values: fp32, or int8 in a quarter of the memory",
)
@click.option("--force", is_flag=True, help="replace OUT if it is a model directory")
@click.option("--allow-mismatch", is_flag=True, help="keep an export that differs too much")
@click.option("--max-kl", type=float, help="KL divergence allowed [default: by precision]")
@click.option("--min-top1", type=float, help="share of equal likeliest tokens that is asked")
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="text to quantise and measure on"
)
@click.option("--revision", help="branch, tag or commit of a hub repository")
@click.option("--adapter", help="merge this adapter (PEFT) first: a directory or a hub id")
def export(
    model: str, out: Path | None, precision: str | None, cache_precision: str, force: bool,
    allow_mismatch: bool, max_kl: float | None, min_top1: float | None, calibration: Path | None,
    revision: str | None, adapter: str | None,
) -> None:  # fmt: skip
    """Export MODEL, a hub id or a transformers directory, to the model directory OUT.

    MODEL may be an adapter (PEFT), which is merged into the model that it belongs to.

    Needs torch and transformers (the extra `export`); running the result does not.
    OUT is by default the model's name and its precisions, such as distilgpt2-int8, or
    distilgpt2-int8-kv-int8. What was compared and found is printed as a table, which
    `fastgen info OUT` shows again.
    """
    with clear_errors():
        try:
            with ended_at_once():
                from fastgen.export import pipeline
        except ImportError as error:
            raise ValueError(
                f"exporting needs torch and transformers: {extras.install('export')} ({error})"
            ) from error
        from fastgen.report import REPORT, table

        name = Path(os.path.abspath(model)).name  # of a directory's path, or the end of a hub id
        made = pipeline.export(
            model,
            out or Path(f"{name}-{kind(precision, cache_precision)}"),
            precision=precision,
            cache_precision=cache_precision,
            force=force,
            allow_mismatch=allow_mismatch,
            revision=revision,
            adapter=adapter,
            calibration=calibration,
            tolerance=pipeline.tolerance(precision, max_kl, min_top1, cache_precision),
        )
        click.echo(table(json.loads((made / REPORT).read_text(encoding="utf-8"))))
