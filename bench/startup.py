"""Time the first token in a new process, with the embedded demo model.

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
from collections.abc import Callable
from pathlib import Path

from fastgen.timing.rounds import in_rounds, ratio, seconds

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
    env = os.environ | {"PYTHONPATH": str(Path(fastgen.__file__).parents[1])}

    def timed(program: str) -> Callable[[int], float]:
        command = [sys.executable, "-c", program, str(DEMO / "model.onnx")]
        return lambda _: seconds(lambda: subprocess.run(command, check=True, env=env))

    times = in_rounds({name: timed(program) for name, program in programs.items()}, args.rounds)
    base = next(iter(times.values()))
    print("| a new process | seconds | times the first |")
    print("|---|---|---|")
    for name, took in times.items():
        print(f"| {name} | {statistics.median(took):.3f} | {ratio(took, base):.2f} |")


if __name__ == "__main__":
    main()
