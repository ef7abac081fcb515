"""`/v1/responses`, as OpenAI's own client asks for it: its types are what everything must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types import responses as types
from serving import asked, served
from test_serve_tools import OFFERED, PLAIN, THOUGHTS, TOOLS, legal, models, talking_to
from tool_forms import FORMS

from fastgen.serve.items import items_of, messages_of
from fastgen.serve.kept import KeptResponses, size_of
from fastgen.serve.refused import Refused

__all__ = ["models"]  # a fixture

PATH = "/v1/responses"
FLAT = [{"type": "function", **one["function"]} for one in OFFERED]
EVENT = pydantic.TypeAdapter(types.ResponseStreamEvent)
# What OpenAI sends and its types do not name; and our own.
BESIDES = {
    "Response": {"store", "presence_penalty", "frequency_penalty", "warnings"},
    "Logprob": {"bytes"},
    "LogprobTopLogprob": {"bytes"},
}


@pytest.fixture(scope="module")
def address(models: Any) -> Iterator[str]:
    """That of a service of a model that writes calls as Hermes does."""
    with served(models(FORMS["hermes"][0]), name="docs") as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with talking_to(address) as found:
        yield found


@pytest.fixture(scope="module")
def thinker(models: Any) -> Iterator[str]:
    """The address of a service of a model whose prompt begins a thought."""
    with served(models(THOUGHTS)) as found:
        yield found


def ask(client: openai.OpenAI, **more: Any) -> Any:
    settings = {"input": "How is the weather?", "max_output_tokens": 150, **more}
    settings["extra_body"] = {"seed": 3, **settings.pop("extra_body", {})}
    return client.responses.create(**settings)


def strictly(kind: Any, given: Any) -> Any:
    """`given` as OpenAI's type, of exactly its fields."""
    made = pydantic.TypeAdapter(kind).validate_json(json.dumps(given), strict=True)
    _known(made, "")
    return made


def _known(value: Any, where: str) -> None:
    if isinstance(value, pydantic.BaseModel):
        extra = set(value.model_extra or ())
        assert not extra - BESIDES.get(type(value).__name__, set()), where
        for name in type(value).model_fields:
            _known(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, list):
        for one in value:
            _known(one, where)


