"""Repositories of the hub: their files' names, and the files themselves."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fastgen.errors import ModelError
from fastgen.store import onnx_folders
from fastgen.store.model_info import INFO

DEMO = Path(__file__).parents[1] / "demo"

# Files of a transformers repository that an export does not read.
NOT_READ = [
    "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "coreml/*", "onnx/*",
    "original/*",
]  # fmt: skip
# What says that there is a model of transformers, or an adapter of one.
DESCRIBED = ("config.json", "adapter_config.json")
PICKLES = ["*.bin", "*.pt", "*.pth"]  # the same weights again where there are safetensors

# Errors of huggingface_hub by their names, of which not every version has all.
REASONS = {
    "GatedRepoError": "it is gated: accept its terms on the hub and log in with `hf auth login`",
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "RevisionNotFoundError": "it has no revision {revision}",
    "IncompleteSnapshotError": "the hub cannot be reached, and only a part of it is in the cache",
    "LocalEntryNotFoundError": "the hub cannot be reached, and it is not in the cache",
}
ANSWERS = {"GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError"}


def listed(repository: str, revision: str | None = None) -> list[str]:
    """The names of a repository's files; of those in the hub's own cache where it is away.

    Raises:
        ModelError: it cannot be reached and is not in the cache, or does not exist.
    """
    import huggingface_hub

    try:
        # One request, which fails at once; `list_repo_files` tries again for half a minute.
        repository_info = huggingface_hub.model_info(repository, revision=revision or "main")
        return [file.rfilename for file in repository_info.siblings or ()]
    except Exception as error:  # of huggingface_hub, of the system, or of whatever speaks HTTP
        if _has_answered(error):
            raise _unknown(repository, error, revision) from error
        return _names_below(snapshot(repository, revision, only=[INFO, *DESCRIBED], here=True))


def _names_below(directory: Path) -> list[str]:
    return [
        p.relative_to(directory).as_posix() for p in sorted(directory.rglob("*")) if p.is_file()
    ]


def onnx_snapshot(repository: str, needed: Sequence[str], revision: str | None) -> Path:
    """Download (or find in the hub's own cache) files of an ONNX folder: where its graph lies.

    Raises:
        ModelError: it cannot be reached or does not exist.
    """
    folder = onnx_folders.place_of(needed) or ""
    directory = snapshot(repository, revision, only=[glob.escape(name) for name in needed])
    return directory if folder in ("", "onnx") else directory / folder


def commit(source: Path) -> str:
    """The commit that a snapshot is of, and the folder in it."""
    parts = source.parts
    return "/".join(parts[parts.index("snapshots") + 1 :]) if "snapshots" in parts else source.name


def transformers_snapshot(repository: str, revision: str | None = None) -> Path:
    """Download (or find in the hub's own cache) what an export reads of a repository.

    Raises:
        ModelError: it cannot be reached or does not exist.
    """
    directory = snapshot(repository, revision, ignore=NOT_READ + PICKLES)
    if any(directory.glob("*.safetensors")) or (directory / INFO).is_file():
        return directory
    return snapshot(repository, revision, ignore=NOT_READ)


def snapshot(
    repository: str,
    revision: str | None = None,
    *,
    only: list[str] | None = None,
    ignore: list[str] | None = None,
    here: bool = False,
) -> Path:
    """Download (or find in the hub's own cache) a repository, with its progress bars.

    Args:
        repository: its id.
        revision: a branch, tag or commit; None for the default branch.
        only, ignore: patterns of files.
        here: whether to look into the hub's own cache alone.

    Raises:
        ModelError: it cannot be reached or does not exist.
    """
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=only,
                ignore_patterns=ignore,
                local_files_only=here,
            )
        )
    except Exception as error:  # of huggingface_hub, of the system, or of whatever speaks HTTP
        raise _unknown(repository, error, revision) from error


def _unknown(repository: str, error: Exception, revision: str | None) -> ModelError:
    return ModelError(
        f"{repository} is neither a directory here nor a repository that can be had from the "
        f"hub: {_reason(error, revision)}"
    )


def _has_answered(error: Exception) -> bool:
    """True if the hub itself said no: asking again, or looking into the cache, changes nothing."""
    return bool({kind.__name__ for kind in type(error).__mro__} & ANSWERS)


def _reason(error: Exception, revision: str | None) -> str:
    """An error of the hub in one line."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    for name, reason in REASONS.items():
        if name in kinds:
            return reason.format(revision=repr(revision))
    return (str(error).strip() or repr(error)).splitlines()[0]


def is_id(name: str | os.PathLike[str]) -> bool:
    """True for a name that a repository can have."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))) and not str(name).startswith(".")
