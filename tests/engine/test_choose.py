"""Decisions: probabilities of options, against transformers and its DecisionPipeline."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import ragged
from transformers.pipelines import DecisionPipeline

import fastgen
from fastgen.engine.prefix_cache import PrefixCache

KINDS = ["gpt2", "llama", "gemma2"]
OPTIONS = [[5, 6, 7], [5, 6], [9], [70, 3, 2, 1, 8, 11, 40], [5, 9]]


def sums(theirs: Any, prompt: list[int], options: list[list[int]]) -> np.ndarray:
    """torch's log-probability of each option after the prompt, each in a call of its own."""
    out = []
    for option in options:
        with torch.no_grad():
            logprobs = theirs(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(option) - 1)
        out.append(float(logprobs[at, torch.tensor(option)].double().sum()))
    return np.array(out)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_torch(pair, kind):
    theirs, ours = pair(kind)
    for prompt in ragged(71, (1, 6, 64, 90)):
        found = ours.choose(prompt, OPTIONS)
        expected = sums(theirs, prompt, OPTIONS)
        close(found.logprobs, expected)
        close(found.probabilities, softmax(expected))
        assert found.index == expected.argmax() and found.option is OPTIONS[found.index]
        warm = ours.choose(prompt, OPTIONS, temperature=2.5)
        close(warm.probabilities, softmax(expected / 2.5))
        lengths = np.array([len(option) for option in OPTIONS])
        mean = ours.choose(prompt, OPTIONS, per_token=True)
        close(mean.probabilities, softmax(expected / lengths))
        assert mean.logprobs == found.logprobs


def test_several_prompts_and_options_of_their_own(pair):
    theirs, ours = pair("llama")
    begin = ragged(72, (70,))[0]
    prompts = [begin + tail for tail in ragged(73, (3, 20, 9))]
    cache = PrefixCache()
    shared = ours.choose(prompts, OPTIONS, prefix_cache=cache)
    assert cache.hits == 2 and cache.tokens_reused == 2 * 64  # what they begin with is read once
    again = ours.choose(prompts, OPTIONS)
    for prompt, found, same in zip(prompts, shared, again, strict=True):
        close(found.logprobs, sums(theirs, prompt, OPTIONS))
        assert found == same == ours.choose(prompt, OPTIONS)
    own = [[[5], [6, 7]], OPTIONS, [[9, 9], [8], [7]]]
    for prompt, options, found in zip(prompts, own, ours.choose(prompts, own), strict=True):
        close(found.logprobs, sums(theirs, prompt, options))
    tensor = ours.choose(torch.tensor(prompts[0]), [np.array([5]), torch.tensor([6, 7])])
    assert tensor.logprobs == ours.choose(prompts[0], [[5], [6, 7]]).logprobs


def test_texts_are_cut_apart_from_the_prompt(pair):
    _, ours = pair("llama")
    tokenizer, options = ours.tokenizer, [" dog", " lazy dog", "."]
    found = ours.choose("The quick brown fox", options)
    ids = [tokenizer.encode(one, add_special_tokens=False) for one in options]
    expected = ours.choose(tokenizer.encode("The quick brown fox"), ids)
    assert found.logprobs == expected.logprobs and found.option == options[found.index]
    several = ours.choose(["The quick", "The quick brown fox"], options)
    assert several[1] == found
    own = ours.choose(["The quick", "The quick brown fox"], [[" a", " b"], options])
    assert own[1] == found and len(own[0].probabilities) == 2


