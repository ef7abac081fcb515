"""The export, step by step: load, torch logits, convert, compare, bundle."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import onnx_ir
import onnxruntime
from fastgen.export import (
    bundle,
    cache,
    calibrate,
    check,
    profile,
    prompts,
    quality,
    recipe,
    room,
    trim,
    window,
)
from fastgen.export.foreign import folder
from fastgen.export.foreign import origin as foreign
from fastgen.export.origin import Origin
from fastgen.export.progress import Progress
from fastgen.export.recipe import RECIPES
from fastgen.export.unsupported import UnsupportedModel
from numpy.typing import NDArray

import fastgen
from fastgen import CausalLM, folders, hub
from fastgen.codes import SCALES
from fastgen.hub import CACHE_PRECISION, PRECISION
from fastgen.model import GRAPH, INFO, UNPACKED
from fastgen.output import GenerateOutput
from fastgen.report import REPORT
from fastgen.tuning import Tuning

if TYPE_CHECKING:  # which a folder needs none of
    from transformers import PreTrainedModel

PRECISIONS = ("fp32", *RECIPES)
CACHE_PRECISIONS = tuple(cache.DTYPES)

# What a precision may differ by from the original; `export` and the command line can change it.
TOLERANCES = {
    "fp32": check.Tolerance(),
    "int8": check.Tolerance(max_difference=1.0, kl=0.02, top1=0.95, greedy=False),
    "int4": check.Tolerance(max_difference=1.0, kl=0.2, top1=0.80, greedy=False),
}


def export(
    model: str | os.PathLike[str] | PreTrainedModel,
    out: str | os.PathLike[str] | None = None,
    *,
    tokenizer: object | None = None,
    precision: str | None = None,
    cache_precision: str = CACHE_PRECISION,
    force: bool = False,
    allow_mismatch: bool = False,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | None = None,
    tolerance: check.Tolerance | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    quick: bool = False,
    progress: TextIO | None = sys.stderr,
) -> Path:
    """Export a causal language model to a model directory, proved equal to the original.

    Args:
        model: a hub id, a `save_pretrained` directory, an adapter's (PEFT) of either kind, an
            ONNX folder that others exported, or a transformers model object, which is left as it
            was.
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
        calibration: a file with text to quantise and to measure on; None for the one that comes
            with fastgen.
        tolerance: what may differ from the original; None for the coarser precision's own.
        max_kl, min_top1: another KL divergence, or share of equal likeliest tokens, than there.
        quick: leave out the comparison on text of what was quantised, and so its tolerance. What
            proves the graph in float32 is never left out.
        progress: where steps are shown; None for nowhere.

    Returns:
        `out`.

    Raises:
        UnsupportedModel: the graph cannot express the model; the message says why.
        Mismatch: the export disagrees with the original.
        ModelError: there is no such model, or `out` cannot be written, or the machine has not the
            memory or the disk that it takes.
    """
    if cache_precision not in CACHE_PRECISIONS:
        known = ", ".join(CACHE_PRECISIONS)
        raise ValueError(f"cache_precision must be one of {known}, got {cache_precision!r}")
    if calibration is not None and not Path(calibration).is_file():
        raise ValueError(f"calibration must be a file with text, {calibration} is none")
    if out is not None:
        bundle.check_free(Path(out), force)
    found = _folder(model, precision, revision, adapter)
    if found is None and precision not in (None, *PRECISIONS):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    made = (precision or PRECISION) if found is None else found.precision
    if out is None:
        called = made if found is None or made != found.first else found.name
        out = _usual_place(model, hub.kind(called, cache_precision))
        bundle.check_free(out, force)
    out = Path(out)
    wishes = Wishes(
        precision=made,
        cache_precision=cache_precision,
        force=force,
        allow_mismatch=allow_mismatch,
        tolerance=tolerance or usual_tolerance(made, cache_precision, max_kl, min_top1),
        calibration=Path(calibration or calibrate.TEXT),
        quick=quick,
    )
    kinds = wishes.kinds("fp32" if found is None else found.first)
    shown = Progress(_steps(wishes, kinds), progress)
    with shown.watch.working():
        with shown.step("load") as about:
            if found is not None:
                origin: Origin = foreign.Folder(found)
            else:
                place = _Place(out, made, len(kinds))
                origin = _original(model, tokenizer, revision, adapter, place)
                about += [place.needs.summary()] if place.needs is not None else []
                shown.watch.unseen = place.spilled
            about[:0] = origin.about()
        with origin.evaluating():
            _export(origin, out, wishes, shown)
    return out


def _steps(wishes: Wishes, kinds: Sequence[str]) -> list[str]:
    """What is shown, in order."""
    names = ["load", "original logits", "convert", *_compared("ONNX")]
    for kind in kinds:
        weights = kind == "weights"
        name = wishes.precision if weights else f"{wishes.cache_precision} cache"
        names += [f"quantise to {name}" if weights else "quantise keys and values"]
        names += _compared(name) + ([] if wishes.quick else [f"{name} text compared"])
    return [*names, "time by operator", "bundle"]


def _compared(name: str) -> list[str]:
    return [f"{name} logits compared", f"{name} greedy text compared"]


@dataclass
class _Place:
    """What a transformers model may take where it is exported to.

    Attributes:
        quantised: how often it is.
        needs: as it turns out.
        spilled: bytes of a file with its weights in float32.
    """

    out: Path
    precision: str
    quantised: int
    needs: room.Needs | None = None
    spilled: int = 0

    @property
    def spills(self) -> bool:
        """Whether its weights go to a file of their own."""
        return self.needs is not None and self.needs.disk[room.ORIGINAL] > 0

    def in_own_types(self, directory: Path) -> bool:
        """Whether the weights of a checkpoint stay as they are; raises for what cannot fit."""
        size = room.of_checkpoint(directory)
        return size is not None and self.settle(size).own_types

    def settle(self, size: room.Size, may_stay: bool = True) -> room.Needs:
        needs = room.needs(size, self.precision, self.quantised, may_stay)
        needs.check(self.out)
        self.needs = needs
        return needs


def _folder(
    model: object, precision: str | None, revision: str | None, adapter: object
) -> folder.Choice | None:
    """The graph of an ONNX folder, here or on the hub; None for what is no such folder."""
    if not isinstance(model, str | os.PathLike) or adapter is not None:
        return None
    place = Path(model)
    if not place.is_dir():
        if place.exists() or not hub.is_id(model):
            return None
        fetched = hub.onnx_folder(str(model), precision, revision)
        return None if fetched is None else folder.choose(fetched, precision)
    if (place / INFO).is_file() or not hub.is_onnx(folders.names_in(place), precision):
        return None
    return folder.choose(place, precision)


def _original(
    model: Any, tokenizer: object | None, revision: str | None, adapter: Any, place: _Place
) -> Origin:
    """A transformers model, by name or as it is.

    Raises:
        ModelError: there is no torch or no transformers here.
    """
    try:
        from fastgen.export import original, source, stored
        from transformers import PreTrainedModel
    except ImportError as error:
        raise hub.needs(model, False, error) from error
    if not isinstance(model, PreTrainedModel):
        loaded = source.load(model, revision, adapter, place.in_own_types)
        if place.needs is None:
            place.settle(room.of_model(loaded.model, is_mapped=False), may_stay=False)
        if place.spills:
            place.spilled = stored.spill(loaded.model, bundle.parent(place.out))
        return original.Original(loaded)
    if adapter is not None:
        raise ValueError("adapter goes with a model's name: a model object can be merged by peft")
    place.settle(room.of_model(model, is_mapped=True), may_stay=False)
    return original.Original(source.of_object(model, tokenizer))


def _usual_place(model: object, kind: str) -> Path:
    """A directory in this one, called after a model."""
    if not isinstance(model, str | os.PathLike):
        raise ValueError("out must be a directory: a model object has no name of its own")
    name = Path(os.path.abspath(model)).name  # of a directory's path, or the end of a hub id
    return Path(f"{name}-{kind}")


def usual_tolerance(
    precision: str, cache_precision: str, kl: float | None = None, top1: float | None = None
) -> check.Tolerance:
    """That of the coarser of the two; with another bound or two where they are given."""
    usual = max((TOLERANCES[precision], TOLERANCES[cache_precision]), key=lambda one: one.kl)
    given = {name: bound for name, bound in (("kl", kl), ("top1", top1)) if bound is not None}
    return replace(usual, **given)


@dataclass(frozen=True)
class Wishes:
    """What the caller of `export` asked for."""

    precision: str
    cache_precision: str
    force: bool
    allow_mismatch: bool
    tolerance: check.Tolerance
    calibration: Path
    quick: bool

    def kinds(self, first: str) -> list[str]:
        """What is quantised of a graph that is in the precision `first` already."""
        cache = ["cache"] if self.cache_precision != "fp32" else []
        return cache + (["weights"] if self.precision != first else [])


@dataclass
class _Job:
    """One export: what all its steps need.

    Attributes:
        out: where the last graph is written.
        original: what the original says of the probes.
        description: the content of `fastgen.json`.
        scales: of keys and values, once they are quantised.
    """

    origin: Origin
    wishes: Wishes
    shown: Progress
    out: Path
    original: check.Reference
    description: dict[str, Any]
    scales: NDArray[np.float32] | None = None

    def convert(self, to: Path, whole: bool = False) -> onnx_ir.Model:
        with self.shown.step("convert") as found:
            converted, about = self.origin.convert(whole)
            trim.trim(converted, self.description["max_length"])
            self.description["hard_limit"] |= trim.rotations_are_tabled(converted)
            self.description["windows"] = window.bound(converted)
            self.save(converted, to)
            found += [*about, f"{len(converted.graph)} nodes"]
        return converted

    def save(self, converted: onnx_ir.Model, to: Path) -> None:
        to.mkdir(parents=True, exist_ok=True)
        bundle.save(converted, to / GRAPH)
        if self.scales is not None:
            np.save(to / SCALES, self.scales)
        bundle.seal(to, self.description)

    def quantise(self, converted: onnx_ir.Model, to: Path) -> dict[str, Any]:
        """Quantise the weights of a graph that was proved equal, and say what it costs."""
        calibration, evaluation = self._text()
        precision = self.wishes.precision
        with self.shown.step(f"quantise to {precision}") as found:
            used = calibration[: calibrate.TOKENS // calibrate.ROW]
            made, smoothed, reached = recipe.make(converted, precision, used, self.shown.part)
            self.save(converted, to)
            wide = [one.name for one in made if one.wide]
            found.append(f"{len(made)} matrices, {len(wide)} kept wider, {len(smoothed)} smoothed")
            if reached:
                unreached = sum(len(one.unreached) for one in reached)
                experts = sum(one.experts for one in reached)
                found.append(f"the text came to all but {unreached} of {experts} experts")
        rows = evaluation[: quality.TOKENS // calibrate.ROW]
        report = self.compare(to, precision, rows) | {
            "matrices": [asdict(one) for one in made],
            "wider": wide,
            "smoothed": smoothed,
        }
        if reached:
            report["experts"] = [asdict(one) for one in reached]
        self.judge(report)
        return report

    def quantise_cache(self, converted: onnx_ir.Model, to: Path) -> dict[str, Any]:
        """Store keys and values in 8 bits, and say what that alone costs."""
        limit, precision = self.description["max_length"], self.wishes.cache_precision
        calibration, evaluation = self._text()
        with self.shown.step("quantise keys and values") as found:
            reached = cache.reach(converted, calibration[: cache.TOKENS // calibrate.ROW], limit)
            self.scales = cache.quantize(converted, reached)
            self.description["cache_dtype"] = cache.DTYPES[precision]
            self.save(converted, to)
            channels = sum(one.size for one in reached.values())
            found.append(f"{channels:,} channels, {precision}")
        name = f"{precision} cache"
        rows = cache.long_rows(evaluation, limit)
        rows = rows[: max(1, quality.TOKENS // len(rows[0]))]
        report = self.compare(to, name, rows)
        self.judge(report)
        return report

    def compare(
        self, to: Path, name: str, texts: Sequence[NDArray[np.int64]] = ()
    ) -> dict[str, Any]:
        """Compare what a written graph says, through fastgen's own engine.

        Args:
            texts: rows of ids on which it is compared too, where it was quantised.
        """
        with self.shown.step(f"{name} logits compared") as found:
            tuning = None if to == self.out else Tuning(entries=UNPACKED)
            model = CausalLM(to, tuning=tuning)
            model.model.grain = check.GRAIN
            rows = self.original.rows
            logits = check.compare(self.original.logits, check.exported_logits(model.model, rows))
            found.append(logits.summary())
        with self.shown.step(f"{name} greedy text compared") as found:
            out = check.continued(model, rows)
            greedy = check.compare_continuation(out, self._continuation(out))
            found.append(greedy.summary())
        wrong = check.judge(logits, self.origin.tolerance, greedy)
        size = sum((to / name).stat().st_size for name in (GRAPH, f"{GRAPH}.data"))
        report = {
            "bytes": size, "logits": asdict(logits), "greedy": asdict(greedy), "mismatch": wrong,
        }  # fmt: skip
        return report | (self._compare_text(name, model, texts) if texts else {})

    def _continuation(self, ours: GenerateOutput) -> list[NDArray[np.int64]]:
        """The original's, of each row; what the first graph writes is most likely the same."""
        known = self.original.continuation
        if not known:
            guesses = [np.array(ids[-check.NEW_TOKENS :]) for ids in ours.sequences]
            known += check.original_continuations(
                self.origin.logits, self.origin.continuation, self.original.rows, guesses
            )
        return known

    def judge(self, report: dict[str, Any]) -> None:
        if report["mismatch"] and not self.wishes.allow_mismatch:
            raise check.Mismatch(
                f"the export disagrees with the original: {'; '.join(report['mismatch'])}"
            )

    def _text(self) -> tuple[list[NDArray[np.int64]], ...]:
        """Rows of ids to calibrate on, and others to measure on."""
        text = calibrate.rows_of_text(
            self.wishes.calibration.read_text(encoding="utf-8"),
            self.origin.tokenizer,
            self.description["vocab_size"],
            self.description["max_length"],
        )
        return calibrate.halves(text)

    def _compare_text(
        self, name: str, model: CausalLM, rows: Sequence[NDArray[np.int64]]
    ) -> dict[str, Any]:
        """What the written model costs on `rows`, and whether that is too much."""
        if self.wishes.quick:
            return {"quick": True, "mismatch": []}
        with self.shown.step(f"{name} text compared") as found:
            measured = quality.measure(self.origin.logits, model.model, rows, self.shown.part)
            found.append(measured.summary())
        return {
            "quality": asdict(measured) | {"more_perplexity": measured.more_perplexity},
            "mismatch": check.judge(measured, self.wishes.tolerance),
        }


