"""Calls of tools and reasoning over HTTP, as OpenAI's own client asks for them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from serving import served
from tiny import some
from tool_forms import EVERY, FORMS, OFFERED, TOOLS, template, thinking

import fastgen
from fastgen.serve import chats
from fastgen.serve.reasoning import Budget
from fastgen.serve.tools.reader import Marks, ReadingOptions
from fastgen.serve.tools.whole import WholeAnswer
from fastgen.store import hub
from fastgen.store.model_info import CHAT_TEMPLATE

MESSAGES: list[Any] = [{"role": "user", "content": "How is the weather?"}]
PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"
THOUGHTS = thinking("<think>", "</think>", "<|assistant|><think>\n")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`models(template)`: the demo model with it."""
    place = tmp_path_factory.mktemp("models")
    known: dict[str, fastgen.CausalLM] = {}

    def model(source: str) -> fastgen.CausalLM:
        if source not in known:
            directory = place / str(len(known))
            shutil.copytree(hub.DEMO, directory)
            (directory / CHAT_TEMPLATE).write_text(source, encoding="utf-8")
            known[source] = fastgen.load(directory)
        return known[source]

    return model


def talking_to(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(models: Any) -> Iterator[openai.OpenAI]:
    """Of a service of a model that writes calls as Hermes does."""
    with served(models(FORMS["hermes"][0])) as address, talking_to(address) as found:
        yield found


def ask(client: openai.OpenAI, **more: Any) -> Any:
    settings = {"model": "any", "messages": MESSAGES, "tools": OFFERED, "seed": 3,
                "max_tokens": 150, **more}  # fmt: skip
    return client.chat.completions.create(**settings)


asks = ask


def legal(calls: Any) -> list[str]:
    """The names of calls, whose arguments are those of their tools."""
    for one in calls or ():
        jsonschema.validate(json.loads(one.function.arguments), TOOLS[one.function.name])
        assert one.type == "function" and one.id.startswith("call_")
    return [one.function.name for one in calls or ()]


def streamed(client: openai.OpenAI, **more: Any) -> tuple[dict[str, Any], list[Any]]:
    """The message that a stream's deltas make, and its choices."""
    found = [one.choices[0] for one in ask(client, stream=True, **more) if one.choices]
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for one in found:
        delta = one.delta.model_dump(exclude_unset=True)
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls") or ():
            if call["index"] == len(message["tool_calls"]):
                assert call["id"] and call["function"]["name"]
                message["tool_calls"].append([call["function"]["name"], ""])
            message["tool_calls"][call["index"]][1] += call["function"].get("arguments", "")
    return message, found


# --- calls that are forced -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def turncoat(tmp_path_factory: pytest.TempPathFactory) -> fastgen.CausalLM:
    """The demo model, in whose directory a test puts its template before it is served."""
    place = tmp_path_factory.mktemp("turncoat") / "model"
    shutil.copytree(hub.DEMO, place)
    return fastgen.load(place)


# A service each; what all others write is forced and read in tests/serve/test_tool_formats.py too.
QUICK = ("hermes", "qwen_xml", "glm47", "llama", "pythonic", "mistral11", "deepseek4", "harmony",
         "gemma", "command_r", "plain")  # fmt: skip


@pytest.mark.parametrize("name", some(EVERY, QUICK))
def test_a_forced_call_of_every_format(turncoat: fastgen.CausalLM, name: str) -> None:
    source = PLAIN if name == "plain" else FORMS[name][0]
    (turncoat.directory / CHAT_TEMPLATE).write_text(source, encoding="utf-8")
    plain = {"plain_tools": True} if name == "plain" else {}
    body = {"max_reasoning_tokens": 4} if EVERY[name].channels else {}
    with served(turncoat, **plain) as address, talking_to(address) as client:
        room = 150 if name == "plain" else 350
        ask = functools.partial(asks, extra_body=body, max_tokens=room)
        choice = {"type": "function", "function": {"name": "weather"}}
        named = ask(client, tool_choice=choice).choices[0]
        assert legal(named.message.tool_calls) == ["weather"] and not named.message.content
        assert named.finish_reason == "stop"
        message, found = streamed(
            client,
            tool_choice="required",
            parallel_tool_calls=False,
            extra_body=body,
            max_tokens=room,
        )
        ((called, arguments),) = message["tool_calls"]
        jsonschema.validate(json.loads(arguments), TOOLS[called])
        assert found[-1].finish_reason == "tool_calls" and not message["content"]


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    settings = {"tool_choice": "required", "parallel_tool_calls": False}
    whole = ask(client, **settings).choices[0]
    (call,) = whole.message.tool_calls
    message, found = streamed(client, **settings)
    assert message["tool_calls"] == [[call.function.name, call.function.arguments]]
    assert found[-1].finish_reason == whole.finish_reason == "tool_calls"


def test_required_and_allowed_tools(client: openai.OpenAI) -> None:
    several = [
        len(
            legal(
                ask(client, tool_choice="required", seed=seed, max_tokens=250)
                .choices[0]
                .message.tool_calls
            )
        )
        for seed in range(4)
    ]
    assert max(several) > 1
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
        {"type": "function", "function": {"name": "now"}}]}}  # fmt: skip
    found = ask(client, tool_choice=allowed).choices[0].message.tool_calls
    assert {*legal(found)} == {"now"}


