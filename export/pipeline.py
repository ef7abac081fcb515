"""The export, step by step: load, torch logits, convert, compare, bundle."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx_ir
import onnxruntime
import torch
import transformers
from fastgen.export import bundle, cache, calibrate, check, graph, quality, recipe, source, trim
from fastgen.export.attention import UnsupportedModel
from fastgen.export.recipe import RECIPES
from fastgen.export.source import Source
from numpy.typing import NDArray
from transformers import PreTrainedModel

import fastgen
from fastgen.hub import PRECISION
from fastgen.model import GRAPH, Model

PRECISIONS = ("fp32", *RECIPES)
CACHE_PRECISIONS = tuple(cache.DTYPES)

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
        self._write(f"{clear}{label:<38}{seconds:7.1f} s  {'; '.join(found)}\n")

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
    cache_precision: str = "fp32",
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
        cache_precision: "fp32" or "int8", of the keys and values that are kept.
        force: replace an existing model directory, once the new one is complete.
        allow_mismatch: keep an export that disagrees with the original beyond the tolerance.
        revision: a branch, tag or commit of a hub repository.
        calibration: a file with text to quantise and to measure on; None for the one that comes
            with fastgen.
        tolerance: what may differ from the original; None for the coarser precision's own.
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
    if cache_precision not in CACHE_PRECISIONS:
        known = ", ".join(CACHE_PRECISIONS)
        raise ValueError(f"cache_precision must be one of {known}, got {cache_precision!r}")
    out = Path(out)
    bundle.check_free(out, force)
    wishes = Wishes(
        precision=precision,
        cache_precision=cache_precision,
        force=force,
        allow_mismatch=allow_mismatch,
        tolerance=tolerance or usual_tolerance(precision, cache_precision),
        calibration=Path(calibration or calibrate.TEXT),
    )
    quantised = (precision != "fp32") + (cache_precision != "fp32")
    shown = Progress(total=6 + 4 * quantised, stream=progress)
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


def usual_tolerance(precision: str, cache_precision: str) -> check.Tolerance:
    """That of the coarser of the two."""
    return max((TOLERANCES[precision], TOLERANCES[cache_precision]), key=lambda one: one.kl)


def tolerance(
    precision: str, kl: float | None, top1: float | None, cache_precision: str = "fp32"
) -> check.Tolerance | None:
    """The usual tolerance with another bound or two; None where a precision is unknown."""
    if precision not in PRECISIONS or cache_precision not in CACHE_PRECISIONS:
        return None
    given = {name: bound for name, bound in (("kl", kl), ("top1", top1)) if bound is not None}
    return replace(usual_tolerance(precision, cache_precision), **given)


@dataclass(frozen=True)
class Wishes:
    """What the caller of `export` asked for."""

    precision: str
    cache_precision: str
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
        proved = report
        if wishes.cache_precision != "fp32":
            made = _quantise_cache(
                loaded, converted, temporary, description, original, wishes, shown
            )
            report = {"fp32": proved, "cache": made} | made
        if wishes.precision != "fp32":
            report = (
                {"fp32": proved}
                | report
                | _quantise(loaded, converted, temporary, description, original, wishes, shown)
            )
        with shown.step("bundle") as found:
            report |= {
                "precision": wishes.precision,
                "cache_precision": wishes.cache_precision,
                "model": loaded.name,
                "tolerance": asdict(wishes.tolerance),
                "probe_tokens": [len(row) for row in rows],
                "tokenizer": loaded.note or "saved",
                "steps": shown.steps,
                "versions": _versions(),
            }
            bundle.write_json(temporary / bundle.REPORT, report)
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
    calibration, evaluation = _text(loaded, description, wishes)
    with shown.step(f"quantise to {wishes.precision}") as found:
        used = calibration[: calibrate.TOKENS // calibrate.ROW]
        made, smoothed = recipe.make(converted, wishes.precision, used, shown.part)
        wide = [one.name for one in made if one.wide]
        found.append(f"{len(made)} matrices, {len(wide)} kept wider, {len(smoothed)} smoothed")
    report = _write(converted, temporary, description, wishes.precision, original, shown)
    rows = evaluation[: calibrate.TOKENS // calibrate.ROW]
    report |= _compare_text(wishes.precision, loaded, temporary, rows, wishes, shown) | {
        "matrices": [asdict(one) for one in made],
        "wider": wide,
        "smoothed": smoothed,
    }
    _judge(report, wishes.allow_mismatch)
    return report


def _quantise_cache(
    loaded: Source,
    converted: onnx_ir.Model,
    temporary: Path,
    description: dict[str, Any],
    original: check.Reference,
    wishes: Wishes,
    shown: Progress,
) -> dict[str, Any]:
    """Store keys and values in 8 bits, compare again, and say what that alone costs."""
    limit = description["max_length"]
    calibration, evaluation = _text(loaded, description, wishes)
    with shown.step("quantise keys and values") as found:
        reached = cache.reach(converted, calibration[: cache.TOKENS // calibrate.ROW], limit)
        cache.quantize(converted, reached)
        description["cache_dtype"] = cache.DTYPES[wishes.cache_precision]
        channels = sum(one.size for one in reached.values())
        found.append(f"{channels:,} channels, {wishes.cache_precision}")
    name = f"{wishes.cache_precision} cache"
    report = _write(converted, temporary, description, name, original, shown)
    rows = cache.long_rows(evaluation, limit)
    rows = rows[: max(1, calibrate.TOKENS // len(rows[0]))]
    report |= _compare_text(name, loaded, temporary, rows, wishes, shown)
    _judge(report, wishes.allow_mismatch)
    return report


def _text(
    loaded: Source, description: dict[str, Any], wishes: Wishes
) -> tuple[list[NDArray[np.int64]], ...]:
    """Rows of ids to calibrate on, and others to measure on."""
    text = calibrate.rows_of_text(
        wishes.calibration.read_text(encoding="utf-8"),
        loaded.tokenizer,
        description["vocab_size"],
        description["max_length"],
    )
    return calibrate.halves(text)


def _compare_text(
    name: str,
    loaded: Source,
    temporary: Path,
    rows: Sequence[NDArray[np.int64]],
    wishes: Wishes,
    shown: Progress,
) -> dict[str, Any]:
    """What the written model costs on `rows`, and whether that is too much."""
    with shown.step(f"{name} text compared") as found:
        measured = quality.measure(loaded.model, Model(temporary), rows)
        found.append(measured.summary())
    return {
        "quality": asdict(measured) | {"more_perplexity": measured.more_perplexity},
        "mismatch": check.judge(measured, wishes.tolerance),
    }


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
    return {"logits": asdict(logits), "greedy": asdict(greedy), "mismatch": wrong}


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
