"""Ctrl-C: what ends at once while libraries are imported; what ends only between two steps; and how
it is heard where Python would lose it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

QUIET_EXIT = 130  # as shells count an end by Ctrl-C
SOON = 0.01  # seconds until a Ctrl-C that was lost comes again


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


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """For all of a program: a Ctrl-C that comes in a destructor or a callback comes again.

    Python ignores exceptions there, and with them that one.
    """
    usual = sys.unraisablehook

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            usual(lost)
            return
        again = threading.Timer(SOON, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual
