"""Measure loading from the model directory, and from packed weights that are kept.

    python bench/loading.py DIRECTORY DIRECTORY+int8 [...]

`+int8` behind a directory loads it with `prefill_precision="int8"`. Each kind is loaded by a
process of its own, in turn, with the files in the page cache: medians of the seconds of loading and
up to a first step of 16 tokens, and of the memory that the process has to itself then (anonymous).
Then two and four processes hold the model at once: their proportional shares are added. The kept
weights are in a temporary cache, and what making them takes is the first load's seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastgen.timing.rounds import in_rounds

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

CHILD = """
import json, sys, time
import numpy, onnxruntime, tokenizers
from pathlib import Path
from fastgen.engine.model import Model
def memory():
    lines = map(str.split, open("/proc/self/smaps_rollup"))
    return {line[0]: int(line[1]) / 1e3 for line in lines if line[0] in ("Anonymous:", "Pss:")}
directory, form, packed = sys.argv[1:]
start = time.perf_counter()
model = Model(Path(directory), 2, prefill_precision=form, packed=packed == "packed")
loaded = time.perf_counter()
model.forward([numpy.arange(16)], model.new_cache(1, 32))
done = time.perf_counter()
assert model.is_packed == (packed == "packed"), model.cautions
print(json.dumps([loaded - start, done - start, memory()["Anonymous:"]]), flush=True)
for _ in sys.stdin:
    print(json.dumps(memory()["Pss:"]), flush=True)
"""
KINDS = ("as exported", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", metavar="DIRECTORY[+int8]")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print("| model | | MB files | s load | s first token | MB anonymous | of two | four | s made |")
    print("|---|---|---|---|---|---|---|---|---|")
    for given in args.directories:
        path, _, form = given.partition("+")
        with tempfile.TemporaryDirectory() as cache:
            os.environ["FASTGEN_CACHE"] = cache
            calls = {kind: [path, form or "same", kind] for kind in KINDS}
            made = loaded(calls["packed"])[0]
            found = in_rounds(
                {kind: lambda _, call=call: loaded(call) for kind, call in calls.items()},
                args.rounds,
            )
            for kind, call in calls.items():
                place = Path(cache if kind == "packed" else path)
                size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file()) / 1e6
                load, first, own = map(statistics.median, zip(*found[kind], strict=True))
                name, seconds = (Path(given).name, "") if kind == KINDS[0] else ("", f"{made:.2f}")
                print(
                    f"| {name} | {kind} | {size:.0f} | {load:.3f} | {first:.3f} | {own:.0f} "
                    f"| {together(call, 2):.0f} | {together(call, 4):.0f} | {seconds} |",
                    flush=True,
                )


def loaded(call: list[str]) -> list[float]:
    """The measurements of a process that loads a model."""
    with loading(call) as process:
        return list(told(process))


def together(call: list[str], count: int) -> float:
    """MB that so many processes have together."""
    with ExitStack() as held:
        processes = [held.enter_context(loading(call)) for _ in range(count)]
        for process in processes:
            told(process)
        total = 0.0
        for process in processes:
            print(file=process.stdin, flush=True)
            total += told(process)
        return total


@contextmanager
def loading(call: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that loads a model, and holds it as long as this lasts."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CHILD, *call], text=True, **pipes) as process:
        yield process
        process.communicate()


def told(process: subprocess.Popen[str]) -> Any:
    """The next thing that the process says."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


if __name__ == "__main__":
    main()
