"""Ragged prompts: the cheapest way to read them together, beside every way there is."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy_model
import pytest

from fastgen.engine import cuts
from fastgen.engine.cuts import Cuts
from fastgen.engine.prefill import Prefill

pytestmark = pytest.mark.core

CHUNK, MOST = 16, 48


@functools.cache
def every_way(lengths: tuple[int, ...], at: int, between: bool) -> float:
    """The least cost of reading a group from a token on, by every stop that there may be."""
    if not lengths:
        return 0.0
    ends = {n + n % 2 for n in lengths[:-1]} if between else set()
    chunk_end = (at // CHUNK + 1) * CHUNK
    costs = [float("inf")]
    for stop in sorted({*ends, lengths[-1], chunk_end}):
        width = min(stop, lengths[-1]) - at
        if at < stop <= chunk_end and (len(lengths) == 1 or len(lengths) * width <= MOST):
            left = tuple(n for n in lengths if n > stop)
            costs.append(
                cuts.CALL + len(lengths) * width + every_way(left, min(stop, lengths[-1]), between)
            )
    return min(costs)


@pytest.mark.parametrize("between", [False, True])
def test_rows_are_read_together_where_that_costs_least(between):
    """Beside every way to cut a few rows into groups, and each of them into calls."""
    random, kinds = np.random.default_rng(0), Cuts(CHUNK, MOST, between)
    for _ in range(60):
        lengths = sorted(random.integers(1, 40, int(random.integers(1, 8))).tolist())
        count = len(lengths)

        def cost(inner: Sequence[int], lengths: list[int] = lengths) -> float:
            ends = itertools.pairwise((0, *inner, len(lengths)))
            return sum(every_way(tuple(lengths[a:b]), 0, between) for a, b in ends)

        every = [
            inner
            for size in range(count)
            for inner in itertools.combinations(range(1, count), size)
        ]
        found = kinds.together(lengths)
        assert [a for a, _ in found] == [0, *[b for _, b in found[:-1]]] and found[-1][1] == count
        assert cost([b for _, b in found[:-1]]) == min(map(cost, every))
        assert sum(kinds.cost(lengths[a:b]) for a, b in found) == min(map(cost, every))


def calls(kinds: Cuts, lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rows, first token and stop of each call that reads a group."""
    made, at, left = [], 0, [*lengths]
    while left:
        stop = kinds.stop(left, at)
        made.append((len(left), at, stop))
        left, at = [n for n in left if n > stop], stop
    return made


def test_a_staircase_reads_all_to_the_end_of_a_shorter_one():
    kinds = Cuts(256, 512, True)
    lengths = [16, 87, 158, 229, 300, 371, 442, 512]
    assert kinds.together(lengths) == [(0, 8)]
    assert calls(kinds, lengths) == [
        (8, 0, 16), (7, 16, 88), (6, 88, 158), (5, 158, 230), (4, 230, 256), (4, 256, 300),
        (3, 300, 372), (2, 372, 442), (1, 442, 512),
    ]  # fmt: skip
    assert Cuts(256, 512).together(lengths) == [(row, row + 1) for row in range(8)]


def test_no_cut_leaves_a_token_alone_that_is_not_alone_anyway():
    sizes = frozenset({64, 128, 256})
    for lengths in ([119, 120, 121], [63, 128, 129], [40, 41, 105, 169], [255, 257, 300]):
        kinds = Cuts(256, 512, True, sizes)
        for first, end in kinds.together(lengths):
            group = lengths[first:end]
            for _, at, stop in calls(kinds, group):
                for length in group:
                    if at < length:
                        last = min(length, stop)
                        apart = length <= stop and (length - at // 256 * 256) % 64 == 1
                        assert ((last - at) % 64 == 1) == apart, (lengths, at, stop, length)


def test_what_is_known_of_a_prompt_costs_nothing():
    """Of eight rows that begin alike, the first is read, and then the others' ends together."""
    kinds, lengths = Cuts(256, 512, True), [*range(305, 313)]
    assert kinds.together(lengths, lambda row, first: 288 if first else 0) == [(0, 1), (1, 8)]
    assert kinds.together(lengths, lambda row, first: 288) == [(0, 8)]


def test_many_rows_are_cut_in_no_time():
    for lengths in ([1] * 300, sorted(np.random.default_rng(0).integers(1, 999, 100).tolist())):
        found = Cuts(256, 512, True).together(lengths)
        assert found[-1][1] == len(lengths)


def test_states_go_through_whole_chunks():
    for kind, between in ({}, True), ({"windows": True}, True), ({"states": True}, False):
        model = numpy_model.NumpyModel(**kind)
        prefill = Prefill(model, model.new_cache(1, 9), [np.array([5])], 0)
        assert prefill._cuts.between is between
