"""The command line's door: streams, Ctrl-C and the exit code. What it does is in `commands`.

It imports little, so that Ctrl-C is quiet while that imports much.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from fastgen.system.interrupt import QUIET_EXIT, ended_at_once, heard

STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def main() -> None:
    """Run the command line; a broken pipe and Ctrl-C end it quietly."""
    _open_streams()
    try:
        with ended_at_once():
            from fastgen.commands import run
        with heard():
            code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = QUIET_EXIT
    for stream in (sys.stdout, sys.stderr):
        code = _flush(stream, code)
    sys.exit(code)


def _open_streams() -> None:
    """Let closed streams (`>&-`) lead nowhere; else the next file opened takes their number."""
    for number, (name, mode) in enumerate(STREAMS):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # as the lowest number that is free: this one
        if getattr(sys, name) is None:
            stream = os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False)
            setattr(sys, name, stream)


def _flush(stream: TextIO, code: int) -> int:
    """Write what is buffered; returns the exit code. Python itself would complain as it ends."""
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return code if isinstance(error, BrokenPipeError) else code or 2
    return code


if __name__ == "__main__":
    main()
