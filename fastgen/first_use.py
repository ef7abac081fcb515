"""The model directory behind a name: as it is, or exported into the cache on first use."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from fastgen.errors import ModelError
from fastgen.store import files, onnx_folders
from fastgen.store.hub import DEMO
from fastgen.store.model_info import CACHE_PRECISION, INFO, PRECISION, ModelInfo, kind
from fastgen.store.resolve import FASTGEN, GGUF, ONNX_FOLDER, Resolved, needs, resolve


def directory(name_or_path: str | os.PathLike[str] | None) -> Path:
    """The model directory behind a name, made on first use: None is the demo model.

    Raises:
        ModelError: see `exported`.
    """
    return DEMO if name_or_path is None else exported(name_or_path, None, None, None)


def exported(
    name_or_path: str | os.PathLike[str],
    precision: str | None,
    cache_precision: str | None,
    revision: str | None,
) -> Path:
    """A fastgen directory for any model: itself, or its export in the cache, made if need be.

    Args:
        name_or_path: a fastgen directory, an ONNX folder, a transformers model or a GGUF file,
            each here or on the hub.
        precision, cache_precision: None for any of a fastgen directory, for PRECISION and
            CACHE_PRECISION of a transformers model's export, for its own of an ONNX folder's or a
            GGUF file's.
        revision: a branch, tag or commit of a hub repository.

    Raises:
        ModelError: there is no such model, or it is one of another precision, or what its export
            needs is not installed.
    """
    model = resolve(name_or_path, precision, revision)
    if model.kind == FASTGEN:
        return _of_precision(model.fetch(), precision, cache_precision)
    if model.kind == ONNX_FOLDER:
        model.needed()  # or there is none of that precision
        wanted = precision or onnx_folders.usual(model.files)
    elif model.kind == GGUF:
        wanted = precision  # or the file's own
    else:
        wanted = precision or PRECISION
    kept = cache_precision or CACHE_PRECISION
    out = _place(model, kind(wanted or ("gguf" if model.kind == GGUF else "onnx"), kept))
    if not (out / INFO).is_file():
        with files.locked(out.with_name(out.name + ".lock")):
            if not (out / INFO).is_file():  # another process may have made it meanwhile
                _pipeline(model).export(model, out, precision=wanted, cache_precision=kept)
    return out


def _place(model: Resolved, precisions: str) -> Path:
    """The directory in the cache that a model is exported to."""
    digest = hashlib.sha256(model.version.encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "--", model.name.strip("/"))[-60:]
    return files.cache_directory() / f"{name}-{precisions}-{digest}"


def _pipeline(model: Resolved) -> Any:
    """The export.

    Raises:
        ModelError: what it needs is not installed.
    """
    try:
        from fastgen.export import pipeline
    except ImportError as error:
        raise needs(model.name, model.kind, error) from error
    return pipeline


def _of_precision(source: Path, precision: str | None, cache_precision: str | None) -> Path:
    if precision is None and cache_precision is None:
        return source  # any will do, and whoever opens it reads what it says
    info = ModelInfo.read(source)
    if precision is not None and precision != info.precision:
        raise ModelError(f"{source} was exported as {info.precision}, not {precision}")
    if cache_precision is not None and cache_precision != info.cache_precision:
        raise ModelError(
            f"{source} was exported with keys and values in {info.cache_precision}, "
            f"not {cache_precision}"
        )
    return source
