"""Time model directories beside the first of them: calls of all take turns.

    python bench/ratio.py OLD NEW NEW+int8 NEW+packed [...] --rounds 21

What a busy or a slow minute does to one call it does to its neighbours too, so that ratios of
medians are steadier here than times. Directories are of one model, in any precision; `+int8` behind
one loads it with `prefill_precision="int8"`, and the last line says from how many tokens that pays;
`+packed` loads it from packed weights (see `fastgen.load`).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import shapes

from fastgen.timing.rounds import in_rounds, seconds

PROMPTS, ROWS, PAST = (64, 512), (1, 8, 32), 64
RAGGED = ((8, 128), (16, 512), (263, 263))  # tokens of the first and the last of eight prompts
CHUNK = 256  # tokens for which a slot has room besides those of its row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", nargs="+", metavar="DIRECTORY[+int8][+packed]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="of decoding, in a call")
    args = parser.parse_args()

    import fastgen

    given = [one.split("+") for one in args.directories]
    models = [
        fastgen.load(
            path,
            threads=args.threads,
            prefill_precision="int8" if "int8" in how else "same",
            packed="packed" in how,
        ).model
        for path, *how in given
    ]
    names = [Path(one).name for one in args.directories]
    print(f"{shapes.machine(args.threads)}\n")
    print(f"| | {' | '.join(names)} |")
    print("|---|" + "---|" * len(models))
    for length in PROMPTS:
        calls = [prompts(model, [length]) for model in models]
        print(line(f"prompt of {length}", calls, args.rounds, 1), flush=True)
    for first, last in RAGGED:
        lengths = np.linspace(first, last, 8).astype(int).tolist()
        calls = [prompts(model, lengths) for model in models]
        print(line(f"8 prompts of {first} to {last}", calls, args.rounds, 1), flush=True)
    for rows in ROWS:
        calls = [steps(model, rows, args.steps) for model in models]
        title = "a step of one row" if rows == 1 else f"a step of {rows} rows"
        print(line(title, calls, args.rounds, args.steps), flush=True)
    pays = [str(model.many_from or "") for model in models]
    print(f"| tokens from which the second form pays | {' | '.join(pays)} |")


def line(title: str, calls: list[Callable[[], None]], rounds: int, parts: int) -> str:
    """Medians in ms of the first, and of the others how often they go into its time."""
    took = in_rounds(
        {index: lambda _, call=call: seconds(call) / parts for index, call in enumerate(calls)},
        rounds,
    )
    first, *others = map(statistics.median, took.values())
    cells = [f"{first * 1e3:.2f} ms", *(f"{first / other:.2f}" for other in others)]
    return f"| {title} | {' | '.join(cells)} |"


def prompts(model: Any, lengths: list[int]) -> Callable[[], None]:
    from fastgen.engine.prefill import prefill

    random = np.random.default_rng(0)
    rows = [random.integers(0, model.info.vocab_size, length) for length in lengths]
    return lambda: prefill(model, model.new_cache(len(rows), lengths[-1] + CHUNK), rows, 0)


def steps(model: Any, rows: int, count: int) -> Callable[[], None]:
    """Steps of as many rows, from the same place in their texts each time."""
    ids = np.random.default_rng(0).integers(0, model.info.vocab_size, (rows, PAST + count))

    def call() -> None:
        cache = model.new_cache(rows, PAST + count)
        for at in range(count):
            model.forward(list(ids[:, at : at + 1]), cache)

    return call


if __name__ == "__main__":
    main()