def streamed(address: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each of OpenAI's type, in an order that its documents know."""
    body = {"input": "How is the weather?", "max_output_tokens": 150, "seed": 3, **body}
    status, headers, text = asked(address, PATH, {**body, "stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *parts, end, nothing = text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    events = []
    for number, part in enumerate(parts):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        assert events[-1]["sequence_number"] == number
        strictly(types.ResponseStreamEvent, events[-1])
    _in_order(events)
    return events


def _in_order(events: list[dict[str, Any]]) -> None:
    """Check that events open and close items and parts as they should, and say what they end in."""
    kinds = [one["type"].removeprefix("response.") for one in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] in ("completed", "incomplete", "failed")
    items: list[Any] = []
    texts: list[str] = []
    inside: list[str] = []  # what is open
    for kind, one in zip(kinds[2:-1], events[2:-1], strict=True):
        if kind == "output_item.added":
            assert not inside and one["output_index"] == len(items)
            assert one["item"]["status"] == "in_progress"
            items.append(one["item"]["id"])
            texts.append("")
            inside.append("item")
            continue
        if kind == "output_item.done":
            assert inside.pop() == "item" and one["item"]["id"] == items[-1]
            continue
        assert one["output_index"] == len(items) - 1 and one["item_id"] == items[-1]
        if kind == "content_part.added":
            assert inside == ["item"]
            inside.append("part")
        elif kind == "content_part.done":
            assert inside.pop() == "part" and one["part"]["text"] == texts[-1]
        elif kind.endswith(".delta"):
            assert inside == (["item"] if "arguments" in kind else ["item", "part"])
            texts[-1] += one["delta"]
        else:
            assert kind.endswith(".done")
            assert one.get("text", one.get("arguments")) == texts[-1]
    assert not inside
    assert [one["id"] for one in events[-1]["response"]["output"]] == items


def output(response: Any) -> list[Any]:
    """The items of a response without what is chance: their ids."""
    chance = {"id", "call_id"}
    return [{k: v for k, v in one.items() if k not in chance} for one in response["output"]]


# --- a response, whole and streamed --------------------------------------------------------------


def test_a_text_is_what_a_chat_says(client: openai.OpenAI, address: str) -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    chat: Any = client.chat.completions.create(
        model="any",
        messages=said,
        max_tokens=9,
        seed=3,
        temperature=0.7,  # type: ignore[arg-type]
    )
    found = ask(
        client, instructions="Be brief.", input="How?", max_output_tokens=9, temperature=0.7
    )
    assert found.output_text == chat.choices[0].message.content
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.output[0].status == "incomplete" and found.completed_at is None
    usage = found.usage
    assert usage.input_tokens == chat.usage.prompt_tokens and usage.output_tokens == 9
    assert usage.total_tokens == usage.input_tokens + 9
    for items in ("How?", [{"role": "user", "content": [{"type": "input_text", "text": "How?"}]}]):
        body = {"instructions": "Be brief.", "input": items, "max_output_tokens": 9, "seed": 3,
                "temperature": 0.7}  # fmt: skip
        whole = asked(address, PATH, body)[2]
        strictly(types.Response, whole)
        assert output(whole)[0]["content"][0]["text"] == found.output_text
        assert output(streamed(address, **body)[-1]["response"]) == output(whole)


def test_what_was_asked_comes_back(address: str) -> None:
    asks = {
        "instructions": "So.", "metadata": {"a": "b"}, "user": "me", "safety_identifier": "x",
        "prompt_cache_key": "k", "prompt_cache_retention": "24h", "temperature": 0.5, "top_p": 0.9,
        "tool_choice": "none", "max_tool_calls": 3, "parallel_tool_calls": False,
        "max_output_tokens": 2, "truncation": "disabled", "background": False, "store": False,
        "presence_penalty": 0.25, "text": {"verbosity": "low", "format": {"type": "text"}},
    }  # fmt: skip
    body = {**asks, "input": "a", "tools": FLAT, "service_tier": "flex", "include": [],
            "reasoning": {"effort": "low", "summary": "auto"},
            "stream_options": {"include_obfuscation": False}}  # fmt: skip
    found = asked(address, PATH, body)[2]
    strictly(types.Response, found)
    assert {name: found[name] for name in asks} == asks
    assert found["service_tier"] == "default" and found["model"] == "docs"
    assert [tool["name"] for tool in found["tools"]] == [tool["name"] for tool in FLAT]
    assert found["reasoning"] == {"effort": "low", "summary": None}
    assert "no summary" in found["warnings"][0]


def test_log_probabilities(client: openai.OpenAI, address: str) -> None:
    include: Any = ["message.output_text.logprobs"]
    body = {"max_output_tokens": 6, "top_logprobs": 2, "include": include, "temperature": 0}
    (item,) = asked(address, PATH, {"input": "a", **body})[2]["output"]
    (part,) = item["content"]
    assert "".join(one["token"] for one in part["logprobs"]) == part["text"]
    assert all(len(one["top_logprobs"]) == 2 for one in part["logprobs"])
    events = streamed(address, **{**body, "input": "a"})
    deltas = [one["logprobs"] for one in events if one["type"] == "response.output_text.delta"]
    assert [one for some in deltas for one in some] == part["logprobs"]
    alone = ask(client, input="a", max_output_tokens=3, include=include)
    assert len(alone.output[0].content[0].logprobs) == 3
    assert not ask(client, input="a", max_output_tokens=3).output[0].content[0].logprobs


def test_a_form_of_the_text(client: openai.OpenAI) -> None:
    class Point(pydantic.BaseModel):
        x: int = pydantic.Field(ge=0, le=9)
        kind: str = pydantic.Field(pattern="^(a|b)$")

    found = client.responses.parse(
        model="any", input="A point.", text_format=Point, max_output_tokens=60
    )
    assert isinstance(found.output_parsed, Point)
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True}}
    assert json.loads(ask(client, text=form).output_text) == {"a": 1}
    assert ask(client, text={"format": {"type": "json_object"}}).output_text.startswith("{")


def test_an_empty_answer_is_a_message(client: openai.OpenAI) -> None:
    end = {"sequence_bias": [[[0], 500.0]]}
    found = ask(client, extra_body=end, max_output_tokens=4)
    assert found.status == "completed" and found.output_text == ""
    assert found.output[0].type == "message" and found.completed_at


# --- tools ---------------------------------------------------------------------------------------


def test_a_call_and_its_events(address: str) -> None:
    for choice in ("required", {"type": "function", "name": "weather"},
                   {"type": "allowed_tools", "mode": "required",
                    "tools": [{"type": "function", "name": "weather"}]}):  # fmt: skip
        body = {"tools": FLAT, "tool_choice": choice, "parallel_tool_calls": False}
        events = streamed(address, **body)
        whole = asked(address, PATH, {"input": "How is the weather?", "max_output_tokens": 150,
                                      "seed": 3, **body})[2]  # fmt: skip
        assert output(events[-1]["response"]) == output(whole)
        assert whole["tool_choice"] == choice and whole["status"] == "completed"
        (call,) = whole["output"]
        assert call["type"] == "function_call" and call["call_id"].startswith("call_")
        pydantic.TypeAdapter(dict[str, Any]).validate_json(call["arguments"])
        assert call["name"] in TOOLS


def test_a_loop_of_calls(client: openai.OpenAI) -> None:
    first = ask(client, tools=FLAT, tool_choice="required", parallel_tool_calls=False)
    (call,) = first.output
    back: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"}]
    kept = ask(client, input=back, previous_response_id=first.id, tools=FLAT, max_output_tokens=8)
    said: Any = [{"role": "user", "content": "How is the weather?"}, call, *back]
    sent = ask(client, input=said, tools=FLAT, max_output_tokens=8, store=False)
    assert kept.output_text == sent.output_text
    assert kept.usage.input_tokens == sent.usage.input_tokens > first.usage.input_tokens
    assert kept.previous_response_id == first.id


def test_a_call_that_is_cut_off(client: openai.OpenAI, address: str) -> None:
    choice: Any = {"type": "function", "name": "weather"}
    whole = ask(client, tools=FLAT, tool_choice=choice, max_output_tokens=26)
    assert whole.status == "incomplete" and not whole.output
    last = streamed(address, tools=FLAT, tool_choice=choice, max_output_tokens=26)[-1]["response"]
    (call,) = last["output"]
    assert call["status"] == "incomplete" and call["arguments"].startswith("{")
    again = ask(client, previous_response_id=last["id"], max_output_tokens=3)
    assert again.output_text  # the conversation goes on without it


def test_parsed_arguments(client: openai.OpenAI) -> None:
    class Now(pydantic.BaseModel):
        """The time."""

        exact: bool

    tool = openai.pydantic_function_tool(Now)["function"]
    found = client.responses.parse(
        model="any", input="When?", tools=[{"type": "function", **tool}],  # type: ignore[list-item,misc]
        tool_choice="required", max_output_tokens=60, parallel_tool_calls=False,
    )  # fmt: skip
    arguments: Any = found.output[0].parsed_arguments  # type: ignore[union-attr]
    assert arguments.keys() == {"exact"}


# --- reasoning -----------------------------------------------------------------------------------


def test_thoughts_are_an_item(thinker: str) -> None:
    body = {"max_reasoning_tokens": 6, "max_output_tokens": 40, "include": [
        "reasoning.encrypted_content"]}  # fmt: skip
    events = streamed(thinker, **body)
    last = events[-1]["response"]
    thought, message = last["output"]
    assert thought["type"] == "reasoning" and thought["content"][0]["text"]
    assert "think>" not in message["content"][0]["text"]
    assert 6 <= last["usage"]["output_tokens_details"]["reasoning_tokens"] < 20
    whole = asked(thinker, PATH, {"input": "How is the weather?", "seed": 3, **body})[2]
    assert output(whole) == output(last)
    with talking_to(thinker) as client:
        said: Any = [{"role": "user", "content": "How is the weather?"}, *whole["output"],
                     {"role": "user", "content": "And now?"}]  # fmt: skip
        sent = client.responses.input_tokens.count(input=said)
        kept = client.responses.input_tokens.count(
            input="And now?", previous_response_id=whole["id"]
        )
        assert sent.input_tokens == kept.input_tokens
        short = client.responses.input_tokens.count(input=[said[0], *said[2:]])
        assert short.input_tokens < sent.input_tokens  # the template shows the thought
        chat: Any = client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "How is the weather?"}], seed=3,
            max_tokens=40, extra_body={"max_reasoning_tokens": 6},
        )  # fmt: skip
    assert (
        chat.usage.completion_tokens_details.reasoning_tokens
        == (whole["usage"]["output_tokens_details"]["reasoning_tokens"])
    )


