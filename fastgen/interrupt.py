"""Ctrl-C: what ends at once while libraries are imported; what ends only between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

QUIET_EXIT = 130  # as shells count an end by Ctrl-C


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """For imports, which have made nothing yet that would have to be put away.

    As an exception, Ctrl-C comes out of a library's initialisation as whatever that makes of it.
    Who started us with the signal ignored (`nohup`, a shell's background) is obeyed.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(QUIET_EXIT))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """For work that is stopped between its steps: gives what says whether Ctrl-C came.

    So nothing is left half done. Who started us with the signal ignored is obeyed.
    """
    came: list[int] = []
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
