"""Measure loading with the graph optimised, and with the weights packed, beforehand.

    python bench/loading.py DIRECTORY...

onnxruntime can save the graph as it has optimised it, and the weights in the order that its
kernels want them (`session.save_external_prepacked_constant_initializers`). Each variant is loaded
by a process of its own, in turn, with the files in the page cache; medians of session and first
step. "Made elsewhere" is not measured: a packed file is for one kind of processor only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fastgen.timing.rounds import in_rounds

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

CHILD = """
import json, sys, time
import numpy, onnxruntime, tokenizers
from pathlib import Path
import fastgen
from fastgen.engine import model as module
if sys.argv[2] == "optimised":
    plain = module.session_options
    def options(tuning):
        out = plain(tuning)
        out.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return out
    module.session_options = options
start = time.perf_counter()
model = module.Model(Path(sys.argv[1]), threads=2)
loaded = time.perf_counter()
model.forward([numpy.arange(16)], model.new_cache(1, 32))
done = time.perf_counter()
rss = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")][0]
print(json.dumps([loaded - start, done - start, rss / 1e3]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print("| model | graph | MB files | s session | s first token | MB resident |")
    print("|---|---|---|---|---|---|")
    for directory in args.directories:
        with tempfile.TemporaryDirectory() as temporary:
            places = {"as exported": (directory, "plain")}
            for name, packed in (("optimised", False), ("optimised, packed", True)):
                place = Path(temporary) / name
                save(directory, place, packed)
                places[name] = (place, "optimised")
            found = in_rounds(
                {name: lambda _, place=place: loaded(*place) for name, place in places.items()},
                args.rounds,
            )
            for name, (place, _) in places.items():
                size = sum(p.stat().st_size for p in place.iterdir()) / 1e6
                session, first, rss = map(statistics.median, zip(*found[name], strict=True))
                print(
                    f"| {directory.name} | {name} | {size:.0f} | {session:.3f} | {first:.3f} "
                    f"| {rss:.0f} |"
                )


def loaded(place: Path, how: str) -> list[float]:
    """The measurements of a process that loads a model."""
    command = [sys.executable, "-c", CHILD, place, how]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return list(json.loads(out))


def save(directory: Path, place: Path, packed: bool) -> None:
    """Copy a model directory with its graph as onnxruntime has optimised it."""
    from fastgen.engine.model import open_session, session_options
    from fastgen.store.model_info import GRAPH, INFO
    from fastgen.store.tuning import Tuning

    shutil.copytree(directory, place, ignore=shutil.ignore_patterns("model.onnx*"))
    options = session_options(Tuning(threads=2))
    options.optimized_model_filepath = str(place / GRAPH)
    entries = {
        "optimized_model_external_initializers_file_name": f"{GRAPH}.data",
        "optimized_model_external_initializers_min_size_in_bytes": "1024",
    }
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    if packed:
        options.add_session_config_entry(
            "session.save_external_prepacked_constant_initializers", "1"
        )
    open_session(directory / GRAPH, options)
    told = json.loads((place / INFO).read_text())
    told["files"] = {p.name: p.stat().st_size for p in place.iterdir() if p.name != INFO}
    (place / INFO).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
