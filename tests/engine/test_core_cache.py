"""The verbs of the cache beside lists of tokens, and prompts that a prefix cache knows."""

from __future__ import annotations

import numpy as np
import pytest
from numpy_model import KINDS
from tiny import ragged

from fastgen import PrefixCache
from fastgen.engine.cache import Cache

pytestmark = pytest.mark.core

SHAPES = ((2, 4), (1, 8), (2, 4))


def write(cache: Cache, slot: int, tokens: list[int]) -> None:
    """Append tokens as a model does: each number is in all that is kept of it."""
    for token in tokens:
        at = int(cache.lengths[slot])
        if at == 0:
            cache.begin(slot)
        for layer, view in enumerate(cache.slots(slot, 1)):
            view[0, :, at] = token + layer
        for state in cache.states(slot, 1):
            state[0] = state[0] / 2 + token
        cache.lengths[slot] += 1


def held(cache: Cache, slot: int) -> list[int]:
    """The tokens of a slot, which all layers agree on."""
    length = int(cache.lengths[slot])
    found = []
    for layer, view in enumerate(cache.slots(slot, 1)):
        values = view[0, :, :length] - layer
        assert (values == values[:1, :, :1]).all()
        found.append(values[0, :, 0].astype(int).tolist())
    assert all(tokens == found[0] for tokens in found)
    return found[0]


def state_of(tokens: list[int]) -> np.ndarray:
    state = np.zeros(3, np.float32)
    for token in tokens:
        state = state / 2 + token
    return state


def agree(cache: Cache, rows: list[list[int]]) -> None:
    assert cache.lengths.tolist() == list(map(len, rows))
    for slot, tokens in enumerate(rows):
        assert held(cache, slot) == tokens
        for state in cache.states(slot, 1):
            if tokens:
                np.testing.assert_allclose(state[0], state_of(tokens), rtol=1e-6)