def test_strict_tools_have_all_their_parameters(client: openai.OpenAI) -> None:
    loose = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": loose, "strict": True}}]
    for seed in range(3):
        answer = ask(client, tools=tools, tool_choice="required", seed=seed, max_tokens=60)
        (call, *_) = answer.choices[0].message.tool_calls
        assert json.loads(call.function.arguments).keys() == {"a", "b"}
    tools[0]["function"]["parameters"] = {"type": "object", "properties": {"a": {}}}
    with pytest.raises(openai.BadRequestError, match="strict"):
        ask(client, tools=tools)


def test_a_call_that_is_cut_off_is_of_length(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    whole = ask(client, tool_choice=choice, max_tokens=12).choices[0]
    assert whole.finish_reason == "length" and not whole.message.tool_calls
    message, found = streamed(client, tool_choice=choice, max_tokens=26)
    assert found[-1].finish_reason == "length"
    assert message["tool_calls"][0][0] == "weather" and message["tool_calls"][0][1][0] == "{"


def test_a_loop_of_two_turns(client: openai.OpenAI) -> None:
    answer = ask(client, tool_choice="required", parallel_tool_calls=False)
    first, first_count = answer.choices[0].message, answer.usage.prompt_tokens
    (call,) = first.tool_calls
    said = [*MESSAGES, first.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "3 degrees"}]  # fmt: skip
    second = ask(client, messages=said, max_tokens=8)
    assert second.choices[0].finish_reason in ("stop", "length")
    assert second.usage.prompt_tokens > first_count


# --- calls that are not --------------------------------------------------------------------------


def test_auto_answers_as_it_would_and_a_call_that_begins_is_legal(
    client: openai.OpenAI, models: Any
) -> None:
    model = models(FORMS["hermes"][0])
    free = model.chat(MESSAGES, tools=OFFERED, do_sample=True, top_k=0, seed=3, max_new_tokens=40)
    assert ask(client, max_tokens=40).choices[0].message.content == free
    # Where the model would go on with a mark, what follows is a call.
    mark = model.tokenizer.encode("<tool_call>", add_special_tokens=False)
    answer = ask(client, extra_body={"sequence_bias": _towards(mark)}, max_tokens=200)
    choice = answer.choices[0]
    assert legal(choice.message.tool_calls) and choice.finish_reason in ("tool_calls", "length")


def _towards(mark: list[int]) -> list[Any]:
    """A bias that lets a text begin with `mark`, token after token."""
    return [[[*mark[: place + 1]], 50.0 + 100 * place] for place in range(len(mark))]


