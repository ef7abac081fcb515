"""Every processor and warper beside a formula of a few lines, a row at a time.

What is compared are the scores of each step of a generation with the logits of that step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny import VOCAB, ragged

pytestmark = pytest.mark.core

Row = np.ndarray  # float64 [vocab]
PROMPT = 7
NEW = 10
END = 2


def probabilities(scores: Row) -> Row:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def only(scores: Row, kept: Any) -> Row:
    """The scores of these tokens; all others are ruled out."""
    out = np.full(len(scores), -np.inf)
    out[kept] = scores[kept]
    return out


def without(scores: Row, banned: Any) -> Row:
    out = scores.copy()
    out[list(banned)] = -np.inf
    return out


def penalized(scores: Row, tokens: Any, penalty: float) -> Row:
    out = scores.copy()
    for token in set(tokens):
        out[token] = out[token] * penalty if out[token] < 0 else out[token] / penalty
    return out


def followers(text: list[int], ids: list[int], size: int) -> set[int]:
    """The tokens that would complete an n-gram of the text."""
    last = ids[len(ids) - size + 1 :]
    grams = [text[at : at + size] for at in range(len(text) - size + 1)]
    return {gram[-1] for gram in grams if gram[:-1] == last}


def counted(scores: Row, new: list[int], frequency: float, presence: float) -> Row:
    out = scores.copy()
    for token in set(new):
        out[token] -= frequency * new.count(token) + presence
    return out


def biased(scores: Row, ids: list[int], biases: dict[tuple[int, ...], float]) -> Row:
    out = scores.copy()
    for sequence, bias in biases.items():
        before = list(sequence[:-1])
        if ids[len(ids) - len(before) :] == before:
            out[sequence[-1]] += bias
    return out


def decayed(scores: Row, new: int, start: int, factor: float) -> Row:
    out = scores.copy()
    if new > start:
        out[END] += abs(out[END]) * (factor ** (new - start) - 1)
    return out


def nucleus(scores: Row, mass: float) -> Row:
    """The likeliest tokens, until their sum reaches the mass."""
    chances = probabilities(scores)
    order = np.argsort(-chances, kind="stable")
    before = np.cumsum(chances[order]) - chances[order]
    return only(scores, order[before < mass])


def typical(scores: Row, mass: float) -> Row:
    chances = probabilities(scores)
    with np.errstate(divide="ignore"):
        surprise = -np.log(chances)
    distance = np.abs(surprise - (chances * surprise).sum())
    order = np.argsort(distance, kind="stable")
    before = np.cumsum(chances[order]) - chances[order]
    return only(scores, order[before < mass])


def by_entropy(scores: Row, share: float) -> Row:
    order = np.argsort(-scores, kind="stable")[:100]
    chances = probabilities(scores[order])
    terms = -chances * np.log(chances)
    inside = np.cumsum(terms) <= share * terms.sum()
    inside[0] = True
    return only(scores, order[inside])


def at_least(scores: Row, bound: float) -> Row:
    kept = probabilities(scores) >= bound
    kept[scores.argmax()] = True
    return only(scores, kept)


def eta(scores: Row, epsilon: float) -> Row:
    chances = probabilities(scores)
    entropy = -(chances * np.log(chances)).sum()
    return at_least(scores, min(epsilon, math.sqrt(epsilon) * math.exp(-entropy)))


def normalised(scores: Row) -> Row:
    return np.asarray(np.log(probabilities(scores)))


SEEN = [5, 17, 40]
BIASES = {(5,): 3.0, (17, 5): -4.0, (40,): -2.5}
DRAW = {"do_sample": True, "top_k": 0, "seed": 3}

# What a call is asked for, and what becomes of the scores after `ids`, of which `new` are new.
Formula = Callable[[Row, list[int], list[int]], Row]
KNOBS: dict[str, tuple[dict[str, Any], Formula]] = {
    "repetition_penalty": (
        {"repetition_penalty": 1.7}, lambda s, ids, new: penalized(s, ids, 1.7)),
    "encoder_repetition_penalty": (
        {"encoder_repetition_penalty": 1.7},
        lambda s, ids, new: penalized(s, ids[:PROMPT], 1 / 1.7)),
    "frequency_penalty": (
        {"frequency_penalty": 0.8, "presence_penalty": 0.3},
        lambda s, ids, new: counted(s, new, 0.8, 0.3)),
    "logit_bias": (
        {"logit_bias": {5: 3.0, 17: -4.0}},
        lambda s, ids, new: biased(s, ids, {(5,): 3.0, (17,): -4.0})),
    "sequence_bias": ({"sequence_bias": BIASES}, lambda s, ids, new: biased(s, ids, BIASES)),
    "no_repeat_ngram_size 1": (
        {"no_repeat_ngram_size": 1}, lambda s, ids, new: without(s, ids)),
    "no_repeat_ngram_size 2": (
        {"no_repeat_ngram_size": 2}, lambda s, ids, new: without(s, followers(ids, ids, 2))),
    "encoder_no_repeat_ngram_size": (
        {"encoder_no_repeat_ngram_size": 2},
        lambda s, ids, new: without(s, followers(ids[:PROMPT], ids, 2))),
    "bad_words_ids": (
        {"bad_words_ids": [[5], [17, 40]]},
        lambda s, ids, new: without(s, {5} | ({40} if ids[-1] == 17 else set()))),
    "suppress_tokens": ({"suppress_tokens": SEEN}, lambda s, ids, new: without(s, SEEN)),
    "begin_suppress_tokens": (
        {"begin_suppress_tokens": SEEN}, lambda s, ids, new: s if new else without(s, SEEN)),
    "min_length": (
        {"min_length": 12}, lambda s, ids, new: without(s, {END}) if len(ids) < 12 else s),
    "min_new_tokens": (
        {"min_new_tokens": 4}, lambda s, ids, new: without(s, {END}) if len(new) < 4 else s),
    "forced_eos_token_id": (
        {"forced_eos_token_id": END},
        lambda s, ids, new: only(np.zeros(VOCAB), [END]) if len(new) == NEW - 1 else s),
    "exponential_decay_length_penalty": (
        {"exponential_decay_length_penalty": (3, 1.2)},
        lambda s, ids, new: decayed(s, len(new), 3, 1.2)),
    "prefix_allowed_tokens_fn": (
        {"prefix_allowed_tokens_fn": lambda row, ids: [3 + row, int(ids[-1]), 9]},
        lambda s, ids, new: s),  # by the row: looked at below
    "logits_processor": (
        {"logits_processor": [lambda ids, scores: -scores]}, lambda s, ids, new: -s),
    "renormalize_logits": (
        {"renormalize_logits": True, "repetition_penalty": 1.7},
        lambda s, ids, new: normalised(penalized(s, ids, 1.7))),
    "temperature": ({**DRAW, "temperature": 0.6}, lambda s, ids, new: s / 0.6),
    "top_k": ({**DRAW, "top_k": 7}, lambda s, ids, new: only(s, np.argsort(-s)[:7])),
    "top_p": ({**DRAW, "top_p": 0.8}, lambda s, ids, new: nucleus(s, 0.8)),
    "min_p": (
        {**DRAW, "min_p": 0.1}, lambda s, ids, new: at_least(s, 0.1 * probabilities(s).max())),
    "top_h": ({**DRAW, "top_h": 0.4}, lambda s, ids, new: by_entropy(s, 0.4)),
    "typical_p": ({**DRAW, "typical_p": 0.7}, lambda s, ids, new: typical(s, 0.7)),
    "epsilon_cutoff": ({**DRAW, "epsilon_cutoff": 0.02}, lambda s, ids, new: at_least(s, 0.02)),
    "eta_cutoff": ({**DRAW, "eta_cutoff": 0.02}, lambda s, ids, new: eta(s, 0.02)),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", sorted(set(KNOBS) - {"prefix_allowed_tokens_fn"}))
def test_scores_are_the_formula_of_the_logits(pair, name, seed):
    _, model = pair("numpy")
    knobs, formula = KNOBS[name]
    # Texts that repeat themselves and hold the tokens that knobs name.
    rows = [row[:2] + SEEN[:2] + row[:2] + [17] for row in ragged(seed, (2, 2, 2))]
    out = model.generate(
        rows,
        max_new_tokens=NEW,
        eos_token_id=END,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **knobs,
    )
    compared = 0
    for row, sequence in enumerate(out.sequences):
        for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
            ids = sequence[: PROMPT + step]
            expected = formula(logits[row].astype(float), ids, ids[PROMPT:])
            kept = np.isfinite(expected)
            assert np.array_equal(np.isfinite(scores[row]), kept), (name, row, step)
            np.testing.assert_allclose(scores[row][kept], expected[kept], rtol=1e-4, atol=1e-4)
            compared += 1
            if sequence[PROMPT + step] == END:
                break
    assert compared >= len(rows)


def test_only_what_a_function_names_is_chosen(pair):
    _, model = pair("numpy")
    rows = ragged(4, (5, 5))
    for more in ({}, {"num_beams": 2}, DRAW):
        out = model.generate(rows, max_new_tokens=6, **KNOBS["prefix_allowed_tokens_fn"][0], **more)
        for row, sequence in enumerate(out):
            for before, token in itertools.pairwise(sequence[4:]):
                assert token in (3 + row, before, 9)


def test_what_is_said_applies_in_transformers_order(pair):
    """Penalties before bans before warpers: of several knobs each works on what came before it."""
    _, model = pair("numpy")
    (prompt,) = ragged(5, (PROMPT,))
    out = model.generate(
        prompt,
        max_new_tokens=6,
        eos_token_id=None,
        repetition_penalty=1.7,
        suppress_tokens=SEEN,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **{**DRAW, "temperature": 0.6, "top_k": 12, "top_p": 0.9},
    )
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        ids = out.sequences[0][: PROMPT + step]
        expected = without(penalized(logits[0].astype(float), ids, 1.7), SEEN) / 0.6
        expected = only(expected, np.argsort(-expected)[:12])
        expected = nucleus(expected, 0.9)
        kept = np.isfinite(expected)
        assert np.array_equal(np.isfinite(scores[0]), kept)
        np.testing.assert_allclose(scores[0][kept], expected[kept], rtol=1e-4, atol=1e-4)


# -- Draws ----------------------------------------------------------------------------------------

DRAWS = 3000


@pytest.mark.parametrize(
    ("knobs", "formula"),
    [
        ({}, lambda s: s),
        ({"temperature": 2.5}, lambda s: s / 2.5),
        ({"top_k": 3}, lambda s: only(s, np.argsort(-s)[:3])),
        ({"top_p": 0.7, "temperature": 1.5}, lambda s: nucleus(s / 1.5, 0.7)),
    ],
    ids=["as they are", "temperature", "top_k", "top_p"],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(pair, knobs, formula):
    _, model = pair("numpy", vocab=12)
    prompt = [5, 3, 7]
    out = model.generate(
        prompt,
        max_new_tokens=1,
        eos_token_id=None,
        num_return_sequences=DRAWS,
        **{**DRAW, **knobs},
    )
    expected = probabilities(formula(model.model.logits_of(prompt)[-1]))
    found = np.bincount([row[-1] for row in out], minlength=12) / DRAWS
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(found - expected) <= 5 * deviation).all()


def test_a_seed_repeats_its_draws_and_another_draws_others(pair):
    _, model = pair("numpy")
    rows = ragged(6, (4, 4))
    knobs = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None}
    found = {
        seed: model.generate(rows, seed=seed, **knobs) for seed in (0, 1, 2**40 + 5, 2**64 - 1)
    }
    assert all(model.generate(rows, seed=seed, **knobs) == out for seed, out in found.items())
    assert len({str(out) for out in found.values()}) == 4
    free = {str(model.generate(rows, **knobs)) for _ in range(4)}
    assert len(free) == 4


def test_a_draw_is_not_that_of_a_neighbour(pair):
    """Rows of one seed draw apart: the same prompt twice does not go on alike."""
    _, model = pair("numpy")
    (row,) = ragged(7, (4,))
    one, other = model.generate(
        [row, row], max_new_tokens=12, do_sample=True, seed=1, eos_token_id=None
    )
    assert one != other
