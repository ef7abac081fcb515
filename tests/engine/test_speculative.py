"""Guessed tokens change nothing but the time: prompt lookup and assistants, any number of rows."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from tiny import left_padded, ragged
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import fastgen
from fastgen.engine.speculative import SpeculationBudget, continuation
from fastgen.export import export
from fastgen.inputs.params import resolve

# Here guesses are to be right; whether they pay is asked of `SpeculationBudget`, below.
pytestmark = pytest.mark.usefixtures("always_guess")

SAMPLING = {"do_sample": True, "top_k": 0, "temperature": 0.6}
KNOBS = [
    {},
    {"eos_token_id": [5, 17, 40]},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 4},
    {**SAMPLING, "seed": 3},
    {**SAMPLING, "seed": 4, "num_return_sequences": 3},
    {**SAMPLING, "seed": 5, "top_p": 0.8, "min_new_tokens": 7, "eos_token_id": [5, 17, 40]},
]


def repetitive(rows: int) -> list[list[int]]:
    """Prompts that a lookup finds something in."""
    random = np.random.default_rng(rows)
    return [random.integers(3, tiny.VOCAB, 6).tolist() * 3 for _ in range(rows)]


@pytest.fixture(scope="module")
def assistant(pair, tmp_path_factory):
    """A model that often agrees with tiny llama: its own weights with some noise."""
    model = tiny.build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    path = export(
        model, tmp_path_factory.mktemp("assistant") / "m", precision="fp32", progress=None
    )
    return fastgen.load(path)


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_prompt_lookup_is_plain_generation(pair, kind, rows, knobs):
    _, model = pair(kind)
    prompts = repetitive(rows)
    asked = {"max_new_tokens": 40, **knobs}
    plain = model.generate(prompts, **asked)
    for size in (1, 4, 10):
        assert model.generate(prompts, prompt_lookup_num_tokens=size, **asked) == plain


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_an_assistant_is_plain_generation(pair, assistant, rows, knobs, schedule):
    _, model = pair("llama")
    prompts = ragged(3, (4, 9, 2)[:rows])
    asked = {"max_new_tokens": 30, **knobs}
    plain = model.generate(prompts, **asked)
    found = model.generate(
        prompts,
        assistant_model=assistant,
        num_assistant_tokens=5,
        assistant_confidence_threshold=0.01,
        num_assistant_tokens_schedule=schedule,
        **asked,
    )
    assert found == plain


def test_guesses_are_used(pair, assistant):
    """An assistant that agrees saves most of the model's steps; so does a repetitive text."""
    _, model = pair("llama")
    knobs = {"max_new_tokens": 60, "eos_token_id": None}
    for more, helper in (
        ({"assistant_confidence_threshold": 0.0}, assistant),
        ({"prompt_lookup_num_tokens": 8}, None),
    ):
        call = model._call(repetitive(1), knobs=knobs | more, assistant_model=helper)
        steps = sum(1 for _ in call.steps())
        assert steps < 50, steps


def test_scores_are_those_of_plain_generation(pair):
    _, model = pair("llama")
    asked = {"max_new_tokens": 20, "output_scores": True, "output_logits": True,
             "return_dict_in_generate": True, "top_logprobs": 3,
             "eos_token_id": [5, 17]}  # fmt: skip
    plain = model.generate(repetitive(2), **asked)
    found = model.generate(repetitive(2), prompt_lookup_num_tokens=4, **asked)
    assert found.sequences == plain.sequences
    for name in ("scores", "logits"):
        for a, b in zip(getattr(plain, name), getattr(found, name), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert found.finish_reasons == plain.finish_reasons
    for a, b in zip(plain.top_logprobs, found.top_logprobs, strict=True):
        assert [[i for i, _ in step] for step in a] == [[i for i, _ in step] for step in b]


@pytest.mark.parametrize("seed", range(40))
def test_candidates_are_those_of_transformers(seed):
    random = np.random.default_rng(seed)
    ids = random.integers(0, 6, int(random.integers(2, 40)))
    eos = int(random.integers(0, 6))
    num, size = int(random.integers(1, 8)), int(random.integers(1, 4))
    theirs = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor([eos]),
        num_output_tokens=num,
        max_matching_ngram_size=size,
        max_length=1000,
    )
    expected, _ = theirs.get_candidates(torch.from_numpy(ids)[None])
    found = continuation(ids, num, size, frozenset({eos}))
    if expected.shape[1] > len(ids):  # where a match starts with an eos, ours tries the next one
        assert found.tolist() == expected[0, len(ids) :].tolist()


def test_greedy_lookup_is_that_of_transformers(pair):
    theirs, ours = pair("llama")
    for row in repetitive(3):
        knobs = {"max_new_tokens": 30, "prompt_lookup_num_tokens": 5, "do_sample": False}
        ids, mask = left_padded([row])
        expected = theirs.generate(ids, attention_mask=mask, **knobs)
        assert ours.generate(row, **knobs) == expected.tolist()


