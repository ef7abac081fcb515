"""`POST /v1/choose`: the decisions of `CausalLM.choose`, beside whatever else runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import COMPLETIONS, TEMPLATE, Watched, address, asked, counts, model, served, until

import fastgen
from fastgen.engine.score import Choosing

__all__ = ["TEMPLATE", "address", "model"]  # fixtures, and what they take

CHOOSE = "/v1/choose"
PROMPT = "The os module provides " * 20
OPTIONS = ["functions", " a class", " the value of the environment", "."]


def close(found: Any, expected: fastgen.Decision) -> None:
    assert found["choice_index"] == expected.index and found["choice"] == expected.option
    assert found["probabilities"] == pytest.approx(expected.probabilities, abs=2e-3)
    assert found["logprobs"] == pytest.approx(expected.logprobs, abs=2e-2)
    assert found["confidence"] == pytest.approx(expected.confidence, abs=2e-3)


def test_decisions_are_those_of_python(address: str, model: fastgen.CausalLM) -> None:
    body = {"prompt": [PROMPT, "class "], "options": OPTIONS}
    status, _, found = asked(address, CHOOSE, body)
    assert status == 200 and found["object"] == "list" and found["model"] == "docs"
    assert [one["index"] for one in found["data"]] == [0, 1]
    for one, prompt in zip(found["data"], body["prompt"], strict=True):
        close(one, model.choose(prompt, OPTIONS))
        assert sum(one["probabilities"]) == pytest.approx(1)
    encode = model.tokenizer.encode
    options = sum(len(encode(one, add_special_tokens=False)) for one in OPTIONS)
    tokens = len(encode(PROMPT)) + len(encode("class ")) + 2 * options
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    for more in ({"temperature": 3}, {"per_token": True}):
        _, _, found = asked(address, CHOOSE, {"prompt": PROMPT, "options": OPTIONS, **more})
        close(found["data"][0], model.choose(PROMPT, OPTIONS, **more))
    ids = [[5, 6], [7], [9, 9, 9]]
    _, _, found = asked(address, CHOOSE, {"prompt": [5, 9], "options": ids})
    close(found["data"][0], model.choose([5, 9], ids))
    messages = [{"role": "user", "content": "Is os a module?"}]
    _, _, found = asked(address, CHOOSE, {"messages": messages, "options": [" yes", " no"]})
    close(found["data"][0], model.choose(model.chat_ids(messages), [" yes", " no"]))


def test_a_prompt_that_is_known_is_not_read_again(model: fastgen.CausalLM) -> None:
    with served(model) as here:
        body = {"prompt": PROMPT, "options": OPTIONS}
        first, second = (asked(here, CHOOSE, body)[2]["data"] for _ in range(2))
        assert first == second
        found, length = counts(here), len(model.tokenizer.encode(PROMPT))
        assert found["prefix_cache_hits_total"] == (length - 1) // 32 * 32
        asked(here, COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1})
        assert counts(here)["prefix_cache_hits_total"] > found["prefix_cache_hits_total"]


def test_it_runs_beside_others_and_leaves_with_its_client(
    model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    greedy = {"prompt": "The os module", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    body = {"prompt": [PROMPT, PROMPT + "a", "b" + PROMPT], "options": OPTIONS}
    with served(model, chunk=32) as here, ThreadPoolExecutor(2) as pool:
        text = pool.submit(asked, here, COMPLETIONS, greedy)
        until(lambda: watched.begun > 3)
        found = asked(here, CHOOSE, body)[2]["data"]
        assert text.result()[2]["choices"][0]["text"] == model.complete(
            "The os module", max_new_tokens=60, eos_token_id=None
        )
        for one, prompt in zip(found, body["prompt"], strict=True):
            close(one, model.choose(prompt, OPTIONS))
        # A chunk of a prompt at a time, and the stream's tokens between two of them.
        assert len(watched.events) > 3 * len(model.tokenizer.encode(PROMPT)) // 32


def test_what_is_held_is_no_more_than_was_promised(model: fastgen.CausalLM) -> None:
    ids = model.tokenizer.encode(PROMPT)
    needed = Choosing(model.model, ids, [[5], [6, 7]]).bytes
    with served(model, max_bytes=needed) as here:
        assert asked(here, CHOOSE, {"prompt": ids, "options": [[5], [6, 7]]})[0] == 200
        many = [[index, 7] for index in range(200)]
        status, _, found = asked(here, CHOOSE, {"prompt": ids, "options": many})
        assert status == 400 and "bytes of memory" in found["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"options": ["a", "b"]}, "prompt", "a prompt or messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "options": ["a", "b"]},
         "prompt", "one of them"),
        ({"prompt": "a"}, "options", "required"),
        ({"prompt": "a", "options": ["a"]}, "options", "at least 2"),
        ({"prompt": "a", "options": ["a", 5]}, "options", ""),
        ({"prompt": "a", "options": ["a", ""]}, "options", "option 1 is empty"),
        ({"prompt": "a", "options": ["a", "a"]}, "options", "there twice"),
        ({"prompt": "a", "options": [[5], [99999]]}, "options", "0 to 2047, got 99999"),
        ({"prompt": "a", "options": [[5], [2**70]]}, "options", ""),
        ({"prompt": "", "options": ["a", "b"]}, "prompt", "empty"),
        ({"prompt": "a", "options": [str(one) for one in range(257)]}, "options", "256"),
        ({"prompt": [5] * 512, "options": ["a", "b"]}, "prompt", "context is 512"),
        ({"prompt": "a", "options": ["a", "b"], "temperature": 0}, "temperature", "positive"),
        ({"prompt": "a", "options": ["a", "b"], "top_p": 0.5}, "top_p", "no field"),
    ],
)  # fmt: skip
def test_what_cannot_be_decided_is_said(
    address: str, body: dict[str, Any], param: str, words: str
) -> None:
    status, _, found = asked(address, CHOOSE, body)
    assert status == 400, found
    assert found["error"]["param"] == param and words in found["error"]["message"]
