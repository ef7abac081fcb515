"""Measure a long context: reading it, and a step after it, by precision of the cache.

    python bench/context.py --shape smollm-135m --past 500 1800
    python bench/context.py --shape llama-0.5b --precision int8 --past 2000 8000 32000 --rounds 1
    python bench/context.py --shape gemma-270m --precision int8 --cache-precision fp32 --every-token

Every model reads the same tokens and steps after them, in interleaved rounds. The tables give
medians over the rounds; megabytes are those that the process holds more with the prompt read.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import shapes

from fastgen.timing.rounds import in_rounds

LONG = 4000  # tokens from which on nothing is warmed up: it would take as long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--cache-precision", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--past", type=int, nargs="+", default=[1800], help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=16, help="steps")
    parser.add_argument(
        "--every-token",
        action="store_true",
        help="also as if layers with windows were shown all, and all was kept",
    )
    args = parser.parse_args()

    import fastgen

    with shapes.exported(args.shape, args.precision, args.keep, args.cache_precision) as paths:
        models = {
            name: fastgen.load(path, threads=args.threads).model for name, path in paths.items()
        }
        print(f"{args.shape}, {args.rows} rows; {shapes.machine(args.threads)}\n")
        print("| tokens | model | MB more | s to read them | tokens a second | ms a step after |")
        print("|---|---|---|---|---|---|")
        for past in args.past:
            contexts = {name: Context(model, args, past) for name, model in models.items()}
            for name, model in models.items() if args.every_token else ():
                contexts[f"{name}, every token"] = Context(model, args, past, every=True)
            for name, told in summaries(contexts, args.rounds, warm=int(past < LONG)):
                print(f"| {past:,} | {name} | {told} |", flush=True)


class Context:
    """A model that reads so many tokens of some rows, and steps after them."""

    def __init__(
        self, model: Any, args: argparse.Namespace, past: int, every: bool = False
    ) -> None:
        self.model, self.rows, self.past, self.new = model, args.rows, past, args.new
        self.grain, self.windows = model.grain, model.info.windows
        if every:
            self.grain, self.windows = past + args.new, ()
        random = np.random.default_rng(0)
        self.ids = random.integers(0, model.info.vocab_size, (args.rows, past + args.new))

    def round(self, _: int) -> tuple[float, float, float]:
        """Megabytes more, seconds to read, and seconds of a step."""
        from fastgen.engine.prefill import CHUNK, prefill

        cache = self.model.new_cache(self.rows, self.past + max(CHUNK, self.new))
        cache.windows, self.model.grain = self.windows, self.grain
        held = shapes.resident()
        start = time.perf_counter()
        prefill(self.model, cache, list(self.ids[:, : self.past]), 0)
        took = time.perf_counter() - start
        held = shapes.resident() - held
        read = time.perf_counter()
        for step in range(self.past, self.past + self.new):
            self.model.forward(list(self.ids[:, step : step + 1]), cache)
        return held, took, (time.perf_counter() - read) / self.new


def summaries(
    contexts: Mapping[str, Context], rounds: int, warm: int = 1
) -> Iterator[tuple[str, str]]:
    """The cells of each, in interleaved rounds."""
    calls = {name: context.round for name, context in contexts.items()}
    for name, found in in_rounds(calls, rounds, warm).items():
        megabytes, read, step = map(statistics.median, zip(*found, strict=True))
        tokens = contexts[name].rows * contexts[name].past
        yield name, f"{megabytes:.1f} | {read:.2f} | {tokens / read:,.0f} | {1e3 * step:.2f}"


if __name__ == "__main__":
    main()