def test_free_calls_are_not_held_to_schemas(models: Any) -> None:
    model = models(FORMS["hermes"][0])
    mark = model.tokenizer.encode("<tool_call>", add_special_tokens=False)
    with served(model, free_calls=True) as address, talking_to(address) as client:
        answer = ask(client, extra_body={"sequence_bias": _towards(mark)}, max_tokens=60)
        assert not answer.choices[0].message.tool_calls
        assert "<tool_call>" in answer.choices[0].message.content


def test_what_a_schema_asks_and_cannot_be_held_is_said(client: openai.OpenAI) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    answer = ask(client, tools=tools, max_tokens=5)
    assert "calls are not held to" in answer.model_extra["warnings"][0]
    with pytest.raises(openai.BadRequestError, match="cannot be used"):
        ask(client, tools=tools, tool_choice="required")


def test_content_streams_at_once_where_there_are_tools(client: openai.OpenAI) -> None:
    message, found = streamed(client, max_tokens=30)
    assert sum(bool(one.delta.content) for one in found) > 10
    assert message["content"] == ask(client, max_tokens=30).choices[0].message.content


def test_log_probabilities_beside_calls(client: openai.OpenAI) -> None:
    settings = {"tool_choice": "required", "parallel_tool_calls": False, "logprobs": True}
    whole = ask(client, **settings).choices[0]
    _, found = streamed(client, **settings)
    tokens = [one.token for part in found if part.logprobs for one in part.logprobs.content]
    assert tokens == [one.token for one in whole.logprobs.content]


def test_a_format_of_the_content_and_tools(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(3):
        choice = ask(client, response_format=wanted, seed=seed).choices[0]
        if not legal(choice.message.tool_calls):
            assert json.loads(choice.message.content)["a"] in (1, 2)
    with pytest.raises(openai.BadRequestError, match="another text"):
        ask(client, tool_choice="required", extra_body={"regex": "a"})


@pytest.mark.parametrize(
    ("more", "param"),
    [({"tool_choice": "any"}, "tool_choice"), ({"tools": [{"type": "custom"}]}, "tools"),
     ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
     ({"extra_body": {"max_reasoning_tokens": 5}}, "max_reasoning_tokens")],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_name(
    client: openai.OpenAI, more: Any, param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **more)
    assert error.value.param == param


def test_templates_that_show_no_form_are_refused(models: Any) -> None:
    strange = template("<<{{ f.name }}>>")
    for source, told in ((PLAIN, "--plain-tools"), (strange, "known form")):
        with served(models(source)) as address, talking_to(address) as client:
            with pytest.raises(openai.BadRequestError, match=told):
                ask(client)
            assert ask(client, tool_choice="none", max_tokens=3).choices[0].message.content


def test_plain_tools_are_told_in_words(models: Any) -> None:
    model = models(PLAIN)
    with served(model, plain_tools=True) as address, talking_to(address) as client:
        few = ask(client, tools=None, max_tokens=3).usage.prompt_tokens
        said = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "a", "content": "noon"}]  # fmt: skip
        told = ask(client, messages=said, max_tokens=3).usage.prompt_tokens
        assert told > few + 100


# --- reasoning -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinker(models: Any) -> Iterator[openai.OpenAI]:
    """Of a service of a model whose prompt begins a thought."""
    with served(models(THOUGHTS)) as address, talking_to(address) as found:
        yield found


def think(client: openai.OpenAI, **more: Any) -> Any:
    body = {"max_reasoning_tokens": 6, **more.pop("extra_body", {})}
    return ask(client, tools=more.pop("tools", None), extra_body=body, **more)


