"""From a name to a model directory: on disk, on the hub, in the cache, or the embedded one.

Whatever is written is written beside its place and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgen import extras, swap
from fastgen.model import INFO, ModelError, ModelInfo

DEMO = Path(__file__).parent / "demo"
PRECISION = "int8"  # of an export where none is asked for
CACHE_PRECISION = "fp32"  # the same for keys and values

# What a transformers repository holds that an export does not read.
NOT_READ = [
    "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite", "coreml/*", "onnx/*",
    "original/*",
]  # fmt: skip
PICKLES = ["*.bin", "*.pt", "*.pth"]  # the same weights again where there are safetensors

# Errors of huggingface_hub by their names, of which not every version has all.
REASONS = {
    "GatedRepoError": "it is gated: accept its terms on the hub and log in with `hf auth login`",
    "RepositoryNotFoundError": "there is no such repository, or it is private",
    "RevisionNotFoundError": "it has no revision {revision}",
    "IncompleteSnapshotError": "the hub cannot be reached, and only a part of it is in the cache",
    "LocalEntryNotFoundError": "the hub cannot be reached, and it is not in the cache",
}


def directory(name_or_path: str | os.PathLike[str] | None) -> Path:
    """The model directory behind a name: None is the demo model; a path; a hub repository.

    Raises:
        ModelError: it does not exist, or is not a fastgen directory.
    """
    if name_or_path is None:
        return DEMO
    if _is_here(name_or_path):
        return Path(name_or_path)
    # A repository that is not ours is not worth its weights: look for the description first.
    if not (snapshot(str(name_or_path), only=[INFO, "config.json"]) / INFO).is_file():
        raise ModelError(
            f"the hub repository {name_or_path} holds no fastgen model ({INFO}); for a "
            "transformers model use CausalLM.from_pretrained, or `fastgen export`"
        )
    return snapshot(str(name_or_path))


def exported(
    name_or_path: str | os.PathLike[str],
    precision: str | None,
    cache_precision: str | None,
    revision: str | None,
) -> Path:
    """A fastgen directory for any model: itself, or its export in the cache, made if need be.

    Args:
        precision, cache_precision: None for any of a fastgen directory, for PRECISION and
            CACHE_PRECISION of an export.

    Raises:
        ModelError: there is no such model, or it is one of another precision.
    """
    import hashlib

    if _is_here(name_or_path):
        source = Path(name_or_path)
        if not source.is_dir():
            raise ModelError(f"{source} is not a directory, nor a hub id")
        key = str(source.resolve()) + _fingerprint(source)
    else:
        source = transformers_snapshot(str(name_or_path), revision)
        key = str(name_or_path) + source.name
        if (source / INFO).is_file():
            source = snapshot(str(name_or_path), revision)
    if (source / INFO).is_file():
        return _of_precision(source, precision, cache_precision)
    wanted, kept = precision or PRECISION, cache_precision or CACHE_PRECISION
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    name = re.sub(r"[^\w.-]+", "--", str(name_or_path).strip("/"))[-60:]
    out = cache_directory() / f"{name}-{kind(wanted, kept)}-{digest}"
    if not (out / INFO).is_file():
        with _locked(out.with_name(out.name + ".lock")):
            if not (out / INFO).is_file():  # another process may have made it meanwhile
                _export(source, out, wanted, kept)
    return out


def kind(precision: str, cache_precision: str) -> str:
    """What an export's directory is called after: "int8", or "int8-kv-int8" for the cache too."""
    return precision if cache_precision == CACHE_PRECISION else f"{precision}-kv-{cache_precision}"


def transformers_snapshot(repository: str, revision: str | None = None) -> Path:
    """Download (or find in the hub's own cache) what an export reads of a repository.

    Raises:
        ModelError: it cannot be reached or does not exist.
    """
    found = snapshot(repository, revision, ignore=NOT_READ + PICKLES)
    if any(found.glob("*.safetensors")) or (found / INFO).is_file():
        return found
    return snapshot(repository, revision, ignore=NOT_READ)


def snapshot(
    repository: str,
    revision: str | None = None,
    *,
    only: list[str] | None = None,
    ignore: list[str] | None = None,
) -> Path:
    """Download (or find in the hub's own cache) a repository, with its progress bars.

    Args:
        repository: its id.
        revision: a branch, tag or commit; None for the default branch.
        only, ignore: patterns of files.

    Raises:
        ModelError: it cannot be reached or does not exist.
    """
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=only, ignore_patterns=ignore
            )
        )
    except Exception as error:  # of huggingface_hub, of the system, or of whatever speaks HTTP
        raise ModelError(
            f"{repository} is neither a directory here nor a repository that can be had from the "
            f"hub: {_reason(error, revision)}"
        ) from error


def _reason(error: Exception, revision: str | None) -> str:
    """What went wrong with the hub, in one line."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    for name, reason in REASONS.items():
        if name in kinds:
            return reason.format(revision=repr(revision))
    return (str(error).strip() or repr(error)).splitlines()[0]


def cache_directory() -> Path:
    """Where exports of `from_pretrained` are kept: FASTGEN_CACHE, or ~/.cache/fastgen."""
    chosen = os.environ.get("FASTGEN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fastgen"


def _is_here(name: str | os.PathLike[str]) -> bool:
    """Whether a name is a path. What a killed export of that path left is put back first."""
    return Path(name).exists() or swap.restore(Path(name)) or not _is_hub_id(name)


def _is_hub_id(name: str | os.PathLike[str]) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))) and not str(name).startswith(".")


def _fingerprint(source: Path) -> str:
    """Names, sizes and times of a directory's files: an edited model is another model."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(source.iterdir())]
    return repr(stats)


def _of_precision(source: Path, precision: str | None, cache_precision: str | None) -> Path:
    info = ModelInfo.read(source)
    if precision is not None and precision != info.precision:
        raise ModelError(f"{source} was exported as {info.precision}, not {precision}")
    if cache_precision is not None and cache_precision != info.cache_precision:
        raise ModelError(
            f"{source} was exported with keys and values in {info.cache_precision}, "
            f"not {cache_precision}"
        )
    return source


def _export(source: Path, out: Path, precision: str, cache_precision: str) -> None:
    try:
        from fastgen.export import pipeline
    except ImportError as error:
        raise ModelError(
            f"{source} is a transformers model; exporting it needs torch and transformers: "
            f"{extras.install('export')} ({error})"
        ) from error
    pipeline.export(source, out, precision=precision, cache_precision=cache_precision)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which goes when the process does; others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        release = _lock(file)
        try:
            yield
        finally:
            release()


def _lock(file: Any) -> Any:
    if os.name == "nt":
        import msvcrt

        def seek_and(mode: int) -> None:
            file.seek(0)
            msvcrt.locking(file.fileno(), mode, 1)  # type: ignore[attr-defined,unused-ignore]

        seek_and(msvcrt.LK_LOCK)  # type: ignore[attr-defined,unused-ignore]
        return lambda: seek_and(msvcrt.LK_UNLCK)  # type: ignore[attr-defined,unused-ignore]
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    return lambda: fcntl.flock(file, fcntl.LOCK_UN)
