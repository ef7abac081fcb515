"""The export, step by step: load, torch logits, convert, compare, bundle."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import onnxruntime
import torch
import transformers
from fastgen.export import bundle, check, graph, source, trim
from fastgen.export.attention import UnsupportedModel
from fastgen.export.source import Source
from transformers import PreTrainedModel

import fastgen
from fastgen.model import GRAPH, Model

PRECISIONS = ("fp32",)


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

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()


def export(
    model: str | os.PathLike[str] | PreTrainedModel,
    out: str | os.PathLike[str],
    *,
    tokenizer: object | None = None,
    precision: str = "fp32",
    force: bool = False,
    allow_mismatch: bool = False,
    revision: str | None = None,
    progress: TextIO | None = sys.stderr,
) -> Path:
    """Export a causal language model to a model directory, proved equal to the original.

    Args:
        model: a hub id, a `save_pretrained` directory, or a transformers model object, which is
            left as it was.
        out: the directory to write; it appears when it is complete.
        tokenizer: the tokenizer of a model object; without one it is exported for ids only.
        precision: "fp32".
        force: replace an existing model directory, once the new one is complete.
        allow_mismatch: keep an export that disagrees with the original beyond the tolerance.
        revision: a branch, tag or commit of a hub repository.
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
    shown = Progress(total=6, stream=progress)
    with shown.step("load") as found:
        if isinstance(model, PreTrainedModel):
            loaded = source.of_object(model, tokenizer)
        else:
            loaded = source.load(model, revision)
        found += _about(loaded)
    with _evaluating(loaded.model):
        _export(loaded, out, precision, force, allow_mismatch, shown)
    return out


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout; afterwards each module trains or does not, as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _about(loaded: Source) -> list[str]:
    size = sum(p.numel() for p in loaded.model.parameters())
    about = [f"{loaded.model.config.model_type}, {size / 1e6:,.1f} M weights"]
    return about + ([f"for ids only: {loaded.note}"] if loaded.tokenizer is None else [])


def _export(
    loaded: Source,
    out: Path,
    precision: str,
    force: bool,
    allow_mismatch: bool,
    shown: Progress,
) -> None:
    model, tolerance = loaded.model, check.Tolerance()
    layers = graph.layers_of(model)
    with shown.step("torch logits") as found:
        rows = check.probes(model, loaded.tokenizer, layers)
        expected = check.reference_logits(model, rows)
        continuation = check.reference_continuation(model, rows)
        found.append(f"{len(rows)} rows of {', '.join(str(len(row)) for row in rows)} tokens")
    description = bundle.describe(loaded, layers, precision)
    with bundle.directory(out, force) as temporary:
        with shown.step("convert") as found:
            converted = graph.convert(model, layers)
            trim.trim(converted, description["max_length"])
            description["hard_limit"] |= trim.rotations_are_tabled(converted)
            graph.save(converted, temporary / GRAPH)
            del converted
            size = sum(p.stat().st_size for p in temporary.iterdir())
            found.append(f"{len(layers)} attention layers, {size / 1e6:,.1f} MB")
        bundle.write_configuration(loaded, temporary)
        bundle.seal(temporary, description)
        with shown.step("ONNX logits compared") as found:
            logits = check.compare(expected, check.exported_logits(Model(temporary), rows))
            found.append(logits.summary())
        with shown.step("greedy text compared") as found:
            greedy = check.compare_continuation(temporary, rows, continuation)
            found.append(greedy.summary())
        wrong = check.judge(logits, greedy, tolerance)
        if wrong and not allow_mismatch:
            raise check.Mismatch(f"the export disagrees with the original: {'; '.join(wrong)}")
        with shown.step("bundle") as found:
            report = {
                "precision": precision,
                "model": loaded.name,
                "mismatch": wrong,
                "tolerance": asdict(tolerance),
                "logits": asdict(logits),
                "greedy": asdict(greedy),
                "probe_tokens": [len(row) for row in rows],
                "tokenizer": loaded.note or "saved",
                "steps": shown.steps,
                "versions": _versions(),
            }
            bundle.write_json(temporary / bundle.REPORT, report)
            bundle.seal(temporary, description)
            found.append(str(out) + (" (mismatch allowed)" if wrong else ""))


def _versions() -> dict[str, str]:
    return {
        "fastgen": fastgen.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


__all__ = ["PRECISIONS", "UnsupportedModel", "export"]