def test_what_cannot_be_guessed_is_said(pair):
    _, model = pair("llama")
    _, other = pair("gpt2", vocab_size=98)
    for knobs, words in (
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "num_beams=1"),
        ({"prompt_lookup_num_tokens": 3, "guidance_scale": 2.0}, "guidance_scale"),
        ({"assistant_model": other}, "vocabulary of 98, the model of 99"),
    ):
        with pytest.raises(ValueError, match=words):
            model.generate([5, 6, 7], max_new_tokens=3, **knobs)


def test_a_models_own_default_that_a_search_has_no_use_for_is_left_out():
    """As transformers does; who asks for both is told."""
    own = {"prompt_lookup_num_tokens": 3, "penalty_alpha": 0.6, "diversity_penalty": 0.5,
           "forced_eos_token_id": 2}  # fmt: skip
    for asked in ({"num_beams": 2}, {"num_beams": 2, "do_sample": True}):
        found = resolve(own, None, asked)
        assert found.prompt_lookup_num_tokens is None and found.diversity_penalty == 0
        assert found.forced_eos_token_id == (2,)
    del own["penalty_alpha"]
    assert resolve(own, None, {}).prompt_lookup_num_tokens == 3
    assert resolve(own, None, {"guidance_scale": 2.0}).prompt_lookup_num_tokens is None
    assert resolve(own, None, {"regex": "a"}).forced_eos_token_id is None
    for given in (
        {"penalty_alpha": 0.6},
        {"diversity_penalty": 0.5},
        {"forced_eos_token_id": 2, "regex": "a"},
    ):
        with pytest.raises(ValueError, match=next(iter(given))):
            resolve(own, None, {"num_beams": 2, **given})
    assert resolve({}, None, {"top_k": 50.0, "pad_token_id": -1}).top_k == 50
    with pytest.raises(ValueError, match="top_k must be an integer"):
        resolve({}, None, {"top_k": 50.5})


# --- whether it pays -----------------------------------------------------------------------------


def run(
    budget: SpeculationBudget, steps: int, holds, cost, search: float = 0.0
) -> tuple[float, int]:
    """Seconds and tokens of a call by a model whose plain step takes 1 and a guessed token `cost`.

    Args:
        budget: what decides how many tokens are guessed.
        steps: tokens that are wanted.
        holds: (token) -> how many tokens of a guess hold there.
        cost: plain steps that a guessed token adds to a step.
        search: seconds to look for a guess.
    """
    seconds, done, verified = 0.0, 0, 0
    while done < steps:
        width = min(ALLOWED(budget, steps - done), steps - done - 1)
        if width > 0:
            budget.searched(search)
            kept = min(holds(done), width) + 1
            took = 1 + cost * width
            budget.verified(took, width, kept)
            seconds, done, verified = seconds + search + took, done + kept, verified + 1
        else:
            budget.stepped(1.0)
            seconds, done = seconds + 1, done + 1
    return seconds, verified


ALLOWED = SpeculationBudget.allowed


@pytest.mark.parametrize("cost", [0.02, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [64, 300, 2000])
def test_guesses_that_never_hold_cost_little(cost, steps):
    seconds, _ = run(SpeculationBudget(), steps, lambda _: 0, cost)
    assert seconds <= 1.03 * steps


@pytest.mark.parametrize("cost", [0.02, 0.1, 0.3])
def test_guesses_that_hold_are_used_and_grow(cost):
    seconds, verified = run(SpeculationBudget(), 300, lambda _: 100, cost)
    assert seconds < (0.2 if cost < 0.2 else 0.5) * 300
    assert verified > 5


def test_what_stops_holding_is_noticed():
    """Guesses hold for 200 tokens and then never again: what was gained is not gambled away."""
    good, _ = run(SpeculationBudget(), 200, lambda _: 100, 0.1)
    seconds, _ = run(SpeculationBudget(), 1200, lambda at: 100 if at < 200 else 0, 0.1)
    assert seconds < good + 1000 * 1.03


def test_a_search_that_finds_nothing_stops(pair):
    budget = SpeculationBudget()
    for _ in range(500):
        budget.stepped(1.0)
        if ALLOWED(budget, 100):
            budget.searched(0.1)
    assert budget.lost <= 0.02 * 600 + 0.1


def test_a_text_without_repetitions_is_generated_plainly(pair, monkeypatch):
    """The whole loop, by the real clock: few steps read guesses where none holds."""
    monkeypatch.setattr(SpeculationBudget, "allowed", ALLOWED)
    _, model = pair("llama")
    read = []
    real = SpeculationBudget.verified
    monkeypatch.setattr(
        SpeculationBudget, "verified", lambda self, *a: read.append(a) or real(self, *a)
    )
    random = np.random.default_rng(5)
    ids = random.integers(3, tiny.VOCAB, 40).tolist()
    knobs = {"max_new_tokens": 80, "eos_token_id": None, "do_sample": True, "top_k": 0, "seed": 1,
             "temperature": 5.0}  # fmt: skip
    plain = model.generate(ids, **knobs)
    assert model.generate(ids, prompt_lookup_num_tokens=10, **knobs) == plain
    assert len(read) < 40
