"""Grammars of strangers are tried first in a process that may die.

llguidance compiles what it is given in our own process, by recursion and without an end to memory:
`{"const": -9223372036854775808}` takes the process with it, and no check of ours can promise that
nothing else does. So what is new is compiled elsewhere first, with limits, and some texts of it are
begun there; what came through is compiled here. `trial_process` is the other side.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing.spawn
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.sampling import trial_process

SECONDS = 3.0  # of the processor, for a grammar
MEGABYTES = 256  # that it may take
GRACE = 5.0  # seconds that a process has to end a trial by itself, beside those of its limits


class Exceeded(ValueError):
    """A grammar that takes more than it may."""


@dataclass(frozen=True)
class Limits:
    """The most that a grammar may take until it is compiled.

    Attributes:
        seconds: of the processor; four times as many by the clock.
        bytes: of memory. (Windows does not say how many it took: there time alone is limited.)

    Raises:
        ValueError: one of them is not positive.
    """

    seconds: float = SECONDS
    bytes: int = MEGABYTES << 20

    def __post_init__(self) -> None:
        if not 0 < self.seconds < 1e6 or self.bytes < 1:
            raise ValueError(
                f"a grammar's seconds and bytes must be positive, got {self.seconds} and "
                f"{self.bytes}"
            )

    def exceeded(self, verdict: Mapping[str, Any]) -> str:
        """Say in words why a grammar's trial gave no result."""
        return {
            "time": f"compiling it takes more than {self.seconds:g} seconds",
            "memory": f"compiling it takes more than {self.bytes >> 20:,} MB of memory",
            "stack": "compiling it takes more than "
            f"{trial_process.STACK >> 20} MB of stack: something in it is nested too deep",
        }.get(str(verdict.get("over")), "compiling it ends its process")


class Trial:
    """A process that compiles grammars for one vocabulary at a time; started when it is needed.

    Args:
        grace: seconds after which it is ended where it ended no trial by itself.
    """

    def __init__(self, grace: float = GRACE) -> None:
        self.grace = grace
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._holds: weakref.ref[Any] | None = None
        self._of_parent: subprocess.Popen[bytes] | None = None
        python = multiprocessing.spawn.get_executable() or sys.executable
        # Nothing but the standard library is on its path until it is told ours.
        self.command = [python, "-I", "-S", "-B", str(Path(trial_process.__file__))]
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave)

    @property
    def pid(self) -> int | None:
        """The process that runs, if one does."""
        return self._process.pid if self._process is not None else None

    def ready(self, vocabulary: trial_process.Spellings) -> None:
        """Let the process have a vocabulary, so that it is at work on it while we are."""
        with self._lock, contextlib.suppress(OSError):
            self._hold(vocabulary)

    def run(
        self,
        vocabulary: trial_process.Spellings,
        grammar: str,
        limits: Limits,
        settings: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Compile a grammar there.

        Args:
            grammar: as llguidance takes it.
            settings: of its `LLParserLimits`.

        Returns:
            `grown`, the bytes that it took; `error`, what llguidance said, if it did.

        Raises:
            Exceeded: it came to a limit.
            ValueError: no process can be started.
        """
        asked = {"seconds": limits.seconds, "bytes": limits.bytes, "llguidance": dict(settings)}
        with self._lock:
            try:
                process = self._hold(vocabulary)
            except OSError as error:
                raise ValueError(f"no process for it can be started: {error}") from error
            late = threading.Event()

            def end() -> None:
                late.set()
                process.kill()

            patience = trial_process.PATIENCE * limits.seconds + self.grace
            timer = threading.Timer(patience, end)
            timer.daemon = True
            timer.start()
            try:
                self._send("grammar", grammar, asked)
                assert process.stdout is not None
                line = process.stdout.readline()
            except OSError:  # it died while it was asked
                line = b""
            finally:
                timer.cancel()
            if not line.endswith(b"\n"):
                self._end()
                raise Exceeded(limits.exceeded({"over": "time"} if late.is_set() else {}))
            verdict: dict[str, Any] = json.loads(line)
            if verdict.get("ended") == process.pid:
                self._end()
        if "over" in verdict:
            raise Exceeded(limits.exceeded(verdict))
        return verdict

    def close(self) -> None:
        """End the process, if it runs; the next grammar starts another."""
        with self._lock:
            self._end()

    def _hold(self, vocabulary: trial_process.Spellings) -> subprocess.Popen[bytes]:
        """The process, which has this vocabulary."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        held = self._holds() if self._holds is not None else None
        if held is not vocabulary:
            given = {
                "path": [one for one in sys.path if one],
                "tokens": vocabulary.tokens,
                "special": vocabulary.special_token_ids,
            }
            self._send("vocabulary", given)
            self._holds = weakref.ref(vocabulary)
        return self._process

    def _send(self, *message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()

    def _end(self) -> None:
        process, self._process, self._holds = self._process, None, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # what was not sent before it died
                    pipe.close()
            process.wait()

    def _leave(self) -> None:
        """In a fork of ours: the process is our parent's, and so may be who holds the lock."""
        self._lock = threading.Lock()
        self._of_parent, self._process, self._holds = self._process, None, None
