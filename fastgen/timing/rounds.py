"""Rounds of timing: every call once a round, in turn, so that a busy minute hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name")
Result = TypeVar("Result")


def in_rounds(
    calls: Mapping[Name, Callable[[int], Result]], rounds: int, warm: int = 1
) -> dict[Name, list[Result]]:
    """Run every call once a round, in turn.

    Args:
        calls: each takes the number of the round, from 0 on, and returns what it measured.
        rounds: that count.
        warm: rounds before these, whose results are left out.

    Returns:
        the results of each call, by round.
    """
    results: dict[Name, list[Result]] = {name: [] for name in calls}
    for turn in range(warm + rounds):
        for name, call in calls.items():
            result = call(turn)
            if turn >= warm:
                results[name].append(result)
    return results


def seconds(work: Callable[[], Any]) -> float:
    """The time that work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' ratios, which is steadier than a ratio of medians."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
