"""Fields of OpenAI's and vLLM's clients: null is no field, others' names are knobs."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import address, model

import fastgen
from fastgen import commands
from fastgen.serve import dialects, wire
from fastgen.serve.limits import RequestLimits
from fastgen.serve.service import Service

__all__ = ["address", "model"]  # fixtures, which take the TEMPLATE

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}"
    "effort {{ reasoning_effort }}, assistant:"
)
PROMPT = "The os module"
SAID = [{"role": "user", "content": "Hi"}]
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def posted(address: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)["error"]


def batch(model: fastgen.CausalLM, line: Any, place: Path) -> Any:
    """The body of `fastgen batch`'s answer to a line."""
    source, out = place / "in.jsonl", place / "out.jsonl"
    source.write_text(json.dumps(line) + "\n")
    commands.run(["batch", str(source), str(out), "-m", str(model.directory)])
    return json.loads(out.read_text())["response"]["body"]


def texts(answer: Any) -> list[str]:
    assert "choices" in answer, answer
    return [
        one["text"] if "text" in one else one["message"]["content"] for one in answer["choices"]
    ]


FIELDS = st.sampled_from(sorted({*wire.ChatCompletion.model_fields, *wire.Completion.model_fields}))


@settings(max_examples=15, deadline=None)
@given(st.sets(FIELDS | st.text(min_size=1), max_size=20))
def test_null_is_not_given_whatever_the_field(names):
    nulls = dict.fromkeys(names)
    for kind, needed in (
        (wire.Completion, {"prompt": "a"}),
        (wire.ChatCompletion, {"messages": SAID}),
    ):
        body = kind.model_validate({**nulls, **needed})
        assert body == kind.model_validate(needed)
        alone = wire.generation_request(kind.model_validate(needed), {}, RequestLimits())
        assert wire.generation_request(body, {}, RequestLimits()) == alone


def test_null_within_a_request_and_in_a_batch(address, model, tmp_path):
    every = dict.fromkeys(wire.ChatCompletion.model_fields)
    body = {
        **every, "unknown": None, "max_tokens": 4, "temperature": 0,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": None}],
             "name": None},
            {"role": "assistant", "content": None, "tool_calls": None},  # legal: it said nothing
        ],
        "response_format": {"type": "text", "json_schema": None},
        "stream_options": {"include_usage": None, "other": None},
    }  # fmt: skip
    talk = [*SAID, {"role": "assistant", "content": ""}]
    expected = [model.chat(talk, max_new_tokens=4)]
    assert texts(posted(address, CHATS, **body)) == expected
    line = {"custom_id": "a", "method": "POST", "url": CHATS, "body": body}
    assert texts(batch(model, line, tmp_path)) == expected


@pytest.mark.parametrize("field", ["n", "num_return_sequences", "best_of"])
def test_several_greedy_answers_are_equal(address, model, field, tmp_path):
    body = {"prompt": [PROMPT, "class "], "max_tokens": 5, "temperature": 0, field: 3}
    answer = posted(address, COMPLETIONS, **body)
    alone = [model.complete(one, max_new_tokens=5) for one in (PROMPT, "class ")]
    copies = 1 if field == "best_of" else 3
    assert texts(answer) == [text for text in alone for _ in range(copies)]
    assert answer["usage"]["completion_tokens"] == 2 * 3 * 5
    line = {"custom_id": "a", "method": "POST", "url": COMPLETIONS, "body": body}
    assert texts(batch(model, line, tmp_path)) == texts(answer)


def test_vllms_names_are_knobs(address, model):
    end = model.tokenizer.encode(model.complete(PROMPT, max_new_tokens=9))[4]
    own = model.generation_config.to_dict().get("eos_token_id")
    every = [*(own if isinstance(own, list) else [own] if own is not None else []), end]
    for sent, knobs in (
        ({"stop_token_ids": [end]}, {"eos_token_id": every}),
        ({"stop_token_ids": [end], "ignore_eos": True}, {"eos_token_id": [end]}),
        ({"ignore_eos": True}, {"eos_token_id": None}),
        ({"stop_token_ids": [end], "min_tokens": 7}, {"eos_token_id": every, "min_new_tokens": 7}),
        ({"stop_token_ids": [], "min_tokens": 0, "ignore_eos": False}, {}),
        ({"top_k": -1, "temperature": 1, "seed": 3}, {"top_k": 0, "do_sample": True, "seed": 3}),
    ):
        body = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0, **sent}
        expected = model.complete(PROMPT, max_new_tokens=9, **knobs)
        assert texts(posted(address, COMPLETIONS, **body)) == [expected], sent
    for sent, param in (
        ({"min_tokens": 2, "min_new_tokens": 3}, "min_tokens"),
        ({"ignore_eos": True, "eos_token_id": [5]}, "ignore_eos"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"stop_token_ids": [1], "eos_token_id": "x"}, "eos_token_id"),
    ):
        error = posted(address, COMPLETIONS, prompt=PROMPT, max_tokens=4, **sent)
        assert error["type"] == "invalid_request_error" and error["param"] == param, error


def test_usage_of_each_chunk(address):
    body = {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    for path, more in ((COMPLETIONS, body), (CHATS, {**body, "prompt": None, "messages": SAID})):
        request = urllib.request.Request(
            address + path, json.dumps(more).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            lines = [line[6:] for line in answer.read().decode().split("\n") if line]
        chunks = [json.loads(line) for line in lines[:-1]]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 6 and len(set(counts)) > 2
        assert not chunks[-1]["choices"]


def test_what_changes_no_token_is_let_go_and_said_once(model, caplog):
    service = Service(model)
    template = wire.ChatCompletion.model_validate(
        {"messages": SAID, "reasoning_effort": "low", "verbosity": "high", "priority": 3}
    )
    sent = template.model_dump(exclude_unset=True)
    used = dialects.for_template(sent, service.template)
    assert used == {"reasoning_effort": "low"}
    with caplog.at_level(logging.WARNING, "fastgen.serve.dialects"):
        for _ in range(3):
            service.noted(sent, used)
    assert sorted(record.args for record in caplog.records) == [("priority",), ("verbosity",)]


def test_reasoning_effort_reaches_a_template_that_names_it(address, model):
    body = {"messages": SAID, "max_tokens": 5, "temperature": 0}
    answer = posted(address, CHATS, **body, reasoning_effort="low")
    expected = model.chat(SAID, max_new_tokens=5, template_variables={"reasoning_effort": "low"})
    assert texts(answer) == [expected]


def test_what_asks_for_nothing_is_accepted_and_the_rest_refused_by_name(address):
    plain = {"messages": SAID, "max_tokens": 3, "temperature": 0}
    expected = texts(posted(address, CHATS, **plain))
    accepted = dialects.ONLY | dialects.ONLY_CHATS
    inert = dict.fromkeys((*dialects.INERT, *dialects.LET_GO), "x") | {"verbosity": "low"}
    assert texts(posted(address, CHATS, **plain, **accepted, **inert)) == expected
    others = {"modalities": ["text", "audio"], "skip_special_tokens": False, "best_of": 2,
              "use_beam_search": True, "echo": 1, "audio": {}, "web_search_options": {},
              "allowed_token_ids": [1], "guided_choice": ["a"]}  # fmt: skip
    for name, value in others.items():
        error = posted(address, CHATS, **plain, **{name: value})
        assert error["param"] == name and name in error["message"], error
