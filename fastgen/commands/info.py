"""fastgen info: what a model directory holds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from fastgen.commands.say import clear_errors, in_json

if TYPE_CHECKING:
    from pathlib import Path

    from fastgen.store.model_info import ModelInfo


@click.command()
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="print JSON; null is what is not finite")
@click.option("--verify", is_flag=True, help="compare every file, weights too, with its digest")
@click.option("--remove-packed", is_flag=True, help="remove what --packed has kept of MODEL")
def info(model: str | None, as_json: bool, verify: bool, remove_packed: bool) -> None:
    """Say what MODEL (default: the demo model) holds and what its export found."""
    from fastgen import first_use
    from fastgen.store import jsonfile, packed
    from fastgen.store.model_info import INFO, REPORT, TOKENIZER, ModelInfo
    from fastgen.store.report import table
    from fastgen.store.tuning import Tuning, read

    with clear_errors():
        directory = first_use.directory(model)
        model_info = ModelInfo.verify(directory) if verify else ModelInfo.read(directory)
        if remove_packed:
            click.echo(f"removed {packed.remove(model_info) / 1e6:,.1f} MB of packed weights")
            return
        report = jsonfile.read(directory / REPORT)
        if as_json:
            click.echo(in_json(jsonfile.read(directory / INFO) | {"report": report}, indent=2))
            return
        beside = report.get("beside", "the original")
        compared = f"\nbeside {beside}:\n{table(report)}" if report else "report       none"
        size = sum(model_info.files.values())
        tuned = read(directory)
        token, limit = model_info.cache_bytes, model_info.max_length
        full = f", {model_info.row_bytes(limit) / 1e6:,.1f} MB a row of {limit:,}" if limit else ""
        lines = {
            "model": f"{model_info.name or directory.name} ({model_info.model_type})",
            "weights": f"{model_info.parameters:,}",
            "precision": model_info.precision + _prompts(model_info),
            "size": f"{size / 1e6:,.1f} MB in {len(model_info.files)} files",
            "vocabulary": f"{model_info.vocab_size:,} tokens",
            "context": f"{limit or 'any number of'} positions",
            "layers": f"{len(model_info.layers)} with keys and values{_windows(model_info)}",
            "cache": f"{model_info.cache_dtype}, {token:,} bytes a token{full}",
            "tokenizer": "yes" if (directory / TOKENIZER).is_file() else "no (ids only)",
            "runs with": str(tuned) if tuned else f"{Tuning()} (not tuned)",
            "exported by": f"fastgen {model_info.exporter}",
        }
        if model_info.states:
            row = f"{model_info.state_bytes:,} bytes a row of any length"
            lines["states"] = f"{len(model_info.states)} besides, {row}"
        if verify:
            lines["verified"] = "every file has the bytes that were exported"
        shown = [*lines.items(), *(("packed", _packed(p, verify)) for p in packed.kept(model_info))]
        for name, value in shown:
            click.echo(f"{name:<12} {value}")
        click.echo(compared)


def _windows(model_info: ModelInfo) -> str:
    """Layers with a window, by its length: ", 15 of them with a window of 512 tokens"."""
    counts = Counter(window for window in model_info.windows if window is not None)
    return "".join(f", {n} of them with a window of {w:,} tokens" for w, n in counts.items())


def _packed(kept: Path, verify: bool) -> str:
    """The size and the place of packed weights, and why they are of no use if they are not."""
    from fastgen.store import packed

    size = sum(path.stat().st_size for path in kept.iterdir())
    fault = packed.fault(kept, whole=verify)
    return f"{size / 1e6:,.1f} MB in {kept}" + (f": {fault}" if fault else "")


def _prompts(model_info: ModelInfo) -> str:
    """A note on the second form for many tokens, if the model has one."""
    if not model_info.can_read_prompts:
        return ""
    more = model_info.many_tokens_bytes / 1e6
    return f' (prefill_precision="int8": prompts and many rows faster, for {more:,.1f} MB)'