@pytest.mark.parametrize("states", [(), ((3,),)], ids=["keys and values", "states"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("seed", range(8))
def test_the_verbs_are_those_of_lists(seed, dtype, states):
    random = np.random.default_rng(seed)
    cache = Cache(SHAPES, rows=4, capacity=8, dtype=dtype, states=states)
    rows: list[list[int]] = [[] for _ in range(4)]
    for _ in range(60):
        verb = random.choice(["write", "take", "trim", "reserve", "carry", "renew"])
        slot = int(random.integers(len(rows)))
        if verb == "write":
            tokens = random.integers(0, 90, int(random.integers(1, 5))).tolist()
            cache.reserve(len(rows), len(rows[slot]) + len(tokens))
            write(cache, slot, tokens)
            rows[slot] = rows[slot] + tokens
        elif verb == "take":
            parents = random.integers(0, len(rows), int(random.integers(1, len(rows) + 1)))
            cache.take(parents)
            rows = [rows[parent] for parent in parents] + [[]] * (len(rows) - len(parents))
        elif verb == "trim" and not states:
            length = int(random.integers(0, len(rows[slot]) + 1))
            cache.trim(slot, length)
            rows[slot] = rows[slot][:length]
        elif verb == "reserve":
            cache.reserve(len(rows) + 1, 8)
            rows += [[]] * (cache.rows - len(rows))
        elif verb == "carry" and rows[slot]:
            other = Cache(SHAPES, rows=2, capacity=cache.capacity, dtype=dtype, states=states)
            length = len(rows[slot])
            assert other.layout == cache.layout
            parts = [*cache.read(slot, 0, length), *cache.state(slot)[1]]
            kinds = [(part.dtype, part.shape) for part in parts]
            assert kinds == cache.kind(length)
            assert sum(part.nbytes for part in parts) == cache.nbytes(length)
            other.append(1, length, parts)
            agree(other, [[], rows[slot]])
        elif verb == "renew":
            last = max((i + 1 for i, row in enumerate(rows) if row), default=1)
            cache.renew(last, max(map(len, rows)) + 1)
            rows = rows[:last]
        agree(cache, rows)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_known_to_be_equal_stays_where_it_is(seed):
    """Beams of one prompt: their first tokens are the same, and only what follows is copied."""
    random = np.random.default_rng(seed)
    cache, prompt = Cache(SHAPES, rows=5, capacity=40), list(range(10))
    rows = [prompt + random.integers(0, 90, 6).tolist() for _ in range(5)]
    for slot, row in enumerate(rows):
        write(cache, slot, row)
    for _ in range(20):
        parents = random.integers(0, 5, 5)
        cache.take(parents, start=len(prompt))
        rows = [rows[parent] for parent in parents]
        agree(cache, rows)


def test_what_cannot_be_taken_back_is_refused():
    cache = Cache(SHAPES, rows=1, capacity=8, states=((3,),))
    write(cache, 0, [5, 6])
    kept = cache.state(0)
    write(cache, 0, [7])
    with pytest.raises(ValueError, match="holds 3 tokens, not 4"):
        cache.trim(0, 4)
    with pytest.raises(ValueError, match="cannot be trimmed"):
        cache.trim(0, 2)
    cache.restore(0, kept)
    agree(cache, [[5, 6]])
    with pytest.raises(ValueError, match="less than what is held"):
        cache.renew(1, 1)


def test_memory_that_was_reached_is_counted_until_it_is_made_anew():
    cache = Cache(SHAPES, rows=2, capacity=8)
    write(cache, 0, [1, 2, 3])
    write(cache, 1, [4])
    assert cache.reached() == 4
    cache.take([1])
    cache.trim(0, 0)
    assert cache.reached() == 4
    cache.renew(2, 8)
    assert cache.reached() == 0


def test_layers_with_a_window_forget_what_they_are_not_shown():
    cache = Cache(SHAPES, rows=1, capacity=2048, windows=(16, None, 16))
    write(cache, 0, [1] * 2048)
    cache.forget(0, 1)
    views = list(cache.slots(0, 1))
    assert (views[0][:, :, 2048 - 256 :] == 1).all()  # what is shown
    assert (views[2] == 1 + 2).all()  # of the layer that sees all


# -- Prompts that are known -----------------------------------------------------------------------

KNOBS = (
    {},
    {"do_sample": True, "seed": 3},
    {"num_beams": 3},
    {"prompt_lookup_num_tokens": 4},
)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_hit_changes_nothing(pair, kind, knobs):
    _, model = pair(kind)
    kept, (shared,) = PrefixCache(), ragged(1, (300,))
    prompts = [shared + more for more in ragged(2, (1, 9, 40, 300))]
    for prompt in prompts:
        expected = model.generate(prompt, max_new_tokens=6, **knobs)
        assert model.generate(prompt, max_new_tokens=6, prefix_cache=kept, **knobs) == expected
    assert (kept.hits, kept.misses) == (3, 1)
    assert kept.tokens_reused >= 3 * 256
    together = model.generate(prompts, max_new_tokens=6, **knobs)
    assert model.generate(prompts, max_new_tokens=6, prefix_cache=kept, **knobs) == together


@pytest.mark.parametrize("kind", KINDS)
def test_only_as_much_is_kept_as_there_is_room_for(pair, kind):
    _, model = pair(kind)
    token = model.model.info.cache_bytes
    kept = PrefixCache(max_bytes=700 * token)
    for seed in range(5):
        (prompt,) = ragged(seed, (400,))
        expected = model.generate(prompt, max_new_tokens=3)
        assert model.generate(prompt, max_new_tokens=3, prefix_cache=kept) == expected
        assert 0 < kept.nbytes <= kept.max_bytes
    kept.clear()
    assert (len(kept), kept.nbytes) == (0, 0)


def test_models_do_not_find_what_others_kept(pair):
    _, one = pair("numpy")
    _, other = pair("numpy", seed=1)
    kept, (prompt,) = PrefixCache(), ragged(3, (100,))
    for model in (one, other, one):
        expected = model.generate(prompt, max_new_tokens=5)
        assert model.generate(prompt, max_new_tokens=5, prefix_cache=kept) == expected
    assert (kept.hits, kept.misses) == (1, 2)
