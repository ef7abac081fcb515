"""The loop beside the model's own logits: greedy search, stops, guesses, scores, logits."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from numpy_model import KINDS, NumpyLM
from tiny import VOCAB, ragged

import fastgen
from fastgen.engine import memory_estimate
from fastgen.engine.batch import Batch

pytestmark = pytest.mark.core
every_kind = pytest.mark.parametrize("kind", KINDS)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def greedy(model: NumpyLM, prompt: list[int], new: int, ends: set[int] = frozenset()) -> list[int]:
    """The likeliest tokens one by one, from the logits of the whole text each time."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model.model.logits_of(ids)[-1].argmax()))
        if ids[-1] in ends:
            break
    return ids


@every_kind
def test_greedy_search_takes_the_likeliest_token(pair, kind):
    _, model = pair(kind)
    for prompt in ragged(1, (1, 5, 30)):
        expected = greedy(model, prompt, 12, {2})
        assert model.generate(prompt, max_new_tokens=12) == [expected]
        assert model.generate(prompt, max_new_tokens=12, num_beams=1) == [expected]
        assert model.generate(prompt, max_new_tokens=12, do_sample=True, top_k=1) == [expected]


@every_kind
def test_logits_are_those_of_the_whole_text(pair, kind):
    _, model = pair(kind)
    rows = ragged(2, (7, 7))
    out = model.generate(
        rows,
        max_new_tokens=9,
        eos_token_id=None,
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    for row, sequence in enumerate(out.sequences):
        expected = model.model.logits_of(sequence)[6:-1]
        for step in range(9):
            np.testing.assert_allclose(out.logits[step][row], expected[step], **CLOSE)
            assert np.array_equal(out.scores[step][row], out.logits[step][row])
    chosen = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    for row, sequence in enumerate(out.sequences):
        expected = model.model.logprobs_of(sequence)[6:-1]
        np.testing.assert_allclose(chosen[row], expected[np.arange(9), sequence[7:]], **CLOSE)


@every_kind
def test_a_score_is_the_log_probability_of_each_token(pair, kind):
    _, model = pair(kind)
    rows = ragged(3, (5, 90, 1, 64, 65, 2))
    (prefix,) = ragged(4, (40,))
    found = model.score(rows)
    after = model.score(rows, prefix=prefix)
    for row, alone, continued in zip(rows, found, after, strict=True):
        expected = model.model.logprobs_of(row)[np.arange(len(row) - 1), row[1:]]
        assert np.isnan(alone[0])
        np.testing.assert_allclose(alone[1:], expected, **CLOSE)
        whole = prefix + row
        expected = model.model.logprobs_of(whole)[np.arange(len(whole) - 1), whole[1:]]
        np.testing.assert_allclose(continued, expected[len(prefix) - 1 :], **CLOSE)
    known = np.concatenate([one[1:] for one in found])
    assert model.perplexity(rows) == pytest.approx(np.exp(-known.mean(dtype=float)), rel=1e-4)


@every_kind
def test_a_stream_says_how_likely_its_tokens_are_and_why_it_ends(pair, kind):
    _, model = pair(kind)
    (prompt,) = ragged(5, (9,))
    tokens = list(model.stream(prompt, max_new_tokens=8, eos_token_id=None, top_logprobs=3))
    ids = prompt + [token.id for token in tokens]
    logprobs = model.model.logprobs_of(ids)
    for at, token in enumerate(tokens, len(prompt) - 1):
        assert token.logprob == pytest.approx(logprobs[at, token.id], abs=1e-4)
        best = np.argsort(-logprobs[at])[:3]
        assert [one for one, _ in token.top_logprobs] == best.tolist()
    assert [token.finish_reason for token in tokens] == [None] * 7 + ["length"]


# -- Stops ----------------------------------------------------------------------------------------


@every_kind
def test_a_row_ends_at_the_first_end_of_text(pair, kind):
    _, model = pair(kind)
    prompts = ragged(6, (6, 6, 6, 6))
    free = [greedy(model, prompt, 20) for prompt in prompts]
    ends = {free[0][10], free[1][14]}  # tokens that some rows reach, at different times
    expected = [greedy(model, prompt, 20, ends) for prompt in prompts]
    width = max(map(len, expected))
    padded = [row + [0] * (width - len(row)) for row in expected]
    out = model.generate(
        prompts, max_new_tokens=20, eos_token_id=sorted(ends), return_dict_in_generate=True
    )
    assert out.sequences == padded
    reasons = ["eos" if row[-1] in ends else "length" for row in expected]
    assert out.finish_reasons == reasons and "eos" in reasons


@every_kind
def test_lengths(pair, kind):
    _, model = pair(kind)
    (prompt,) = ragged(7, (5,))
    free = {"eos_token_id": None}
    assert len(model.generate(prompt, max_new_tokens=1, **free)[0]) == 6
    assert len(model.generate(prompt, max_length=12, **free)[0]) == 12
    assert len(model.generate(prompt, max_length=7, max_new_tokens=3, **free)[0]) == 8
    with pytest.raises(ValueError, match="no room for a new one"):
        model.generate(prompt, max_length=5)
    end = greedy(model, prompt, 1)[-1]
    for least in ({"min_new_tokens": 4}, {"min_length": 9}):
        (out,) = model.generate(prompt, max_new_tokens=9, eos_token_id=end, **least)
        assert end not in out[5:9]


def test_a_callers_criterion_ends_rows(pair):
    _, model = pair("numpy")
    rows = ragged(8, (4, 4))
    whole = model.generate(rows, max_new_tokens=12, eos_token_id=None)
    never = min(set(range(3, VOCAB)) - {*whole[0], *whole[1]})
    seen: list[tuple[int, int]] = []

    def long_enough(ids, scores):
        seen.append(ids.shape)
        return np.array([ids.shape[1] >= 7, ids.shape[1] >= 10])

    out = model.generate(
        rows, max_new_tokens=12, eos_token_id=never, stopping_criteria=[long_enough]
    )
    assert out == [whole[0][:7] + [0] * 3, whole[1][:10]]
    assert seen == [(2, width) for width in range(5, 11)]


@pytest.mark.parametrize("count", [1, 3])
def test_a_text_ends_a_row(pair, count):
    _, model = pair("demo")
    prompt = "The os module"
    whole = model.complete(prompt, max_new_tokens=30)
    stops = [whole[at : at + 2] for at in (len(whole) // 3, len(whole) // 2, len(whole) - 3)]
    first = min(whole.index(stop) + len(stop) for stop in stops[:count])
    found = model.complete(prompt, max_new_tokens=30, stop_strings=stops[:count])
    assert whole.startswith(found) and len(found) >= first
    assert not any(stop in found[: first - 1] for stop in stops[:count])


# -- Guesses --------------------------------------------------------------------------------------

GUESSED = (
    {},
    {"eos_token_id": [5, 17, 40]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 4},
    {"do_sample": True, "temperature": 0.4, "seed": 3},
    {"do_sample": True, "seed": 4, "num_return_sequences": 3, "top_p": 0.8},
)


@pytest.mark.parametrize("knobs", GUESSED, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@every_kind
def test_what_is_guessed_from_the_prompt_changes_nothing(pair, kind, rows, knobs, always_guess):
    _, model = pair(kind)
    prompts = [row * 3 for row in ragged(rows, (6,) * rows)]
    plain = model.generate(prompts, max_new_tokens=16, **knobs)
    for size in (1, 6):
        guessed = model.generate(prompts, max_new_tokens=16, prompt_lookup_num_tokens=size, **knobs)
        assert guessed == plain


@pytest.mark.parametrize("knobs", GUESSED, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("helper", ["itself", "another"])
@every_kind
def test_what_an_assistant_guesses_changes_nothing(pair, kind, helper, rows, knobs):
    _, model = pair(kind)
    _, other = pair("numpy", seed=0 if helper == "itself" else 1)
    prompts = ragged(3, (4, 9, 2)[:rows])
    plain = model.generate(prompts, max_new_tokens=12, **knobs)
    found = model.generate(
        prompts,
        assistant_model=other,
        num_assistant_tokens=5,
        assistant_confidence_threshold=0.01,
        max_new_tokens=12,
        **knobs,
    )
    assert found == plain


def test_guesses_that_are_right_save_steps(pair, always_guess, monkeypatch):
    _, model = pair("numpy")
    steps: list[int] = []
    forward = model.model.forward

    def counted(new, *rest, **more):
        steps.append(max(map(len, new)))
        return forward(new, *rest, **more)

    monkeypatch.setattr(model.model, "forward", counted)
    (prompt,) = ragged(3, (4,))
    model.generate(
        prompt,
        assistant_model=NumpyLM(),
        num_assistant_tokens=5,
        assistant_confidence_threshold=0.0,
        num_assistant_tokens_schedule="constant",
        max_new_tokens=20,
        eos_token_id=None,
    )
    assert len(steps) <= 1 + 20 / 4


# -- Side by side ---------------------------------------------------------------------------------


@every_kind
def test_a_prompt_may_be_given_in_any_form(pair, kind):
    _, model = pair(kind)
    rows = ragged(9, (3, 8))
    expected = model.generate(rows, max_new_tokens=5)
    padded = np.array([[0] * (8 - len(row)) + row for row in rows])
    mask = np.array([[0] * (8 - len(row)) + [1] * len(row) for row in rows])
    found = model.generate(padded, attention_mask=mask, max_new_tokens=5)
    assert isinstance(found, np.ndarray) and found.dtype == np.int64
    assert found.tolist() == expected
    assert model.generate(inputs=rows, max_new_tokens=5) == expected
    assert model.generate(rows, {"max_new_tokens": 5}) == expected


def test_guidance_is_the_formula(pair):
    """scale * (logp - unconditional) + unconditional, the text without its prompt beside it."""
    _, model = pair("numpy")
    (prompt,) = ragged(10, (6,))
    (negative,) = ragged(11, (4,))
    for before, more in ((prompt[-1:], {}), (negative, {"negative_prompt_ids": [negative]})):
        ids = list(prompt)
        for _ in range(6):
            logp = model.model.logprobs_of(ids)[-1]
            away = model.model.logprobs_of(before + ids[len(prompt) :])[-1]
            ids.append(int((1.7 * (logp - away) + away).argmax()))
        knobs = {"guidance_scale": 1.7, "max_new_tokens": 6, "eos_token_id": None, **more}
        assert model.generate(prompt, **knobs) == [ids]


def test_the_embedded_model_generates_with_every_search(pair):
    _, model = pair("demo")
    ids = model.tokenizer.encode("The os module")
    for knobs in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 7}):
        once, again = (model.generate(ids, max_new_tokens=8, **knobs) for _ in range(2))
        assert once == again and once[0][: len(ids)] == ids
    assert isinstance(model, fastgen.CausalLM)


@every_kind
def test_every_order_of_rows_is_the_same_rows(pair, kind):
    _, model = pair(kind)
    rows = ragged(12, (2, 9, 5))
    expected = {tuple(row): model.generate(row, max_new_tokens=6)[0] for row in rows}
    for order in itertools.permutations(rows):
        out = model.generate(list(order), max_new_tokens=6, eos_token_id=None)
        for row, found in zip(order, out, strict=True):
            mine = expected[tuple(row)]
            assert found[9 - len(row) :][: len(mine)] == mine
    assert max(map(max, expected.values())) < VOCAB


def calls_of(step) -> int:
    """Calls of Python's functions, and of those in C, while it runs."""
    calls = []
    sys.setprofile(lambda frame, event, arg: calls.append(event) if "call" in event else None)
    try:
        step()
    finally:
        sys.setprofile(None)
    return len(calls)


def test_a_step_finds_out_nothing_that_a_request_says_once(pair):
    """Python is a good part of a tiny model's step. It was 90 calls, and 25 for each more row."""
    _, model = pair("llama")
    count = {}
    for rows in (1, 2, 9):
        batch = Batch(model.model)
        batch.add(model._call(ragged(4, (5,) * rows), knobs={"max_new_tokens": 9}).request)
        batch.step()
        model.model.forward = lambda new, *_: np.zeros((len(new), 1, VOCAB), np.float32)
        count[rows] = calls_of(batch.step)
        del model.model.forward
    assert count[1] <= 54
    assert (count[9] - count[1]) / 8 <= 9


def test_a_small_call_does_not_ask_the_system_for_its_memory(pair, monkeypatch):
    _, model = pair("llama")
    asked = []
    monkeypatch.setattr(memory_estimate, "memory_bytes", lambda: asked.append(1) or 1 << 20)
    model.generate([5, 6], max_new_tokens=2)
    assert not asked
    with pytest.raises(ValueError, match="this needs up to"):
        model.generate([[5, 6]] * 30_000, max_new_tokens=100)
    assert asked