def test_thoughts_without_an_end(thinker: str) -> None:
    last = streamed(thinker, max_output_tokens=9)[-1]["response"]
    (item,) = last["output"]
    assert item["type"] == "reasoning" and last["status"] == item["status"] == "incomplete"
    assert last["usage"]["output_tokens_details"]["reasoning_tokens"] == 9


def test_known_tokens_are_told(client: openai.OpenAI) -> None:
    long = "The weather is as it was, and so on. " * 12
    ask(client, input=long, max_output_tokens=2)
    usage = ask(client, input=long, max_output_tokens=2).usage
    assert 0 < usage.input_tokens_details.cached_tokens < usage.input_tokens
    chat: Any = client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": long}], max_tokens=2
    )
    assert (
        chat.usage.prompt_tokens_details.cached_tokens == usage.input_tokens_details.cached_tokens
    )


# --- what is kept --------------------------------------------------------------------------------


def test_responses_are_kept_and_forgotten(client: openai.OpenAI, address: str) -> None:
    first = ask(client, max_output_tokens=4)
    second = ask(client, input="And?", previous_response_id=first.id, max_output_tokens=4)
    assert client.responses.retrieve(second.id).output_text == second.output_text
    found = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in found] == ["message"] * 3
    assert [getattr(item, "role", None) for item in found] == ["user", "assistant", "user"]
    path = f"{PATH}/{second.id}/input_items"
    page = asked(address, f"{path}?limit=2")[2]
    strictly(types.ResponseItemList, page)
    assert page["has_more"] and page["first_id"] == found[2].id
    rest = asked(address, f"{path}?limit=2&after={page['last_id']}")[2]
    assert not rest["has_more"] and [one["id"] for one in rest["data"]] == [found[0].id]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError) as error:
        ask(client, previous_response_id=first.id)
    assert error.value.code == "previous_response_not_found"
    assert ask(client, input="?", previous_response_id=second.id, max_output_tokens=2).output_text
    apart = ask(client, store=False, max_output_tokens=2)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(apart.id)
    assert asked(address, f"{PATH}/{second.id}?stream=true")[0] == 400
    for query in ("limit=0", "order=up", "after=nothing"):
        status, _, body = asked(address, f"{path}?{query}")
        assert status == 400 and body["error"]["param"] == query.partition("=")[0]


