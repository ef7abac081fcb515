"""Files and directories that appear whole or not at all, and a kill at any moment loses none.

A file is written beside its place and takes the name at the end. So is a directory, in a temporary
neighbour, `.NAME.new.xxxxxxxx`. Where the system cannot swap two names in one step, the old
directory waits in `.NAME.old.xxxxxxxx/model` until the new one has the name; if the process is
killed just then, `restore` finds it there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from fastgen.errors import ModelError
from fastgen.system import interrupt

try:
    import fcntl
except ImportError:  # Windows: what a killed process leaves stays
    fcntl = None  # type: ignore[assignment]

STALE = 10.0  # seconds after which a temporary directory that nobody claims is removed
SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
AT_FDCWD = -100


def cache_directory() -> Path:
    """The place of what is made on first use: FASTGEN_CACHE, or ~/.cache/fastgen."""
    chosen = os.environ.get("FASTGEN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fastgen"


def check_writable(what: str, path: Path) -> None:
    """Raise a ValueError if a file cannot be written there, before the work that it is to hold.

    Args:
        what: the file's name in the error, such as a flag.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{what} must be a file, {path} is something else")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be written: {error.strerror or error}") from error


@contextmanager
def atomic_file(what: str, path: Path) -> Iterator[Path]:
    """Give a file beside `path` to write into, which takes that name at the end, or leaves nothing.

    Raises:
        ValueError: see `check_writable`.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    check_writable(what, path)
    mine = f"{os.getpid()}.{threading.get_ident()}"
    neighbour = path.with_name(f".{mine}.{path.name}")  # ending as the file itself
    with interrupt.raised():
        try:
            yield neighbour
            neighbour.replace(path)
        finally:
            with interrupt.held_back():
                neighbour.unlink(missing_ok=True)


def temporary_neighbour(out: Path, kind: str, parent: Path | None = None) -> Path:
    """Make a temporary directory, "new" or "old", beside `out` or in another `parent`."""
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.{kind}.", dir=parent or out.parent))


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """A temporary neighbour of `out` that takes its place at the end, or leaves nothing.

    By Ctrl-C, SIGTERM and SIGHUP too. A process that is killed otherwise cannot clean up: the next
    one that writes `out` does it.
    """
    remove_stale(out)
    with interrupt.raised(), contextlib.ExitStack() as cleanup:
        with interrupt.held_back():
            new = temporary_neighbour(out, "new")
            cleanup.callback(_remove, new)
        new.chmod(0o777 & ~_umask())  # what makes temporary directories gives them to one user
        with claimed(new):
            yield new
            with interrupt.held_back():
                if out.exists():
                    replace_directory(new, out)
                else:
                    new.rename(out)


def _remove(directory: Path) -> None:
    with interrupt.held_back():
        shutil.rmtree(directory, ignore_errors=True)


def _umask() -> int:
    """The mask of new files' modes, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def replace_directory(new: Path, out: Path) -> None:
    """Give `new` the name of `out`, which goes, or has the name of `new`. Both are directories."""
    if _exchange(new, out):
        return
    old = temporary_neighbour(out, "old")
    with claimed(old):
        try:
            out.rename(old / "model")
            new.rename(out)
        finally:
            if not out.exists():
                (old / "model").rename(out)
            shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, two: Path) -> bool:
    """Swap two names in one step; False if the system, or the file system, has none."""
    names = os.fsencode(one), os.fsencode(two)
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None), "renameat2", None)
        return call is not None and call(AT_FDCWD, names[0], AT_FDCWD, names[1], SWAP) == 0
    if sys.platform == "darwin":
        call = getattr(ctypes.CDLL(None), "renamex_np", None)
        return call is not None and call(*names, SWAP) == 0
    return False


def restore(out: Path) -> bool:
    """Put back what was being replaced when that was killed; returns whether `out` is there.

    Raises:
        ModelError: it cannot be put back; the message says where it is.
    """
    out = Path(os.path.realpath(out))
    if out.exists():
        return True
    left = [
        directory / "model"
        for directory in _neighbours(out, "old")
        if (directory / "model").is_dir()
    ]
    if not left:
        return False
    model = max(left, key=lambda path: path.parent.stat().st_mtime)
    with suppress(OSError), claimed(model.parent, wait=True) as ours:  # it says below what is amiss
        if ours and not out.exists():  # whoever claimed it may have come to an end
            model.rename(out)
            model.parent.rmdir()
    if not out.exists():
        raise ModelError(
            f"{out} is not there, since a process that replaced it was killed, and cannot be put "
            f"back: move {model} there"
        )
    return True


def remove_stale(out: Path) -> None:
    """Remove what killed processes left beside `out`: nobody claims it, and it is not new."""
    for directory in [*_neighbours(out, "new"), *_neighbours(out, "old")]:
        if (directory / "model").is_dir() and not out.exists():
            continue  # it is the one that is left
        with suppress(OSError):  # another process removes it too
            # Between being made and being claimed a directory looks abandoned.
            if time.time() - directory.stat().st_mtime < STALE:
                continue
            with claimed(directory) as abandoned:
                if abandoned:
                    shutil.rmtree(directory, ignore_errors=True)


def _neighbours(out: Path, kind: str) -> list[Path]:
    pattern = f".{escape(out.name)}.{kind}." + 8 * "[a-z0-9_]"
    return [path for path in out.parent.glob(pattern) if path.is_dir()]


@contextmanager
def claimed(directory: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock on a directory, which goes when the process does.

    Yields whether we have it: False if another process holds it and we do not wait, or
    directories cannot be locked.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which goes when the process does; others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        release = _lock(file)
        try:
            yield
        finally:
            release()


def _lock(file: Any) -> Any:
    if fcntl is None:
        import msvcrt

        def seek_and(mode: int) -> None:
            file.seek(0)
            msvcrt.locking(file.fileno(), mode, 1)  # type: ignore[attr-defined,unused-ignore]

        seek_and(msvcrt.LK_LOCK)  # type: ignore[attr-defined,unused-ignore]
        return lambda: seek_and(msvcrt.LK_UNLCK)  # type: ignore[attr-defined,unused-ignore]
    fcntl.flock(file, fcntl.LOCK_EX)
    return lambda: fcntl.flock(file, fcntl.LOCK_UN)
