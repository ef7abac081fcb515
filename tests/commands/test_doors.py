"""Attacks from outside, door by door: each of these broke something before it was mended."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from scripts import output_of
from tiny import left_padded, ragged
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import ConfidenceCriteria

import fastgen
from fastgen.engine import memory_estimate
from fastgen.sampling import sampler

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
SAMPLE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "pad_token_id": 0}
NAN = float("nan")
SCORES, RECORD = "output_scores", "return_dict_in_generate"


def refused(call: Callable[[], Any], words: str) -> None:
    """The call raises a ValueError that says these words, and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=words):
            call()


# -- Large scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 1e-9},
        {"sequence_bias": {(7,): 5e9}},
        {"sequence_bias": {(7,): -5e9, (8,): 4e9}, "temperature": 1e-3},
        {"guidance_scale": 1e10},
        {"temperature": 1e-9, "num_beams": 3},
    ],
    ids=str,
)
def test_large_scores_are_drawn_from_as_there(both, knobs):
    theirs, ours = both
    ids, mask = left_padded(ragged(3, (4, 7)))
    torch.manual_seed(3)
    expected = theirs.generate(ids, attention_mask=mask, **SAMPLE, **knobs)
    found = ours.generate(ids, attention_mask=mask, seed=3, **SAMPLE, **knobs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_processor_may_return_large_scores(both, beams):
    theirs, ours = both
    ids = torch.tensor(ragged(3, (4,)))
    given = [lambda ids, scores: scores * 0 - 4e9]
    torch.manual_seed(4)
    expected = theirs.generate(ids, logits_processor=given, num_beams=beams, **SAMPLE)
    found = ours.generate(ids, logits_processor=given, num_beams=beams, seed=4, **SAMPLE)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(6))
def test_sampled_beams_that_have_all_ended_go_on_as_there(both, seed):
    theirs, ours = both
    ids = torch.tensor(ragged(seed, (5,)))
    given = [lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)]
    knobs = {
        "num_beams": 4, "top_p": 0.1, "min_p": 0.3, "stop_strings": ["a"], **SAMPLE,
        "early_stopping": "never", "length_penalty": 2.0,
    }  # fmt: skip
    for criteria in (given, []):
        torch.manual_seed(seed)
        expected = theirs.generate(
            ids, stopping_criteria=criteria, tokenizer=tiny.tokenizer(), **knobs
        )
        assert torch.equal(
            ours.generate(ids, stopping_criteria=criteria, seed=seed, **knobs), expected
        )


@pytest.mark.parametrize("top", [3e9, -3e9, -4e12, 1e30, 3.4e38])
def test_a_draw_from_scores_of_any_size(top):
    scores = np.full(50, -np.inf, np.float32)
    scores[[3, 30]] = top
    words = sampler.Stream(1).row(0, 0, 50)
    assert set(sampler.sample_several(scores, words, 2).tolist()) == {3, 30}


# -- Guessed tokens -------------------------------------------------------------------------------

GUESSING = [{"prompt_lookup_num_tokens": 4}, {"assistant": True}]


def guessing(ours: fastgen.CausalLM, how: dict[str, Any]) -> dict[str, Any]:
    return {"assistant_model": ours, "num_assistant_tokens": 4} if "assistant" in how else how


@pytest.mark.parametrize("how", GUESSING, ids=str)
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 6)])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 5}])
def test_processors_go_with_guessed_tokens(ours, always_guess, how, lengths, sampling):
    rows = [row * 2 for row in ragged(5, lengths)]

    def favour(ids, scores):
        scores[np.arange(len(ids)), (ids[:, -1] + 1) % 7 + 3] += 9
        return scores

    knobs = {"max_new_tokens": 20, "logits_processor": [favour], **sampling}
    assert ours.generate(rows, **knobs, **guessing(ours, how)) == ours.generate(rows, **knobs)


