"""Compare a decode step with reading the weights and the cache once, at memory's own speed.

    python bench/bandwidth.py --precision fp32 int8 int4

Memory's speed is the best that products of arrays far larger than any cache reach, one thread for
each of the model's: of one stream of numbers, and of the rows of a matrix, several at a time. Steps
of the models and these are timed in interleaved rounds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the threads here are our own

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import shapes

from fastgen.timing.rounds import in_rounds

FLOATS = 48 << 20  # of each array of each thread
ROW = 4096  # of them in a row of a matrix

READERS: list[Callable[[Any], Any]] = [
    lambda array: array @ array,
    lambda array: array.reshape(-1, ROW) @ array[:ROW],
    lambda array: array[: len(array) // ROW] @ array.reshape(-1, ROW),
]


def main(floats: int = FLOATS) -> None:
    """Measure with arrays of so many numbers for each thread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser)
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"])
    parser.add_argument("--past", type=int, default=48, help="tokens that the cache holds")
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()

    import fastgen

    arrays = [np.ones(floats, np.float32) for _ in range(args.threads)]
    with (
        ThreadPoolExecutor(args.threads) as pool,
        shapes.exported(args.shape, args.precision, args.keep) as paths,
    ):
        models = {
            name: fastgen.load(path, threads=args.threads).model for name, path in paths.items()
        }
        calls = {
            name: lambda _, model=model: step(model, args.past, args.new)
            for name, model in models.items()
        }
        steps = in_rounds({"": lambda _: bandwidth(pool, arrays), **calls}, args.rounds)
        speeds = steps[""]
        print(f"{args.shape}; {shapes.machine(args.threads)}")
        print(
            f"memory: {statistics.median(speeds) / 1e9:.1f} GB/s, read by {args.threads} threads\n"
        )
        print("| precision | MB a step | ms at memory's speed | ms of the step | share |")
        print("|---|---|---|---|---|")
        for name, model in models.items():
            size = read_by_a_step(model, args.past + args.new // 2)
            share = statistics.median(
                size / speed / seconds for speed, seconds in zip(speeds, steps[name], strict=True)
            )
            ideal, real = size / statistics.median(speeds), statistics.median(steps[name])
            times = f"{1e3 * ideal:.2f} | {1e3 * real:.2f}"
            print(f"| {name} | {size / 1e6:.1f} | {times} | {share:.0%} |")


def bandwidth(pool: ThreadPoolExecutor, arrays: list[Any]) -> float:
    """Bytes a second that all threads read together."""
    best = 0.0
    for reader in 5 * READERS:
        start = time.perf_counter()
        list(pool.map(reader, arrays))
        best = max(best, sum(a.nbytes for a in arrays) / (time.perf_counter() - start))
    return best


def step(model: Any, past: int, new: int) -> float:
    """Seconds of a decode step of one row: the session alone."""
    ids = np.random.default_rng(0).integers(0, model.info.vocab_size, past)
    cache = model.new_cache(1, past + new + 2)
    model.forward([ids], cache)
    for _ in range(2):
        model.forward([ids[:1]], cache)
    start = time.perf_counter()
    for _ in range(new):
        model.forward([ids[:1]], cache)
    return (time.perf_counter() - start) / new


def read_by_a_step(model: Any, length: int) -> float:
    """Bytes: all weights but tables that are only looked up, and keys and values so far."""
    import onnx

    graph = onnx.load(model.directory / "model.onnx", load_external_data=False).graph
    sizes = {one.name: np.prod(one.dims) for one in graph.initializer}
    widths = {one.name: one.data_type for one in graph.initializer}
    read: dict[str, float] = {}
    for node in graph.node:
        if node.op_type == "Gather":
            continue
        for name in node.input:
            if name in sizes and sizes[name] > 1024 and not name.startswith("rotation"):
                dtype = onnx.helper.tensor_dtype_to_np_dtype(widths[name])
                read[name] = float(sizes[name]) * dtype.itemsize
    return sum(read.values()) + length * model.info.cache_bytes


if __name__ == "__main__":
    main()
