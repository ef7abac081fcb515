"""The export, step by step: load, torch logits, convert, compare, bundle."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import onnx_ir
import onnxruntime
import torch
import transformers
from fastgen.export import (
    bundle,
    calibrate,
    check,
    graph,
    profile,
    quality,
    recipe,
    source,
    trim,
)
from fastgen.export.attention import UnsupportedModel
from fastgen.export.recipe import RECIPES
from fastgen.export.source import Source
from transformers import PreTrainedModel

import fastgen
from fastgen.hub import PRECISION
from fastgen.model import GRAPH, Model
from fastgen.report import REPORT

PRECISIONS = ("fp32", *RECIPES)

# What a precision may differ by from the original; `export` and the command line can change it.
TOLERANCES = {
    "fp32": check.Tolerance(),
    "int8": check.Tolerance(max_difference=1.0, kl=0.02, top1=0.95, greedy=False),
    "int4": check.Tolerance(max_difference=1.0, kl=0.2, top1=0.80, greedy=False),
}


class Progress:
    """Shows each step with its time and what it found; on a terminal, the running one too.

    Attributes:
        steps: what was shown, for the report.
    """

    def __init__(self, total: int, stream: TextIO | None) -> None:
        self.total = total
        self.stream = stream
        self.steps: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; what is appended to the yielded list is shown as its finding."""
        label = f"[{len(self.steps) + 1}/{self.total}] {name}"
        live = self.stream is not None and self.stream.isatty()
        if live:
            self._write(f"{label} ...")
        found: list[str] = []
        start = time.perf_counter()
        try:
            yield found
        except BaseException:
            if live:
                self._write("\n")
            raise
        seconds = time.perf_counter() - start
        self.steps.append({"step": name, "seconds": round(seconds, 3), "found": "; ".join(found)})
        clear = "\r\x1b[K" if live else ""
        self._write(f"{clear}{label:<34}{seconds:7.1f} s  {'; '.join(found)}\n")

    def part(self, done: int, total: int) -> None:
        """Show how far the running step is, on a terminal."""
        if self.stream is not None and self.stream.isatty():
            self._write(f"\r\x1b[K[{len(self.steps) + 1}/{self.total}] {done + 1} of {total} ...")

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()