@pytest.mark.parametrize("how", GUESSING, ids=str)
@pytest.mark.parametrize("wrong", ["raises", "nan", "nothing"])
def test_what_a_row_never_reaches_is_nobodys_error(ours, always_guess, how, wrong):
    """A callback that only knows the text that does come."""
    row = ragged(5, (6,))[0] * 3
    plain = ours.generate([row], eos_token_id=None, max_new_tokens=20)[0]

    def known(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        if ids[0].tolist() == plain[: len(ids[0])]:
            return scores
        if wrong == "raises":
            raise KeyError("a text that never comes")
        return np.full_like(scores, NAN if wrong == "nan" else -np.inf)

    # A guess of other tokens than those of the model leads away from the text.
    how = guessing(ours, how) | {"max_new_tokens": 20, "eos_token_id": None}
    for sampling in ({}, {"do_sample": True, "top_k": 1}):
        found = ours.generate([row], logits_processor=[known], **sampling, **how)
        assert found[0] == plain


def test_an_error_at_a_token_that_is_taken_counts(ours, always_guess):
    row = ragged(5, (6,))[0] * 3

    def late(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        return scores * (NAN if ids.shape[1] > 22 else 1)

    for how in GUESSING:
        refused(
            lambda how=how: ours.generate(
                [row], logits_processor=[late], max_new_tokens=20, **guessing(ours, how)
            ),
            "the scores hold nan",
        )


def test_rows_that_go_on_after_their_end_do_so_with_guesses(ours, always_guess):
    """Without an end of text rows go on until all have ended: as many tokens as in plain steps."""
    rows = [row * 2 for row in ragged(8, (7, 4, 9, 5))]
    for seed in range(8):
        knobs = {
            "max_new_tokens": 25, "eos_token_id": None, "do_sample": True, "seed": seed,
            "temperature": 0.6, "stop_strings": ["o", "e"], "output_scores": True,
            "return_dict_in_generate": True,
        }  # fmt: skip
        plain = ours.generate(rows, **knobs)
        for how in GUESSING:
            found = ours.generate(rows, **knobs, **guessing(ours, how))
            assert found.sequences == plain.sequences and len(found.scores) == len(plain.scores)


@pytest.mark.parametrize("schedule", ["constant", "heuristic", "heuristic_transient"])
def test_schedules_of_guesses(ours, schedule):
    row = ragged(5, (6,))
    plain = ours.generate(row, max_new_tokens=20)
    knobs = {"assistant_model": ours, "num_assistant_tokens_schedule": schedule}
    assert ours.generate(row, max_new_tokens=20, **knobs) == plain


def test_an_assistant_may_guess_any_number_and_know_less_context(pair):
    _, model = pair("llama")
    _, short = pair("gpt2", n_positions=40)
    row = ragged(5, (6,))
    plain = model.generate(row, max_new_tokens=60)
    for knobs in ({"num_assistant_tokens": 10**12}, {"num_assistant_tokens": 3}):
        for helper in (model, short):
            found = model.generate(row, max_new_tokens=60, assistant_model=helper, **knobs)
            assert found == plain


# -- What callers' objects are given --------------------------------------------------------------


def test_criteria_of_transformers_get_what_they_get_there(both):
    theirs, ours = both
    ids = torch.tensor(ragged(6, (5,)))
    kept = {"output_scores": True, "return_dict_in_generate": True}
    for threshold in (0.0, 0.2, 0.5):
        criteria = StoppingCriteriaList([ConfidenceCriteria(threshold)])
        knobs = {**GREEDY, **kept, "stopping_criteria": criteria, "eos_token_id": None}
        expected = theirs.generate(ids, **knobs)
        assert torch.equal(ours.generate(ids, **knobs).sequences, expected.sequences)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kept", [[], [SCORES], [RECORD], [SCORES, RECORD]])
def test_criteria_see_the_scores_of_all_steps_or_none(both, beams, kept):
    ids, mask = left_padded(ragged(6, (5, 3)))
    kept = dict.fromkeys(kept, True)
    seen: list[list[Any]] = [[], []]
    for model, mine in zip(both, seen, strict=True):

        def look(ids: Any, scores: Any, mine: list[Any] = mine) -> Any:
            mine.append((list(ids.shape), scores if scores is None else torch.stack(scores)))
            return torch.zeros(len(ids), dtype=torch.bool)

        model.generate(
            ids,
            attention_mask=mask,
            num_beams=beams,
            stopping_criteria=[look],
            eos_token_id=None,
            pad_token_id=0,
            **GREEDY,
            **kept,
        )
    assert len(seen[0]) == len(seen[1]) == 8
    for (shape, scores), (other_shape, others) in zip(*seen, strict=True):
        assert shape == other_shape and (scores is None) == (others is None)
        if scores is not None:
            torch.testing.assert_close(scores, others, atol=1e-4, rtol=1e-4)


def test_allowed_tokens_are_asked_with_a_copy_and_taken_at_their_word(ours):
    plain = ours.generate([[5, 6, 7]], **GREEDY)

    def writes(batch_id: int, ids: np.ndarray) -> list[int]:
        ids[:] = 3
        return list(range(tiny.VOCAB))

    assert ours.generate([[5, 6, 7]], prefix_allowed_tokens_fn=writes, **GREEDY) == plain
    mask = np.zeros(tiny.VOCAB, bool)
    mask[[8, 9]] = True
    out = ours.generate([[5, 6]], prefix_allowed_tokens_fn=lambda b, ids: mask, **GREEDY)
    assert set(out[0][2:]) <= {8, 9}
    for answer, words in (
        ([1.5], "must be integers"),
        ([True, False], "must be integers"),
        ({5, 6}, "must be integers"),
        ("ab", "must be integers"),
        ([[5], [6, 7]], "must be a list of token ids"),
        ([99], "tokens of 0 to 98"),
        ([-1], "tokens of 0 to 98"),
        ([2**63], "integers|tokens of 0"),
        ([], "returned no token"),
    ):
        refused(
            lambda answer=answer: ours.generate(
                [5, 6], prefix_allowed_tokens_fn=lambda batch_id, ids: answer, **GREEDY
            ),
            words,
        )


def test_outputs_are_mappings(both):
    theirs, ours = both
    ids = torch.tensor([[5, 6, 7]])
    knobs = {**GREEDY, "return_dict_in_generate": True, "output_scores": True}
    for more in ({}, {"num_beams": 2}):
        expected = theirs.generate(ids, **knobs, **more)
        found = ours.generate(ids, **knobs, **more)
        for name in ("sequences", "scores", "beam_indices", "sequences_scores", "logits"):
            assert (name in found) == (name in expected)
            assert found.get(name) is getattr(found, name, None)
        assert {*expected.keys()} - {"cache"} <= {*found.keys()}
        assert found[0] is found["sequences"] and found.to_tuple()[0] is found.sequences
        assert len(found) == len(found.keys()) == len(found[:])
        assert dict(found)["sequences"] is found.sequences and next(iter(found)) == "sequences"
        assert found.attentions is found.hidden_states is None
        assert found.cache is found.past_key_values is None
        with pytest.raises(KeyError):
            found["attentions"]


# -- torch's own generator ------------------------------------------------------------------------

SCRIPT = """
import sys, torch, transformers
from pathlib import Path
{the_import}
model = {the_class}.from_pretrained({name!r}{more})
ids = torch.tensor([[5, 6, 7], [8, 9, 11]])
torch.manual_seed(7)
for knobs in (
    dict(do_sample=True),
    dict(do_sample=True, num_beams=3, top_p=0.9, num_return_sequences=2),
    dict(do_sample=False),
    dict(do_sample=True, temperature=0.8, num_return_sequences=3, eos_token_id=None),
):
    print(model.generate(ids, max_new_tokens=9, pad_token_id=0, **knobs).tolist())
    print(torch.rand(2).tolist())
transformers.set_seed(11)
print(model.generate(inputs=ids, max_new_tokens=9, do_sample=True, pad_token_id=0).tolist())
def noisy(ids, scores):
    return scores + torch.rand_like(scores)
print(model.generate(ids, max_new_tokens=9, do_sample=True, logits_processor=[noisy]).tolist())
print(torch.get_rng_state().sum().item())
"""


def test_the_two_line_change_keeps_manual_seed(tmp_path, monkeypatch):
    """A script that seeds torch and passes no `seed` prints the same with its import changed."""
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    tiny.build("llama").save_pretrained(tmp_path / "model")

    def run(the_import: str, the_class: str, more: str) -> list[str]:
        script = SCRIPT.format(
            the_import=the_import, the_class=the_class, name=str(tmp_path / "model"), more=more
        )
        return output_of(script).splitlines()

    theirs = run("from transformers import AutoModelForCausalLM", "AutoModelForCausalLM", "")
    ours = run("from fastgen import CausalLM", "CausalLM", ", precision='fp32'")
    assert ours == theirs and len(ours) == 11


def test_a_seed_leaves_torchs_generator_alone(ours):
    ids = torch.tensor([[5, 6, 7]])
    before = torch.get_rng_state()
    ours.generate(ids, seed=3, **SAMPLE)
    ours.generate(ids.tolist(), **SAMPLE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("used", [0, 1, 311, 623, 624, 1001])
def test_torchs_generator_is_advanced_bit_for_bit(used):
    torch.manual_seed(5)
    torch.rand(used)
    begin = torch.get_rng_state()
    for count in (1, 312, 2000):
        torch.set_rng_state(begin)
        expected = torch.empty(count).exponential_()
        after = torch.get_rng_state()
        torch.set_rng_state(begin)
        words = sampler.TorchStream(torch).row(0, 0, count)
        drawn = sampler.exponential(sampler.uniform(words))
        np.testing.assert_allclose(drawn, expected.numpy(), rtol=1e-6)
        assert torch.equal(torch.get_rng_state(), after)


# -- Small things of transformers -----------------------------------------------------------------


def test_without_ids_the_kind_is_that_of_the_other_arguments(both):
    theirs, ours = both
    expected = theirs.generate(max_new_tokens=5)
    assert ours.generate(max_new_tokens=5) == expected.tolist()
    config = transformers.GenerationConfig(max_new_tokens=5)
    assert torch.equal(ours.generate(generation_config=config), expected)
    found = ours.generate(max_new_tokens=5, stopping_criteria=StoppingCriteriaList())
    assert torch.equal(found, expected)


def test_a_length_that_nobody_set_is_said(both):
    theirs, ours = both
    ids = torch.tensor([[5, 6, 7]])
    with pytest.warns(UserWarning, match="no length is set, so 20 new tokens"):
        found = ours.generate(ids)
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert torch.equal(theirs.generate(ids), found)


def test_a_padded_list_is_read_as_the_same_array(ours):
    rows = [[0, 0, 5, 6], [7, 8, 9, 4]]
    expected = ours.generate(np.array(rows), **GREEDY).tolist()
    assert ours.generate(rows, **GREEDY) == expected
    assert ours.generate([[5, 6], [7, 8, 9, 4]], **GREEDY) == expected
    assert ours.generate([[0, 0, 5, 6]], **GREEDY)[0][4:] == expected[0][4:]


def test_what_ruled_every_token_out_is_named(ours):
    every = list(range(tiny.VOCAB))
    knobs = {**SAMPLE, "suppress_tokens": every[:50], "bad_words_ids": [[i] for i in every[50:]],
             "min_new_tokens": 1, "no_repeat_ngram_size": 9, "temperature": 0.5}  # fmt: skip
    words = "every one is ruled out by bad_words_ids, min_new_tokens, suppress_tokens$"
    refused(lambda: ours.generate([5, 6], **knobs), words)
    ban = [lambda ids, scores: np.full_like(scores, -np.inf)]
    refused(
        lambda: ours.generate([5, 6], logits_processor=ban, **SAMPLE),
        "ruled out by logits_processor <lambda>$",
    )


# -- nan ------------------------------------------------------------------------------------------

SEARCHES = [{}, {"do_sample": True, "seed": 1}, {"num_beams": 2},
            {"num_beams": 2, "do_sample": True},
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
            {"prompt_lookup_num_tokens": 3}]  # fmt: skip


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("many", [1, tiny.VOCAB])
def test_nan_is_an_error_in_every_search(ours, search, many):
    def broken(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        scores[:, :many] = NAN
        return scores

    knobs = {"max_new_tokens": 4, "logits_processor": [broken], **search}
    words = "the scores hold nan.*remove_invalid_values"
    refused(lambda: ours.generate([5, 6, 7], **knobs), words)
    refused(lambda: list(ours.stream([5, 6, 7], **knobs)), words)


@pytest.mark.parametrize("large", [False, True])
def test_nan_weights_are_an_error(tmp_path, large):
    """Also where a vocabulary is so large that little of it is looked at."""
    model = tiny.build("gpt2", **({"vocab_size": 5000} if large else {}))
    fastgen.export.export(model, tmp_path / "out", precision="fp32", progress=None)
    (weights,) = [view for view in [np.memmap(tmp_path / "out" / "model.onnx.data", np.float32)]]
    weights[:] = NAN
    del weights
    broken = fastgen.CausalLM(tmp_path / "out")
    for search in SEARCHES:
        refused(
            lambda search=search: broken.generate([5, 6, 7], max_new_tokens=4, **search),
            "the scores hold nan",
        )
    refused(lambda: broken.score([5, 6, 7]), "nan")


@pytest.mark.parametrize(
    "knobs",
    [
        {"logit_bias": {5: NAN}}, {"sequence_bias": {(5,): NAN}}, {"guidance_scale": NAN},
        {"frequency_penalty": NAN}, {"presence_penalty": NAN}, {"length_penalty": NAN},
        {"temperature": NAN}, {"top_p": NAN}, {"min_p": NAN}, {"repetition_penalty": NAN},
        {"temperature": math.inf}, {"length_penalty": math.inf}, {"max_time": math.inf},
        {"exponential_decay_length_penalty": (1, NAN)}, {"diversity_penalty": NAN},
        {"watermarking_config": {"bias": NAN}}, {"assistant_confidence_threshold": NAN},
    ],
    ids=str,
)  # fmt: skip
def test_every_number_is_finite_or_refused(ours, knobs):
    refused(lambda: ours.generate([5, 6], max_new_tokens=3, **knobs), next(iter(knobs)))


def test_infinite_biases_are_legal(ours):
    for name, bias in (("logit_bias", {5: -math.inf}), ("sequence_bias", {(5,): -math.inf})):
        out = ours.generate([[5, 6]], **{**GREEDY, name: bias})
        assert 5 not in out[0][2:]
    assert ours.generate([[5, 6]], logit_bias={9: math.inf}, **GREEDY)[0][2:] == [9] * 8


# -- Large values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1000.0, -1000.0, 1000, 1e38, 0.0, -3.5])
@pytest.mark.parametrize("groups", [{}, {"num_beam_groups": 2, "diversity_penalty": 1.0}])
def test_any_length_penalty_is_computed(ours, penalty, groups):
    out = ours.generate([[5, 6, 7]], num_beams=4, length_penalty=penalty, **GREEDY, **groups)
    assert out[0][:3] == [5, 6, 7]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"logit_bias": {5: 1e39}}, "logit_bias must be a number of at most"),
        ({"guidance_scale": 1e39}, "guidance_scale must be a number of at most"),
        ({"max_new_tokens": 2**63}, "max_new_tokens must be an integer of 64 bits"),
        ({"top_k": -(2**63) - 1}, "top_k must be an integer of 64 bits"),
        ({"eos_token_id": [2**70]}, "eos_token_id must be an integer of 64 bits"),
        ({"suppress_tokens": [2**64]}, "suppress_tokens must be an integer of 64 bits"),
        ({"bad_words_ids": [[2**63]]}, "bad_words_ids must be an integer of 64 bits"),
        ({"logit_bias": {2**63: 1.0}}, "logit_bias must be an integer of 64 bits"),
        ({"seed": 2**64, "do_sample": True}, "seed must be from -2\\*\\*63"),
        ({"seed": -(2**63) - 1}, "seed must be from -2\\*\\*63"),
        ({"max_new_tokens": 2**62}, "128 positions"),
        ({"temperature": 10**400, "do_sample": True}, "temperature must be a number of at most"),
    ],
)
def test_values_that_are_too_large(ours, knobs, words):
    refused(lambda: ours.generate([5, 6], **{"max_new_tokens": 3, **knobs}), words)


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -1, -(2**63)])
def test_seeds_are_those_that_torch_takes(both, seed):
    theirs, ours = both
    ids = torch.tensor([[5, 6, 7]])
    torch.manual_seed(seed)
    expected = theirs.generate(ids, **SAMPLE)
    assert torch.equal(ours.generate(ids, seed=seed, **SAMPLE), expected)


