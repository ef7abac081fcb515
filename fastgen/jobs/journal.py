"""The rows of a job that are done, kept beside its output: a kill at any moment costs nothing.

`OUT.part` begins with a line that says which job it is of. Each line after that is a row's: its
number, its digest, whether it is bad, a checksum, and the line that it becomes in OUT, with tabs in
between. It is the system's as soon as its row is done, so that a killed process loses none, and the
disk's a second later, should the machine itself go down. A line that is torn is cut off.
"""

from __future__ import annotations

import io
import json
import os
import time
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fastgen.store import files

try:
    import fcntl
except ImportError:  # Windows: nobody is kept from running a job twice at once
    fcntl = None  # type: ignore[assignment]

MAGIC = b"fastgen job 1 "
EVERY = 1.0  # seconds between two waits for the disk
NOTHING = -1  # the offset of a row that is not done


@dataclass(frozen=True)
class Entry:
    """A row that is done.

    Attributes:
        line: what it becomes in the output, without what ends it.
    """

    row: int
    digest: str
    bad: bool
    line: bytes

    def written(self) -> bytes:
        """As the journal has it."""
        head = f"{self.row}\t{self.digest}\t{self.bad:d}\t{zlib.crc32(self.line):08x}\t"
        return head.encode() + self.line + b"\n"

    @classmethod
    def read(cls, written: bytes) -> Self | None:
        """Read an entry that `written` wrote; None if it is not whole."""
        parts = written.removesuffix(b"\n").split(b"\t", 4)
        if len(parts) != 5 or not written.endswith(b"\n"):
            return None
        try:
            entry = cls(int(parts[0]), parts[1].decode(), parts[2] == b"1", parts[4])
        except ValueError:
            return None
        return entry if entry.written() == written else None


class Journal:
    """The rows of a job that are done.

    Args:
        out: where the job's output goes, when all is done.
        settings: what every row's result depends on, but the row itself. What a job draws for
            itself when it begins (`drawn`) is taken from the journal where there is one.
        drawn: the same, for a job that begins.
        restart: whether what another job left is thrown away.

    Attributes:
        begun: the settings and what was drawn.
        count, bad: how many rows are done, and how many of those came to nothing.

    Raises:
        ValueError: the journal is of another job, is no journal, or is in use; or there is an
            output and no journal.
    """

    def __init__(
        self, out: Path, settings: Mapping[str, Any], drawn: Mapping[str, Any], restart: bool
    ) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".part")
        self.count = self.bad = 0
        self._offsets, self._digests = array("q"), array("Q")  # by the row's number
        self._synced = time.monotonic()
        self._file = _claimed(self.path)
        try:
            self.begun = self._begin(settings, drawn, restart)
        except BaseException:
            self._file.close()
            raise

    def _begin(
        self, settings: Mapping[str, Any], drawn: Mapping[str, Any], restart: bool
    ) -> dict[str, Any]:
        """Read what is there, or write the first line."""
        with self.path.open("rb") as file:
            first = file.readline()
        if not (first.startswith(MAGIC) or MAGIC.startswith(first)):
            raise ValueError(f"{self.path} is no journal of a job: move it away")
        if not first and self.out.exists() and not restart:
            self.path.unlink()
            raise ValueError(f"{self.out} is there: name another, or replace it with --restart")
        if restart or not first.endswith(b"\n"):
            begun = {**settings, **drawn}
            self._file.seek(0)
            self._file.truncate()
            self._write(MAGIC + json.dumps(begun).encode() + b"\n")
            return begun
        begun = dict(json.loads(first[len(MAGIC) :]))
        for name, value in json.loads(json.dumps(dict(settings))).items():
            if begun.get(name) != value:
                raise ValueError(
                    f"{self.path} is of a job with another {name} ({begun.get(name)!r}, now "
                    f"{value!r}): go on with the same, or throw away what it did with --restart"
                )
        self._recover(len(first))
        return begun

    def _recover(self, offset: int) -> None:
        """Note the rows that are there, and cut off what is torn."""
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                entry = Entry.read(line)
                if entry is None:
                    break
                self._note(entry, offset)
                offset += len(line)
        self._file.seek(offset)
        self._file.truncate()

    def _note(self, entry: Entry, offset: int) -> None:
        row = entry.row
        missing = row + 1 - len(self._offsets)
        if missing > 0:
            self._offsets.extend([NOTHING] * missing)
            self._digests.extend([0] * missing)
        if self._offsets[row] == NOTHING:
            self.count += 1
            self.bad += entry.bad
        self._offsets[row], self._digests[row] = offset, int(entry.digest, 16)

    def digest(self, row: int) -> str | None:
        """The digest of a row that is done; None if it is not."""
        if row >= len(self._offsets) or self._offsets[row] == NOTHING:
            return None
        return f"{self._digests[row]:016x}"

    def add(self, entry: Entry) -> None:
        """A row is done."""
        offset = self._file.tell()
        self._write(entry.written())
        self._note(entry, offset)
        if time.monotonic() - self._synced > EVERY:
            self.sync()

    def _write(self, line: bytes) -> None:
        left = memoryview(line)
        while left:
            left = left[self._file.write(left) or 0 :]

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def lines(self) -> Iterator[bytes]:
        """The outputs of the rows, in the order of their numbers."""
        with self.path.open("rb") as file:
            for offset in self._offsets:
                if offset != NOTHING:
                    file.seek(offset)
                    entry = Entry.read(file.readline())
                    assert entry is not None
                    yield entry.line

    def finish(self, write: Callable[[Path, Callable[[], Iterator[bytes]]], None]) -> None:
        """All rows are done: the output takes its place in one step, and the journal goes.

        Args:
            write: makes the file of the lines.
        """
        self.sync()
        with files.atomic_file("the output", self.out) as temporary:
            write(temporary, self.lines)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        _sync_directory(self.out.parent)
        self.path.unlink()
        self.close()

    def close(self) -> None:
        """Let go of it. What is done stays, and the next one goes on from there."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_lines(path: Path, lines: Callable[[], Iterator[bytes]]) -> None:
    """A file of these lines."""
    with path.open("wb") as file:
        for line in lines():
            file.write(line + b"\n")


def _claimed(path: Path) -> io.FileIO:
    """The file, ours until it is closed; made if it is not there.

    Raises:
        ValueError: another process has it.
    """
    while True:
        # Unbuffered: what was written is the system's, whatever becomes of this process.
        file = io.FileIO(path, "a+")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(f"{path} is in use: another process runs this job") from error
        # Whoever had it before may have finished, and then the name is gone or another file's.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory, where directories can be opened."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
