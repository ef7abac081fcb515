"""A process that has loaded one engine: a JSON request a line comes in, a JSON answer goes out.

    python worker.py prepare ENGINE SOURCE TARGET PRECISION
    python worker.py serve ENGINE

What an engine prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from peers.engines import Engine

IDLE = 0.05  # a process is at rest when it used less than this share of a core


def serve(engine: Engine, requests: Iterable[str], answers: TextIO) -> None:
    """Answer requests until they end. An error is an answer too."""
    for line in requests:
        try:
            answer = respond(engine, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def respond(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Do what one request asks: `load`, `generate`, `logits` or `memory`."""
    match request["do"]:
        case "load":
            directory = Path(request["directory"])
            engine.load(directory, request["precision"], request["threads"])
            return {}
        case "generate":
            engine.first = None
            start = time.perf_counter()
            ids = engine.generate(request["prompts"], request["new"], request["beams"])
            seconds = time.perf_counter() - start
            return {
                "seconds": seconds,
                "first": engine.first and engine.first - start,
                "ids": [[int(i) for i in row] for row in ids],
                "spun": rest() if request.get("rest", True) else 0.0,
            }
        case "logits":
            # In a file: those of 256 tokens and 262,144 logits each are 268 MB.
            import numpy as np

            found = engine.logits(request["ids"])
            np.save(request["file"], np.ascontiguousarray(found, np.float32))
            return {"shape": list(found.shape)}
        case "memory":
            return memory()
    raise ValueError(f"no such request: {request['do']}")


def rest(patience: float = 1.0) -> float:
    """Wait until this process's threads have stopped; seconds of processor time that took.

    Some thread pools wait for more work in a loop, which would slow down the next engine.
    """
    start, first = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < patience:
        used = time.process_time()
        time.sleep(0.02)
        if time.process_time() - used < 0.02 * IDLE:
            break
    return time.process_time() - first


def memory() -> dict[str, float]:
    """Megabytes of this process: what it holds now, and the most it ever held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return {"peak": peak}
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {
        "resident": int(fields["VmRSS"].split()[0]) / 1024,
        "peak": int(fields["VmHWM"].split()[0]) / 1024,
    }


def main() -> None:
    from peers.engines import adapter

    what, name, *rest_of = sys.argv[1:]
    if what == "prepare":
        source, target, precision = rest_of
        adapter(name).prepare(Path(source), Path(target), precision)
        return
    # Engines write to stdout, from C++ too: keep it for answers, and give them stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(adapter(name)(), sys.stdin, answers)


if __name__ == "__main__":
    # The folder above: ours are `peers.something`, so that none can hide an engine's package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
