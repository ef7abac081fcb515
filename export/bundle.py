"""The model directory: written beside its place, renamed when it is complete."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from fastgen.export.attention import Layer
from fastgen.export.source import Source

import fastgen
from fastgen.model import FORMAT, INFO, ModelError

try:
    import fcntl
except ImportError:  # Windows: what a killed export leaves stays
    fcntl = None  # type: ignore[assignment]

OF_THIS_MACHINE = {"name_or_path", "is_local", "local_files_only", "vocab_file", "tokenizer_file"}
STALE = 10.0  # seconds after which a temporary directory that nobody claims is removed


@contextmanager
def directory(out: Path, force: bool) -> Iterator[Path]:
    """A temporary neighbour of `out` that takes its place at the end, or leaves nothing.

    A process that is killed cannot clean up: the next one that writes `out` does it.

    Raises:
        ModelError: `out` exists and `force` is False, or is something that is not ours to replace.
    """
    out = Path(os.path.abspath(out))
    check_free(out, force)
    made = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.new.", dir=out.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        with _claimed(temporary):
            yield temporary
            _replace(temporary, out, force)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds something by now
                parent.rmdir()


@contextmanager
def _claimed(place: Path) -> Iterator[bool]:
    """Hold a lock on a directory, which goes when the process does.

    Yields whether we have it: False if another process holds it, or directories cannot be locked.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove_stale(out: Path) -> None:
    """Remove what exports of `out` left that were killed: nobody claims it, and it is not new."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(new|old)\.[a-z0-9_]{{8}}")
    for place in out.parent.iterdir():
        kind = pattern.fullmatch(place.name)
        if kind is None or not place.is_dir():
            continue
        if kind[1] == "old" and not out.exists():
            continue  # it holds the one model that is left
        with suppress(OSError):
            # Between being made and being claimed a directory looks abandoned.
            if time.time() - place.stat().st_mtime < STALE:
                continue
            with _claimed(place) as abandoned:
                if abandoned:
                    shutil.rmtree(place, ignore_errors=True)


def check_free(out: Path, force: bool) -> None:
    """Raise before any work is done if `out` cannot be written."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ModelError(f"{out} exists and is not a directory")
    if not any(out.iterdir()):
        return
    if not force:
        raise ModelError(f"{out} exists: choose another name, or replace it with --force")
    if not (out / INFO).is_file():
        raise ModelError(f"{out} is not a fastgen model directory: --force does not replace it")


def _replace(new: Path, out: Path, force: bool) -> None:
    check_free(out, force)  # it may have come meanwhile
    if not out.exists():
        new.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(old / "model")
    try:
        new.rename(out)
    except OSError:
        (old / "model").rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def describe(source: Source, layers: Sequence[Layer], precision: str) -> dict[str, Any]:
    """The content of `fastgen.json`, but for the files' sizes."""
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
        "hard_limit": limit is not None and not _computes(source, limit),
        "layers": [[layer.kv_heads, layer.head_dim] for layer in layers],
        "cache_dtype": "float32",
    }


def _computes(source: Source, position: int) -> bool:
    """Whether the model can compute a token at `position`, the first beyond its limit."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    try:
        with torch.no_grad():
            source.model(input_ids=ids, position_ids=torch.full_like(ids, position))
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
