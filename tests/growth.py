"""The growth of work with its size, which no other machine and no other load makes larger."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

RUNS = 3  # the best of them counts
LEAST = 1e-3  # seconds; below it the clock says little


def growth(run: Callable[[int], Any], small: int, large: int, enough: float) -> float:
    """The time of this thread's processor for `run(large)`, by that for `run(small)`.

    Args:
        enough: a growth that is small enough to be believed without another run.
    """

    def seconds(size: int) -> float:
        start = time.thread_time()
        run(size)
        return time.thread_time() - start

    least = max(LEAST, min(seconds(small) for _ in range(RUNS)))
    found = float("inf")
    for _ in range(RUNS):
        found = min(found, seconds(large) / least)
        if found <= enough:
            break
    return found
