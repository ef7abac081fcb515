"""The model directory: written beside its place, renamed when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from fastgen.errors import ModelError
from fastgen.store import files
from fastgen.store.model_info import INFO, ModelInfo, digest


@contextmanager
def directory(out: Path, force: bool) -> Iterator[Path]:
    """A temporary neighbour of `out` that takes its place at the end, or leaves nothing.

    Raises:
        ModelError: see `check_free`.
    """
    target = check_free(out, force)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with files.atomic_directory(target) as temporary:
            yield temporary
            _check_replaceable(target, force)  # it may have come meanwhile
    finally:
        for parent in new_parents:
            with suppress(OSError):  # it holds something by now
                parent.rmdir()


def check_free(out: Path, force: bool) -> Path:
    """The directory that is written, which is a link's target; asked before any work is done.

    Raises:
        ModelError: `out` exists and `force` is False, or is not ours to replace, or its place
            cannot be written.
    """
    files.restore(out)
    target = Path(os.path.realpath(out) if os.path.islink(out) else os.path.abspath(out))
    if os.path.islink(out) and not target.exists():
        raise ModelError(f"{out} is a link to {target}, which does not exist: remove the link")
    _check_replaceable(target, force)
    parent = _above(target)
    try:
        files.temporary_neighbour(target, "new", parent).rmdir()
    except OSError as error:
        raise ModelError(f"{out} cannot be written, {parent}: {error.strerror}") from error
    return target


def _above(path: Path) -> Path:
    return next(parent for parent in path.parents if os.path.lexists(parent))


def parent(out: Path) -> Path:
    """The directory that is there already in which `out` is made."""
    return _above(Path(os.path.realpath(out)))


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


def seal(to: Path, info: ModelInfo) -> None:
    """Write `fastgen.json` with the files that are there: from now on the directory is a model."""
    paths = [path for path in sorted(to.iterdir()) if path.is_file() and path.name != INFO]
    sizes = {path.name: path.stat().st_size for path in paths}
    replace(info, files=sizes, digests={}).write(to)


def sign(to: Path) -> None:
    """Put the files' digests into `fastgen.json`: once, at the end, since it reads all weights."""
    info = ModelInfo.parse(to)
    sizes = {name: (to / name).stat().st_size for name in info.files}
    replace(info, files=sizes, digests={name: digest(to / name) for name in sizes}).write(to)
