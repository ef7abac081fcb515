"""The export, step by step: load, torch logits, convert, compare, bundle."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import onnx_ir
import onnxruntime
from numpy.typing import NDArray

import fastgen
from fastgen.engine.kv_int8 import SCALES
from fastgen.engine.model import UNPACKED
from fastgen.engine.output import GenerateOutput
from fastgen.errors import ModelError, UnsupportedModel
from fastgen.export import bundle, requirements
from fastgen.export.build import origin as build_origin
from fastgen.export.onnx_folder import folder
from fastgen.export.onnx_folder import origin as foreign
from fastgen.export.progress import Progress
from fastgen.export.prove import check, corpus, profile, quality
from fastgen.export.quantize import calibrate, kv_int8, prefill_int8, recipe, rotate
from fastgen.export.quantize.recipe import RECIPES
from fastgen.export.rewrite import contract, onnx_file, trim, window
from fastgen.export.source.origin import Origin, Tolerance
from fastgen.generator import CausalLM
from fastgen.store import hub, jsonfile, onnx_folders
from fastgen.store.graph_io import GraphIO
from fastgen.store.hub import CACHE_PRECISION, PRECISION
from fastgen.store.model_info import GRAPH, INFO
from fastgen.store.report import REPORT
from fastgen.store.tuning import Tuning
from fastgen.system import interrupt, memory

if TYPE_CHECKING:  # which a folder needs none of
    from transformers import PreTrainedModel

    from fastgen.export.torch_model.source import Source

PRECISIONS = ("fp32", *RECIPES)
CACHE_PRECISIONS = tuple(kv_int8.DTYPES)

# What a precision may differ by from the original; `export` and the command line can change it.
# Kernels are chosen for it (see `recipe`), and what cannot reach it is refused.
TOLERANCES = {
    "fp32": Tolerance(),
    "int8": Tolerance.quantised(kl=0.006),
    "int4": Tolerance.quantised(kl=0.1),
}


OWN_LOGITS = "logits of each row alone"  # where there is no original that runs
Kept = Callable[[NDArray[Any]], NDArray[Any]]
TUNED = 1024  # tokens that say whether a target is met: no code is made of them
AGAIN = 2  # times that the text which decides sends matrices up the ladder


@interrupt.raised()
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
        build: whether to make the graph of the checkpoint's tensors, by its family (`build`), and
            not to trace the model; None to do so where there is no torch.
        prove: run the original in torch beside a graph that was built. One that was traced is
            always compared with it.
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
    texts = _texts(text, calibration)
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
        texts=texts,
        quick=quick,
    )
    kinds = wishes.kinds("fp32" if found is None else found.first)
    if texts and not kinds:
        raise ValueError(f"text is for what is quantised, and of {made} nothing is: leave it out")
    built = None if found is not None else _built(model, revision, adapter, build, prove)
    shown = Progress(_steps(wishes, kinds, built is not None and not prove), progress)
    with shown.watch.working():
        with shown.step("load") as about:
            if found is not None:
                origin: Origin = foreign.Folder(found)
            else:
                place = _Place(out, made, len(kinds))
                if built is None:
                    origin = _original(model, tokenizer, revision, adapter, place)
                else:
                    origin = _of_tensors(built, revision, place, prove)
                about += [place.needs.summary()] if place.needs is not None else []
                shown.watch.unseen = place.spilled
            about[:0] = origin.about()
        with origin.evaluating(), calibrate.shelf(bundle.parent(out)) as kept:
            _export(origin, out, wishes, shown, kept)
    return out


def _steps(wishes: Wishes, kinds: Sequence[str], asks_itself: bool) -> list[str]:
    """What is shown, in order."""
    names = ["load", "original logits", "convert", *_compared("ONNX")]
    if asks_itself:
        names[1:3] = ["convert", OWN_LOGITS]
    for kind in kinds:
        weights = kind == "weights"
        name = wishes.precision if weights else f"{wishes.cache_precision} cache"
        names.append(f"quantise to {name}" if weights else "quantise keys and values")
        names += _judged(name, wishes.quick)
    return [*names, "time by operator", "bundle"]


def _judged(name: str, quick: bool) -> list[str]:
    return [*_compared(name), *([] if quick else [f"{name} text compared"])]


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
    needs: requirements.Needs | None = None
    spilled: int = 0

    @property
    def spills(self) -> bool:
        """Whether its weights go to a file of their own."""
        return self.needs is not None and self.needs.disk[requirements.ORIGINAL] > 0

    def in_own_types(self, directory: Path) -> bool:
        """Whether the weights of a checkpoint stay as they are; raises for what cannot fit."""
        size = requirements.of_checkpoint(directory)
        return size is not None and self.settle(size).own_types

    def settle(self, size: requirements.Size, may_stay: bool = True) -> requirements.Needs:
        needs = requirements.needs(size, self.precision, self.quantised, may_stay)
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
    if (place / INFO).is_file() or not hub.is_onnx(onnx_folders.names_in(place), precision):
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
        from transformers import PreTrainedModel

        from fastgen.export.torch_model import original, source
    except ImportError as error:
        raise hub.needs(model, False, error) from error
    if not isinstance(model, PreTrainedModel):
        return original.Original(_loaded(model, revision, adapter, place))
    if adapter is not None:
        raise ValueError("adapter goes with a model's name: a model object can be merged by peft")
    place.settle(requirements.of_model(model, is_mapped=True), may_stay=False)
    return original.Original(source.of_object(model, tokenizer))


def _loaded(model: Any, revision: str | None, adapter: Any, place: _Place) -> Source:
    """A transformers model by its name, its weights where they have room."""
    from fastgen.export.torch_model import source
    from fastgen.export.trace import stored

    loaded = source.load(model, revision, adapter, place.in_own_types)
    if place.needs is None:
        place.settle(requirements.of_model(loaded.model, is_mapped=False), may_stay=False)
    if place.spills:
        place.spilled = stored.spill(loaded.model, bundle.parent(place.out))
    return loaded


def _built(
    model: Any, revision: str | None, adapter: Any, build: bool | None, prove: bool
) -> str | Path | None:
    """The model's directory or its id, where its graph is built and not traced.

    Raises:
        ModelError: there is no torch, and what it says cannot be built.
        UnsupportedModel: it cannot be built, which was asked for.
    """
    torch = hub.has_torch()
    if prove and not torch:
        raise hub.needs(model, False, "to run the original, as --prove asks")
    wanted = prove or not torch if build is None else build
    if not wanted:
        return None
    why = _refused(model, revision, adapter)
    if why is None:
        return model if isinstance(model, Path) else str(model)
    if build or prove:
        raise UnsupportedModel(f"{_called(model)} cannot be built: {why}")
    raise hub.needs(_called(model), False, why)


def check_buildable(name: str, described: Path, names: Iterable[str]) -> None:
    """Look at what can be had without its weights, where there is no torch.

    Args:
        described: where its config.json lies.
        names: of its files.

    Raises:
        ModelError: it cannot be built.
    """
    why = build_origin.refused(described, names)
    if why is not None:
        raise hub.needs(name, False, why)


def _called(model: object) -> str:
    return str(model) if isinstance(model, str | os.PathLike) else type(model).__name__


def _refused(model: Any, revision: str | None, adapter: Any) -> str | None:
    """Why a model cannot be built; None where it can."""
    if not isinstance(model, str | os.PathLike):
        return "it is no checkpoint's directory or hub id"
    if adapter is not None:
        return "an adapter has to be merged first"
    place = Path(model)
    if (place / INFO).is_file():
        raise ModelError(f"{model} is a fastgen model already: there is nothing to export")
    if place.is_dir():
        return build_origin.refused(place, onnx_folders.names_in(place))
    if place.exists() or not hub.is_id(model):
        return f"{model} is no directory, nor a hub id"
    described = hub.snapshot(str(model), revision, only=[*hub.DESCRIBED])
    return build_origin.refused(described, hub.listed(str(model), revision))


def _of_tensors(model: str | Path, revision: str | None, place: _Place, prove: bool) -> Origin:
    """A checkpoint whose family is known; with the original beside it, where that is to run."""
    here = Path(model)
    directory = here if here.is_dir() else hub.transformers_snapshot(str(model), revision)
    if prove:
        from fastgen.export.build.proved import Proved

        return Proved(_loaded(model, revision, None, place), directory)
    size = requirements.of_checkpoint(directory)
    if size is not None:
        place.settle(replace(size, is_float32=True), may_stay=False)  # each is cast as it is read
    return build_origin.Built(directory, None if here.is_dir() else str(model))


def _texts(text: Any, calibration: Any) -> list[Path]:
    """The user's files, each of which can be read."""
    given = [text] if isinstance(text, str | os.PathLike) else list(text or ())
    if calibration is not None:
        warnings.warn("calibration is now named text", DeprecationWarning, stacklevel=3)
        given.append(calibration)
    paths = [Path(one) for one in given]
    for path in paths:
        corpus.read(path)
    return paths