def test_references_to_items(client: openai.OpenAI) -> None:
    first = ask(client, max_output_tokens=4)
    said: Any = [{"role": "user", "content": "How is the weather?"}, first.output[0],
                 {"role": "user", "content": "And?"}]  # fmt: skip
    named: Any = [said[0], {"type": "item_reference", "id": first.output[0].id}, said[2]]
    count = client.responses.input_tokens.count
    assert count(input=named).input_tokens == count(input=said).input_tokens
    with pytest.raises(openai.NotFoundError):
        count(input=[{"type": "item_reference", "id": "msg_none"}])


def test_the_oldest_are_forgotten() -> None:
    kept = KeptResponses(most=3, most_bytes=4000)
    for number in range(5):
        item = {"id": f"msg_{number}", "type": "message", "role": "user", "content": []}
        response = {"id": f"resp_{number}", "output": []}
        kept.add(response, [item], [], size_of(response, [item], []))
    assert len(kept) == 3 and kept.item("msg_1") is None and kept.item("msg_4")
    kept.get("resp_2")
    large = {"id": "resp_l", "output": [], "instructions": "a" * 3600}
    kept.add(large, [], [], size_of(large, [], []))
    assert kept.nbytes <= 4000 and kept.get("resp_l") and kept.get("resp_2")
    huge = {"id": "resp_h", "output": [], "instructions": "a" * 5000}
    kept.add(huge, [], [], size_of(huge, [], []))
    assert len(kept) == 3
    kept.delete("resp_4")
    kept.delete("resp_l")
    kept.delete("resp_2")
    assert kept.nbytes == 0 and kept.item("msg_2") is None


# --- items to messages ---------------------------------------------------------------------------


