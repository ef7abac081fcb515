"""Sources of rows: JSON lines, text lines, Parquet; a file, or standard input.

A row's number is its line's, counted from 0 (blank lines have one and are no row).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgen.jobs import parquet
from fastgen.jobs.row import InputRow, as_json
from fastgen.store import jsonfile

KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".parquet": "parquet",
}  # fmt: skip
BOM = b"\xef\xbb\xbf"
AT_ONCE = 256  # rows of a Parquet file that are made Python's at a time


@dataclass
class RowSource:
    """The rows of a file, or of standard input.

    Attributes:
        path: None for standard input, which can be read once.
        kind: "jsonl", "text" or "parquet".
    """

    path: Path | None
    kind: str

    @classmethod
    def of(cls, name: str, kind: str | None = None) -> RowSource:
        """The source that a command line names: a path, or "-".

        Raises:
            ValueError: there is no such file, or nobody knows its kind.
        """
        if name == "-":
            if kind == "parquet":
                raise ValueError("Parquet cannot be read from standard input: pass a file")
            return cls(None, kind or "jsonl")
        path = Path(name)
        if not path.exists():
            raise ValueError(f"{name} is not there")
        if path.is_dir():
            raise ValueError(f"{name} is a directory, expected a file (directories: --ray)")
        jsonfile.check_fetched(path)
        return cls(path, kind or kind_of(name))

    @property
    def again(self) -> bool:
        """True where it can be read more than once."""
        return self.path is not None and self.path.is_file()

    def rows(self, columns: Collection[str] | None = None) -> Iterator[InputRow]:
        """Row by row; nothing is read ahead but a buffer."""
        if self.kind == "parquet":
            assert self.path is not None
            yield from _of_parquet(self.path, columns)
        elif self.path is None:
            yield from _of_lines(sys.stdin.buffer, self.kind == "text")
        else:
            with self.path.open("rb") as file:
                yield from _of_lines(file, self.kind == "text")

    def columns(self) -> list[str] | None:
        """The names that all rows have, where the file says so."""
        if self.kind != "parquet" or self.path is None:
            return None
        with parquet.opened(self.path) as file:
            return list(file.schema_arrow.names)


def kind_of(name: str) -> str:
    """ "jsonl", "text" or "parquet", by a file's ending.

    Raises:
        ValueError: it has another one.
    """
    kind = KINDS.get(Path(name).suffix.lower())
    if kind is None:
        known = ", ".join(KINDS)
        raise ValueError(f"{name} must end in {known}, or be - for standard input and output")
    return kind


def _of_lines(lines: Iterable[bytes], text: bool) -> Iterator[InputRow]:
    for number, line in enumerate(lines):
        row = of_line(number, line, text)
        if row is not None:
            yield row


def of_line(number: int, line: bytes, text: bool, file: str | None = None) -> InputRow | None:
    """The row that a line is; None for a blank one."""
    content = line.removeprefix(BOM) if number == 0 else line
    content = content.rstrip(b"\r\n")
    return InputRow(number, content, text, file) if content.strip() else None


def _of_parquet(path: Path, columns: Collection[str] | None) -> Iterator[InputRow]:
    number = 0
    with parquet.opened(path) as file:
        names = file.schema_arrow.names
        wanted = names if columns is None else [name for name in names if name in columns]
        for batch in file.iter_batches(batch_size=AT_ONCE, columns=wanted):
            for fields in batch.to_pylist():
                yield InputRow(number, as_json(fields).encode("utf-8", "surrogatepass"))
                number += 1