def _usual_place(model: object, kind: str) -> Path:
    """A directory in this one, called after a model."""
    if not isinstance(model, str | os.PathLike):
        raise ValueError("out must be a directory: a model object has no name of its own")
    name = Path(os.path.abspath(model)).name  # of a directory's path, or the end of a hub id
    return Path(f"{name}-{kind}")


def usual_tolerance(
    precision: str, cache_precision: str, kl: float | None = None, top1: float | None = None
) -> Tolerance:
    """That of the coarser of the two; with another bound or two where they are given."""
    usual = max((TOLERANCES[precision], TOLERANCES[cache_precision]), key=lambda one: one.kl)
    return replace(
        usual,
        kl=usual.kl if kl is None else kl,
        top1=usual.top1 if top1 is None else top1,
    )


@dataclass(frozen=True)
class Wishes:
    """What the caller of `export` asked for."""

    precision: str
    cache_precision: str
    force: bool
    allow_mismatch: bool
    tolerance: Tolerance
    texts: Sequence[Path]
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
        kept: puts an array into a file, where it takes no memory that the system could not have
            back.
        proved: where the graph in float32 is, once it was proved equal.
        open: what a stage holds until it is over.
    """

    origin: Origin
    wishes: Wishes
    shown: Progress
    out: Path
    original: check.Reference
    description: dict[str, Any]
    kept: Kept
    scales: NDArray[np.float32] | None = None
    proved: Path | None = None
    open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def convert(self, to: Path, whole: bool = False) -> onnx_ir.Model:
        with self.shown.step("convert") as found:
            converted, about = self.origin.convert(whole)
            unbound = replace(self.io, windows=())
            contract.check(converted, unbound, "convert")
            trim.trim(converted, self.description["max_length"])
            self.description["hard_limit"] |= trim.rotations_are_tabled(converted)
            contract.check(converted, unbound, "trim")
            self.description["windows"] = window.bound(converted)
            self.save(converted, to)
            self.origin.written(to)
            found += [*about, f"{len(converted.graph)} nodes"]
        if not self.original.logits:
            with self.shown.step(OWN_LOGITS) as found:
                self.original = _reference(self.origin, found, self.kept)
        return converted

    @property
    def io(self) -> GraphIO:
        """The inputs and outputs that the graph must have by now."""
        said = self.description
        layers, states = (tuple(map(tuple, said[name])) for name in ("layers", "states"))
        windows = tuple(said.get("windows", ()))
        return GraphIO(said["vocab_size"], layers, states, windows, said["cache_dtype"])

    def save(self, converted: onnx_ir.Model, to: Path) -> None:
        contract.check(converted, self.io, f"the steps before {to.name} is written")
        to.mkdir(parents=True, exist_ok=True)
        onnx_file.save(converted, to / GRAPH)
        if self.scales is not None:
            np.save(to / SCALES, self.scales)
        bundle.seal(to, self.description)

    def quantise(self, place: Path, to: Path) -> dict[str, Any]:
        """Quantise the weights of a graph that was proved equal, and say what it costs.

        Kernels go up the ladder until the text says that the target is met, first that of
        calibration and then that which nothing was chosen by.
        """
        precision, target = self.wishes.precision, self.wishes.tolerance.kl
        with self.shown.step(f"quantise to {precision}") as found:
            used = self.corpus.calibration(recipe.RECIPES[precision].tokens + TUNED)
            rows = self._judged_on(quality.TOKENS)
            tuned, used = _apart(used, TUNED)
            graph, turned = self._turned(place)
            found += turned
            plan = self.open.enter_context(recipe.planned(graph, precision, used, self.shown.part))
            made = self._within(plan, tuned, target, to)
            found += _told(made, plan)
            found.append(self.corpus.summary())
        report = self.compare(to, precision, rows)
        for _ in range(AGAIN):
            measured = report.get("quality", {}).get("kl", 0.0)
            if measured <= target or not self._further(plan, tuned, measured, target):
                break
            again = _judged(precision, self.wishes.quick)
            self.shown.again(f"quantise to {precision}", *again)
            with self.shown.step(f"quantise to {precision}") as found:
                made = self._within(plan, tuned, target, to)
                found += _told(made, plan)
            report = self.compare(to, precision, rows)
        report |= {
            "matrices": [asdict(one) for one in made],
            "wider": [one.name for one in made if one.wide],
            "smoothed": plan.smoothed,
            "turned": turned,
            "kinds": plan.sensed,
            "text": dict(self.corpus.kinds),
        }
        if plan.reached:
            report["experts"] = [asdict(one) for one in plan.reached]
        self.judge(report)
        return report

    def _turned(self, place: Path) -> tuple[onnx_ir.Model, list[str]]:
        """The graph at `place` with what can be turned, if it still says the same then."""
        graph = onnx_ir.load(place / GRAPH)
        done = rotate.rotate(graph)
        if not done:
            return onnx_ir.load(place / GRAPH), []
        turned = place.with_name("turned")
        self.save(graph, turned)
        model = CausalLM(turned, tuning=Tuning(entries=UNPACKED)).model
        rows = self.original.rows
        said = check.compare_export(self.original.logits, model, rows)
        del model, graph
        memory.trim()
        if check.judge(said, self.origin.tolerance):
            shutil.rmtree(turned)
            return onnx_ir.load(place / GRAPH), [
                "what was turned said something else: left as it was"
            ]
        return onnx_ir.load(turned / GRAPH), [f"turned: {', '.join(done)}"]

    def _within(
        self, plan: recipe.Plan, rows: Sequence[NDArray[np.int64]], target: float, to: Path
    ) -> list[recipe.Made]:
        """Write the cheapest graph that is within the target on some rows, as far as one is."""
        while True:
            model, made = plan.make(self.shown.part)
            self.save(model, to)
            del model
            if self.wishes.quick:
                return made
            written = CausalLM(to).model
            measured = quality.measure(self.origin.logits, written, rows).kl
            del written
            memory.trim()
            if measured <= target or not self._further(plan, rows, measured, target):
                return made

    def _further(
        self, plan: recipe.Plan, rows: Sequence[NDArray[np.int64]], measured: float, target: float
    ) -> bool:
        """Send matrices up the ladder, whose whole costs more than is wanted; whether any went."""
        if not plan.sensed:
            plan.sense(rows, self.shown.part)
        return plan.aim(measured, target)

    def quantise_cache(self, converted: onnx_ir.Model, to: Path) -> dict[str, Any]:
        """Store keys and values in 8 bits, and say what that alone costs."""
        limit, precision = self.description["max_length"], self.wishes.cache_precision
        with self.shown.step("quantise keys and values") as found:
            reached = kv_int8.reach(converted, self.corpus.calibration(kv_int8.TOKENS), limit)
            rows = kv_int8.long_rows(self._judged_on(2 * quality.TOKENS), limit, quality.TOKENS)
            self.scales = kv_int8.quantize(converted, reached)
            self.description["cache_dtype"] = kv_int8.DTYPES[precision]
            self.save(converted, to)
            channels = sum(one.size for one in reached.values())
            found.append(f"{channels:,} channels, {precision}")
        name = f"{precision} cache"
        report = self.compare(to, name, rows)
        self.judge(report)
        return report

    def compare(
        self, to: Path, name: str, texts: Sequence[NDArray[np.int64]] | None = None
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
            logits = check.compare_export(self.original.logits, model.model, rows)
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
        return report | ({} if texts is None else self._compare_text(name, model, texts))

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

    @cached_property
    def corpus(self) -> corpus.Corpus:
        """Rows of ids to calibrate on, and others to measure on."""
        return corpus.of(self.origin, self.description, self.wishes.texts, self._writes)

    def _judged_on(self, tokens: int) -> list[NDArray[np.int64]]:
        """Rows to measure on; none where nothing is measured."""
        return [] if self.wishes.quick else self.corpus.evaluation(tokens)

    def _writes(self) -> CausalLM:
        """The graph in float32, which the model's own text is sampled from."""
        assert self.proved is not None
        return CausalLM(self.proved, tuning=Tuning(entries=UNPACKED))

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