@pytest.mark.parametrize(
    "knobs",
    [
        {"guidance_scale": 1e38},
        {"logit_bias": {5: 3e38}},
        {"frequency_penalty": 3e38},
        {"presence_penalty": -3e38},
        {"repetition_penalty": 3e38},
        {"repetition_penalty": 1e-40},
        {"encoder_repetition_penalty": 1e-320},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 3e38},
    ],
    ids=str,
)
@pytest.mark.parametrize("search", [{}, {"do_sample": True, "seed": 1}, {"num_beams": 2}], ids=str)
def test_large_numbers_give_an_answer_or_an_error_and_no_warning(ours, knobs, search):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            out = ours.generate([[5, 6, 7]], **{**search, "max_new_tokens": 5, **knobs})
        except ValueError as error:
            assert (
                "nan" in str(error) or "infinite" in str(error) or "cannot be sampled" in str(error)
            )
        else:
            assert out[0][:3] == [5, 6, 7]


# -- Padding, negative prompts --------------------------------------------------------------------


@pytest.mark.parametrize("pad", [1000, 99])
def test_a_padding_that_is_no_token_is_refused(ours, pad):
    words = f"pad_token_id must be a token of 0 to 98, got {pad}"
    refused(lambda: ours.generate([[5, 6], [7]], pad_token_id=pad, **GREEDY), words)
    refused(lambda: ours.generate([5], {"pad_token_id": pad}, **GREEDY), words)