def _export(origin: Origin, out: Path, wishes: Wishes, shown: Progress) -> None:
    description = origin.describe(wishes.precision)
    floats = room.FLOAT * description["parameters"]
    shown.weights = floats
    with shown.step("original logits") as found:
        original = _reference(origin)
        lengths = [len(row) for row in original.rows]
        found.append(f"{len(lengths)} rows of {', '.join(map(str, lengths))} tokens")
    with bundle.directory(out, wishes.force) as temporary:
        shown.watch.directory = temporary
        job = _Job(origin, wishes, shown, temporary, original, description)
        report = _stages(job)
        why = prompts.write(temporary)
        if why and job.description["precision"] == "int4":
            job.description["no_prompts"] = why
        with shown.step("time by operator") as found:
            spent = profile.by_operator(temporary)
            found += [f"{step} {next(iter(shares))}" for step, shares in spent.items()]
        with shown.step("bundle") as found:
            origin.write_configuration(temporary)
            report |= {
                "time": spent,
                "precision": wishes.precision,
                "cache_precision": wishes.cache_precision,
                "model": origin.name,
                "tolerance": asdict(wishes.tolerance),
                "probe_tokens": lengths,
                "tokenizer": origin.note or "saved",
                "quick": wishes.quick,
                "steps": shown.steps,
                "peaks": asdict(shown.watch.peaks) | {"float32_weights": floats},
                "versions": _versions() | origin.versions(),
                **origin.report(),
            }
            bundle.write_json(temporary / REPORT, report)
            bundle.seal(temporary, job.description)
            bundle.sign(temporary)
            size = sum(p.stat().st_size for p in temporary.iterdir())
            found.append(f"{out}, {size / 1e6:,.1f} MB")


