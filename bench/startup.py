"""How soon the first token comes in a new process, with the embedded demo model.

    python bench/startup.py

Fresh processes in interleaved rounds: (a) import onnxruntime and create the demo model's session;
(b) import fastgen, load the demo model and make the first token of a text prompt.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

BARE = """
import os, sys
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
"""
WHOLE = """
import fastgen
model = fastgen.load()
next(iter(model.stream("The os module", max_new_tokens=1)))
"""
IDS = """
import fastgen
model = fastgen.load()
model.generate([5, 6, 7], max_new_tokens=1)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()

    import fastgen
    from fastgen.store.hub import DEMO

    programs = {
        "import onnxruntime, create the session": BARE,
        "import fastgen, load, first token of ids": IDS,
        "import fastgen, load, first token of a text": WHOLE,
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(args.rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", program, str(DEMO / "model.onnx")],
                check=True,
                env=os.environ | {"PYTHONPATH": str(Path(fastgen.__file__).parents[1])},
            )
            if turn:
                times[name].append(time.perf_counter() - start)
    base = next(iter(times.values()))
    print("| a new process | seconds | times the first |")
    print("|---|---|---|")
    for name, seconds in times.items():
        ratio = statistics.median(s / b for b, s in zip(base, seconds, strict=True))
        print(f"| {name} | {statistics.median(seconds):.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
