"""Time the first token with the start of the prompt kept, against a fresh prefill.

    python bench/prefix.py --shape distilgpt2 --precision fp32 int8 int4

A prompt of `--prompt` tokens, whose first `--kept` tokens were the start of an earlier prompt; both
sides in interleaved rounds. A hit is measured with the rest of the prompt new in each round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
import shapes

import fastgen
from fastgen.timing.rounds import in_rounds, ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--kept", type=int, default=448)
    args = parser.parse_args()

    print(f"{args.shape}; {shapes.machine(args.threads)}\n")
    print(f"| first token after {args.prompt}, ms | fresh | {args.kept} tokens kept | times |")
    print("|---|---|---|---|")
    with shapes.exported(args.shape, args.precision, args.keep) as paths:
        for precision, path in paths.items():
            model = fastgen.load(path, threads=args.threads)
            fresh, kept = compare(model, args)
            times = ratio(fresh, kept)
            one, two = statistics.median(fresh), statistics.median(kept)
            print(f"| {precision} | {1e3 * one:.1f} | {1e3 * two:.1f} | {times:.2f} |")


def compare(model: fastgen.CausalLM, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds to the first token of each round, fresh and with the kept prefix."""
    random = np.random.default_rng(0)
    ids = random.integers(3, model.model.info.vocab_size, args.prompt)
    cache = fastgen.PrefixCache()
    model.generate(ids[: args.kept], max_new_tokens=1, prefix_cache=cache)
    rest = random.integers(
        3, model.model.info.vocab_size, (args.rounds + 1, args.prompt - args.kept)
    )

    def first(turn: int, prefix_cache: fastgen.PrefixCache | None) -> tuple[float, Any]:
        ids[args.kept :] = rest[turn]
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=1, prefix_cache=prefix_cache)
        return time.perf_counter() - start, out

    calls = {name: partial(first, prefix_cache=one) for name, one in (("", None), ("kept", cache))}
    both = in_rounds(calls, args.rounds)
    (fresh, said), (kept, same) = (zip(*found, strict=True) for found in both.values())
    assert all(map(np.array_equal, said, same)) and cache.hits == args.rounds + 1
    return list(fresh), list(kept)


if __name__ == "__main__":
    main()
