"""Time one checkout of fastgen beside another: the same calls of the same model, in turn.

    python bench/versions.py BEFORE AFTER --model distilgpt2-int8

Each checkout runs in a process of its own, which waits while the other one works. The table has
the medians of the first, and of the second how much of the first one's time it takes, as the
median of the rounds' ratios: 1.00 is as fast, 1.02 is 2% slower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import shapes

from fastgen.timing.rounds import in_rounds, ratio

WORKER = """
import json, sys, time
import numpy as np
import fastgen
model = fastgen.load(json.loads(sys.argv[1]), threads=int(sys.argv[2]))
vocabulary = model.model.info.vocab_size
for line in sys.stdin:
    rows, prompt, knobs = json.loads(line)
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, prompt))
    start = time.perf_counter()
    model.generate(ids, eos_token_id=None, **knobs)
    print(time.perf_counter() - start, flush=True)
"""


class Version:
    """A process that runs a checkout.

    Args:
        checkout: its root.
        model: what it loads.
        threads: of a step.
    """

    def __init__(self, checkout: Path, model: str | None, threads: int) -> None:
        if not (checkout / "fastgen" / "__init__.py").is_file():
            sys.exit(f"{checkout} is no checkout of fastgen: it has no fastgen/__init__.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", WORKER, json.dumps(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(checkout.resolve())},
            text=True,
        )

    def seconds(self, case: list[Any]) -> float:
        """The time of a call there."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps(case), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def cases(new: int) -> dict[str, list[Any]]:
    """Title -> rows, tokens of the prompt, keywords."""
    some = {"max_new_tokens": new}
    drawn = some | {"do_sample": True, "top_k": 50, "top_p": 0.9, "seed": 0}
    return {
        f"1 row, 16 -> {new}": [1, 16, some],
        f"4 rows, 16 -> {new}": [4, 16, some],
        f"8 rows, 64 -> {new}": [8, 64, some],
        f"1 row, drawn, 16 -> {new}": [1, 16, drawn],
        f"4 beams, 16 -> {new}": [1, 16, some | {"num_beams": 4}],
        f"prompt lookup, 64 -> {new}": [1, 64, some | {"prompt_lookup_num_tokens": 4}],
        "first token after 448": [1, 448, {"max_new_tokens": 1}],
    }


def compared(versions: list[Version], case: list[Any], rounds: int) -> list[list[float]]:
    """Seconds of a call by version and round."""
    calls = {index: lambda _, v=version: v.seconds(case) for index, version in enumerate(versions)}
    return list(in_rounds(calls, rounds).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=Path, metavar="CHECKOUT")
    parser.add_argument("--model", help="a model directory [default: the demo]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()

    versions = [Version(root, args.model, args.threads) for root in args.checkouts]
    print(f"{args.model or 'the demo'}; {shapes.machine(args.threads)}\n")
    print("| | before, ms | after / before |\n|---|---|---|")
    for title, case in cases(args.new).items():
        before, after = compared(versions, case, args.rounds)
        print(f"| {title} | {1e3 * statistics.median(before):.1f} | {ratio(after, before):.3f} |")
    for version in versions:
        version.close()


if __name__ == "__main__":
    main()