@pytest.mark.parametrize("pad", [-1, -5])
def test_a_padding_below_zero_is_none(ours, pad):
    rows, knobs = ragged(3, (4, 6)), {**GREEDY, "stop_strings": ["o", "e"]}  # rows end apart
    without = ours.generate(rows, pad_token_id=None, **knobs)
    assert ours.generate(rows, pad_token_id=pad, **knobs) == without
    assert ours.generate(rows, {"pad_token_id": pad}, **knobs) == without
    array = np.array([[5, 6, 7], [2, 9, 4]])
    found, expected = (ours.generate(array, pad_token_id=one, **knobs) for one in (pad, None))
    assert np.array_equal(found, expected)


def test_a_models_own_padding_that_is_no_token_is_none(both):
    theirs, _ = both
    ours = fastgen.load(both[1].directory)
    ours.generation_config.pad_token_id = -1
    plain = both[1].generate(ragged(3, (4, 6)), **GREEDY, pad_token_id=2)
    assert ours.generate(ragged(3, (4, 6)), **GREEDY) == plain
    ours.generation_config.eos_token_id = [1000, 2]
    out = ours.generate(ragged(3, (4, 6)), stop_strings=["o"], **GREEDY)
    assert all(0 <= token < tiny.VOCAB for row in out for token in row)
    # transformers' own -1 stays where it puts it: beams without an end of text.
    ids = torch.tensor([[5, 6, 7]])
    knobs = {"num_beams": 3, "eos_token_id": None, "pad_token_id": 0, "num_return_sequences": 3,
             "stopping_criteria": [lambda ids, scores: ids[:, -1] % 2 == 0], **GREEDY}  # fmt: skip
    assert torch.equal(both[1].generate(ids, **knobs), theirs.generate(ids, **knobs))