def test_thoughts_are_split_from_the_answer_and_end_in_time(
    thinker: openai.OpenAI, models: Any
) -> None:
    choice = think(thinker, max_tokens=40, logprobs=True).choices[0]
    message = choice.message
    assert message.reasoning_content and message.content and "think>" not in message.content
    tokens = [one.token for one in choice.logprobs.content]
    end = models(THOUGHTS).tokenizer.encode("</think>", add_special_tokens=False)
    assert "".join(tokens[6 : 6 + len(end)]) == "</think>"
    endless = ask(thinker, tools=None, max_tokens=20).choices[0]
    assert endless.message.content == "" and len(endless.message.reasoning_content) > 20
    body = {"max_reasoning_tokens": 6}
    streams, _ = streamed(thinker, tools=None, max_tokens=40, extra_body=body)
    assert streams["content"].strip() == message.content.strip()
    assert streams["reasoning_content"] == message.reasoning_content


def test_a_budget_of_nothing_and_a_call_behind_thoughts(thinker: openai.OpenAI) -> None:
    none = think(thinker, max_tokens=30, extra_body={"max_reasoning_tokens": 0}).choices[0]
    assert not hasattr(none.message, "reasoning_content") and none.message.content


def test_thoughts_before_a_forced_call(models: Any) -> None:
    source = FORMS["hermes"][0] + "<think>"
    with served(models(source)) as address, talking_to(address) as client:
        body = {"max_reasoning_tokens": 5}
        choice = ask(client, tool_choice="required", extra_body=body, max_tokens=200).choices[0]
        assert legal(choice.message.tool_calls) and choice.message.reasoning_content
        assert not choice.message.content


def test_raw_reasoning(models: Any) -> None:
    with served(models(THOUGHTS), reasoning="none") as address, talking_to(address) as client:
        message = think(client, max_tokens=30).choices[0].message
        assert "</think>" in message.content and not hasattr(message, "reasoning_content")


def test_effort_leads_to_the_switch_that_the_template_has(models: Any) -> None:
    switch = "{% if enable_thinking is false %}<think></think>{% else %}<think>{% endif %}"
    model = models(template("", f"<|assistant|>{switch}"))
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    with served(model) as address, talking_to(address) as client:
        counts = [
            ask(client, tools=None, max_tokens=3, **more).usage.prompt_tokens
            for more in (
                {},
                {"reasoning_effort": "none"},
                {"reasoning_effort": "low"},
                {"extra_body": off},
            )
        ]
    assert counts[0] == counts[2] < counts[1] == counts[3]


def test_a_budget_leaves_alone_what_does_not_think(models: Any) -> None:
    model = models(PLAIN)
    budget = Budget(model.tokenizer, Marks("<think>", "</think>"), 3, 5, begun=False)
    settings: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False}
    ids = [model.tokenizer.encode("a b c d e f")[:5]]
    free = model.generate(ids, attention_mask=[[1] * 5], **settings)
    held = model.generate(ids, attention_mask=[[1] * 5], logits_processor=[budget], **settings)
    assert free == held


def test_unknown_effort_is_let_go(client: openai.OpenAI) -> None:
    assert ask(client, tools=None, max_tokens=3, reasoning_effort="high").choices


def test_deltas_number_calls_across_steps() -> None:
    whole, seen = WholeAnswer(), []
    reader = EVERY["mistral11"].read(ReadingOptions(TOOLS))
    text = "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}"
    for letter in [*text, None]:
        events = reader.end() if letter is None else reader.push(letter)
        whole.take(events)
        seen += list(chats._deltas(events, whole))
    calls = [one["tool_calls"][0] for one in seen]
    assert [one["index"] for one in calls] == sorted(one["index"] for one in calls)
    assert {one["index"] for one in calls} == {0, 1}


def test_batches_call_too(models: Any, tmp_path: Path) -> None:
    from fastgen import commands

    model = models(FORMS["hermes"][0])
    body = {"messages": MESSAGES, "tools": OFFERED, "tool_choice": "required", "max_tokens": 200}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(line) + "\n")
    commands.run(["batch", str(source), str(out), "-m", str(model.directory)])
    answer = json.loads(out.read_text())["response"]["body"]["choices"][0]
    for call in answer["message"]["tool_calls"]:
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), TOOLS[function["name"]])
