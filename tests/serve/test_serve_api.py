"""The HTTP API, as OpenAI's own client speaks it: every text is the one that is generated alone."""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from click.testing import CliRunner
from serving import (
    CHATS,
    COMPLETIONS,
    TEMPLATE,
    WAIT,
    Watched,
    address,
    asked,
    command,
    counts,
    model,
    served,
    until,
)

import fastgen
from fastgen.commands import cli
from fastgen.engine.schedule import bytes_of
from fastgen.serve.engine import Engine
from fastgen.store import hub
from fastgen.store.model_info import ModelInfo
from fastgen.text import chat_template

__all__ = ["TEMPLATE", "address", "model"]  # fixtures, and what they take

DEMO = ModelInfo.read(hub.DEMO)
PROMPT = "The os module"
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is os?"},
]
TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
CALL = r'<tool_call>\{"name": "add", "arguments": \{"x": [1-9]\}\}</tool_call>'


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with talking_to(address) as found:
        yield found


def talking_to(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=WAIT)


def alone(model: fastgen.CausalLM, prompt: Any, **knobs: Any) -> Any:
    """The text that `complete` writes; without knobs that say otherwise, as OpenAI samples."""
    return model.complete(prompt, **{"do_sample": True, "top_k": 0, **knobs})


def choices(answer: Any) -> list[str]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.text for choice in answer.choices]


# --- completions --------------------------------------------------------------------------------


