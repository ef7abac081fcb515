"""The command line, and scripts that others wrote."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any


def output_of(script: str) -> str:
    """Run a script in this process, whose imports and traced graphs it shares: what it prints."""
    said = io.StringIO()
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(said):
        exec(compile(script, "<script>", "exec"), names)
    return said.getvalue()


COMMAND = [sys.executable, "-m", "fastgen"]


def run(*args: str | Path, stdin: bytes = b"", **kwargs: object) -> tuple[int, str, str]:
    done = subprocess.run([*COMMAND, *map(str, args)], input=stdin, capture_output=True, **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()
