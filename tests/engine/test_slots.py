"""The slots of a cache: rows move between them, and the cache moves along."""

from __future__ import annotations

import numpy as np
import pytest

from fastgen.engine.cache import Cache
from fastgen.engine.slots import Move, Slots


def holding(*tokens: int, rows: int = 8) -> Slots:
    """Slots that hold a token each, whose keys are its number; 0 is an empty slot."""
    cache = Cache([(1, 2)], rows, 4)
    for slot, token in enumerate(tokens):
        if token:
            cache.append(slot, 1, [np.full((2, 1, 1, 2), token, np.float32)])
    return Slots(cache)


def held(slots: Slots) -> list[int]:
    """The token of each slot, 0 of those that are empty."""
    cache = slots.cache
    return [
        int(cache.read(slot, 0, 1)[0].flat[0]) if cache.lengths[slot] else 0
        for slot in range(cache.rows)
    ]


def test_copies_are_made_all_at_once():
    slots = holding(1, 2, 3, 4)
    slots.copy([Move(0, 1), Move(1, 0)], 3)
    assert held(slots) == [2, 1, 3, 0, 0, 0, 0, 0]


def test_a_copy_from_a_token_on_leaves_what_is_before_it():
    slots = Slots(Cache([(1, 2)], 2, 4))
    for slot, token in enumerate((1, 2)):
        slots.cache.append(slot, 2, [np.full((2, 1, 2, 2), token, np.float32)])
    slots.copy([Move(0, 1, 1)], 2)
    assert slots.cache.read(0, 0, 2)[0][0, 0, :, 0].tolist() == [1, 2]


def test_what_was_read_is_inserted_behind_the_rows_that_run():
    slots = holding(1, 2, 5, 6)
    assert slots.insert([2, 2, 3], 2) == []
    assert held(slots) == [1, 2, 5, 5, 6, 0, 0, 0]


def test_prompts_that_are_read_meanwhile_make_way():
    slots = holding(1, 5, 7, 8)
    assert slots.insert([1, 1, 1], 1, [range(2, 4)]) == [4]
    assert held(slots)[:6] == [1, 5, 5, 5, 7, 8]


def test_prompts_that_are_read_far_enough_behind_stay():
    slots = holding(1, 5, 0, 0, 7, 8)
    assert slots.insert([1, 1], 1, [range(4, 6)]) == [4]
    assert held(slots)[:3] == [1, 5, 5] and held(slots)[4:] == [7, 8, 0, 0]


def test_the_cache_grows_where_rows_are_inserted():
    slots = holding(1, 2, rows=2)
    slots.insert([1] * 5, 1)
    assert held(slots) == [1, 2, 2, 2, 2, 2]


def test_gaps_are_filled_by_those_behind_and_nobody_else_moves():
    slots = holding(1, 2, 3, 4, 5)
    assert slots.close_gaps([0, 2, 4]) == [0, 2, 1]
    assert held(slots) == [1, 5, 3, 0, 0, 0, 0, 0]


def test_gaps_are_closed_in_order():
    slots = holding(1, 2, 3, 4, 5)
    assert slots.close_gaps([1, 3, 4], in_order=True) == [0, 1, 2]
    assert held(slots) == [2, 4, 5, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("in_order", [False, True])
def test_what_is_read_behind_the_gaps_stays(in_order):
    slots = holding(1, 2, 3, 7, 8)
    slots.close_gaps([0, 2], end=5, in_order=in_order)
    assert held(slots)[:2] == [1, 3] and held(slots)[3:] == [7, 8, 0, 0, 0]


def test_slots_that_are_not_used_are_cleared():
    slots = holding(1, 2, 3, 4)
    slots.clear({0, 3})
    assert held(slots) == [1, 0, 0, 4, 0, 0, 0, 0]
