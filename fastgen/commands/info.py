"""fastgen info: what a model directory holds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from fastgen.commands.say import clear_errors, in_json

if TYPE_CHECKING:
    from fastgen.store.model_info import ModelInfo


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="print JSON; null is what is not finite")
@click.option("--verify", is_flag=True, help="compare every file, weights too, with its digest")
def info(model: str | None, as_json: bool, verify: bool) -> None:
    """Say what MODEL (default: the demo model) holds and what its export found."""
    from fastgen import first_use
    from fastgen.store import jsonfile
    from fastgen.store.model_info import INFO, REPORT, TOKENIZER, ModelInfo
    from fastgen.store.report import table
    from fastgen.store.tuning import Tuning, read

    with clear_errors():
        place = first_use.directory(model)
        found = ModelInfo.verify(place) if verify else ModelInfo.read(place)
        report = jsonfile.read(place / REPORT)
        if as_json:
            click.echo(in_json(jsonfile.read(place / INFO) | {"report": report}, indent=2))
            return
        beside = report.get("beside", "the original")
        compared = f"\nbeside {beside}:\n{table(report)}" if report else "report       none"
        size = sum(found.files.values())
        tuned = read(place)
        token, limit = found.cache_bytes, found.max_length
        full = f", {found.row_bytes(limit) / 1e6:,.1f} MB a row of {limit:,}" if limit else ""
        lines = {
            "model": f"{found.name or place.name} ({found.model_type})",
            "weights": f"{found.parameters:,}",
            "precision": found.precision + _prompts(found),
            "size": f"{size / 1e6:,.1f} MB in {len(found.files)} files",
            "vocabulary": f"{found.vocab_size:,} tokens",
            "context": f"{limit or 'any number of'} positions",
            "layers": f"{len(found.layers)} with keys and values{_windows(found)}",
            "cache": f"{found.cache_dtype}, {token:,} bytes a token{full}",
            "tokenizer": "yes" if (place / TOKENIZER).is_file() else "no (ids only)",
            "runs with": str(tuned) if tuned else f"{Tuning()} (not tuned)",
            "exported by": f"fastgen {found.exporter}",
        }
        if found.states:
            row = f"{found.state_bytes:,} bytes a row of any length"
            lines["states"] = f"{len(found.states)} besides, {row}"
        if verify:
            lines["verified"] = "every file has the bytes that were exported"
        for name, value in lines.items():
            click.echo(f"{name:<12} {value}")
        click.echo(compared)


def _windows(found: ModelInfo) -> str:
    """Layers with a window, by its length: ", 15 of them with a window of 512 tokens"."""
    counts = Counter(window for window in found.windows if window is not None)
    return "".join(f", {n} of them with a window of {w:,} tokens" for w, n in counts.items())


def _prompts(found: ModelInfo) -> str:
    """A note on prompts that are read in int8, if the model can."""
    note = ' (prefill_precision="int8" reads prompts faster, in memory)'
    return note if found.can_read_prompts else ""
