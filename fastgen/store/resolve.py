"""The model that a name stands for: a fastgen directory, an ONNX folder or a checkpoint."""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import ModelError
from fastgen.store import files, hub, jsonfile, onnx_folders
from fastgen.store.model_info import CONFIG, INFO, PRECISIONS
from fastgen.system import extras

# The kinds of a model.
FASTGEN = "a fastgen model"
ONNX_FOLDER = "an ONNX folder"
CHECKPOINT = "a transformers model"
GGUF = "a GGUF file"

SUFFIX = ".gguf"


@dataclass(frozen=True)
class Resolved:
    """A model by its name.

    Attributes:
        name: as it was given.
        kind: FASTGEN, ONNX_FOLDER, CHECKPOINT (an adapter too) or GGUF.
        files: the names of its files, two levels deep.
        directory: that holds them; None for a repository on the hub.
        revision: of the repository.
        precision: that was asked for; None for any.
        file: the name of a GGUF file among `files`; None for other kinds.
    """

    name: str
    kind: str
    files: Sequence[str]
    directory: Path | None
    revision: str | None
    precision: str | None
    file: str | None = None

    @property
    def repository(self) -> str:
        """The id on the hub: the name without a file in it."""
        return self.name.partition(":")[0]

    def fetch(self) -> Path:
        """The directory with what is read of it, downloaded if need be.

        Raises:
            ModelError: it cannot be reached, or does not have the precision.
        """
        if self.directory is not None:
            return self.directory
        if self.kind == ONNX_FOLDER:
            return hub.onnx_snapshot(self.name, self.needed(), self.revision)
        if self.kind == CHECKPOINT:
            return hub.transformers_snapshot(self.name, self.revision)
        if self.file is not None:
            return hub.snapshot(self.repository, self.revision, only=[glob.escape(self.file)])
        return hub.snapshot(self.name, self.revision)

    def described(self) -> Path:
        """The directory with its config.json, of which no weights are downloaded."""
        if self.directory is not None:
            return self.directory
        return hub.snapshot(self.repository, self.revision, only=[*hub.DESCRIBED])

    def needed(self) -> list[str]:
        """The files of an ONNX folder that the precision needs.

        Raises:
            ModelError: it does not have that precision, or is no decoder.
        """
        try:
            return onnx_folders.wanted(self.files, self.precision)
        except ModelError as error:
            raise ModelError(f"{self.name} cannot be opened: {error}") from error

    @property
    def version(self) -> str:
        """A text that changes with the model: an edited one is another model."""
        if self.directory is None:  # the commit alone: what is in the cache needs none of its files
            described = self.described() if self.file is None else self.fetch()
            return self.name + hub.commit(described)
        names = self.files if self.file is None else [self.file]
        stats = [(name, (self.directory / name).stat()) for name in sorted(names)]
        known = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return f"{self.directory.resolve()}{known!r}"


def resolve(
    name: str | os.PathLike[str],
    precision: str | None = None,
    revision: str | None = None,
    *,
    adapted: bool = False,
) -> Resolved:
    """Find out which model a name stands for, by the names of its files alone.

    A killed export of a directory is put back first.

    Args:
        name: a directory, a hub id, or a GGUF file (on the hub "id:file.gguf").
        precision: that is asked for; None for any.
        revision: a branch, tag or commit of a hub repository.
        adapted: an adapter goes with it, which only weights for torch can take.

    Raises:
        ModelError: there is no such model.
    """
    directory = Path(name)
    if directory.suffix == SUFFIX and directory.is_file():
        return _gguf(str(name), [directory.name], directory.name, directory.parent, precision)
    repository, _, file = str(name).partition(":")
    if file.endswith(SUFFIX) and hub.is_id(repository) and not directory.exists():
        names = hub.listed(repository, revision)
        return _gguf(str(name), names, file, None, precision, revision)
    if directory.exists() or files.restore(directory) or not hub.is_id(name):
        return _named(str(name), directory, precision, None, adapted)
    return _named(str(name), None, precision, revision, adapted)


def _named(
    name: str, directory: Path | None, precision: str | None, revision: str | None, adapted: bool
) -> Resolved:
    if directory is not None:
        _check_directory(name, directory)
        names = onnx_folders.names_in(directory)
    else:
        names = hub.listed(name, revision)
    kind = _kind(name, names, precision, adapted)
    if kind == GGUF:
        file = next(name for name in names if name.endswith(SUFFIX))
        return _gguf(name, names, file, directory, precision, revision)
    return Resolved(name, kind, tuple(names), directory, revision, precision)


def _gguf(
    name: str,
    names: Sequence[str],
    file: str,
    directory: Path | None,
    precision: str | None,
    revision: str | None = None,
) -> Resolved:
    """A GGUF file in a directory or a repository.

    Raises:
        ModelError: it is not there.
    """
    if file not in names:
        there = [other for other in names if other.endswith(SUFFIX)]
        raise ModelError(
            f"{name} is not there: the repository has {jsonfile.some(there) or 'none'}"
        )
    return Resolved(name, GGUF, tuple(names), directory, revision, precision, file)


def _check_directory(name: str, directory: Path) -> None:
    if directory.is_dir():
        return
    if directory.exists():
        raise ModelError(f"{name} is not a directory, it is a file: expected one, or a hub id")
    raise ModelError(
        f"{name} is not a directory: there is no directory, nor a hub id, of that name"
    )


def _kind(name: str, names: Sequence[str], precision: str | None, adapted: bool) -> str:
    if INFO in names:
        return FASTGEN
    if not adapted and is_onnx(names, precision):
        return ONNX_FOLDER
    files = [one for one in names if one.endswith(SUFFIX)]
    if files and not onnx_folders.holds_torch(names):
        if len(files) > 1:
            raise ModelError(
                f"{name} has {len(files)} GGUF files: name one of {jsonfile.some(files)}, a path "
                f"to it or, on the hub, {name}:{files[0]}"
            )
        return GGUF
    if any(described in names for described in hub.DESCRIBED):
        return CHECKPOINT
    raise ModelError(
        f"{name} is not a fastgen model directory: it has no {INFO}; nor an ONNX folder; and it "
        f"is not a transformers model: it has no {CONFIG}"
    )


def is_onnx(names: Iterable[str], precision: str | None) -> bool:
    """True for files that are to be opened as an ONNX folder.

    Where weights for torch lie beside the graphs, and torch is here, they are the original:
    its own precisions are made of them, and those that only the folder has are the folder's.
    """
    names = list(names)
    if onnx_folders.place_of(names) is None:
        return False
    if not onnx_folders.holds_torch(names) or not has_torch():
        return True
    return precision is not None and precision not in PRECISIONS


def has_torch() -> bool:
    """True if torch and transformers are installed."""
    try:
        return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    except ImportError:
        return False


def needs(name: object, kind: str, error: object) -> ModelError:
    """The error that says what to install for a model that has to be exported first."""
    if kind == ONNX_FOLDER:
        return ModelError(
            f"{name} is an ONNX folder; opening it needs onnx and onnx_ir: "
            f"{extras.install('onnx')} ({error})"
        )
    if kind == GGUF:
        return ModelError(
            f"{name} is a GGUF file; opening it needs onnx, onnx_ir and gguf: "
            f"{extras.install('gguf')} ({error})"
        )
    return ModelError(
        f"{name} is a transformers model; exporting it needs torch and transformers: "
        f"{extras.install('export')}; where its family can be built, onnx and onnx_ir alone: "
        f"{extras.install('onnx')} ({error})"
    )
