"""The model directory: written beside its place, renamed when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from fastgen.export import hooks, sparse
from fastgen.export.graph import Kept
from fastgen.export.source import Source

import fastgen
from fastgen import jsonfile, swap
from fastgen.model import FORMAT, INFO, ModelError, digest

OF_THIS_MACHINE = {"name_or_path", "is_local", "local_files_only", "vocab_file", "tokenizer_file"}


@contextmanager
def directory(out: Path, force: bool) -> Iterator[Path]:
    """A temporary neighbour of `out` that takes its place at the end, or leaves nothing.

    A process that is killed cannot clean up: the next one that writes `out` does it.

    Raises:
        ModelError: see `check_free`.
    """
    place = check_free(out, force)
    made = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    swap.remove_stale(place)
    temporary = swap.neighbour(place, "new")
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        with swap.claimed(temporary):
            yield temporary
            _check_replaceable(place, force)  # it may have come meanwhile
            if place.exists():
                swap.replace(temporary, place)
            else:
                temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds something by now
                parent.rmdir()


def check_free(out: Path, force: bool) -> Path:
    """The directory that is written, which is a link's target; asked before any work is done.

    Raises:
        ModelError: `out` exists and `force` is False, or is not ours to replace, or its place
            cannot be written.
    """
    swap.restore(out)
    place = Path(os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out))
    if os.path.islink(out) and not place.exists():
        raise ModelError(f"{out} is a link to {place}, which does not exist: remove the link")
    _check_replaceable(place, force)
    parent = next(parent for parent in place.parents if os.path.lexists(parent))
    try:
        swap.neighbour(place, "new", parent).rmdir()
    except OSError as error:
        raise ModelError(f"{out} cannot be written, {parent}: {error.strerror}") from error
    return place


def _check_replaceable(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ModelError(f"{out} exists and is not a directory: choose another name")
    if os.path.ismount(out):
        raise ModelError(f"{out} is a mount point: choose a directory in it")
    if not any(out.iterdir()):
        return
    if not force:
        raise ModelError(f"{out} exists: choose another name, or replace it with --force")
    if not (out / INFO).is_file():
        raise ModelError(f"{out} is not a fastgen model directory: --force does not replace it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def describe(source: Source, kept: Kept, precision: str) -> dict[str, Any]:
    """The content of `fastgen.json`, but for the files' sizes and digests."""
    config = source.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    return {
        "format": FORMAT,
        "fastgen": fastgen.__version__,
        "precision": precision,
        "model_type": source.model.config.model_type,
        "name": source.name,
        "parameters": sum(p.numel() for p in source.model.parameters()),
        "vocab_size": source.model.get_output_embeddings().weight.shape[0],
        "max_length": limit,
        "hard_limit": sparse.limit(source.model) is not None
        or (limit is not None and not _computes(source, limit)),
        "layers": [[layer.kv_heads, layer.head_dim] for layer in kept.layers],
        "states": [list(shape) for shape in kept.states.values()],
        "cache_dtype": "float32",
    }


def _computes(source: Source, position: int) -> bool:
    """Whether the model can compute a token at `position`, the first beyond its limit."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    try:
        with torch.no_grad(), hooks.positions(source.model, ids + position) as given:
            source.model(input_ids=ids, **given)
    except (IndexError, RuntimeError):
        return False
    return True


def write_configuration(source: Source, to: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    config = json.loads(source.model.config.to_json_string(use_diff=False))
    # Where the model came from is in `fastgen.json`, as a name; here it may be a path.
    config.pop("_name_or_path", None)
    write_json(to / "config.json", config)
    defaults = source.model.generation_config.to_dict()
    defaults = {name: value for name, value in defaults.items() if value is not None}
    write_json(to / "generation_config.json", defaults)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(to)
        path = to / "tokenizer_config.json"
        kept = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {k: v for k, v in kept.items() if k not in OF_THIS_MACHINE})


def seal(to: Path, description: dict[str, Any]) -> None:
    """Write `fastgen.json`: from now on the directory is a model."""
    found = [p for p in sorted(to.iterdir()) if p.is_file() and p.name != INFO]
    files = {p.name: p.stat().st_size for p in found}
    write_json(to / INFO, description | {"files": files})


def sign(to: Path) -> None:
    """Put the files' digests into `fastgen.json`: once, at the end, since it reads all weights."""
    said = jsonfile.read(to / INFO)
    files = {
        name: {"bytes": (to / name).stat().st_size, "sha256": digest(to / name)}
        for name in said["files"]
    }
    write_json(to / INFO, said | {"files": files})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
