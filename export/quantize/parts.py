"""Large matrices a part at a time, on all cores, and logits: temporaries stay small."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastgen.export.quantize import blas
from fastgen.system.cpu import physical_cores

CHUNK = 32  # positions whose logits are held at a time
PART = 1 << 18  # numbers of a part, about: smaller ones cost more than a cache gives back

Thing = TypeVar("Thing")
Result = TypeVar("Result")

_thread = threading.local()  # `beside`: whether it is one of several that work side by side


def each(
    count: int, size: int, work: Callable[[slice], Result], spread: bool = False
) -> list[Result]:
    """Results of `work` for `count` things, a few neighbours at a time, in order.

    numpy lets other threads run while it computes, so the parts run side by side.

    Args:
        size: numbers that one thing has.
        spread: whether each core has a part, also where all fit into one: `work` takes long.
    """
    cores = 1 if getattr(_thread, "beside", False) else physical_cores()
    step = max(1, PART // max(1, size))
    if spread:
        step = min(step, max(1, -(-count // cores)))
    parts = [slice(at, min(at + step, count)) for at in range(0, count, step)]
    with blas.one_thread():
        if min(cores, len(parts)) < 2:
            return [work(part) for part in parts]
        with ThreadPoolExecutor(min(cores, len(parts))) as pool:
            return list(pool.map(work, parts))


def side_by_side(
    work: Callable[[Thing], Result], things: Sequence[Thing], threads: int | None = None
) -> Iterator[Result]:
    """Results of `work` for each thing, in order: on all cores, each thing on one.

    What is done with a thing is done by one thread, products and `each` included.

    Args:
        threads: None for as many as there are cores.
    """
    threads = min(physical_cores() if threads is None else threads, len(things))
    if threads < 2:
        yield from map(work, things)
        return
    with (
        blas.one_thread(),
        ThreadPoolExecutor(threads, initializer=_begin_beside) as pool,
    ):
        try:
            yield from pool.map(work, things)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin_beside() -> None:
    _thread.beside = True


def chunks(logits: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Logits [length, vocab] a few positions at a time: what is made of them is as large."""
    return (logits[at : at + CHUNK] for at in range(0, len(logits), CHUNK))