def test_negative_prompts(ours):
    scale = {"guidance_scale": 1.5, **GREEDY}
    refused(
        lambda: ours.generate([5], negative_prompt_ids=[6] * 200, **scale), "negative_prompt_ids"
    )
    refused(lambda: ours.generate([5], negative_prompt_ids=[6], **GREEDY), "needs a guidance_scale")
    refused(
        lambda: ours.generate([5], negative_prompt_attention_mask=[1], **scale),
        "needs negative_prompt_ids",
    )
    masked = np.ma.masked_array([5, 6], [0, 1])
    for call in (
        lambda: ours.generate(masked, **GREEDY),
        lambda: ours.score(masked),
        lambda: ours.generate([5], negative_prompt_ids=masked, **scale),
    ):
        refused(call, "is a masked array")
    assert ours.generate([5], negative_prompt_ids=[6], **GREEDY, guidance_scale=1)


def test_a_negative_prompt_beyond_learned_positions(pair):
    _, model = pair("gpt2")
    knobs = {"guidance_scale": 1.5, **GREEDY}
    refused(
        lambda: model.generate([5], negative_prompt_ids=[6] * 125, **knobs),
        "negative_prompt_ids has 125 tokens, which with 8 new ones exceed the 128",
    )
    model.generate([5], negative_prompt_ids=[6] * 120, **knobs)