def test_a_list_of_prompts_and_n(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    knobs = {"seed": 7, "temperature": 0.8, "top_p": 0.9}
    prompts = [PROMPT, "class ", "A list"]
    answer = client.completions.create(model="docs", prompt=prompts, n=2, max_tokens=12, **knobs)
    expected = [
        alone(model, one, num_return_sequences=2, max_new_tokens=12, **knobs) for one in prompts
    ]
    assert choices(answer) == [text for texts in expected for text in texts]
    assert answer.object == "text_completion" and answer.model == "docs"
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage
    assert answer.usage.prompt_tokens == sum(len(model.tokenizer.encode(p)) for p in prompts)
    assert answer.usage.completion_tokens == 6 * 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 72


def test_ids_as_prompts(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    ids = model.tokenizer.encode(PROMPT)
    for prompt, count in ((ids, 1), ([ids, ids[:2]], 2)):
        answer = client.completions.create(model="docs", prompt=prompt, max_tokens=8, temperature=0)
        expected = [PROMPT, model.tokenizer.decode(ids[:2])][:count]
        greedy = [model.complete(one, max_new_tokens=8) for one in expected]
        assert choices(answer) == greedy


def test_where_nobody_says_how_many_there_are_16(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="docs", prompt=PROMPT, seed=1)
    assert answer.usage and answer.usage.completion_tokens == 16


def test_best_of(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    knobs = {"seed": 3, "temperature": 1.2}
    answer = client.completions.create(
        model="docs", prompt=PROMPT, n=2, best_of=5, max_tokens=9, **knobs
    )
    texts, sums = [""] * 5, [[] for _ in range(5)]
    for token in model.stream(
        PROMPT, do_sample=True, top_k=0, num_return_sequences=5, max_new_tokens=9, **knobs
    ):
        texts[token.row] += token.text
        sums[token.row].append(token.logprob)
    order = np.argsort([-np.mean(one) for one in sums], kind="stable")
    assert choices(answer) == [texts[place] for place in order[:2]]
    assert answer.usage and answer.usage.completion_tokens == 45  # what was made, not what came


def test_echo_with_logprobs_scores_a_prompt(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    text = "The os module. naïve ☃ text"
    answer = client.completions.create(
        model="docs", prompt=[text, "class "], echo=True, logprobs=3, max_tokens=0
    )
    assert choices(answer) == [text, "class "]
    for choice, whole in zip(answer.choices, (text, "class "), strict=True):
        found = choice.logprobs
        assert found and found.token_logprobs and found.top_logprobs and found.text_offset
        expected = model.score(whole)
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        np.testing.assert_allclose(found.token_logprobs[1:], expected[1:], atol=1e-5)
        likeliest = [max(one.values()) for one in found.top_logprobs[1:]]
        assert all(a >= b - 1e-5 for a, b in zip(likeliest, expected[1:], strict=True))
        assert all(len(one) == 3 for one in found.top_logprobs[1:])
        assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)
    assert answer.usage and answer.usage.completion_tokens == 0


def test_the_work_of_an_echo_grows_with_its_tokens(
    client: openai.OpenAI, model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in tokens that are made text, whatever the tokenizer: so many for each."""
    tokenizer, made = model.tokenizer, [0]
    decode, spelling = tokenizer.decode, tokenizer.spelling

    def decoded(ids: Any, *rest: Any, **more: Any) -> str:
        made[0] += len(ids)
        return decode(ids, *rest, **more)

    def spelt(token: int) -> bytes | None:
        made[0] += 1
        return spelling(token)

    monkeypatch.setattr(tokenizer, "decode", decoded)
    monkeypatch.setattr(tokenizer, "spelling", spelt)
    for by_bytes in (True, False):
        monkeypatch.setitem(vars(tokenizer), "is_byte_level", by_bytes)
        for length in (20, 200):
            made[0] = 0
            ids: Any = [token for token in range(300, 300 + length)]
            answer = client.completions.create(
                model="docs", prompt=ids, echo=True, logprobs=1, max_tokens=0
            )
            assert answer.choices[0].text == decode(ids, False)
            assert made[0] <= 12 * length, (by_bytes, length)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_goes_on_with_the_text(
    client: openai.OpenAI, model: fastgen.CausalLM, stream: bool
) -> None:
    answer: Any = client.completions.create(
        model="docs",
        prompt=PROMPT,
        echo=True,
        logprobs=1,
        max_tokens=5,
        temperature=0,
        stream=stream,
    )
    parts = list(answer) if stream else [answer]
    found = [part.choices[0] for part in parts]
    whole = PROMPT + model.complete(PROMPT, max_new_tokens=5)
    assert "".join(one.text for one in found) == whole
    offsets = [offset for one in found for offset in one.logprobs.text_offset]
    spelt = [token for one in found for token in one.logprobs.tokens]
    assert "".join(spelt) == whole
    assert offsets == [len("".join(spelt[:place])) for place in range(len(spelt))]


def test_logprobs(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    answer = client.completions.create(
        model="docs", prompt=PROMPT, logprobs=2, max_tokens=7, seed=5
    )
    found = answer.choices[0].logprobs
    assert found and found.token_logprobs and found.top_logprobs and found.tokens
    tokens = list(
        model.stream(PROMPT, do_sample=True, top_k=0, seed=5, max_new_tokens=7, top_logprobs=2)
    )
    assert found.token_logprobs == [token.logprob for token in tokens]
    assert "".join(found.tokens) == answer.choices[0].text
    for mine, token in zip(found.top_logprobs, tokens, strict=True):
        assert token.top_logprobs
        assert list(mine.values()) == [logprob for _, logprob in token.top_logprobs]


def test_suffix_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="suffix is not supported") as error:
        client.completions.create(model="docs", prompt=PROMPT, suffix="the end")
    assert error.value.param == "suffix" and error.value.type == "invalid_request_error"


# --- chats --------------------------------------------------------------------------------------


def test_a_chat_is_what_the_template_makes_of_its_roles(
    client: openai.OpenAI, model: fastgen.CausalLM
) -> None:
    knobs = {"seed": 2, "temperature": 0.7}
    sampled = {"do_sample": True, "top_k": 0, "max_new_tokens": 10, **knobs}
    answer = client.chat.completions.create(
        model="docs", messages=MESSAGES, max_completion_tokens=10, n=2, **knobs
    )
    expected = model.chat(MESSAGES, num_return_sequences=2, **sampled)
    assert [choice.message.content for choice in answer.choices] == expected
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is os?"}]
    answer = client.chat.completions.create(
        model="docs",
        messages=[MESSAGES[0], {"role": "user", "content": parts}],
        max_tokens=10,
        **knobs,
    )
    assert answer.choices[0].message.content == model.chat(MESSAGES, **sampled)


def test_tools_reach_the_template_and_calls_come_back(
    client: openai.OpenAI, model: fastgen.CausalLM
) -> None:
    settings: dict[str, Any] = {
        "model": "docs", "messages": MESSAGES, "tools": [TOOL], "seed": 1, "max_tokens": 60,
    }  # fmt: skip
    answer = client.chat.completions.create(**settings)
    free = model.chat(MESSAGES, tools=[TOOL], do_sample=True, top_k=0, seed=1, max_new_tokens=60)
    assert answer.choices[0].message.content == free  # no call in it
    assert answer.choices[0].finish_reason == "length"

    settings["extra_body"] = {"regex": r"Yes\. " + CALL}
    whole = client.chat.completions.create(**settings).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content == "Yes."
    (call,) = whole.message.tool_calls or ()
    assert call.type == "function" and call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"x"}

    chunks = list(client.chat.completions.create(stream=True, **settings))
    deltas = [one.choices[0].delta for one in chunks]
    assert "".join(one.content or "" for one in deltas) == "Yes."
    calls = [call for one in deltas for call in one.tool_calls or ()]
    assert calls[0].function and calls[0].function.name == "add" and calls[0].id
    grown = "".join(one.function.arguments or "" for one in calls if one.function)
    assert grown == call.function.arguments and len(calls) > 2
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    # What came back is said again, with the tool's answer.
    said = [*MESSAGES, whole.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "3"}]  # fmt: skip
    answer = client.chat.completions.create(
        model="docs", messages=said, max_tokens=5, temperature=0
    )
    assert answer.choices[0].message.content == model.chat(said, max_new_tokens=5)
    text = chat_template.prompt(model.directory, model.tokenizer.config, said)
    assert re.search("<tool_call>add [1-9]</tool_call>", text)  # the JSON text is an object there
    assert answer.usage
    assert answer.usage.prompt_tokens == len(model.tokenizer.encode(text, False))
    kept = client.chat.completions.create(**settings, tool_choice="none").choices[0]
    assert kept.message.tool_calls is None and "<tool_call>" in (kept.message.content or "")


def test_response_format(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}, "ok": {"enum": [True]}},
              "required": ["age", "ok"], "additionalProperties": False}  # fmt: skip
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    answer = client.chat.completions.create(
        model="docs", messages=MESSAGES, response_format=wanted, seed=4, max_tokens=80
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert isinstance(found["age"], int) and found["ok"] is True and len(found) == 2
    assert answer.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(
        model="docs", messages=MESSAGES, response_format=wanted, seed=4, max_tokens=3
    )
    assert cut.choices[0].finish_reason == "length"
    answer = client.chat.completions.create(
        model="docs",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    assert (answer.choices[0].message.content or "").startswith("{")


def test_logprobs_of_a_chat(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    settings: dict[str, Any] = {"model": "docs", "messages": MESSAGES, "seed": 6, "max_tokens": 8}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=2, **settings)
    found = answer.choices[0].logprobs
    assert found and found.content and len(found.content) == 8
    assert "".join(one.token for one in found.content) == answer.choices[0].message.content
    for one in found.content:
        assert bytes(one.bytes or ()).decode() == one.token and len(one.top_logprobs) == 2
        assert one.logprob <= one.top_logprobs[0].logprob + 1e-6
    streamed = client.chat.completions.create(
        logprobs=True, top_logprobs=2, stream=True, **settings
    )
    pieces = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [one for piece in pieces for one in piece.content or ()] == found.content


# --- streams ------------------------------------------------------------------------------------


def test_a_stream_is_the_text_in_pieces(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": "docs", "prompt": [PROMPT, "é"], "n": 2, "seed": 9, "max_tokens": 20,
        "temperature": 1.5,
    }  # fmt: skip
    whole = client.completions.create(**settings)
    chunks = list(
        client.completions.create(stream=True, stream_options={"include_usage": True}, **settings)
    )
    last = chunks.pop()
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks) and len(chunks) > 20
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == choices(whole)
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert not any(c.usage for c in client.completions.create(stream=True, **settings))


def test_a_chat_as_a_stream(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "docs", "messages": MESSAGES, "seed": 9, "max_tokens": 9}
    whole = client.chat.completions.create(**settings)
    chunks = list(
        client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **settings
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    said = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(said) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.choices[0].finish_reason in ("length", "stop")


def test_stop(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    """A text ends before the first stop text, whole or in pieces, wherever tokens are cut."""
    free = model.complete(PROMPT, max_new_tokens=40)
    for first, last in ((8, 11), (13, 21), (20, 22)):
        stop = free[first:last]
        settings: dict[str, Any] = {
            "model": "docs", "prompt": PROMPT, "stop": [stop, "never seen"], "temperature": 0,
            "max_tokens": 40, "logprobs": 0,
        }  # fmt: skip
        whole = client.completions.create(**settings).choices[0]
        assert whole.text == free[: free.index(stop)] and whole.finish_reason == "stop"
        pieces = [chunk.choices[0] for chunk in client.completions.create(stream=True, **settings)]
        assert "".join(piece.text for piece in pieces) == whole.text
        assert pieces[-1].finish_reason == "stop"
        offsets = [offset for one in pieces for offset in one.logprobs.text_offset]
        spelt = whole.logprobs.tokens
        assert offsets == whole.logprobs.text_offset
        assert offsets == [len("".join(spelt[:place])) for place in range(len(spelt))]


def test_a_stop_text_is_looked_for_in_what_is_new(
    client: openai.OpenAI, model: fastgen.CausalLM
) -> None:
    free = model.complete(PROMPT, max_new_tokens=5)
    across = PROMPT[-1] + free[0]
    settings: dict[str, Any] = {
        "model": "docs", "prompt": PROMPT, "temperature": 0, "max_tokens": 5,
    }  # fmt: skip
    assert across not in free
    assert choices(client.completions.create(stop=across, **settings)) == [free]
    answer = client.completions.create(extra_body={"stop_strings": across}, **settings)
    assert answer.usage and answer.usage.completion_tokens == 1  # transformers' rule


def test_log_probabilities_are_the_models_own(
    client: openai.OpenAI, model: fastgen.CausalLM
) -> None:
    settings: dict[str, Any] = {
        "model": "docs", "max_tokens": 6, "logprobs": 5, "seed": 2, "temperature": 0.2,
        "top_p": 0.3,
    }  # fmt: skip
    new = client.completions.create(prompt=PROMPT, **settings).choices[0]
    ids = model.tokenizer.encode(PROMPT)
    whole = ids + [model.tokenizer.index(token) for token in new.logprobs.tokens]
    if None not in whole:
        expected = model.score(whole)[len(ids) :]
        np.testing.assert_allclose(new.logprobs.token_logprobs, expected, atol=1e-4)
    for spelt, mine, top in zip(
        new.logprobs.tokens, new.logprobs.token_logprobs, new.logprobs.top_logprobs, strict=True
    ):
        assert all(isinstance(value, float) for value in top.values()) and len(top) == 5
        assert mine == top.get(spelt, mine)
    echo = (
        client.completions.create(
            prompt=PROMPT + new.text, echo=True, **{**settings, "max_tokens": 0}
        )
        .choices[0]
        .logprobs
    )
    known = list(zip(echo.tokens, echo.token_logprobs, echo.top_logprobs, strict=True))[1:]
    assert [top.get(spelt, mine) for spelt, mine, top in known] == [mine for _, mine, _ in known]


def test_the_models_own_end(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    """An end of text is no text; with ignore_eos there is none."""
    end = model.tokenizer.encode(model.complete(PROMPT, max_new_tokens=4))[-1]
    settings: dict[str, Any] = {
        "model": "docs", "prompt": PROMPT, "temperature": 0, "max_tokens": 6, "logprobs": 0,
    }  # fmt: skip
    answer = client.completions.create(**settings, extra_body={"eos_token_id": end}).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.logprobs and end not in [
        model.tokenizer.index(token) for token in answer.logprobs.tokens or ()
    ]
    answer = client.completions.create(**settings, extra_body={"ignore_eos": True}).choices[0]
    assert answer.finish_reason == "length"


# --- knobs --------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "seed": 5}
# A value for every knob; with what it needs besides.
KNOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_length": (30, {"max_new_tokens": None}),
    "max_new_tokens": (7, {}),
    "min_length": (9, {}),
    "min_new_tokens": (6, {"eos_token_id": [200, 13, 14]}),
    "early_stopping": ("never", {"num_beams": 3}),
    "max_time": (60, {}),
    "stop_strings": (["\n", "e"], {}),
    "do_sample": (False, {}),
    "num_beams": (4, {}),
    "num_beam_groups": (2, {"num_beams": 4, "diversity_penalty": 0.5}),
    "diversity_penalty": (0.7, {"num_beams": 4, "num_beam_groups": 2}),
    "length_penalty": (0.2, {"num_beams": 3}),
    "num_return_sequences": (3, {"num_beams": 4}),
    "seed": (11, {"do_sample": True}),
    "temperature": (0.6, SAMPLED),
    "top_k": (5, SAMPLED),
    "top_p": (0.5, SAMPLED),
    "min_p": (0.1, SAMPLED),
    "top_h": (0.4, SAMPLED),
    "typical_p": (0.6, SAMPLED),
    "epsilon_cutoff": (0.01, SAMPLED),
    "eta_cutoff": (0.01, SAMPLED),
    "repetition_penalty": (1.5, {}),
    "encoder_repetition_penalty": (1.5, {}),
    "frequency_penalty": (0.8, {}),
    "presence_penalty": (0.8, {}),
    "logit_bias": ({"13": -100, "200": 5}, {}),
    "no_repeat_ngram_size": (1, {}),
    "encoder_no_repeat_ngram_size": (1, {}),
    "bad_words_ids": ([[13], [14, 15]], {}),
    "sequence_bias": ([[[13, 14], -5.0]], {}),
    "renormalize_logits": (True, SAMPLED),
    "forced_bos_token_id": (20, {}),
    "forced_eos_token_id": (13, {}),
    "remove_invalid_values": (True, {}),
    "exponential_decay_length_penalty": ([2, 2.0], {}),
    "suppress_tokens": ([13, 14], {}),
    "begin_suppress_tokens": ([13], {}),
    "guidance_scale": (1.5, {}),
    "watermarking_config": ({"greenlist_ratio": 0.4, "bias": 3.0}, {}),
    "token_healing": (True, {}),
    "json_schema": ({"type": "integer"}, {}),
    "regex": ("[a-z]{3}", {}),
    "grammar": ('start: "ab" | "cd"', {}),
    "prompt_lookup_num_tokens": (3, {}),
    "max_matching_ngram_size": (3, {"prompt_lookup_num_tokens": 3}),
    "num_assistant_tokens": (5, {}),
    "num_assistant_tokens_schedule": ("heuristic", {}),
    "assistant_confidence_threshold": (0.5, {}),
    "return_dict_in_generate": (True, {}),
    "output_scores": (True, {}),
    "output_logits": (True, {}),
    "top_logprobs": (2, {}),
    "pad_token_id": (0, {}),
    "bos_token_id": (0, {}),
    "eos_token_id": ([13, 14, 200], {}),
}


def test_every_knob_is_a_field(
    client: openai.OpenAI, model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, side by side: each text is what `generate` writes with the same keywords.

    And whatever is asked for, the engine's thread alone runs the model.
    """
    threads, forward = set(), model.model.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.current_thread().name)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", noted)
    assert set(KNOBS) == {knob.name for knob in fields(fastgen.Params)}

    def one(name: str) -> tuple[str, list[str]]:
        value, besides = KNOBS[name]
        knobs = {"max_new_tokens": 12, "do_sample": False, **besides, name: value}
        answer = client.completions.create(model="docs", prompt=PROMPT, extra_body=knobs)
        return name, choices(answer)

    with ThreadPoolExecutor(16) as pool:
        found = dict(pool.map(one, KNOBS))
    assert threads == {"fastgen-engine"}
    for name, (value, besides) in KNOBS.items():
        knobs = {"max_new_tokens": 12, "do_sample": False, **besides, name: value}
        knobs = {"top_k": 0, **knobs}
        if name in ("return_dict_in_generate", "output_scores", "output_logits"):
            del knobs[name]  # they change what `generate` returns, not the text
        texts = model.complete(PROMPT, **knobs)
        texts = [texts] if isinstance(texts, str) else texts
        if name == "stop_strings":  # here as with OpenAI: it is not part of the text
            texts = [re.split("\n|e", text)[0] for text in texts]
        assert found[name] == texts, name


def test_openais_own_knobs(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    knobs: dict[str, Any] = {
        "seed": 8, "temperature": 0.9, "top_p": 0.8, "frequency_penalty": 0.5,
        "presence_penalty": 0.4, "logit_bias": {str(model.tokenizer.encode(" the")[0]): 4},
    }  # fmt: skip
    answer = client.completions.create(model="docs", prompt=PROMPT, max_tokens=25, **knobs)
    assert choices(answer) == [alone(model, PROMPT, max_new_tokens=25, **knobs)]
    without = client.completions.create(
        model="docs", prompt=PROMPT, max_tokens=25, **knobs | {"logit_bias": {}}
    )
    assert choices(without) != choices(answer)
    one, other = (
        choices(client.completions.create(model="docs", prompt=PROMPT, max_tokens=25))
        for _ in range(2)
    )
    assert one != other  # without a seed, tokens are drawn anew


def test_beams_and_how_many(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    beams = {"num_beams": 5, "length_penalty": 0.5}
    answer = client.completions.create(
        model="docs", prompt=[PROMPT, "class "], n=3, max_tokens=10, extra_body=beams
    )
    expected = [
        model.complete(one, num_return_sequences=3, max_new_tokens=10, **beams)
        for one in (PROMPT, "class ")
    ]
    assert choices(answer) == [text for texts in expected for text in texts]
    chunks = list(
        client.completions.create(
            model="docs", prompt=PROMPT, max_tokens=10, stream=True, extra_body=beams
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0][0]


def test_many_clients_at_once(client: openai.OpenAI, model: fastgen.CausalLM) -> None:
    """Prompts of all lengths, sampled, greedy and beams: nobody's text depends on the others."""
    random = np.random.default_rng(0)
    wishes: list[tuple[str, dict[str, Any]]] = []
    for place in range(24):
        knobs = [{"temperature": 0.9, "seed": place}, {"do_sample": False}, {"num_beams": 2}][
            place % 3
        ]
        prompt = PROMPT + " and".join(map(str, range(int(random.integers(90)))))
        wishes.append((prompt, {"max_new_tokens": int(random.integers(1, 24)), **knobs}))

    def one(wish: tuple[str, dict[str, Any]]) -> str:
        prompt, knobs = wish
        chunks = client.completions.create(
            model="docs", prompt=prompt, stream=True, extra_body=knobs
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(one, wishes))
    for text, (prompt, knobs) in zip(found, wishes, strict=True):
        sampled = {"do_sample": "seed" in knobs, "top_k": 0}
        assert text == model.complete(prompt, **{**sampled, **knobs})


@pytest.mark.slow
def test_rude_clients() -> None:
    """A short run of bench/soak.py, which the long one is for: broken, slow and lost requests."""
    script = Path(fastgen.__file__).parents[1] / "bench" / "soak.py"
    words = ["--requests", "200", "--warm", "200", "--clients", "20", "--growth", "200"]
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none lost" in done.stdout


# --- besides ------------------------------------------------------------------------------------


def test_models_and_health(client: openai.OpenAI, address: str) -> None:
    assert [one.id for one in client.models.list()] == ["docs"]
    assert client.models.retrieve("docs").owned_by == "fastgen"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt', only 'docs'"):
        client.models.retrieve("gpt")
    assert asked(address, "/health")[2] == {
        "status": "ok",
        "model": "docs",
        "loaded": {"docs": True},
    }


def test_tokenize_and_back(address: str, model: fastgen.CausalLM) -> None:
    text = "The naïve os ☃"
    _, _, found = asked(address, "/tokenize", {"prompt": text})
    ids = model.tokenizer.encode(text)
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": 512}
    assert asked(address, "/detokenize", {"tokens": ids})[2] == {"prompt": text}
    status, _, found = asked(address, "/detokenize", {"tokens": [99999]})
    assert status == 400 and found["error"]["param"] == "tokens"


# Knobs that a request lacks which has one text, and a name of its own for its length.
ONE_TEXT = {
    "CreateResponse": {"num_return_sequences", "max_new_tokens"},
    "CreateMessage": {"num_return_sequences", "max_new_tokens", "top_logprobs"},
}


def test_the_api_is_documented(address: str) -> None:
    _, _, found = asked(address, "/openapi.json")
    assert {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/models",
        "/health",
        "/metrics",
        "/tokenize",
        "/detokenize",
    } <= set(found["paths"])
    described = found["components"]["schemas"]
    for kind in ("Completion", "ChatCompletion", "CreateResponse", "CreateMessage"):
        named = set(described[kind]["properties"]) | ONE_TEXT.get(kind, set())
        assert {knob.name for knob in fields(fastgen.Params)} <= named
    assert "swagger" in asked(address, "/docs")[2]


def test_head_is_get_without_a_body(address: str) -> None:
    """For whoever looks whether a service is there: also where the answer is an error."""

    def answer(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        host = address.removeprefix("http://")
        with contextlib.closing(http.client.HTTPConnection(host, timeout=30)) as line:
            line.request(method, path)
            found = line.getresponse()
            named = {name.lower(): value for name, value in found.getheaders()}
            kept = {name: named[name] for name in ("content-type", "content-length")}
            return found.status, kept, found.read()

    paths = ["/health", "/v1/models", "/v1/models/docs", "/knobs", "/", "/page/main.js", "/docs"]
    for path in [*paths, "/openapi.json", "/v1/models/none", "/v1/responses/none"]:
        status, headers, content = answer("GET", path)
        assert content and status == (404 if path.endswith("none") else 200)
        assert answer("HEAD", path) == (status, headers, b""), path
    status, _, content = answer("HEAD", "/metrics")  # (they count requests: each is another text)
    assert (status, content) == (200, b"")
    assert answer("HEAD", COMPLETIONS)[0] == 405


def test_metrics(model: fastgen.CausalLM) -> None:
    with served(model) as address, talking_to(address) as client:
        prompt = PROMPT * 30
        for _ in range(2):
            client.completions.create(model="it", prompt=prompt, max_tokens=9, temperature=0)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="it", prompt=PROMPT, max_tokens=-1)
        status, headers, _ = asked(address, "/metrics")
        found = counts(address)
    assert status == 200 and headers["content-type"].startswith("text/plain")
    length = len(model.tokenizer.encode(prompt))
    assert found['http_requests_total{handler="/v1/completions",method="POST",status="200"}'] == 2
    assert found['http_requests_total{handler="/v1/completions",method="POST",status="400"}'] == 1
    assert found["prompt_tokens_total"] == 2 * length
    assert found["generation_tokens_total"] == 18
    for seconds in ("time_to_first_token", "e2e_request_latency", "request_queue_time",
                    "request_prefill_time", "request_decode_time"):  # fmt: skip
        assert found[f"{seconds}_seconds_count"] == 2
    waited = found["request_queue_time_seconds_sum"] + found["request_prefill_time_seconds_sum"]
    assert waited == pytest.approx(found["time_to_first_token_seconds_sum"])
    whole = waited + found["request_decode_time_seconds_sum"]
    assert whole == pytest.approx(found["e2e_request_latency_seconds_sum"])
    assert found["inter_token_latency_seconds_count"] == 16
    assert found['inter_token_latency_seconds_bucket{le="+Inf"}'] == 16
    assert found["request_prompt_tokens_sum"] == 2 * length
    assert found["request_generation_tokens_sum"] == 18
    assert found['request_success_total{finished_reason="length"}'] == 2
    assert found['request_success_total{finished_reason="stop"}'] == 0
    assert found["num_rows_running"] == found["num_requests_waiting"] == 0
    assert found["num_requests_running"] == found["kv_cache_usage_perc"] == 0
    assert found["prefix_cache_queries_total"] == 2 * length
    assert found["prefix_cache_hits_total"] == (length - 1) // 32 * 32
    assert found["prefix_cache_bytes"] > 0 == found["promised_bytes"]
    assert found["model_loaded"] == 1


def test_the_key(model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    plain = hmac.compare_digest  # in constant time
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or plain(a, b))
    with served(model, api_key="s3cret") as address:
        for key in ("s3cre", "wrong", "s3cret"):
            with talking_to(address, key) as client:
                if key == "s3cret":
                    assert client.models.list().data
                    continue
                with pytest.raises(openai.AuthenticationError) as error:
                    client.completions.create(model="it", prompt=PROMPT)
                assert error.value.code == "invalid_api_key"
        assert compared == [(k, b"s3cret") for k in (b"s3cre", b"wrong", b"s3cret")]
        status, headers, found = asked(address, "/v1/models")
        assert status == 401 and headers["www-authenticate"] == "Bearer"
        assert found["error"]["type"] == "authentication_error"
        basic = {"Authorization": "Basic s3cret"}
        assert asked(address, "/v1/models", **basic)[0] == 401
        for path in ("/metrics", "/knobs"):
            assert asked(address, path)[0] == 401
        for path in ("/tokenize", "/detokenize", "/v1/chat/completions"):
            assert asked(address, path, {})[0] == 401
        assert asked(address, "/health")[0] == asked(address, "/")[0] == 200


def test_cors_is_off_unless_an_origin_is_named(address: str, model: fastgen.CausalLM) -> None:
    origin = {"Origin": "https://example.org"}
    assert "access-control-allow-origin" not in asked(address, "/v1/models", **origin)[1]
    with served(model, cors="https://example.org") as open_one:
        _, headers, _ = asked(open_one, "/v1/models", **origin)
        assert headers["access-control-allow-origin"] == "https://example.org"
        _, headers, _ = asked(open_one, "/v1/models", Origin="https://example.com")
        assert "access-control-allow-origin" not in headers


# --- errors -------------------------------------------------------------------------------------

LONG = "word " * 600
ERRORS = [
    (COMPLETIONS, b"{", 400, None, "no JSON"),
    (COMPLETIONS, b"[" * 100_000, 400, None, ""),
    (COMPLETIONS, b'{"prompt": "\\ud800"}', 400, None, "no Unicode"),
    (COMPLETIONS, {"prompt": "a", "stop": "\ud800"}, 400, "stop", "^stop"),
    (COMPLETIONS, {"prompt": "a", "\ud800": 1}, 400, None, "unicode"),
    (CHATS, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", ""),
    (COMPLETIONS, {}, 400, "prompt", "required"),
    (COMPLETIONS, [], 400, None, ""),
    (COMPLETIONS, {"prompt": 5}, 400, "prompt", ""),
    (COMPLETIONS, {"prompt": ""}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": []}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "prompt", "empty"),
    (COMPLETIONS, {"prompt": [99999]}, 400, "prompt", "0 to 2047, got 99999"),
    (COMPLETIONS, {"prompt": [5, -850], "echo": True, "logprobs": 1}, 400, "prompt", "got -850"),
    (COMPLETIONS, {"prompt": [2**70], "echo": True}, 400, "prompt", "got 1180591620717411303424"),
    (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", "a list of texts"),
    (COMPLETIONS, {"prompt": "a", "stop_strings": 5}, 400, "stop_strings", "string"),
    (COMPLETIONS, {"prompt": "a", "max_new_tokens": "x"}, 400, "max_new_tokens", "integer"),
    (COMPLETIONS, {"prompt": "a", "max_new_tokens": [3]}, 400, "max_new_tokens", "integer"),
    (COMPLETIONS, {"prompt": "a", "max_new_tokens": {}}, 400, "max_new_tokens", "integer"),
    (COMPLETIONS, {"prompt": "a", "top_logprobs": 1.5}, 400, "top_logprobs", "integer"),
    (COMPLETIONS, {"prompt": "a", "top_logprobs": 21}, 400, "top_logprobs", "20"),
    (COMPLETIONS, {"prompt": "a", "num_return_sequences": 65}, 400, "num_return_sequences", "64"),
    (COMPLETIONS, {"prompt": "a", "best_of": 65}, 400, "best_of", "64"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 33}, 400, "stop", "32"),
    (COMPLETIONS, {"prompt": "a", "stop_strings": ["x" * 1025]}, 400, "stop_strings", "1,024"),
    (COMPLETIONS, {"prompt": "a", "bad_words_ids": [[1]] * 9000}, 400, None, "16,384 values"),
    (COMPLETIONS, {"prompt": "a " * 600_000}, 400, "prompt", "1,048,576"),
    (COMPLETIONS, {"prompt": [[1, 2]] * 64, "max_tokens": 500, "n": 64, "logprobs": 20}, 400,
     "logprobs", "1,048,576"),
    (COMPLETIONS, {"prompt": ["a"] * 65}, 400, "prompt", "64"),
    (COMPLETIONS, {"prompt": LONG}, 400, "prompt", "the context is 512 tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 600}, 400, "prompt", "the context is 512"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "echo"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "x"}, 400, "max_tokens", "integer"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, 400, "n", "greater"),
    (COMPLETIONS, {"prompt": "a", "n": 65}, 400, "n", "64"),
    (COMPLETIONS, {"prompt": "a", "n": 3, "best_of": 2}, 400, "best_of", "less than n"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of", "streamed"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "20"),
    (COMPLETIONS, {"prompt": "a", "stop": ""}, 400, "stop", "^stop must"),
    (COMPLETIONS, {"prompt": "a", "temprature": 1}, 400, "temprature", "no field"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature", "must be"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, 400, "temperature", "must be"),
    (COMPLETIONS, {"prompt": "a", "temperature": 0, "do_sample": True}, 400, "temperature", ""),
    (COMPLETIONS, {"prompt": "a", "top_p": [1]}, 400, "top_p", "must be"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", ""),
    (COMPLETIONS, {"prompt": "a", "num_beams": 65}, 400, None, "65 rows or beams"),
    (COMPLETIONS, {"prompt": "a", "num_beams": 2, "n": 3}, 400, "n", "num_beams"),
    (COMPLETIONS, {"prompt": "a", "regex": "("}, 400, "regex", "cannot be used"),
    (COMPLETIONS, {"prompt": "a", "json_schema": 5}, 400, "json_schema", ""),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 5, "max_new_tokens": 6}, 400, "max_tokens", ""),
    (COMPLETIONS, {"prompt": "a", "n": 2, "num_return_sequences": 2}, 400, "n", "two names"),
    (CHATS, {"messages": []}, 400, "messages", "1"),
    (CHATS, {"messages": "hi"}, 400, "messages", "list"),
    (CHATS, {"messages": [{"content": "hi"}]}, 400, "messages", "required"),
    (CHATS, {"messages": [{"role": "user", "content": LONG}]}, 400, "prompt", "512"),
    (CHATS, {"messages": MESSAGES, "max_tokens": 4, "max_completion_tokens": 5}, 400,
     "max_tokens", "different lengths"),
    (CHATS, {"messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens", "one token"),
    (CHATS, {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
    (CHATS, {"messages": MESSAGES, "response_format": {"type": "xml"}}, 400,
     "response_format", "json_schema"),
    (CHATS, {"messages": MESSAGES, "response_format": {"type": "json_schema"}}, 400,
     "response_format", "schema"),
    (CHATS, {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "any"}, 400,
     "tool_choice", "required"),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages", "image_url"),
    ("/v1/embeddings", {"input": "a"}, 404, None, "Not Found"),
    ("/health", {}, 405, None, "Method Not Allowed"),
    (COMPLETIONS, b'{"prompt": "' + b"a" * (9 << 20) + b'"}', 413, None, "2,097,152 bytes"),
]  # fmt: skip


def test_errors_have_openais_shape(address: str) -> None:
    for path, body, status, param, words in ERRORS:
        found, _, content = asked(address, path, body)
        shown = f"{path} {str(body)[:80]}: {content}"
        assert found == status, shown
        error = content["error"]
        assert set(content) == {"error"} and set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error", shown
        assert error["param"] == param and re.search(words, error["message"]), shown
    assert asked(address, COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_token_that_nothing_can_be_is_an_error_of_its_request(client: openai.OpenAI) -> None:
    """Also where the answer has begun: then it is the last event."""
    nothing: dict[str, Any] = {
        "logit_bias": dict.fromkeys(map(str, range(DEMO.vocab_size)), -math.inf)
    }
    with pytest.raises(openai.BadRequestError, match="ruled out"):
        client.completions.create(model="it", prompt=PROMPT, extra_body=_finite(nothing))
    with pytest.raises(openai.APIError, match="ruled out"):
        list(
            client.completions.create(
                model="it", prompt=PROMPT, stream=True, extra_body=_finite(nothing)
            )
        )


def _finite(knobs: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's client writes no infinities; this many tokens suppressed are all of them."""
    return {"suppress_tokens": [int(token) for token in knobs["logit_bias"]]}


def test_what_breaks_inside_has_that_shape_too(
    model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Engine, *_: Any) -> Any:
        raise KeyError("inside")

    with served(model) as address:
        monkeypatch.setattr(Engine, "submit", broken)
        status, _, content = asked(address, COMPLETIONS, {"prompt": "a"})
    assert status == 500 and content["error"]["type"] == "server_error"
    assert content["error"]["code"] == "internal_error"


# --- waiting, leaving, stopping -----------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row_within_a_step(
    model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    watched = Watched(monkeypatch)
    body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "n": 2, "stream": stream}
    with served(model) as address:
        host, port = address.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=WAIT)
        as_json = {"Content-Type": "application/json"}
        connection.request("POST", COMPLETIONS, json.dumps(body), as_json)
        if stream:
            assert connection.getresponse().read(1) == b"d"
        until(lambda: watched.begun > 3)
        assert connection.sock
        connection.sock.shutdown(socket.SHUT_RDWR)  # as when the client's process ends
        connection.close()
        until(lambda: watched.cancelled)
        scheduler = watched.scheduler
        assert scheduler
        until(lambda: scheduler.idle)
        at = watched.cancelled[0]
        assert at < 200  # it was not at its end
        assert not any(count for step, count in watched.events if step > at)
        assert asked(address, COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] == 200
        assert scheduler.rows == scheduler.held == 0


def test_the_queue_has_an_end(model: fastgen.CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    with served(model, queue=2, max_rows=1) as address, talking_to(address) as client:
        settings: dict[str, Any] = {
            "model": "it", "prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stream": True,
        }  # fmt: skip
        expected = model.complete(PROMPT, max_new_tokens=30)
        running = client.completions.create(**settings)
        next(iter(running))
        waiting = ThreadPoolExecutor(2)
        others = [
            waiting.submit(lambda: list(client.completions.create(**settings))) for _ in range(2)
        ]
        scheduler = watched.scheduler
        assert scheduler
        until(lambda: scheduler.waiting == 2)
        assert counts(address)["num_requests_waiting"] == 2
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(**settings)
        assert error.value.response.headers["retry-after"] == "1"
        assert error.value.code == "queue_full" and error.value.type == "rate_limit_error"
        for one in others:  # those that waited have lost nothing
            assert "".join(chunk.choices[0].text for chunk in one.result(WAIT)) == expected
        waiting.shutdown()


def test_what_can_never_fit_is_refused(model: fastgen.CausalLM) -> None:
    most = bytes_of(model.call([[5, 6, 7]], max_new_tokens=20))
    with served(model, max_bytes=most) as address:
        body = {"prompt": [5, 6, 7], "max_tokens": 20, "do_sample": False}
        assert asked(address, COMPLETIONS, body)[0] == 200
        status, _, found = asked(address, COMPLETIONS, {**body, "max_tokens": 60})
        assert status == 400 and "bytes of memory, calls have" in found["error"]["message"]
        # One prompt of several that cannot be: none of them runs on.
        status, _, found = asked(address, COMPLETIONS, {**body, "prompt": [[5], [5] * 300]})
        assert status == 400
        until(lambda: counts(address)["num_rows_running"] == 0)


def test_sigterm_lets_what_runs_finish() -> None:
    """The demo model, where none is named."""
    with command("--log-format", "json") as (process, address), talking_to(address) as client:
        assert client.models.list().data[0].id == DEMO.name
        settings: dict[str, Any] = {
            "model": "it", "prompt": PROMPT, "max_tokens": 480, "n": 4, "seed": 1,
            "extra_body": {"ignore_eos": True}, "stream": True,
        }  # fmt: skip
        stream = iter(client.completions.create(**settings))
        tokens = len([next(stream) for _ in range(5)])
        process.send_signal(signal.SIGTERM)
        until(lambda: asked(address, "/health")[0] == 503)
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="it", prompt=PROMPT)
        assert error.value.status_code == 503 and error.value.code == "stopping"
        ended = [chunk.choices[0].finish_reason for chunk in stream]
        assert ended.count("length") == 4 and tokens + len(ended) > 4 * 240
        assert process.wait(WAIT) == 0
        assert process.stderr
        told = [json.loads(line) for line in process.stderr.read().splitlines()]
        ends = {(one["status"], one["finish_reason"], one["client_gone"]) for one in told}
        assert ends == {(200, "length", False), (503, None, False)}


@pytest.mark.parametrize("how", ["grace", "twice"])
def test_what_does_not_finish_in_time_is_told(how: str) -> None:
    with (
        command("--grace", "0.3" if how == "grace" else "60") as (process, address),
        talking_to(address) as client,
    ):
        stream = iter(
            client.completions.create(
                model="it",
                prompt=PROMPT,
                max_tokens=500,
                n=64,
                stream=True,
                extra_body={"ignore_eos": True},
            )
        )
        next(stream)
        process.send_signal(signal.SIGTERM)
        if how == "grace":
            with pytest.raises(openai.APIError, match="being stopped"):
                list(stream)
            assert process.wait(WAIT) == 0
        else:
            until(lambda: asked(address, "/health")[0] == 503)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(Exception):
                list(stream)
            process.wait(WAIT)  # long before its grace is over


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--grace", "-1"], "--grace"),
        (["--memory", "0"], "--memory"),
        (["--rows", "0"], "--rows"),
        (["--queue", "0"], "--queue"),
        (["--api-key", " "], "--api-key"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["no/such/directory"], "no/such/directory"),
    ],
)
def test_the_commands_errors(flags: list[str], words: str) -> None:
    found = CliRunner().invoke(cli, ["serve", "--port", "0", *flags])
    assert found.exit_code == 2 and words in found.output
    assert "Traceback" not in found.output


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.startswith("fastgen.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    found = CliRunner().invoke(cli, ["serve"])
    assert found.exit_code == 2 and "pip install 'fastgen-onnx[serve]'" in found.output
