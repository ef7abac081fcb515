"""How much memory an export needs, as multiples of the model's float32 weights.

    python bench/export.py --shape smollm-135m --precision fp32 int8 int4

A process of its own exports a saved model and notes its resident memory every few milliseconds,
by the step that runs. What the imports of torch and transformers take is told apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import shapes

NEEDED = "RssAnon"  # what no other process could use: mapped files aside
PAUSE = 0.01  # seconds between two looks at the memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="smollm-135m")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)  # of the child process
    args = parser.parse_args()
    if args.source:
        child(args.source, args.precision[0])
        return
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        model = shapes.build(args.shape)
        weights = 4 * sum(p.numel() for p in model.parameters()) / 1e6
        model.save_pretrained(source)
        del model
        print(f"{args.shape}, {weights:,.0f} MB of weights; {shapes.machine(2)}\n")
        print(
            "| precision | MB after imports | peak MB | of which the step | more than the imports |"
        )
        print("|---|---|---|---|---|")
        for precision in args.precision:
            found = json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--source", source, "--precision", precision],
                    check=True, stdout=subprocess.PIPE,
                ).stdout
            )  # fmt: skip
            step, peak = max(found["steps"].items(), key=lambda item: item[1])
            more = (peak - found["imports"]) / weights
            print(f"| {precision} | {found['imports']:.0f} | {peak:.0f} | {step} | {more:.2f} |")
            steps = ", ".join(f"{name} {value:.0f}" for name, value in found["steps"].items())
            print(f"  {steps}", file=sys.stderr)


def child(source: Path, precision: str) -> None:
    """Export, and print the resident memory after the imports and at each step's peak."""
    from fastgen.export import pipeline

    imports = shapes.resident(NEEDED)
    running, peaks, ended = ["load"], {}, threading.Event()

    class Watched(pipeline.Progress):
        def step(self, name):
            running[0] = name
            return super().step(name)

    def watch() -> None:
        while not ended.is_set():
            name = running[0]
            peaks[name] = max(peaks.get(name, 0), shapes.resident(NEEDED))
            time.sleep(PAUSE)

    pipeline.Progress = Watched
    threading.Thread(target=watch, daemon=True).start()
    pipeline.export(source, source.parent / precision, precision=precision, allow_mismatch=True)
    ended.set()
    print(json.dumps({"imports": imports, "steps": peaks}))


if __name__ == "__main__":
    main()
