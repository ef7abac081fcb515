"""An actor's node: the model's directory, fetched once, and its threads."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from fastgen import first_use
from fastgen.engine.schedule import SHARE
from fastgen.errors import ModelError
from fastgen.store import files
from fastgen.store.model_info import INFO
from fastgen.system import extras
from fastgen.system.cpu import memory_bytes


def directory(model: str | os.PathLike[str] | None) -> Path:
    """The directory of a model on this node. What is elsewhere is fetched once; others wait.

    Args:
        model: a directory, a hub id, or the URI of a directory in an object store or another file
            system that pyarrow knows ("s3://bucket/model"); None for the demo model.

    Raises:
        ModelError: it cannot be had, or holds no model.
    """
    if model is None or ("://" not in str(model) and Path(model).exists()):
        return first_use.directory(model)
    name = re.sub(r"[^\w.-]+", "--", str(model).strip("/"))[-60:]
    key = hashlib.sha256(str(model).encode()).hexdigest()[:12]
    target = files.cache_directory() / "fetched" / f"{name}-{key}"
    with files.locked(target.with_name(target.name + ".lock")):
        return _copied(str(model), target) if "://" in str(model) else first_use.directory(model)


def _copied(uri: str, target: Path) -> Path:
    """Copy a directory to `target`, unless it is there as it was: `fastgen.json` says so."""
    try:
        from pyarrow import fs
    except ImportError as error:
        raise ModelError(f"{uri} needs pyarrow: {extras.install('batch')}") from error
    try:
        system, path = fs.FileSystem.from_uri(uri)
        with system.open_input_stream(f"{path}/{INFO}") as file:
            info = file.read()
        if (target / INFO).is_file() and (target / INFO).read_bytes() == info:
            return target
        with files.atomic_directory(target) as new:
            fs.copy_files(path, str(new), source_filesystem=system)
    except (OSError, ValueError) as error:  # of pyarrow's: of the network, the store, the name
        raise ModelError(f"{uri} cannot be had: {error}") from error
    return target


def threads() -> int | None:
    """The threads that Ray gives this actor: its CPUs. None outside of one."""
    cpus = _cpus()
    return None if cpus is None else max(1, int(cpus))


def memory() -> int | None:
    """The bytes that calls may come to hold in this actor: its CPUs' part of the machine's share.

    None outside of an actor, for all of that share.
    """
    cpus, most = _cpus(), memory_bytes()
    if cpus is None or most is None:
        return None
    return int(SHARE * most * min(1.0, cpus / (os.cpu_count() or 1)))


def _cpus() -> float | None:
    """The CPUs that Ray gives this actor; None outside of one."""
    import sys

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    if context.get_actor_id() is None:  # the program that has started Ray
        return None
    cpus = context.get_assigned_resources().get("CPU")
    return None if cpus is None else float(cpus)
