"""numpy's BLAS held to one thread, where matrices are worked on side by side.

Its threads wait for each other by spinning: several small products at once are then far slower on
two threads each than on one, and where others use the machine, tens of times so.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

# Where numpy's wheels keep it, beside or within the package, and what its functions are called.
FOLDERS = ("../numpy.libs", ".dylibs", ".libs")
NAMES = (
    "scipy_openblas_{}_num_threads64_",
    "openblas_{}_num_threads64_",
    "openblas_{}_num_threads",
)


@cache
def _functions() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Functions that get and set its number of threads; None where they are not found."""
    home = Path(np.__file__).parent
    for path in (path for folder in FOLDERS for path in (home / folder).glob("*openblas*")):
        library = ctypes.CDLL(str(path))  # which is loaded already
        for name in NAMES:
            if hasattr(library, name.format("set")):
                return getattr(library, name.format("get")), getattr(library, name.format("set"))
    return None


class _Held:
    """The number of those that asked for one thread and have not ended, and what there was before.

    Several ask at once, such as the threads that write a graph: the last to end gives it back.
    """

    lock = threading.Lock()
    count = 0
    before = 0


@contextmanager
def one_thread() -> Iterator[None]:
    """Have products of numpy computed by the thread that asks for them, and by no other."""
    if (functions := _functions()) is None:
        yield
        return
    threads, set_threads = functions
    with _Held.lock:
        if _Held.count == 0:
            _Held.before = threads()
            set_threads(1)
        _Held.count += 1
    try:
        yield
    finally:
        with _Held.lock:
            _Held.count -= 1
            if _Held.count == 0:
                set_threads(_Held.before)