def test_a_prompt_is_read_once_for_all_options(pair, monkeypatch):
    _, ours = pair("llama")
    read, forward = [], ours.model.forward

    def counted(new: Any, *args: Any) -> Any:
        read.append(sum(map(len, new)))
        return forward(new, *args)

    monkeypatch.setattr(ours.model, "forward", counted)
    ours.choose(list(range(3, 93)), [[one] for one in range(26)])
    assert read == [89, 1]  # one token each: the prompt's own logits say it all
    read.clear()
    ours.choose(list(range(3, 93)), [[1], [2, 3], [2, 4, 5]])
    assert read == [89, 1, 1 + 2]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_labels_are_decided_as_transformers_decides(both, temperature):
    """The pipeline's own prompts and labels: its answer and its probabilities."""
    from transformers.decision import DecisionConfig

    theirs, ours = both
    tokenizer = copy.deepcopy(tiny.tokenizer())  # the pipeline adds tokens to it
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    single = [
        word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    ]
    labels = {"choice": single[:5], "score": single[5:10], "noul": single[10:12]}
    assert all(labels.values()) and len(single) >= 12
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    config = DecisionConfig(labels=labels, temperature=dict.fromkeys(labels, temperature))
    decide = DecisionPipeline(
        model=theirs, tokenizer=tokenizer, decision_config=config, device="cpu"
    )
    request = {
        "state": "the quick fox",
        "questions": {
            "tone": {"type": "choice", "criteria": {"calm": None, "angry": "loud", "sad": None}},
            "urgent": {"type": "score", "criteria": ["later", "today"]},
            "spam": {"type": "noul", "instructions": "Is it spam?"},
        },
    }
    answers = decide(request)
    for inputs, questions in decide.preprocess(request)["prompts"]:
        (question,) = questions
        prompt = inputs["input_ids"][0].tolist()
        kept = [token for token in prompt if token < ours.model.info.vocab_size]
        assert kept == prompt
        options = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in question.labels]
        found = ours.choose(prompt, options, temperature=temperature)
        answer = answers[question.name]
        if question.type == "noul":
            at = question.options.index("true")
            assert found.probabilities[at] == pytest.approx(answer["noul"], abs=1e-4)
            continue
        close(found.probabilities, np.array([*answer["probabilities"].values()]))
        if question.type == "choice":
            assert question.options[found.index] == answer["choice"]
            assert found.confidence == pytest.approx(answer["confidence"], abs=1e-4)


def test_what_cannot_be_decided_is_said(pair):
    _, ours = pair("gpt2")
    for call, words in (
        (lambda: ours.choose([5], [[5]]), "two or more"),
        (lambda: ours.choose([5], "yes"), "two or more"),
        (lambda: ours.choose([5], [[5], []]), "empty"),
        (lambda: ours.choose([5], ["a", ""]), "option 1 is empty"),
        (lambda: ours.choose([5], [[5], [6], [5]]), "option 2 is there twice"),
        (lambda: ours.choose([5], [[5], [999]]), "outside the vocabulary"),
        (lambda: ours.choose([], [[5], [6]]), "empty"),
        (lambda: ours.choose([[5], [6]], [[[5], [6]]]), "1 lists for 2 prompts"),
        (lambda: ours.choose([5], [[5], [6]], temperature=0), "temperature must be a positive"),
        (lambda: ours.choose([5], [[5], [6]], temperature=float("nan")), "temperature"),
        (lambda: ours.choose([5] * 126, [[5], [6, 7, 8]]), "129 tokens .* takes 128"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("kind", ["numpy, states", "numpy, windows"])
def test_with_states_and_with_windows(pair, kind):
    """An option is scored as a continuation is, whatever the model keeps of a prompt."""
    _, ours = pair(kind)
    prompt = ragged(74, (50,))[0]
    cache = PrefixCache()
    for _ in range(2):
        found = ours.choose(prompt, OPTIONS, prefix_cache=cache)
        alone = [float(ours.score(one, prefix=prompt).sum()) for one in OPTIONS]
        close(found.logprobs, np.array(alone))


def test_a_decision_says_how_sure_it_is():
    even = fastgen.Decision(0, "a", [0.5, 0.5], [-1.0, -1.0])
    sure = fastgen.Decision(1, "b", [0.0, 1.0, 0.0], [-9.0, 0.0, -9.0])
    assert even.confidence == 0 and sure.confidence == 1
    assert fastgen.Decision(0, "a", [0.75, 0.25], [0.0, 0.0]).confidence == 0.5
