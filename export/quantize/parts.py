"""Large matrices a part at a time, on all cores, and logits: temporaries stay small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastgen.system.cpu import physical_cores

CHUNK = 32  # positions whose logits are held at a time
PART = 1 << 18  # numbers of a part, about: smaller ones cost more than a cache gives back

Result = TypeVar("Result")


def each(count: int, size: int, work: Callable[[slice], Result]) -> list[Result]:
    """Results of `work` for `count` things, a few neighbours at a time, in order.

    numpy lets other threads run while it computes, so the parts run side by side.

    Args:
        size: numbers that one thing has.
    """
    step = max(1, PART // max(1, size))
    parts = [slice(at, min(at + step, count)) for at in range(0, count, step)]
    threads = min(physical_cores(), len(parts))
    if threads < 2:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, parts))


def chunks(logits: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Logits [length, vocab] a few positions at a time: what is made of them is as large."""
    return (logits[at : at + CHUNK] for at in range(0, len(logits), CHUNK))
