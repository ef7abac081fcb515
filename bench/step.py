"""Measure a step's cost besides the graph: fastgen's loop against bare `session.run`.

    python bench/step.py --shape distilgpt2

Both run the same tokens in interleaved rounds. The bare loop does nothing but run the bound
session; the difference is python, numpy and the pick of the token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()

    import fastgen

    with shapes.exported(args.shape, [args.precision], args.keep) as paths:
        model = fastgen.load(paths[args.precision], threads=args.threads)
        print(f"{args.shape} {args.precision}; {shapes.machine(args.threads)}\n")
        print("| rows | knobs | bare session.run, ms | fastgen's step, ms | more |")
        print("|---|---|---|---|---|")
        for rows in args.rows:
            for name, knobs in KNOBS.items():
                compare(model, rows, name, knobs, args)


KNOBS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling, top_k 50, top_p 0.9": {"do_sample": True, "top_k": 50, "top_p": 0.9, "seed": 0},
    "sampling, whole vocabulary": {"do_sample": True, "top_k": 0, "seed": 0},
}


def compare(
    model: Any, rows: int, name: str, knobs: dict[str, Any], args: argparse.Namespace
) -> None:
    from fastgen.engine.batch import Batch

    random = np.random.default_rng(0)
    ids = random.integers(0, model.model.info.vocab_size, (rows, 16))
    bare: list[float] = []
    whole: list[float] = []
    for turn in range(args.rounds + 1):
        knobs = {**knobs, "max_new_tokens": args.new + 2, "eos_token_id": None}
        batch = Batch(model.model)
        batch.add(model._call(ids, knobs=knobs).request)
        batch.step()
        batch.step()
        start = time.perf_counter()
        for _ in range(args.new):
            batch.step()
        if turn:
            whole.append((time.perf_counter() - start) / args.new)
        (call,) = [bound for key, bound in batch.cache.bindings.items() if key[2] == 1]
        # The same lengths once more: back to the first step, then one token at a time.
        call.seqlens_k -= args.new
        call.total_sequence_length -= args.new
        call.position_ids -= args.new
        start = time.perf_counter()
        for _ in range(args.new):
            call.seqlens_k += 1
            call.total_sequence_length += 1
            call.position_ids += 1
            model.model.session.run_with_iobinding(call.binding)
        if turn:
            bare.append((time.perf_counter() - start) / args.new)
    one, two = statistics.median(bare), statistics.median(whole)
    more = statistics.median(b / a - 1 for a, b in zip(bare, whole, strict=True))
    print(f"| {rows} | {name} | {1e3 * one:.2f} | {1e3 * two:.2f} | {more:+.1%} |")


if __name__ == "__main__":
    main()