def test_a_bad_default_of_the_model_is_called_so(both):
    ours = fastgen.load(both[1].directory)
    ours.generation_config.top_k = -1
    words = r"top_k must be zero or more, got -1 \(the model's own default\)"
    refused(lambda: ours.generate([5, 6], **GREEDY), words)
    refused(
        lambda: ours.generate([5, 6], top_k=-2, **GREEDY), "top_k must be zero or more, got -2$"
    )


# -- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {"num_beams": 10**9},
        {"num_return_sequences": 10**9, "do_sample": True},
        {"num_beams": 10**9, "num_return_sequences": 10**9},
        {"max_new_tokens": 10**11},
        {"max_new_tokens": 10**8, "num_beams": 50},
        {"max_new_tokens": 10**8, "guidance_scale": 2.0, "num_beams": 20},
        {"max_new_tokens": 10**8, "output_scores": True, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_what_cannot_fit_is_refused_with_its_size(pair, knobs):
    _, model = pair("llama", max_position_embeddings=10**12)
    refused(
        lambda: model.generate([5, 6, 7], **{"max_new_tokens": 100, **knobs}),
        r"needs up to [\d,.]+ GB of memory \(keys and values [\d,.]+.*the machine has",
    )


def test_the_sizes_are_those_of_a_call(ours):
    """The part that can be looked at: the cache that a call reserves."""
    info = ours.model.info
    params = fastgen.Params(num_beams=3)
    parts = memory_estimate.of_call(info, params, prompts=2, width=10, max_length=256)
    assert parts["keys and values"] == ours.model.new_cache(6, 256).size
    assert parts["ids"] == 6 * 256 * 8 and parts["logits"] >= 6 * info.vocab_size * 4
    guided = fastgen.Params(num_beams=3, guidance_scale=2.0)
    twice = memory_estimate.of_call(info, guided, prompts=2, width=10, max_length=256)
    assert twice["keys and values"] == 2 * parts["keys and values"]


def test_the_machines_memory_is_that_of_its_limits(monkeypatch):
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (10**10, 10**10));"
        "from fastgen.system.cpu import memory_bytes; print(memory_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert 0 < int(done.stdout) <= 10**10, done.stderr


