"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from fastgen.system import interrupt


def check(what: str, path: Path) -> None:
    """Raise a ValueError if a file cannot be written there, before the work that it is to hold.

    Args:
        what: whose file it is, as the error names it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{what} must be a file, {path} is something else")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def written(what: str, path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; it takes that name if all goes well, or leaves nothing.

    Raises:
        ValueError: see `check`.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    check(what, path)
    mine = f"{os.getpid()}.{threading.get_ident()}"
    neighbour = path.with_name(f".{mine}.{path.name}")  # ending as the file itself
    with interrupt.raised():
        try:
            yield neighbour
            neighbour.replace(path)
        finally:
            with interrupt.held_back():
                neighbour.unlink(missing_ok=True)