def _apart(
    rows: Sequence[NDArray[np.int64]], tokens: int
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Some of the rows, of all kinds, about so many tokens together, and the others."""
    every = max(2, sum(map(len, rows)) // tokens)
    return list(rows[::every]) or list(rows), [
        row for place, row in enumerate(rows) if place % every or len(rows) == 1
    ]


def _told(made: Sequence[recipe.Made], plan: recipe.Plan) -> list[str]:
    """What became of the matrices."""
    kernels = Counter(one.kernel for one in made)
    told = [", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common())]
    told += [f"{len(plan.smoothed)} smoothed"] if plan.smoothed else []
    if plan.reached:
        unreached = sum(len(one.unreached) for one in plan.reached)
        experts = sum(one.experts for one in plan.reached)
        told.append(f"the text came to all but {unreached} of {experts} experts")
    return told


def _export(origin: Origin, out: Path, wishes: Wishes, shown: Progress, kept: Kept) -> None:
    description = origin.describe(wishes.precision)
    floats = requirements.FLOAT * description["parameters"]
    shown.weights = floats
    original = check.Reference([], [])  # where only the graph can be asked, which there is not yet
    if OWN_LOGITS not in shown.names:
        with shown.step("original logits") as found:
            original = _reference(origin, found, kept)
    with bundle.directory(out, wishes.force) as temporary:
        shown.watch.directory = temporary
        job = _Job(origin, wishes, shown, temporary, original, description, kept)
        report = _stages(job)
        why = prefill_int8.write(temporary)
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
                "probe_tokens": [len(row) for row in job.original.rows],
                "tokenizer": origin.note or "saved",
                "quick": wishes.quick,
                "steps": shown.steps,
                "peaks": asdict(shown.watch.peaks) | {"float32_weights": floats},
                "versions": _versions() | origin.versions(),
                **origin.report(),
            }
            jsonfile.write(temporary / REPORT, report)
            bundle.seal(temporary, job.description)
            bundle.sign(temporary)
            size = sum(p.stat().st_size for p in temporary.iterdir())
            found.append(f"{out}, {size / 1e6:,.1f} MB")


def _reference(origin: Origin, found: list[str], kept: Kept) -> check.Reference:
    rows = origin.probes()
    found.append(f"{len(rows)} rows of {', '.join(str(len(row)) for row in rows)} tokens")
    return check.Reference(rows, [kept(origin.logits(row)) for row in rows])


def _stages(job: _Job) -> dict[str, Any]:
    """Convert, prove, and quantise what is to be quantised; the last stage is written to `out`.

    Earlier ones go to a directory of their own, and the next one reads their weights from its
    file, where they take no memory that the system could not have back.
    """
    kinds, out = job.wishes.kinds(job.origin.first), job.out
    if job.wishes.texts:
        assert job.corpus  # says at once what is wrong with a user's text
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
    job.proved = place
    del converted
    for kind in kinds:
        gc.collect()  # graphs are full of cycles: the one before goes now, with its weights
        before, place = place, out if kind == kinds[-1] else work / kind
        if kind == "cache":
            made = job.quantise_cache(onnx_ir.load(before / GRAPH), place)
            report = {"fp32": proved, "cache": made} | made
        else:
            with contextlib.ExitStack() as job.open:
                report = {"fp32": proved} | report | job.quantise(before, place)
    shutil.rmtree(work, ignore_errors=True)
    return report


def _versions() -> dict[str, str]:
    return {
        "fastgen": fastgen.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


__all__ = ["PRECISIONS", "UnsupportedModel", "export"]
