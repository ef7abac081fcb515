"""From a name to a model directory: on disk, on the hub, in the cache, or the embedded one.

Whatever is written is written beside its place and renamed when it is complete.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastgen.errors import ModelError
from fastgen.store import files, onnx_folders
from fastgen.store.model_info import INFO, PRECISIONS, ModelInfo
from fastgen.system import extras

DEMO = Path(__file__).parents[1] / "demo"
PRECISION = "int8"  # of an export where none is asked for
CACHE_PRECISION = "fp32"  # the same for keys and values

# What a transformers repository holds that an export does not read.
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
        name_or_path: a fastgen directory, an ONNX folder or a transformers model, each here or on
            the hub.
        precision, cache_precision: None for any of a fastgen directory, for PRECISION and
            CACHE_PRECISION of a transformers model's export, for the folder's own of an ONNX
            folder's.
        revision: a branch, tag or commit of a hub repository.

    Raises:
        ModelError: there is no such model, or it is one of another precision.
    """
    import hashlib

    here, name = _is_here(name_or_path), str(name_or_path)
    place = Path(name_or_path)
    if here and not place.is_dir():
        raise ModelError(f"{name} is not a directory, nor a hub id")
    names = onnx_folders.names_in(place) if here else listed(name, revision)
    if INFO in names:
        found = place if here else snapshot(name, revision)
        return _of_precision(found, precision, cache_precision)
    foreign = is_onnx(names, precision)
    needed = _needed(name, names, precision) if foreign else []
    if not foreign and not any(described in names for described in DESCRIBED):
        raise ModelError(
            f"{name} is not a fastgen model directory: it has no {INFO}; nor an ONNX folder, nor a "
            f"transformers model (it has no {DESCRIBED[0]})"
        )
    if here:
        key = str(place.resolve()) + _fingerprint(place, names)
    else:  # its commit alone: what is in the cache needs none of its files
        key = name + _commit(snapshot(name, revision, only=[*DESCRIBED]))
    wanted = precision or (onnx_folders.usual(names) if foreign else PRECISION)
    kept = cache_precision or CACHE_PRECISION
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    called = re.sub(r"[^\w.-]+", "--", name.strip("/"))[-60:]
    out = cache_directory() / f"{called}-{kind(wanted or 'onnx', kept)}-{digest}"
    if not (out / INFO).is_file():
        with files.locked(out.with_name(out.name + ".lock")):
            if not (out / INFO).is_file():  # another process may have made it meanwhile
                pipeline = _pipeline(name, foreign)
                if not foreign and not has_torch():
                    described = place if here else snapshot(name, revision, only=[*DESCRIBED])
                    pipeline.check_buildable(name, described, names)
                if not here and foreign:
                    place = _onnx_snapshot(name, needed, revision)
                elif not here:
                    place = transformers_snapshot(name, revision)
                pipeline.export(place, out, precision=wanted, cache_precision=kept)
    return out


def _pipeline(name: str, foreign: bool) -> Any:
    """The export.

    Raises:
        ModelError: what it needs is not installed.
    """
    try:
        from fastgen.export import pipeline
    except ImportError as error:
        raise needs(name, foreign, error) from error
    return pipeline


def needs(name: object, foreign: bool, error: object) -> ModelError:
    """What to install for a model that has to be exported first."""
    if foreign:
        return ModelError(
            f"{name} is an ONNX folder; opening it needs onnx and onnx_ir: "
            f"{extras.install('onnx')} ({error})"
        )
    return ModelError(
        f"{name} is a transformers model; exporting it needs torch and transformers: "
        f"{extras.install('export')}; where its family can be built, onnx and onnx_ir alone: "
        f"{extras.install('onnx')} ({error})"
    )


def is_onnx(names: Iterable[str], precision: str | None) -> bool:
    """Whether files are to be opened as an ONNX folder.

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
    """Whether torch and transformers are installed."""
    try:
        return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    except ImportError:
        return False


def listed(repository: str, revision: str | None = None) -> list[str]:
    """The names of a repository's files; of those in the hub's own cache where it is away.

    Raises:
        ModelError: it cannot be reached and is not in the cache, or does not exist.
    """
    import huggingface_hub

    try:
        # One request, which fails at once; `list_repo_files` tries again for half a minute.
        said = huggingface_hub.model_info(repository, revision=revision or "main")
        return [one.rfilename for one in said.siblings or ()]
    except Exception as error:  # of huggingface_hub, of the system, or of whatever speaks HTTP
        if _has_answered(error):
            raise _unknown(repository, error, revision) from error
        return _names_below(snapshot(repository, revision, only=[INFO, *DESCRIBED], here=True))


def _names_below(place: Path) -> list[str]:
    return [p.relative_to(place).as_posix() for p in sorted(place.rglob("*")) if p.is_file()]


def onnx_folder(repository: str, precision: str | None, revision: str | None) -> Path | None:
    """What an ONNX folder on the hub needs for a precision, here; None for what is no such folder.

    Raises:
        ModelError: it cannot be reached or does not exist, or is no decoder, or not of that
            precision.
    """
    names = listed(repository, revision)
    if INFO in names or not is_onnx(names, precision):
        return None
    return _onnx_snapshot(repository, _needed(repository, names, precision), revision)


def _needed(name: str, names: Sequence[str], precision: str | None) -> list[str]:
    try:
        return onnx_folders.wanted(names, precision)
    except ModelError as error:
        raise ModelError(f"{name} cannot be opened: {error}") from error


def _onnx_snapshot(repository: str, needed: Sequence[str], revision: str | None) -> Path:
    place = onnx_folders.place_of(needed) or ""
    found = snapshot(repository, revision, only=[glob.escape(name) for name in needed])
    return found if place in ("", "onnx") else found / place


def _commit(source: Path) -> str:
    """The commit that a snapshot is of, and the folder in it."""
    parts = source.parts
    return "/".join(parts[parts.index("snapshots") + 1 :]) if "snapshots" in parts else source.name


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
    """Whether the hub itself said no: asking again, or looking into the cache, changes nothing."""
    return bool({kind.__name__ for kind in type(error).__mro__} & ANSWERS)


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
    return Path(name).exists() or files.restore(Path(name)) or not is_id(name)


def is_id(name: str | os.PathLike[str]) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))) and not str(name).startswith(".")


def _fingerprint(source: Path, names: Iterable[str]) -> str:
    """Names, sizes and times of a directory's files: an edited model is another model."""
    stats = [(name, (source / name).stat()) for name in sorted(names)]
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


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
