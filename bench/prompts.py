"""Measure the gain and the cost of prompts in int8 for a model in int4.

    python bench/prompts.py --shape distilgpt2 --keep DIR

The first token after prompts of several lengths, in interleaved rounds: int4, int4 with prompts in
int8, and int8. Then each in a process of its own: seconds to load, and memory after a prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapes

from fastgen.timing.rounds import in_rounds, ratio, seconds

KINDS = {
    "int4": ("int4", "same"),
    "int4, prompts in int8": ("int4", "int8"),
    "int8": ("int8", "same"),
}
LOADED = """
import json, sys, time, numpy, fastgen.engine.prefill, fastgen.engine.model
from pathlib import Path
sys.path.insert(0, {here!r})
import shapes
before = shapes.resident()
start = time.perf_counter()
model = fastgen.engine.model.Model(Path({path!r}), {threads}, prefill_precision={prompts!r})
seconds, loaded, most = time.perf_counter() - start, shapes.resident(), shapes.resident("VmHWM")
prompt = numpy.arange({prompt}) % model.info.vocab_size
fastgen.engine.prefill.prefill(model, model.new_cache(1, {prompt} + 1), [prompt], 0)
print(json.dumps([seconds, loaded - before, most - before, shapes.resident() - before]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--prompt", nargs="+", type=int, default=[32, 64, 128, 512])
    args = parser.parse_args()
    with shapes.exported(args.shape, ["int4", "int8"], args.keep) as paths:
        print(f"{args.shape}; {shapes.machine(args.threads)}\n")
        for line in (*first_tokens(args, paths), "", *loads(args, paths)):
            print(line, flush=True)


def first_tokens(args: argparse.Namespace, paths: dict[str, Path]) -> Iterator[str]:
    import fastgen

    models = {
        name: fastgen.load(paths[kind], threads=args.threads, prefill_precision=prompts)
        for name, (kind, prompts) in KINDS.items()
    }
    yield f"| first token after, ms | {' | '.join(models)} | times int4 | of int8 |"
    yield f"|---|{'---|' * (len(models) + 2)}"
    for length in args.prompt:
        times = timed(models, length, args.rounds)
        own, apart, int8 = times.values()
        medians = [f"{1e3 * statistics.median(one):.1f}" for one in times.values()]
        ratios = [f"{ratio(other, apart):.2f}" for other in (own, int8)]
        shown = " | ".join([*medians, *ratios])
        yield f"| {length} | {shown} |"


def timed(models: dict[str, Any], length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token, by model and round. Each round has a new random prompt."""
    random = np.random.default_rng(0)

    def timed_one(model: Any) -> float:
        ids = random.integers(0, model.model.info.vocab_size, (1, length))
        return seconds(lambda: model.generate(ids, max_new_tokens=1, do_sample=False))

    calls = {name: lambda _, model=model: timed_one(model) for name, model in models.items()}
    return in_rounds(calls, rounds)


def loads(args: argparse.Namespace, paths: dict[str, Path]) -> Iterator[str]:
    yield "| | s to load | MB then | MB at most on the way | MB after the longest prompt | files |"
    yield "|---|---|---|---|---|---|"
    for name, (kind, prompts) in KINDS.items():
        program = LOADED.format(
            here=str(Path(__file__).parent),
            path=str(paths[kind]),
            threads=args.threads,
            prompts=prompts,
            prompt=max(args.prompt),
        )
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, "-c", program], check=True, capture_output=True, text=True
                ).stdout
            )
            for _ in range(3)
        ]
        took, loaded, most, after = (statistics.median(one) for one in zip(*runs, strict=True))
        size = sum(one.stat().st_size for one in paths[kind].iterdir()) / 1e6
        yield f"| {name} | {took:.2f} | {loaded:.0f} | {most:.0f} | {after:.0f} | {size:.1f} |"


if __name__ == "__main__":
    main()
