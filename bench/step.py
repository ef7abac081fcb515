"""Measure a step's cost besides the graph: fastgen's loop against bare `session.run`.

    python bench/step.py --shape distilgpt2
    python bench/step.py --directory fastgen/demo --threads 1 --rows 1 4 8

Both run the same tokens in interleaved rounds. The bare loop does nothing but run the bound
session; the difference is python, numpy and the pick of the token. "Python alone" is fastgen's loop
with a session that does nothing: the least of all rounds, in microseconds of a step and of a call
of one new token. What a busy machine does to it is little.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--directory", type=Path, help="a model directory, in place of a shape")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()

    import fastgen

    with given(args) as directory:
        model = fastgen.load(directory, threads=args.threads)
        print(f"{directory.name}; {shapes.machine(args.threads)}\n")
        print(
            "| rows | knobs | bare session.run, ms | fastgen's step, ms | more | Python alone, us |"
            " of a call |"
        )
        print("|---|---|---|---|---|---|---|")
        for rows in args.rows:
            for name, knobs in KNOBS.items():
                compare(model, rows, name, knobs, args)


@contextlib.contextmanager
def given(args: argparse.Namespace) -> Iterator[Path]:
    """The model directory: as given, or an export of the shape."""
    if args.directory:
        yield args.directory
        return
    with shapes.exported(args.shape, [args.precision], args.keep) as paths:
        yield paths[args.precision]


class Silent:
    """A session that does nothing."""

    def __init__(self, session: Any) -> None:
        self.io_binding = session.io_binding

    def run_with_iobinding(self, binding: Any) -> None:
        pass


KNOBS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling, top_k 50, top_p 0.9": {"do_sample": True, "top_k": 50, "top_p": 0.9, "seed": 0},
    "sampling, whole vocabulary": {"do_sample": True, "top_k": 0, "seed": 0},
}


def compare(
    model: Any, rows: int, name: str, knobs: dict[str, Any], args: argparse.Namespace
) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(0, model.model.info.vocab_size, (rows, 16))
    knobs = {**knobs, "max_new_tokens": args.new + 2, "eos_token_id": None}
    session, silent = model.model.session, Silent(model.model.session)
    bare: list[float] = []
    whole: list[float] = []
    python: list[float] = []
    calls: list[float] = []
    for turn in range(args.rounds + 1):
        batch = begun(model, ids, knobs)
        whole.append(steps(batch, args.new))
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
            session.run_with_iobinding(call.binding)
        bare.append((time.perf_counter() - start) / args.new)
        model.model.session = silent
        python.append(steps(begun(model, ids, knobs), args.new))
        start = time.perf_counter()
        model.generate(ids, **knobs | {"max_new_tokens": 1})
        calls.append(time.perf_counter() - start)
        model.model.session = session
        if not turn:  # which touches the memory
            bare, whole = [], []
    one, two = statistics.median(bare), statistics.median(whole)
    more = statistics.median(b / a - 1 for a, b in zip(bare, whole, strict=True))
    ours = f"{1e6 * min(python):.1f} | {1e6 * min(calls):.0f}"
    print(f"| {rows} | {name} | {1e3 * one:.2f} | {1e3 * two:.2f} | {more:+.1%} | {ours} |")


def begun(model: Any, ids: Any, knobs: dict[str, Any]) -> Any:
    """A batch after its prompts and two steps."""
    from fastgen.engine.batch import Batch

    batch = Batch(model.model)
    batch.add(model._call(ids, knobs=knobs).request)
    batch.step()
    batch.step()
    return batch


def steps(batch: Any, count: int) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    for _ in range(count):
        batch.step()
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
