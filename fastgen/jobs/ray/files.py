"""Lines for Ray Data: what it lacks. (Its text reader splits lines where Unicode does, in memory.)

Imported late, since it needs Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink, FileBasedDatasource, WriteResult

LINES = 4096  # of a block that is read
BYTES = 2**20  # of a file that are read at a time


class Lines(FileBasedDatasource):  # type: ignore[misc]
    """The lines of files: "line" (bytes), "number" and "file" (its path)."""

    def _read_stream(self, f: Any, path: str) -> Iterator[Any]:
        lines: list[bytes] = []
        first = 0
        for line in _split(f):
            lines.append(line)
            if len(lines) == LINES:
                yield _table(first, lines, path)
                first, lines = first + len(lines), []
        if lines:
            yield _table(first, lines, path)


def _split(file: Any) -> Iterator[bytes]:
    """Lines of a stream, which may be one that cannot be sought in."""
    rest = b""
    while read := file.read(BYTES):
        *lines, rest = (rest + read).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _table(first: int, lines: list[bytes], path: str) -> Any:
    numbers = range(first, first + len(lines))
    return pyarrow.table(
        {
            "line": pyarrow.array(lines, pyarrow.binary()),
            "number": pyarrow.array(numbers, pyarrow.int64()),
            "file": pyarrow.array([path] * len(lines), pyarrow.string()),
        }
    )


class ToLines(BlockBasedFileDatasink):  # type: ignore[misc]
    """Writes the column "line", a line each.

    Attributes:
        rows, bad: how many there are, and of those, came to nothing; known when all is written.
    """

    rows = bad = 0

    def __init__(self, path: str) -> None:
        super().__init__(path, file_format="jsonl")

    def write(self, blocks: Iterable[Any], ctx: Any) -> tuple[int, int]:
        """Write the blocks of a task as one file; returns rows, and bad ones."""
        kept = list(blocks)
        super().write(kept, ctx)
        tables = [BlockAccessor.for_block(block).to_arrow() for block in kept]
        bad = sum(sum(table.column("bad").to_pylist()) for table in tables if table.num_rows)
        return sum(table.num_rows for table in tables), bad

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        """Write one block."""
        for line in block.to_arrow().column("line").to_pylist():
            file.write(line + b"\n")

    def on_write_complete(self, write_result: WriteResult) -> None:
        """All is written: add up what the tasks said."""
        super().on_write_complete(write_result)
        self.rows = sum(rows for rows, _ in write_result.write_returns)
        self.bad = sum(bad for _, bad in write_result.write_returns)
