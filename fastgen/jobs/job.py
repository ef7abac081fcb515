"""A job: rows in, rows out, each once and in the input's order, whatever happens in between."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

from fastgen.jobs import parquet
from fastgen.jobs.journal import Entry, Journal, write_lines
from fastgen.jobs.row import Done, InputRow
from fastgen.jobs.source import RowSource, kind_of


class Work(Protocol):
    """The work of a job on its rows."""

    def run(self, rows: Iterable[InputRow]) -> Iterator[Done]:
        """Each row with its outcome, in any order; rows are taken as they are needed."""


class RowJob:
    """Rows of one place that become rows of another.

    Args:
        source: where they come from.
        out: where they go: a path, or "-" for standard output, which has no journal.
        settings: what every row's result depends on, but the row itself.
        seed: of rows that sample and have none of their own; None for any.
        restart: whether an output, or what an earlier job left, is replaced.
        columns: of a Parquet file, those that are read; None for all.

    Attributes:
        begun: the settings, the job's seed and when it was begun (Unix seconds): those of the
            first start, where this one goes on.
        total: how many rows there are; None where that is known at the end only.
        skipped: how many were done before.
        bad: how many have come to nothing, before and now.

    Raises:
        ValueError: the output is there; the journal is of another job, input or model; or it is
            in use.
    """

    def __init__(
        self,
        source: RowSource,
        out: str,
        settings: Mapping[str, Any],
        *,
        seed: int | None = None,
        restart: bool = False,
        columns: Collection[str] | None = None,
    ) -> None:
        self.source, self.columns = source, columns
        self.out = None if out == "-" else _target(out, source)
        settings = dict(settings) | ({} if seed is None else {"seed": seed})
        drawn = {"seed": secrets.randbits(32), "created": int(time.time())} | settings
        self.journal = None
        self.begun = drawn
        if self.out is not None:
            self.journal = Journal(self.out, settings, drawn, restart)
            self.begun = self.journal.begun
        self.skipped = self.journal.count if self.journal else 0
        self.bad = self.journal.bad if self.journal else 0
        try:
            self.total = self._count()
        except BaseException:
            self.close()
            raise

    def run(self, work: Work) -> Iterator[Done]:
        """Do what is not done, then put the output in its place; gives each row as it is done."""
        sink = _InOrder(sys.stdout.buffer) if self.journal is None else None
        for done in work.run(self._pending(sink)):
            bad = done.bad is not None
            self.bad += bad
            if self.journal is not None:
                self.journal.add(Entry(done.row.number, done.row.digest, bad, done.line))
            elif sink is not None:
                sink.add(done)
            yield done
        if self.journal is not None and self.out is not None:
            is_table = kind_of(str(self.out)) == "parquet"
            self.journal.finish(parquet.write if is_table else write_lines)

    def _pending(self, sink: _InOrder | None) -> Iterator[InputRow]:
        """The rows that are not done."""
        again = 0
        for row in self.source.rows(self.columns):
            if self._is_done(row):
                again += 1
                continue
            if sink is not None:
                sink.expect(row)
            yield row
        self._all_there(again)

    def _count(self) -> int | None:
        """Count the rows. Those that are done must be the ones that were."""
        if not self.source.again:
            return None
        rows = again = 0
        for row in self.source.rows(self.columns):
            rows += 1
            again += self._is_done(row)
        self._all_there(again)
        return rows

    def _is_done(self, row: InputRow) -> bool:
        known = self.journal.digest(row.number) if self.journal else None
        if known is not None and known != row.digest:
            raise self._another(f"row {row.number} of the input was another")
        return known is not None

    def _all_there(self, again: int) -> None:
        if again < self.skipped:
            raise self._another(f"{self.skipped - again} rows that are done are not in it")

    def _another(self, why: str) -> ValueError:
        assert self.journal is not None
        return ValueError(
            f"{self.journal.path} is of a job with another input ({why}): pass the same, or throw "
            "away what it did with --restart"
        )

    def close(self) -> None:
        """Close the journal, which keeps the rows that are done."""
        if self.journal is not None:
            self.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _target(out: str, source: RowSource) -> Path:
    """The path of the output, links followed.

    Raises:
        ValueError: nothing can be put there.
    """
    path = Path(os.path.realpath(out))
    if kind_of(out) == "text":
        raise ValueError(
            f"{out}: a text may have several lines, and a row may be an error; name the output "
            ".jsonl or .parquet"
        )
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a directory")
    if path.exists() and not path.is_file():
        raise ValueError(f"{out} is not a file (for standard output, pass -)")
    if source.path is not None and path.exists() and path.samefile(source.path):
        raise ValueError(f"{out} is the input too: name another")
    return path


class _InOrder:
    """Writes lines in the input's order: what is done early waits for those before it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._expected: deque[int] = deque()
        self._waiting: dict[int, bytes] = {}

    def expect(self, row: InputRow) -> None:
        self._expected.append(row.number)

    def add(self, done: Done) -> None:
        self._waiting[done.row.number] = done.line
        while self._expected and self._expected[0] in self._waiting:
            self._file.write(self._waiting.pop(self._expected.popleft()) + b"\n")
        self._file.flush()
