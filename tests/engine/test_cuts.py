"""Ragged prompts that are read in a staircase: the same bits as by any other way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import ragged

import fastgen
from fastgen.engine.cuts import Cuts
from fastgen.engine.model import Model
from fastgen.engine.prefill import Prefill
from fastgen.export import export
from fastgen.export.source.origin import Tolerance

LOOSE = Tolerance(max_difference=1.0, kl=1.0, top1=0.0, greedy=False)
KINDS = ["llama", "gemma2", "gemma3_text", "gpt2", "phi3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Any:
    """Models with room for several chunks, by kind and precision."""
    home = tmp_path_factory.mktemp("cuts")

    @functools.cache
    def one(kind: str, precision: str, keys: str = "fp32") -> Model:
        path = home / f"{kind}-{precision}-{keys}"
        config = {"n_positions": 700} if kind == "gpt2" else {"max_position_embeddings": 700}
        export(
            tiny.build(kind, **config), path, tokenizer=tiny.tokenizer(), precision=precision,
            cache_precision=keys, progress=None, tolerance=LOOSE,
        )  # fmt: skip
        return fastgen.load(path).model

    return one


def read(
    model: Model, rows: Sequence[Any], kinds: Cuts | None = None
) -> tuple[list[Any], list[int]]:
    """Logits, keys and values and states of each row, and the stops on the way."""
    held = model.new_cache(len(rows), max(map(len, rows)) + 256)
    prefill = Prefill(model, held, [np.array(row) for row in rows], 0)
    if kinds is not None:
        prefill._cuts = kinds
    stops = []
    while not prefill.done:
        prefill.read()
        stops += held.lengths.tolist()
    kept = [held.read(row, 0, len(ids)) for row, ids in enumerate(rows)]
    states = [held.state(row)[1] for row in range(len(rows))]
    return [[a, *b, *c] for a, b, c in zip(prefill.logits, kept, states, strict=True)], stops


def same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(np.array_equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


LENGTHS = [
    (16, 87, 158, 229, 300, 371, 442, 512), (9, 33, 130, 257, 258, 321), (17, 40, 301, 600),
    (40, 41, 105, 169), (1, 2, 3, 120, 121), (63, 65, 127, 129, 193, 385),
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("kind", tiny.some(KINDS, {"llama", "gemma2"}))
def test_a_staircase_leaves_every_bit_as_it_is(made, kind, precision):
    """Beside cuts at multiples of the chunk alone."""
    model, stairs = made(kind, precision), 0
    for seed, lengths in enumerate(LENGTHS):
        rows = ragged(seed, lengths)
        found, stops = read(model, rows)
        plain, others = read(model, rows, Cuts(256, 512))
        assert same(found, plain), lengths
        stairs += stops != others
    assert stairs >= 2


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_of_a_staircase_are_those_rows_alone(made, precision):
    model = made("llama", precision)
    for seed, lengths in enumerate(LENGTHS):
        rows = [row for row in ragged(seed, lengths) if len(row) % 256 > 1]
        found, _ = read(model, rows)
        for row, mine in zip(rows, found, strict=True):
            assert same([mine], read(model, [row])[0]), len(row)


def test_what_is_rounded_between_calls_is_cut_as_it_is_alone(made):
    model = made("llama", "fp32", "int8")
    rows = ragged(0, LENGTHS[0])
    found, stops = read(model, rows)
    assert {n for n in stops if n % 256} <= {*map(len, rows)}
    for row, mine in zip(rows, found, strict=True):
        (alone,), _ = read(model, [row])
        np.testing.assert_allclose(mine[0], alone[0], atol=1e-4 * np.abs(alone[0]).max())
