"""Parquet in and out (extra `batch`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fastgen.system import extras

AT_ONCE = 4096  # rows of a group that is written


def opened(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`, which is a context manager.

    Raises:
        ValueError: there is no pyarrow, or the file is damaged or of another kind.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"Parquet needs pyarrow: {extras.install('batch')}") from error
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error


def write(path: Path, lines: Callable[[], Iterable[bytes]]) -> None:
    """Write JSON objects, a row each, as a table of all their fields.

    Args:
        lines: gives the lines each time it is called: once for the types, once for the rows.

    Raises:
        ValueError: a field has types in different rows that no column can have.
    """
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([])
    try:
        for rows in _groups(lines()):
            group_schema = pyarrow.Table.from_pylist(rows).schema
            schema = pyarrow.unify_schemas([schema, group_schema], promote_options="permissive")
        with parquet.ParquetWriter(path, schema) as file:
            for rows in _groups(lines()):
                file.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise ValueError(
            f"the rows do not fit into one table ({error}); nothing is lost: give the journal, "
            "which ends in .parquet.part, the name of one of JSON lines, .jsonl.part, and name that"
        ) from error


def _groups(lines: Iterable[bytes]) -> Iterator[list[dict[str, Any]]]:
    """Rows, `AT_ONCE` at a time; each has all the names of its group."""
    left = iter(lines)
    while some := [json.loads(line) for line in islice(left, AT_ONCE)]:
        names = dict.fromkeys(name for row in some for name in row)
        yield [{name: row.get(name) for name in names} for row in some]