# -- Raw errors of Python -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"stop_strings": 5}, "stop_strings must be a non-empty text or a list"),
        ({"stop_strings": b"ab"}, "stop_strings must be"),
        ({"stop_strings": ["\ud800"]}, "stop_strings holds .* no character of Unicode"),
        ({"logit_bias": [5]}, "logit_bias must be {token id: bias}"),
        ({"logit_bias": 5}, "logit_bias must be {token id: bias}"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias must be an integer, got 'x'"),
        ({"logit_bias": {5: "x"}}, "logit_bias must be a number, got 'x'"),
        ({"sequence_bias": 5}, "sequence_bias must be {token ids: bias"),
        ({"sequence_bias": {5: 1.0}}, "sequence_bias must be a list of non-empty lists"),
        ({"sequence_bias": [[[5]]]}, "sequence_bias must be {token ids: bias"),
        ({"bad_words_ids": 5}, "bad_words_ids must be a list"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list"),
        ({"temperature": np.array([1.0, 2.0])}, r"temperature must be a number, got \[1.0, 2.0\]"),
        ({"do_sample": np.array([True, False])}, "do_sample must be True or False"),
        ({"top_k": np.array([1, 2])}, "top_k must be an integer"),
        ({"max_new_tokens": np.array([3])}, "max_new_tokens must be an integer"),
        ({"early_stopping": np.array([1, 2])}, "early_stopping must be"),
        ({"eos_token_id": torch.zeros(2)}, "eos_token_id must be an integer"),
        ({"eos_token_id": torch.ones(2).to_sparse()}, "dense"),
        ({"eos_token_id": torch.ones(2, device="meta")}, "dense"),
        ({"exponential_decay_length_penalty": 5}, r"must be \(start, factor\)"),
        ({"exponential_decay_length_penalty": "ab"}, r"must be \(start, factor\)"),
        ({"num_assistant_tokens_schedule": 5}, "num_assistant_tokens_schedule must be a text"),
        ({"num_assistant_tokens_schedule": [5]}, "num_assistant_tokens_schedule must be a text"),
        ({"watermarking_config": 5}, "watermarking_config must be"),
        ({"watermarking_config": {"bias": "x"}}, "bias must be a number"),
        ({"watermarking_config": {"context_width": 1.5}}, "context_width must be an integer"),
        ({"watermarking_config": {5: 5, "a": 6}}, "watermarking_config must have"),
        ({"watermarking_config": {"ngram_len": 10**9, "keys": [1]}}, "ngram_len must be between"),
        ({"watermarking_config": {"ngram_len": 5, "keys": 5.5}}, "keys must be an integer"),
        ({"generation_config": {5: 5}}, "generation_config must have names"),
        ({"generation_config": 5}, "generation_config must be a dict"),
        ({"logits_processor": 5}, "logits_processor must be callable"),
        ({"logits_processor": [5]}, "logits_processor must be callable"),
        ({"stopping_criteria": "ab"}, "stopping_criteria must be callable"),
        ({"stopping_criteria": [lambda ids, scores: None]}, "expected one truth value"),
        ({"stopping_criteria": [lambda ids, scores: "a"]}, "expected one truth value"),
        ({"prefix_allowed_tokens_fn": 5}, "prefix_allowed_tokens_fn must be callable"),
        ({"streamer": 5}, r"streamer must have put\(ids\) and end\(\)"),
        ({"assistant_model": 5}, "assistant_model must be a fastgen model"),
        ({"tokenizer": 5, "stop_strings": "a"}, "tokenizer must be a fast tokenizer"),
        ({"prefix_cache": 5}, "prefix_cache must be a fastgen.PrefixCache"),
        ({"attention_mask": "ab"}, "attention_mask must hold 0 and 1"),
        ({"attention_mask": {1}}, "attention_mask must hold 0 and 1"),
        ({"attention_mask": [1, None]}, "attention_mask must hold 0 and 1"),
        ({"attention_mask": torch.ones(2).to_sparse()}, "attention_mask .*dense"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"seed": [1.5]}, "seed must be an integer"),
    ],
    ids=lambda one: re.sub(" at 0x[0-9a-f]+", "", str(one)),  # the same in every process
)
def test_values_of_a_wrong_kind(ours, knobs, words):
    refused(lambda: ours.generate([5, 6], **{"max_new_tokens": 3, **knobs}), words)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([b"ab"], "ids must hold integers, got b'ab'"),
        ({5, 6}, "must be a list, an array or a tensor of token ids, got set"),
        ({5: 6}, "must be a list, an array or a tensor of token ids, got dict"),
        ([{5, 6}], "must hold integers"),
        ([[5], "a"], "row 1 must be a list of token ids"),
        (np.array([1, 2], "m8[s]"), "must be integers, got timedelta64"),
        (np.array([2**63], np.uint64), "integers of 64 bits"),
        ([2**63], "integers of 64 bits"),
        ([[5], [-(2**63) - 1]], "row 1 must hold integers of 64 bits"),
        (torch.tensor([5, 6]).to(torch.bfloat16), "must be integers"),
        (torch.tensor([5, 6]).to_sparse(), "dense"),
        (torch.ones(2, dtype=torch.int64, device="meta"), "dense"),
        ([np.array([[5]])], "row 0 must be a list of token ids"),
        ([torch.tensor(5.0)], "must hold integers"),
    ],
    ids=str,
)  # fmt: skip
def test_ids_of_a_wrong_kind(ours, ids, words):
    refused(lambda: ours.generate(ids, max_new_tokens=3), words)
    refused(lambda: ours.score(ids), words)


def test_uint64_ids_are_what_they_say(ours):
    ids = np.array([[5, 6, 7]], np.uint64)
    assert ours.generate(ids, **GREEDY).tolist() == ours.generate(ids.tolist(), **GREEDY)


def test_half_a_character_in_a_text(ours):
    for call in (
        lambda: ours.complete("a\ud800", max_new_tokens=3),
        lambda: ours.score(["\udfff"]),
        lambda: list(ours.stream("\ud800", max_new_tokens=3)),
    ):
        refused(call, "holds .* no character of Unicode")