def _reference(origin: Origin) -> check.Reference:
    rows = origin.probes()
    return check.Reference(rows, [origin.logits(row) for row in rows])


def _stages(job: _Job) -> dict[str, Any]:
    """Convert, prove, and quantise what is to be quantised; the last stage is written to `out`.

    Earlier ones go to a directory of their own, and the next one reads their weights from its
    file, where they take no memory that the system could not have back.
    """
    kinds, out = job.wishes.kinds(job.origin.first), job.out
    work = out / "work"
    place = work / "fp32" if kinds else out
    converted = job.convert(place)
    report = job.compare(place, "ONNX")
    if report["mismatch"] and converted.meta.get("repeated"):  # layers are alike, but not these
        job.shown.again("convert", *_compared("ONNX"))
        converted = job.convert(place, whole=True)
        report = job.compare(place, "ONNX")
    proved = report
    job.judge(report)
    for kind in kinds:
        converted = onnx_ir.load(place / GRAPH)
        gc.collect()  # graphs are full of cycles: the one before goes now, with its weights
        place = out if kind == kinds[-1] else work / kind
        if kind == "cache":
            made = job.quantise_cache(converted, place)
            report = {"fp32": proved, "cache": made} | made
        else:
            report = {"fp32": proved} | report | job.quantise(converted, place)
    del converted  # whose weights are in a file that goes now
    shutil.rmtree(work, ignore_errors=True)
    return report


def _versions() -> dict[str, str]:
    return {
        "fastgen": fastgen.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


__all__ = ["PRECISIONS", "UnsupportedModel", "export"]
