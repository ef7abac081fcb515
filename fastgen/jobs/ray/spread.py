"""A job on a cluster: files that Ray Data reads, rows over actors, a directory of files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.jobs.ray.cluster import OfLines, RowActor
from fastgen.jobs.source import kind_of
from fastgen.store import files
from fastgen.system import extras

# What an actor's own errors end with, of those that a user can mend. Ray passes on their text.
TOLD = re.compile(r"^(?:\w+\.)*(?:ValueError|ModelError): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Spread:
    """Settings of a job on a cluster.

    Attributes:
        address: "local" for a cluster of its own on this machine, "auto" for the one that there
            is, or ray://HOST:PORT.
        actors: engines; None for one on each node.
        cpus: of each, which are its threads; None for those of a node but one.
        rows: that an actor takes at a time.
        ordered: whether the output has the input's order, file by file.
    """

    address: str
    actors: int | None = None
    cpus: float | None = None
    rows: int = 256
    ordered: bool = False


def run(
    spread: Spread,
    engine: type[RowActor],
    arguments: Mapping[str, Any],
    source: str,
    out: str,
    kind: str | None = None,
    restart: bool = False,
    quiet: bool = False,
) -> tuple[int, int]:
    """Do a job on Ray. The output appears when it is whole, where that is a local directory.

    An actor that dies is replaced, and what it had is done again: no row is lost, and none is
    there twice.

    Args:
        engine: `Generate` or `Score`, made with `arguments` in each actor.
        source: a file or directory, or its URI, as Ray Data takes them.
        out: a directory, or its URI, which gets JSON lines if it ends in .jsonl, or Parquet files
            if it ends in .parquet.
        kind: of the source; None for what it ends in.
        restart: whether an output that is there is replaced.

    Returns:
        How many rows there are, and how many came to nothing.

    Raises:
        ValueError: there is no Ray, no source, no such model; there is an output; or an argument
            cannot be.
    """
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise ValueError(f"--ray needs Ray: {extras.install('ray')} ({error})") from error
    source_kind, wanted = kind or kind_of(source), kind_of(out)
    is_alone = _is_file(source)
    if wanted == "text":
        raise ValueError(f"{out} must end in .jsonl or .parquet")
    directory = None if "://" in out else Path(os.path.realpath(out))
    if directory is not None and directory.exists() and not restart:
        raise ValueError(f"{out} is there: name another, or replace it with --restart")
    if directory is not None and directory.exists() and not directory.is_dir():
        raise ValueError(f"{out} is a file, expected a directory: name another")
    if not ray.is_initialized():
        _connect(spread.address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = not quiet
    context.execution_options.preserve_order = spread.ordered
    actors, cpus = _shape(spread)
    rows = _read(ray.data, source, source_kind).repartition(target_num_rows_per_block=spread.rows)
    dataset = rows.map_batches(
        OfLines,
        fn_constructor_kwargs={
            "engine": engine,
            "arguments": dict(arguments),
            "text": source_kind == "text",
            "to_lines": wanted == "jsonl",
            "is_alone": is_alone,
        },
        batch_size=spread.rows,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus,
    )
    try:
        if directory is None:
            return _write(ray.data, dataset, out, wanted)
        with files.atomic_directory(directory) as new:
            return _write(ray.data, dataset, str(new), wanted)
    except ray.exceptions.RayError as error:
        messages = TOLD.findall(str(error))
        if not messages:
            raise
        raise ValueError(messages[-1]) from error


def _connect(address: str) -> None:
    """Start a cluster, or join one."""
    import ray

    if address != "local":
        ray.init(address)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # as onnxruntime's: off
    ray.init("local", include_dashboard=False, log_to_driver=False)


def _shape(spread: Spread) -> tuple[int, float]:
    """Actors, and the CPUs of each. One CPU of a node is left for reading and writing."""
    import ray

    nodes = [
        node["Resources"]["CPU"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU")
    ]
    cpus = spread.cpus
    if cpus is None:
        each = 1 if spread.actors is None else -(-spread.actors // len(nodes))
        free = (min(nodes) - 1) / each
        cpus = float(int(free)) if free >= 1 else max(min(nodes) - 0.5, 0.5) / each
    return spread.actors or len(nodes), cpus


def _is_file(source: str) -> bool:
    """True for one file, and not a directory of some.

    Raises:
        ValueError: there is nothing of that name.
    """
    from pyarrow import fs

    try:
        uri = source if "://" in source else os.path.abspath(source)
        system, path = fs.FileSystem.from_uri(uri)
        kind = system.get_file_info(path).type
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be read: {error}") from error
    if kind == fs.FileType.NotFound:
        raise ValueError(f"{source} is not there")
    return bool(kind == fs.FileType.File)


def _read(data: Any, source: str, kind: str) -> Any:
    """The rows of files as a dataset."""
    path = source if "://" in source else os.path.abspath(source)
    if kind == "parquet":
        return data.read_parquet(path)
    from fastgen.jobs.ray.files import Lines

    return data.read_datasource(Lines(path))


def _write(data: Any, dataset: Any, path: str, kind: str) -> tuple[int, int]:
    """Write a dataset; returns how many rows it had, and how many that came to nothing."""
    if kind == "jsonl":
        from fastgen.jobs.ray.files import ToLines

        sink = ToLines(path)
        dataset.write_datasink(sink)
        return sink.rows, sink.bad
    dataset.write_parquet(path)
    counts = (
        data.read_parquet(path)
        .select_columns(["error"])
        .map_batches(_counted, batch_format="pyarrow")
        .take_all()
    )
    return sum(counted["rows"] for counted in counts), sum(counted["bad"] for counted in counts)


def _counted(table: Any) -> dict[str, NDArray[np.int64]]:
    """Count the rows, and those of them that came to nothing."""
    rows = table.num_rows
    return {"rows": np.array([rows]), "bad": np.array([rows - table.column("error").null_count])}
