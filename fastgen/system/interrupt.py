"""Ctrl-C: what ends at once while libraries are imported; what ends only between two steps; and how
it is heard where Python would lose it. SIGTERM and SIGHUP, where something has to be put away.
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
# What ends a process that says nothing else. (Windows has no SIGHUP.)
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
SIGNALLED = 128  # and the signal's number: the exit code, as shells count it
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
def raised() -> Iterator[None]:
    """For work that leaves something behind if it is killed: SIGTERM and SIGHUP are raised in it.

    As SystemExit, so that whatever is on the way out puts away what it made. Who handles these
    signals, or had us started with them ignored (`nohup`), is obeyed; work in another thread than
    the main one cannot hear them.
    """
    ours = [number for number in ENDING if _is_ours(number)]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _is_ours(number: int) -> bool:
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(number) is signal.SIG_DFL


def _end(number: int, _: object) -> None:
    raise SystemExit(SIGNALLED + number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """For what must not stop half way, such as putting away: a signal that comes is raised after.

    Of those that Python hears; others end the process as before.
    """
    came: list[int] = []
    usual: dict[int, object] = {}
    if threading.current_thread() is threading.main_thread():
        usual = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDING)}
    usual = {number: handler for number, handler in usual.items() if callable(handler)}
    for number in usual:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if came:
            signal.raise_signal(came[0])


def _interrupt_main() -> None:
    """Ctrl-C for the main thread, which may wait: a signal ends that, what Python sets does not."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


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
        again = threading.Timer(SOON, _interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual
