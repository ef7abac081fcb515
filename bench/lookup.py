"""Measure the gain of prompt lookup where text repeats, and its cost where no guess holds.

    python bench/lookup.py --shape distilgpt2 --precision fp32 int8 int4

Plain generation and `prompt_lookup_num_tokens` in interleaved rounds, prompts of 64 tokens:

- repeats: greedy text of random weights goes round in circles, and nearly every guess holds;
- misleads: tokens are drawn from 32 ids, evenly, so that the last one has always occurred before,
  every step has something to guess, and 31 of 32 guesses are wrong;
- nothing to find: tokens are drawn from the whole vocabulary, and what is lost is the search.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import shapes

import fastgen
from fastgen.timing.rounds import in_rounds, ratio, seconds

PROMPT, FEW = 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32"])
    parser.add_argument("--new", type=int, default=256, help="tokens that are generated")
    parser.add_argument("--guess", type=int, default=10, help="prompt_lookup_num_tokens")
    args = parser.parse_args()

    print(f"{args.shape}; {shapes.machine(args.threads)}\n")
    print("| | text | plain, ms a token | with lookup | times as fast |")
    print("|---|---|---|---|---|")
    with shapes.exported(args.shape, args.precision, args.keep) as paths:
        for precision, path in paths.items():
            model = fastgen.load(path, threads=args.threads)
            for text, vocabulary, knobs in cases(model.model.info.vocab_size):
                plain, guessed = compare(model, vocabulary, knobs, args)
                times = ratio(plain, guessed)
                one, two = (1e3 * statistics.median(side) / args.new for side in (plain, guessed))
                print(f"| {precision} | {text} | {one:.2f} | {two:.2f} | {times:.3f} |", flush=True)


def cases(vocab: int) -> list[tuple[str, int, dict[str, Any]]]:
    """The kinds of text: a name, the prompt's ids (from 3 on), and the knobs that make it so."""
    few = {"suppress_tokens": list(range(FEW + 3, vocab)), "temperature": 100.0}
    return [
        ("repeats", vocab, {"do_sample": False}),
        ("misleads", FEW + 3, {"do_sample": True, "top_k": 0, **few}),
        ("nothing to find", vocab, {"do_sample": True, "top_k": 0, "temperature": 100.0}),
    ]


def compare(
    model: fastgen.CausalLM, vocabulary: int, knobs: dict[str, Any], args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Seconds of a call in each round, plain and with prompt lookup."""
    random = np.random.default_rng(0)
    prompts = random.integers(3, vocabulary, (1 + args.rounds, PROMPT))
    common = {"max_new_tokens": args.new, "eos_token_id": None, **knobs}

    def timed(guess: int | None) -> Callable[[int], float]:
        knobs = {**common, "prompt_lookup_num_tokens": guess}
        return lambda turn: seconds(lambda: model.generate(prompts[turn], seed=turn, **knobs))

    times = in_rounds({"plain": timed(None), "guessed": timed(args.guess)}, args.rounds)
    return times["plain"], times["guessed"]


if __name__ == "__main__":
    main()
