"""The export: a model is opened, its steps are taken, and a model directory comes of it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import onnxruntime

import fastgen
from fastgen.errors import UnsupportedModel
from fastgen.export import bundle, requirements, stages
from fastgen.export.many_tokens import Second
from fastgen.export.opening import Opening, opening
from fastgen.export.options import PRECISIONS, ExportOptions, texts_of
from fastgen.export.progress import Cost, Progress, Step
from fastgen.export.source.origin import Tolerance
from fastgen.export.work import Work
from fastgen.store import jsonfile
from fastgen.store.model_info import CACHE_PRECISION, REPORT, kind
from fastgen.store.resolve import Resolved
from fastgen.system import interrupt

if TYPE_CHECKING:  # which a folder needs none of
    from transformers import PreTrainedModel


@interrupt.raised()
def export(
    model: str | os.PathLike[str] | Resolved | PreTrainedModel,
    out: str | os.PathLike[str] | None = None,
    *,
    tokenizer: object | None = None,
    precision: str | None = None,
    cache_precision: str = CACHE_PRECISION,
    force: bool = False,
    allow_mismatch: bool = False,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    calibration: str | os.PathLike[str] | None = None,
    tolerance: Tolerance | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    quick: bool = False,
    build: bool | None = None,
    prove: bool = False,
    progress: TextIO | None = sys.stderr,
) -> Path:
    """Export a causal language model to a model directory, proved equal to the original.

    However it ends, by an error, Ctrl-C, SIGTERM or SIGHUP, what it made on the way is put away.

    Args:
        model: a hub id, a `save_pretrained` directory, an adapter's (PEFT) of either kind, an
            ONNX folder that others exported, or a transformers model object, which is left as it
            was. What `store.resolve` found of a name is taken too.
        out: the directory to write; it appears when it is complete. None for the model's name
            and its precisions, such as distilgpt2-int8.
        tokenizer: the tokenizer of a model object; without one it is exported for ids only.
        precision: "fp32", "int8" or "int4"; None for int8, and for a folder's own (see
            `foreign.folder`), of which there are more.
        cache_precision: "fp32" or "int8", of the keys and values that are kept.
        force: replace an existing model directory, once the new one is complete.
        allow_mismatch: keep an export that disagrees with the original beyond the tolerance.
        revision: a branch, tag or commit of a hub repository.
        adapter: an adapter that is merged into the model first, a directory or a hub id.
        text: a file, or several, with text like that which the model is used for: plain text, or
            JSON lines (by the file's ending) with `text`, `ids` or `messages`. It takes the place
            of what comes with fastgen and of what the model itself writes (see `corpus`): every
            other paragraph or line is calibrated on, the rest judged.
        calibration: the old name of `text`, for one file.
        tolerance: what may differ from the original; None for the coarser precision's own.
        max_kl: another KL divergence than there.
        min_top1: share of equal likeliest tokens that is asked; without it none is.
        quick: leave out the comparison on text of what was quantised, and so its tolerance. What
            proves the graph in float32 is never left out.
        build: True to make the graph of the checkpoint's tensors, by its family (`build`), without
            torch; False to trace the model. None to build it where its family is known, and to
            compare it with the original where torch is; should they differ, it is traced.
        prove: build, and run the original in torch beside it, whatever `build` says; should they
            differ, that is an error. A graph that was traced is always compared with it.
        progress: where steps are shown; None for nowhere.

    Returns:
        `out`.

    Raises:
        UnsupportedModel: the graph cannot express the model; the message says why.
        Mismatch: the export disagrees with the original.
        ModelError: there is no such model, or `out` cannot be written, or the machine has not the
            memory or the disk that it takes.
    """
    texts = texts_of(text)
    if calibration is not None:
        warnings.warn("calibration is now named text", DeprecationWarning, stacklevel=3)
        texts.append(Path(calibration))
    options = ExportOptions(
        tokenizer=tokenizer,
        precision=precision,
        cache_precision=cache_precision,
        force=force,
        allow_mismatch=allow_mismatch,
        revision=revision,
        adapter=adapter,
        texts=texts,
        tolerance=tolerance,
        max_kl=max_kl,
        min_top1=min_top1,
        quick=quick,
        build=build,
        prove=prove,
    )
    if out is not None:
        bundle.check_free(Path(out), force)
    opened = opening(model, options)
    if out is None:
        out = _usual_place(opened, cache_precision)
        bundle.check_free(out, force)
    target = options.target(opened.first, opened.precision, opened.held)
    shown = Progress(progress)
    with shown.watch.working(), ExitStack() as stack:
        work = Work(opened, options, target, Path(out), shown, stack)
        shown.run(steps(work))
    return work.out


def _usual_place(opened: Opening, cache_precision: str) -> Path:
    """A directory in this one, called after a model."""
    if opened.name is None:
        raise ValueError("out must be a directory: a model object has no name of its own")
    name = Path(os.path.abspath(opened.name)).name  # of a directory's path, or the end of a hub id
    return Path(f"{name}-{kind(opened.label, cache_precision)}")


def steps(work: Work) -> list[Step]:
    """All steps of an export, in order; some may be taken again."""
    return [
        *stages.Graph(work).steps(),
        *stages.quantised(work),
        *([] if work.target.precision == "fp32" else [_many_tokens(work)]),
        Step("bundle", Cost(0.2, 0.3), partial(_bundle, work)),
    ]


def _many_tokens(work: Work) -> Step:
    return Step("form for many tokens", Cost(1, 4), Second(work).write)


def _bundle(work: Work) -> list[str]:
    """Write the other files of a model directory, and sign all."""
    shutil.rmtree(work.working, ignore_errors=True)
    work.origin.write_configuration(work.directory)
    jsonfile.write(work.directory / REPORT, work.report | _about(work))
    bundle.seal(work.directory, work.info)
    bundle.sign(work.directory)
    size = sum(path.stat().st_size for path in work.directory.iterdir())
    return [f"{work.out}, {size / 1e6:,.1f} MB"]


def _about(work: Work) -> dict[str, Any]:
    """The report of the export as a whole."""
    origin, shown, target = work.origin, work.shown, work.target
    floats = requirements.FLOAT * origin.parameters
    return {
        "time": work.time,
        "precision": target.precision,
        "cache_precision": target.cache_precision,
        "model": origin.name,
        "tolerance": asdict(target.tolerance),
        "probe_tokens": [len(row) for row in work.original.rows],
        "tokenizer": origin.note or "saved",
        "quick": work.options.quick,
        "steps": shown.taken,
        "peaks": asdict(shown.watch.peaks) | {"float32_weights": floats},
        "versions": _versions() | origin.versions(),
        **origin.report(),
    }


def _versions() -> dict[str, str]:
    return {
        "fastgen": fastgen.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


__all__ = ["PRECISIONS", "UnsupportedModel", "export"]