def test_items_of_one_answer_are_one_message() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "now", "arguments": "{}"}
    given = [
        {"role": "developer", "content": "Two."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"},
                                     {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant",
         "content": [{"type": "output_text", "text": "So"}]},
        call, {**call, "call_id": "d"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"type": "function_call_output", "call_id": "d",
         "output": [{"type": "input_text", "text": "2"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
        {"role": "assistant", "content": "Done."}, {"role": "assistant", "content": "Really."},
    ]  # fmt: skip
    items = items_of(given, lambda _: None)
    for one in items:
        strictly(types.ResponseItem, one)
    called = [{"id": name, "type": "function", "function": {"name": "now", "arguments": "{}"}}
              for name in "cd"]  # fmt: skip
    assert messages_of(items, "One.") == [
        {"role": "system", "content": "One.\n\nTwo."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "reasoning_content": "hm", "content": "So", "tool_calls": called},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
        {"role": "tool", "tool_call_id": "d", "content": "2"},
        {"role": "assistant", "reasoning_content": "x", "content": "Done."},
        {"role": "assistant", "content": "Really."},
    ]


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"input": [{"type": "message"}]}, "input", "role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input", "input_image"),
        ({"input": [{"type": "computer_call"}]}, "input", "computer_call"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]}, "input",
         "call_id"),
        ({"input": []}, "input", "nothing"), ({"input": None}, "input", "nothing"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": OFFERED}, "tools", '"name"'),
        ({"tools": [{**FLAT[0], "defer_loading": True}]}, "tools", "defer_loading"),
        ({"tools": FLAT, "tool_choice": {"type": "mcp"}}, "tool_choice", "allowed_tools"),
        ({"tools": FLAT, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x'"),
        ({"conversation": "c"}, "conversation", "previous_response_id"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"background": True}, "background", "background"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"include": ["file_search_call.results"]}, "include", "file_search"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text", "schema"),
        ({"max_output_tokens": 100_000}, "input", "context"),
        ({"max_reasoning_tokens": 4}, "max_reasoning_tokens", "no reasoning"),
        ({"n": 2}, "n", "no field"), ({"num_return_sequences": 2}, "num_return_sequences", "field"),
        ({"top_logprobs": 90}, "top_logprobs", "20"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "strict": True,
                              "schema": {"type": "object", "properties": {"a": {}}}}}}, "text",
         "text: |strict"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input",
         "encrypted"),
        ({"temperature": "hot"}, "temperature", "temperature"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_its_name(
    address: str, body: dict[str, Any], param: str, told: str
) -> None:
    status, _, found = asked(address, PATH, {"input": "a", "max_output_tokens": 2, **body})
    assert status == 400 and found["error"]["param"] == param, found
    assert any(word in found["error"]["message"] for word in told.split("|")), found


def test_a_template_without_tools(models: Any) -> None:
    with served(models(PLAIN)) as address:
        _, _, found = asked(address, PATH, {"input": "a", "tools": FLAT})
        assert "--plain-tools" in found["error"]["message"]
    with served(models(PLAIN), plain_tools=True) as address, talking_to(address) as client:
        found = ask(client, tools=FLAT, tool_choice="required", parallel_tool_calls=False)
        (call,) = found.output
        assert legal([_Called(call)]) == [call.name]


class _Called:
    """A call as a chat has it, for `legal`."""

    type = "function"

    def __init__(self, call: Any) -> None:
        self.id, self.function = call.call_id, call


def test_a_stream_that_fails_says_so(
    address: str, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.serve.service import LiveRun

    whole = LiveRun.tokens

    async def failing(run: LiveRun) -> Any:
        count = 0
        async for pair in whole(run):
            yield pair
            count += 1
            if count == 3:
                raise Refused(503, "the service is being stopped", code="stopping")

    monkeypatch.setattr(LiveRun, "tokens", failing)
    _, _, text = asked(address, PATH, {"input": "a", "stream": True, "max_output_tokens": 9})
    last = json.loads(text.split("data: ")[-2])
    strictly(types.ResponseFailedEvent, last)
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error"
    with client.responses.stream(model="any", input="a", max_output_tokens=9) as stream:
        assert [one.type for one in stream][-1] == "response.failed"


def test_the_client_puts_a_stream_together(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="any", input="How is the weather?", tools=FLAT, max_output_tokens=200,  # type: ignore[arg-type]
        tool_choice="required", extra_body={"seed": 3}, parallel_tool_calls=False,
    ) as stream:  # fmt: skip
        kinds = {one.type for one in stream}
        found = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds and len(found.output) == 1
