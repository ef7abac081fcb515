"""What a long context costs: a chunk of a prompt and a step after it, by precision of the cache.

    python bench/context.py --shape smollm-135m --past 1800

Every model runs the same tokens in interleaved rounds, each of one chunk and some steps after the
same past, which is then taken back. The tables give medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--cache-precision", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--past", type=int, default=1800, help="tokens held before what is timed")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a prompt, of one row")
    parser.add_argument("--new", type=int, default=16, help="steps")
    args = parser.parse_args()

    import fastgen

    with shapes.exported(args.shape, args.precision, args.keep, args.cache_precision) as paths:
        contexts = {}
        for name, path in paths.items():
            contexts[name] = Context(fastgen.load(path, threads=args.threads).model, args)
        for turn in range(args.rounds + 1):  # the first warms up
            for context in contexts.values():
                context.round(keep=turn > 0)
    print(f"{args.shape}, {args.rows} rows; {shapes.machine(args.threads)}\n")
    print(f"| model | MB cache | ms a step after {args.past} | ms a chunk of {args.chunk} |")
    print("|---|---|---|---|")
    for name, one in contexts.items():
        step, chunk = (1e3 * statistics.median(times) for times in (one.steps, one.chunks))
        print(f"| {name} | {one.megabytes:.1f} | {step:.2f} | {chunk:.1f} |")


class Context:
    """A model with rows that hold a past."""

    def __init__(self, model: object, args: argparse.Namespace) -> None:
        from fastgen.prefill import CHUNK, prefill

        self.model, self.args = model, args
        self.steps: list[float] = []
        self.chunks: list[float] = []
        random = np.random.default_rng(0)
        room = max(CHUNK, args.chunk, args.new)
        self.ids = random.integers(0, model.info.vocab_size, (args.rows, args.past + room))
        self.cache = model.new_cache(args.rows, args.past + room)
        self.megabytes = args.rows * args.past * model.info.cache_bytes / 1e6
        prefill(model, self.cache, list(self.ids[:, : args.past]), 0)

    def round(self, keep: bool) -> None:
        past, args = self.args.past, self.args
        start = time.perf_counter()
        self.model.forward([self.ids[0, past : past + args.chunk]], self.cache)
        chunk = time.perf_counter() - start
        self.cache.trim(0, past)
        start = time.perf_counter()
        for step in range(args.new):
            self.model.forward(list(self.ids[:, past + step : past + step + 1]), self.cache)
        steps = (time.perf_counter() - start) / args.new
        for row in range(args.rows):
            self.cache.trim(row, past)
        if keep:
            self.chunks.append(chunk)
            self.steps.append(steps)


if __name__ == "__main__":
    main()
