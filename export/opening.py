"""From a model to the origin of its export, whichever kind it is of."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fastgen.errors import ModelError, UnsupportedModel
from fastgen.export import bundle, requirements
from fastgen.export.build import origin as build_origin
from fastgen.export.gguf import parts as gguf
from fastgen.export.gguf import proved, tensors
from fastgen.export.onnx_folder import folder
from fastgen.export.onnx_folder import origin as onnx_folder
from fastgen.export.options import PRECISIONS, ExportOptions
from fastgen.export.requirements import Budget
from fastgen.export.source import quantised
from fastgen.export.source.origin import Origin
from fastgen.store import resolve
from fastgen.store.model_info import PRECISION
from fastgen.store.resolve import CHECKPOINT, FASTGEN, GGUF, ONNX_FOLDER, Resolved

if TYPE_CHECKING:  # which a folder needs none of
    from fastgen.export.torch_model.source import Source

TO_PROVE = "to run the original, as --prove asks"


@dataclass(frozen=True)
class Opening:
    """The way from a model to its origin.

    Attributes:
        name: of the model, as it was given; None for a model object.
        first: the precision of its graph.
        precision: that is to be made.
        label: which a directory is called after: `precision`, or the folder's own name of it.
        asks_graph: nothing of it runs, so its graph is asked in place of an original.
        load: gives the origin.
        held: weights stay on the grid that their file has them on.
    """

    name: str | None
    first: str
    precision: str
    label: str
    asks_graph: bool
    load: Callable[[Budget], Origin]
    held: bool = False


def opening(model: object, options: ExportOptions) -> Opening:
    """Find out how a model is opened. Of an ONNX folder on the hub, its files are fetched.

    Args:
        model: a name, what `resolve` made of one, or a transformers model object.

    Raises:
        ModelError: there is no such model, or it cannot be opened here.
        UnsupportedModel: it cannot be built, which was asked for.
    """
    if isinstance(model, str | os.PathLike):
        adapted = options.adapter is not None
        model = resolve.resolve(model, options.precision, options.revision, adapted=adapted)
    if isinstance(model, Resolved) and model.kind == ONNX_FOLDER:
        return _of_folder(model, options.precision)
    if isinstance(model, Resolved) and model.kind == GGUF:
        return _of_gguf(model, options)
    precision = options.precision or PRECISION
    _check_precision(precision)
    name = model.name if isinstance(model, Resolved) else None
    if _is_built(model, options) and isinstance(model, Resolved):
        runs = _original_runs(options)
        load = partial(_of_tensors, model, options, runs)
        return Opening(name, "fp32", precision, precision, not runs, load)
    return Opening(name, "fp32", precision, precision, False, partial(_original, model, options))


def _of_folder(model: Resolved, precision: str | None) -> Opening:
    choice = folder.choose(model.fetch(), precision)
    label = choice.precision if choice.precision != choice.first else choice.name

    def load(_: Budget) -> Origin:
        return onnx_folder.Folder(choice)

    return Opening(model.name, choice.first, choice.precision, label, False, load)


def _of_gguf(model: Resolved, options: ExportOptions) -> Opening:
    """A GGUF file: in its own numbers, where it is quantised and no precision is asked for.

    Raises:
        ModelError: the library `gguf` is not installed.
        UnsupportedModel: what is asked for needs a transformers model.
    """
    asked = {"adapter": options.adapter, "tokenizer": options.tokenizer}
    if odd := [name for name, value in asked.items() if value]:
        raise UnsupportedModel(f"{odd[0]} is for transformers models: {model.name} is {GGUF}")
    try:
        tensors.library()  # before the file is downloaded
    except ImportError as error:
        raise resolve.needs(model.name, GGUF, error) from error
    if options.prove and not resolve.has_torch():
        raise resolve.needs(model.name, CHECKPOINT, TO_PROVE)
    file = gguf.opened(model.fetch() / str(model.file))
    own = gguf.precision_of(file)
    precision = options.precision or own or PRECISION
    _check_precision(precision)

    def load(budget: Budget) -> Origin:
        shapes = [("F32", held.shape) for held in file.tensors.values()]
        budget.settle(requirements.of_shapes(shapes), may_stay=False)
        return proved.Proved(file) if options.prove else build_origin.Built(gguf.of_file(file))

    held = options.precision is None and own is not None
    return Opening(file.path.stem, "fp32", precision, precision, not options.prove, load, held)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _original(model: object, options: ExportOptions, budget: Budget) -> Origin:
    """A transformers model, by name or as it is.

    Raises:
        ModelError: there is no torch or no transformers here.
    """
    try:
        from transformers import PreTrainedModel

        from fastgen.export.torch_model import original, source
    except ImportError as error:
        name = model.name if isinstance(model, Resolved) else model
        raise resolve.needs(name, CHECKPOINT, error) from error
    if isinstance(model, Resolved):
        return original.Original(_loaded(model, options, budget))
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            "model must be a hub id, a directory or a transformers model, "
            f"got {type(model).__name__}"
        )
    if options.adapter is not None:
        raise ValueError("adapter goes with a model's name: a model object can be merged by peft")
    budget.settle(requirements.of_model(model, is_mapped=True), may_stay=False)
    return original.Original(source.of_object(model, options.tokenizer))


def _loaded(model: Resolved, options: ExportOptions, budget: Budget) -> Source:
    """A transformers model by its name, its weights where there is space for them."""
    from fastgen.export.torch_model import source
    from fastgen.export.trace import stored

    loaded = source.load(model.fetch(), options.adapter, budget.in_own_types)
    if budget.needs is None:
        budget.settle(requirements.of_model(loaded.model, is_mapped=False), may_stay=False)
    if budget.spills:
        budget.spilled = stored.spill(loaded.model, bundle.parent(budget.out))
    return loaded


def _of_tensors(model: Resolved, options: ExportOptions, runs: bool, budget: Budget) -> Origin:
    """A checkpoint whose family is known; with the original beside it, where that runs."""
    directory = model.fetch()
    if runs:
        from fastgen.export.build.proved import Proved

        may_trace = options.build is None and not options.prove
        return Proved(_loaded(model, options, budget), directory, may_trace)
    parts = build_origin.of_directory(directory)
    shapes = [("F32", tensor.shape) for tensor in parts.weights.values()]  # cast as they are read
    budget.settle(requirements.of_shapes(shapes), may_stay=False)
    return build_origin.Built(parts)


def _is_built(model: object, options: ExportOptions) -> bool:
    """True where the graph is made of a checkpoint's tensors, and not traced: where its family is
    known, for that takes a fraction of a second, and a trace half a minute (see bench/README.md).

    Raises:
        ModelError: there is no torch, and what it says cannot be built; or nothing is to be done.
        UnsupportedModel: it cannot be built, which was asked for, or nothing reads its weights.
    """
    name = model.name if isinstance(model, Resolved) else type(model).__name__
    has_torch = resolve.has_torch()
    if options.prove and not has_torch:
        raise resolve.needs(name, CHECKPOINT, TO_PROVE)
    if isinstance(model, Resolved) and model.kind == FASTGEN:
        raise ModelError(f"{name} is a fastgen model already: there is nothing to export")
    if options.build is False and not options.prove:
        return False
    try:
        why = _unbuildable(model, options)
    except quantised.Unreadable as error:
        raise UnsupportedModel(f"{name} cannot be exported: {error}") from error
    if why is None:
        return True
    if options.build or options.prove:
        raise UnsupportedModel(f"{name} cannot be built: {why}")
    if not has_torch:
        raise resolve.needs(name, CHECKPOINT, why)
    return False


def _original_runs(options: ExportOptions) -> bool:
    """True if a graph that is built is proved by its original: where torch is, unless `build` says
    that it is not wanted.
    """
    return options.prove or (options.build is None and resolve.has_torch())


def _unbuildable(model: object, options: ExportOptions) -> str | None:
    """The reason why a model cannot be built; None where it can."""
    if not isinstance(model, Resolved):
        return "it is no checkpoint's directory or hub id"
    if options.adapter is not None:
        return "an adapter has to be merged first"
    return build_origin.refused(model.described(), model.files)