def export(
    model: str | os.PathLike[str] | PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    tokenizer: object | None = None,
    precision: str = PRECISION,
    force: bool = False,
    allow_mismatch: bool = False,
    revision: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    tolerance: check.Tolerance | None = None,
    progress: TextIO | None = sys.stderr,
) -> Path:
    """Export a causal language model to a model directory, proved equal to the original.

    Args:
        model: a hub id, a `save_pretrained` directory, or a transformers model object, which is
            left as it was.
        out: the directory to write; it appears when it is complete.
        tokenizer: the tokenizer of a model object; without one it is exported for ids only.
        precision: "fp32", "int8" or "int4".
        force: replace an existing model directory, once the new one is complete.
        allow_mismatch: keep an export that disagrees with the original beyond the tolerance.
        revision: a branch, tag or commit of a hub repository.
        calibration: a file with text to quantise and to measure on; None for the one that comes
            with fastgen.
        tolerance: what may differ from the original; None for the precision's own.
        progress: where steps are shown; None for nowhere.

    Returns:
        `out`.

    Raises:
        UnsupportedModel: the graph cannot express the model; the message says why.
        Mismatch: the export disagrees with the original.
        ModelError: there is no such model, or `out` cannot be written.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    out = Path(out)
    bundle.check_free(out, force)
    wishes = Wishes(
        precision=precision,
        force=force,
        allow_mismatch=allow_mismatch,
        tolerance=tolerance or TOLERANCES[precision],
        calibration=Path(calibration or calibrate.TEXT),
    )
    shown = Progress(total=7 if precision == "fp32" else 11, stream=progress)
    with shown.step("load") as found:
        if isinstance(model, PreTrainedModel):
            loaded = source.of_object(model, tokenizer)
        else:
            loaded = source.load(model, revision)
        found += _about(loaded)
    with _evaluating(loaded.model):
        _export(loaded, out, wishes, shown)
    return out


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and advice; afterwards each module trains or does not, as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with source.quiet():
            yield
    finally:
        for module in training:
            module.training = True


def _about(loaded: Source) -> list[str]:
    size = sum(p.numel() for p in loaded.model.parameters())
    about = [f"{loaded.model.config.model_type}, {size / 1e6:,.1f} M weights"]
    return about + ([f"for ids only: {loaded.note}"] if loaded.tokenizer is None else [])


def tolerance(precision: str, kl: float | None, top1: float | None) -> check.Tolerance | None:
    """The tolerance of a precision with another bound or two; None where it is unknown."""
    usual = TOLERANCES.get(precision)
    given = {name: bound for name, bound in (("kl", kl), ("top1", top1)) if bound is not None}
    return None if usual is None else replace(usual, **given)


@dataclass(frozen=True)
class Wishes:
    """What the caller of `export` asked for."""

    precision: str
    force: bool
    allow_mismatch: bool
    tolerance: check.Tolerance
    calibration: Path


def _export(loaded: Source, out: Path, wishes: Wishes, shown: Progress) -> None:
    model = loaded.model
    layers = graph.layers_of(model)
    with shown.step("torch logits") as found:
        rows = check.probes(model, loaded.tokenizer, layers)
        original = check.Reference(
            rows, check.reference_logits(model, rows), check.reference_continuation(model, rows)
        )
        found.append(f"{len(rows)} rows of {', '.join(str(len(row)) for row in rows)} tokens")
    description = bundle.describe(loaded, layers, wishes.precision)
    with bundle.directory(out, wishes.force) as temporary:
        with shown.step("convert") as found:
            converted = graph.convert(model, layers)
            trim.trim(converted, description["max_length"])
            description["hard_limit"] |= trim.rotations_are_tabled(converted)
            found.append(f"{len(layers)} attention layers, {len(converted.graph)} nodes")
        bundle.write_configuration(loaded, temporary)
        report = _write(converted, temporary, description, "ONNX", original, shown)
        _judge(report, wishes.allow_mismatch)
        if wishes.precision != "fp32":
            report = {"fp32": report} | _quantise(
                loaded, converted, temporary, description, original, wishes, shown
            )
        with shown.step("time by operator") as found:
            spent = profile.by_operator(temporary)
            found += [f"{step} {next(iter(shares))}" for step, shares in spent.items()]
        with shown.step("bundle") as found:
            report |= {
                "time": spent,
                "precision": wishes.precision,
                "model": loaded.name,
                "tolerance": asdict(wishes.tolerance),
                "probe_tokens": [len(row) for row in rows],
                "tokenizer": loaded.note or "saved",
                "steps": shown.steps,
                "versions": _versions(),
            }
            bundle.write_json(temporary / REPORT, report)
            bundle.seal(temporary, description)
            size = sum(p.stat().st_size for p in temporary.iterdir())
            found.append(f"{out}, {size / 1e6:,.1f} MB")


def _quantise(
    loaded: Source,
    converted: onnx_ir.Model,
    temporary: Path,
    description: dict[str, Any],
    original: check.Reference,
    wishes: Wishes,
    shown: Progress,
) -> dict[str, Any]:
    """Quantise the graph that was proved equal, compare again, and say what it costs."""
    text = calibrate.rows_of_text(
        wishes.calibration.read_text(encoding="utf-8"),
        loaded.tokenizer,
        description["vocab_size"],
        description["max_length"],
    )
    calibration, evaluation = calibrate.halves(text)
    with shown.step(f"quantise to {wishes.precision}") as found:
        used = calibration[: calibrate.TOKENS // calibrate.ROW]
        made, smoothed = recipe.make(converted, wishes.precision, used, shown.part)
        wide = [one.name for one in made if one.wide]
        found.append(f"{len(made)} matrices, {len(wide)} kept wider, {len(smoothed)} smoothed")
    report = _write(converted, temporary, description, wishes.precision, original, shown)
    with shown.step("text compared") as found:
        rows = evaluation[: calibrate.TOKENS // calibrate.ROW]
        text_quality = quality.measure(loaded.model, Model(temporary), rows)
        found.append(text_quality.summary())
    report |= {
        "quality": asdict(text_quality) | {"more_perplexity": text_quality.more_perplexity},
        "matrices": [asdict(one) for one in made],
        "wider": wide,
        "smoothed": smoothed,
    }
    report["mismatch"] = check.judge(text_quality, wishes.tolerance)
    _judge(report, wishes.allow_mismatch)
    return report


def _write(
    converted: onnx_ir.Model,
    temporary: Path,
    description: dict[str, Any],
    name: str,
    original: check.Reference,
    shown: Progress,
) -> dict[str, Any]:
    """Write the graph and compare what it says, through fastgen's own engine."""
    graph.save(converted, temporary / GRAPH)
    bundle.seal(temporary, description)
    with shown.step(f"{name} logits compared") as found:
        logits = check.compare(
            original.logits, check.exported_logits(Model(temporary), original.rows)
        )
        found.append(logits.summary())
    with shown.step(f"{name} greedy text compared") as found:
        greedy = check.compare_continuation(temporary, original.rows, original.continuation)
        found.append(greedy.summary())
    wrong = check.judge(logits, check.Tolerance(), greedy)
    size = sum((temporary / name).stat().st_size for name in (GRAPH, f"{GRAPH}.data"))
    return {"bytes": size, "logits": asdict(logits), "greedy": asdict(greedy), "mismatch": wrong}


def _judge(report: dict[str, Any], allow_mismatch: bool) -> None:
    if report["mismatch"] and not allow_mismatch:
        raise check.Mismatch(
            f"the export disagrees with the original: {'; '.join(report['mismatch'])}"
        )


def _versions() -> dict[str, str]:
    return {
        "fastgen": fastgen.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


__all__ = ["PRECISIONS", "UnsupportedModel", "export"]
