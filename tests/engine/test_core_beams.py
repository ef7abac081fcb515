"""Beams beside a search over all sequences, and beside a beam search of a few lines."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy_model import KINDS, NumpyLM
from tiny import ragged

pytestmark = pytest.mark.core
every_kind = pytest.mark.parametrize("kind", KINDS)

LETTERS = 6  # tokens of the vocabulary where all sequences are looked at
NEW = 4
ALL = LETTERS ** (NEW - 1)  # beams that leave nothing out
EOS = 2
# transformers fills beams with the end of text where pad_token_id is 0, and diverse ones with it.
FILL = {0, EOS}


@pytest.fixture(scope="module")
def letters(pair) -> dict[str, NumpyLM]:
    """Models of a few tokens."""
    return {kind: pair(kind, vocab=LETTERS)[1] for kind in KINDS}


def sequences(ends: set[int]) -> list[tuple[int, ...]]:
    """Every text of `NEW` tokens, and every shorter one that ends with an end of text."""
    out = []
    for length in range(1, NEW + 1):
        for text in itertools.product(range(LETTERS), repeat=length):
            if ends.isdisjoint(text[:-1]) and (length == NEW or text[-1] in ends):
                out.append(text)
    return out


def best(
    model: NumpyLM, prompt: list[int], ends: set[int], penalty: float, count: int
) -> list[tuple[float, list[int]]]:
    """The best of all sequences: their scores and ids, best first."""
    scored = []
    for text in sequences(ends):
        ids = [*prompt, *text]
        logprobs = model.model.logprobs_of(ids)[np.arange(len(prompt) - 1, len(ids) - 1), text]
        scored.append((float(logprobs.sum()) / len(text) ** penalty, ids))
    return sorted(scored, key=lambda one: -one[0])[:count]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("ends", [set(), {EOS}, {EOS, 5}], ids=str)
@every_kind
def test_enough_beams_find_the_best_of_all_sequences(letters, kind, ends, penalty):
    model, prompt = letters[kind], [3, 4, 1, 5]
    out = model.generate(
        prompt,
        max_new_tokens=NEW,
        num_beams=ALL,
        num_return_sequences=5,
        length_penalty=penalty,
        early_stopping="never",
        eos_token_id=sorted(ends) or None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    expected = best(model, prompt, ends, penalty, 5)
    for found, (_, ids) in zip(out.sequences, expected, strict=True):
        assert found[: len(ids)] == ids
        assert set(found[len(ids) :]) <= FILL
    scores = [score for score, _ in expected]
    np.testing.assert_allclose(out.sequences_scores, scores, rtol=1e-4)


def searched(model: NumpyLM, prompt: list[int], new: int, width: int) -> list[list[int]]:
    """Beam search where nothing ends a text: at each step the best `width` continuations."""
    beams = [(0.0, prompt)]
    for _ in range(new):
        longer = []
        for score, ids in beams:
            logprobs = model.model.logprobs_of(ids)[-1]
            longer += [(score + logp, [*ids, token]) for token, logp in enumerate(logprobs)]
        beams = sorted(longer, key=lambda one: -one[0])[:width]
    return [ids for _, ids in beams]


@pytest.mark.parametrize("width", [2, 3, 5])
@every_kind
def test_few_beams_are_the_best_of_each_step(pair, kind, width):
    _, model = pair(kind)
    prompts = ragged(width, (2, 11, 6))
    expected = [searched(model, prompt, 6, width) for prompt in prompts]
    knobs = {"max_new_tokens": 6, "num_beams": width, "eos_token_id": None}
    for prompt, beams in zip(prompts, expected, strict=True):
        assert model.generate(prompt, num_return_sequences=width, **knobs) == beams
    together = model.generate(prompts, **knobs)
    assert [row[11 - len(p) :] for row, p in zip(together, prompts, strict=True)] == [
        beams[0] for beams in expected
    ]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"early_stopping": True},
        {"length_penalty": -1.0},
        {"num_beam_groups": 2, "diversity_penalty": 0.7},
    ],
    ids=str,
)
@every_kind
def test_beams_of_several_prompts_are_those_of_each_alone(pair, kind, more):
    _, model = pair(kind)
    rows = ragged(4, (3, 12, 7))
    (end,) = model.generate(rows[0], max_new_tokens=3)[0][-1:]  # some end early
    knobs = {"max_new_tokens": 8, "num_beams": 4, "eos_token_id": [2, end], **more}
    count = knobs.get("num_return_sequences", 1)
    together = model.generate(rows, **knobs)
    for place, row in enumerate(rows):
        alone = model.generate(row, **knobs)
        for mine, expected in zip(together[place * count :][:count], alone, strict=True):
            found = mine[12 - len(row) :]
            assert found[: len(expected)] == expected
            assert set(found[len(expected) :]) <= FILL


@every_kind
def test_scores_and_parents_add_up(pair, kind):
    """A sequence's score is that of its tokens, each under the beam that it continued."""
    _, model = pair(kind)
    (prompt,) = ragged(5, (6,))
    out = model.generate(
        prompt,
        max_new_tokens=7,
        num_beams=4,
        num_return_sequences=4,
        eos_token_id=None,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    np.testing.assert_allclose(np.sum(steps, axis=1) / 7, out.sequences_scores, rtol=1e-4)
    for sequence, parents in zip(out.sequences, np.asarray(out.beam_indices), strict=True):
        logits = model.model.logits_of(sequence)[5:-1]
        for step, parent in enumerate(parents):
            np.testing.assert_allclose(out.logits[step][parent], logits[step], rtol=1e-3, atol=1e-3)


@every_kind
def test_beams_that_draw_repeat_with_their_seed(pair, kind):
    _, model = pair(kind)
    rows = ragged(6, (4, 4))
    knobs = {"max_new_tokens": 8, "num_beams": 3, "do_sample": True, "eos_token_id": None}
    found = {seed: model.generate(rows, seed=seed, **knobs) for seed in range(6)}
    assert all(model.generate(rows, seed=seed, **knobs) == out for seed, out in found.items())
    assert len({str(out) for out in found.values()}) > 3


def test_a_group_of_one_beam_is_greedy_search(pair):
    _, model = pair("numpy")
    (prompt,) = ragged(7, (5,))
    knobs = {"max_new_tokens": 6, "eos_token_id": None}
    (greedy,) = model.generate(prompt, **knobs)
    groups = model.generate(
        prompt,
        num_beams=4,
        num_beam_groups=4,
        num_return_sequences=4,
        diversity_penalty=1e3,
        **knobs,
    )
    assert greedy in groups
    firsts = [row[5] for row in groups]
    assert len(set(firsts)) == 4  # with such a penalty each group begins with a token of its own
