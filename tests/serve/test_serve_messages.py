"""`/v1/messages`, as Anthropic's own client asks for it: its types are what everything must be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pydantic
import pytest
from serving import asked, served
from test_serve_tools import PLAIN, THOUGHTS, TOOLS, models, talking_to
from tool_forms import FORMS

from fastgen.serve.wire_messages import messages_of

anthropic = pytest.importorskip("anthropic")  # of the extra `test`

__all__ = ["models"]  # a fixture

PATH = "/v1/messages"
OFFERED = [{"name": name, "description": name, "input_schema": one} for name, one in TOOLS.items()]
MESSAGES = [{"role": "user", "content": "How is the weather?"}]
BESIDES = {"Message": {"warnings"}}  # ours


@pytest.fixture(scope="module")
def address(models: Any) -> Iterator[str]:
    """That of a service of a model that writes calls as Hermes does."""
    with served(models(FORMS["hermes"][0]), name="docs") as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    with client_of(address) as found:
        yield found


@pytest.fixture(scope="module")
def thinker(models: Any) -> Iterator[str]:
    """The address of a service of a model whose prompt begins a thought."""
    with served(models(THOUGHTS)) as found:
        yield found


def client_of(address: str, key: str = "none") -> Any:
    return anthropic.Anthropic(base_url=address, api_key=key, max_retries=0, timeout=60)


def settings(**more: Any) -> dict[str, Any]:
    return {"model": "any", "messages": MESSAGES, "max_tokens": 150, **more}


def ask(client: Any, **more: Any) -> Any:
    body = {"seed": 3, **more.pop("extra_body", {})}
    return client.messages.create(**settings(**more), extra_body=body)


def strictly(kind: Any, given: Any) -> Any:
    """`given` as Anthropic's type, of exactly its fields."""
    made = pydantic.TypeAdapter(kind).validate_json(json.dumps(given), strict=True)
    _known(made)
    return made


def _known(value: Any) -> None:
    if isinstance(value, pydantic.BaseModel):
        name = type(value).__name__
        assert not set(value.model_extra or ()) - BESIDES.get(name, set()), name
        for field in type(value).model_fields:
            _known(getattr(value, field))
    elif isinstance(value, list):
        for one in value:
            _known(one)


def streamed(address: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each of Anthropic's type, in their order."""
    asks = {**settings(**body), "seed": 3, "stream": True}
    status, headers, text = asked(address, PATH, asks)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    events = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        strictly(anthropic.types.RawMessageStreamEvent, events[-1])
    kinds = [one["type"] for one in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    inside, index = False, -1
    for one in events[1:-2]:
        if one["type"] == "content_block_start":
            index += 1
            assert not inside
        else:
            assert inside
        assert one["index"] == index
        inside = one["type"] != "content_block_stop"
    return events


def put_together(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that a stream's events make, without what is chance."""
    blocks: list[dict[str, Any]] = []
    for one in events:
        if one["type"] == "content_block_start":
            blocks.append({**one["content_block"]})
        elif one["type"] == "content_block_delta":
            ((name, piece),) = ((k, v) for k, v in one["delta"].items() if k != "type")
            blocks[-1][name] = blocks[-1].get(name, "") + piece
    for block in blocks:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("partial_json", "{}"))
    return without_ids(blocks)


def without_ids(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in block.items() if k != "id"} for block in blocks]


def test_a_text_is_what_a_chat_says(client: Any, address: str) -> None:
    found = ask(client, system="Be brief.", max_tokens=9, extra_body={"temperature": 0.7})
    with talking_to(address) as other:
        chat: Any = other.chat.completions.create(
            model="any", messages=[{"role": "system", "content": "Be brief."}, *MESSAGES],  # type: ignore[list-item]
            max_tokens=9, seed=3, temperature=0.7,
        )  # fmt: skip
    assert found.content[0].text == chat.choices[0].message.content
    assert found.stop_reason == "max_tokens" and found.model == "docs"
    usage = found.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == chat.usage.prompt_tokens
    assert usage.output_tokens == 9
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    asks = settings(system=system, max_tokens=9, temperature=0.7, seed=3)
    whole = asked(address, PATH, asks)[2]
    strictly(anthropic.types.Message, whole)
    assert whole["content"][0]["text"] == found.content[0].text
    events = streamed(address, system=system, max_tokens=9, temperature=0.7)
    assert put_together(events) == whole["content"]
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 9


def test_stop_sequences(client: Any) -> None:
    text = ask(client, max_tokens=12).content[0].text
    stop = text[6:9]
    found = ask(client, max_tokens=12, stop_sequences=["nowhere", stop])
    assert found.stop_reason == "stop_sequence" and found.stop_sequence == stop
    assert found.content[0].text == text[: text.index(stop)]


def test_more_tokens_than_there_is_room_for(client: Any) -> None:
    ends = {"min_new_tokens": 500, "temperature": 0.0}
    found = ask(client, max_tokens=4096, extra_body=ends)
    assert found.stop_reason == "model_context_window_exceeded"
    assert found.usage.output_tokens < 512


def test_the_end_of_a_turn(client: Any) -> None:
    found = ask(client, max_tokens=3, extra_body={"sequence_bias": [[[0], 500.0]]})
    assert found.stop_reason == "end_turn" and found.content == []


def test_uses_of_tools(address: str) -> None:
    for choice in ({"type": "any", "disable_parallel_tool_use": True},
                   {"type": "tool", "name": "weather"}):  # fmt: skip
        whole = asked(address, PATH, settings(tools=OFFERED, tool_choice=choice, seed=3))[2]
        strictly(anthropic.types.Message, whole)
        (use,) = whole["content"]
        assert whole["stop_reason"] == "tool_use" and use["id"].startswith("toolu_")
        jsonschema.validate(use["input"], TOOLS[use["name"]])
        events = streamed(address, tools=OFFERED, tool_choice=choice)
        assert put_together(events) == without_ids(whole["content"])
        assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_loop_of_uses(client: Any) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    first = ask(client, tools=OFFERED, tool_choice=choice)
    (use,) = first.content
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "3 degrees"}
    blocks = [result, {"type": "text", "text": "And?"}]
    said = [*MESSAGES, {"role": "assistant", "content": first.content}]
    said.append({"role": "user", "content": blocks})
    second = ask(client, messages=said, tools=OFFERED, max_tokens=8, tool_choice={"type": "none"})
    assert second.content[0].text and second.stop_reason in ("max_tokens", "end_turn")


def test_the_client_runs_a_loop_of_tools(client: Any) -> None:
    """It offers to keep the conversation in a thread, and goes on without one."""
    asked_for: list[bool] = []

    @anthropic.beta_tool  # type: ignore[untyped-decorator,unused-ignore]
    def now(exact: bool) -> str:
        """Tell the time.

        Args:
            exact: to the second.
        """
        asked_for.append(exact)
        return "noon"

    choice = {"type": "any", "disable_parallel_tool_use": True}
    runner = client.beta.messages.tool_runner(
        model="any", messages=MESSAGES, tools=[now], max_tokens=100, tool_choice=choice,
        max_iterations=2,
    )  # fmt: skip
    found = [message.stop_reason for message in runner]
    assert found[0] == "tool_use" and len(found) == 2 and asked_for


def test_a_use_that_is_cut_off(client: Any, address: str) -> None:
    choice = {"type": "tool", "name": "weather"}
    found = ask(client, tools=OFFERED, tool_choice=choice, max_tokens=26)
    assert found.stop_reason == "max_tokens" and not found.content
    events = streamed(address, tools=OFFERED, tool_choice=choice, max_tokens=26)
    assert events[1]["content_block"]["name"] == "weather"
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


def test_the_client_puts_a_stream_together(client: Any) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(**settings(tools=OFFERED, tool_choice=choice)) as stream:
        found = stream.get_final_message()
    (use,) = found.content
    jsonschema.validate(use.input, TOOLS[use.name])
    assert found.stop_reason == "tool_use" and found.usage.output_tokens > 5


def test_thoughts(thinker: str, models: Any) -> None:
    thinking = {"type": "enabled", "budget_tokens": 6}
    whole = asked(thinker, PATH, settings(thinking=thinking, max_tokens=40, seed=3))[2]
    strictly(anthropic.types.Message, whole)
    thought, text = whole["content"]
    assert thought["type"] == "thinking" and thought["thinking"] and thought["signature"]
    assert "think>" not in text["text"]
    assert put_together(streamed(thinker, thinking=thinking, max_tokens=40)) == whole["content"]
    hidden = {**thinking, "display": "omitted"}
    events = streamed(thinker, thinking=hidden, max_tokens=40)
    assert put_together(events) == [{**thought, "thinking": ""}, text]
    with client_of(thinker) as client:
        said = [*MESSAGES, {"role": "assistant", "content": whole["content"]}, *MESSAGES]
        count = client.messages.count_tokens
        with_thought = count(model="any", messages=said).input_tokens
        said[1] = {"role": "assistant", "content": [text]}
        assert count(model="any", messages=said).input_tokens < with_thought
    with served(models(PLAIN)) as address:
        status, _, error = asked(address, PATH, settings(thinking=thinking))
        assert status == 400 and error["error"]["message"].startswith("thinking")


def test_a_form_of_the_text(client: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"format": {"type": "json_schema", "schema": schema}}
    found = ask(client, extra_body={"output_config": form})
    assert json.loads(found.content[0].text) == {"a": 1}


def test_tokens_are_counted(client: Any) -> None:
    few = client.messages.count_tokens(model="any", messages=MESSAGES).input_tokens
    more = client.messages.count_tokens(
        model="any", messages=MESSAGES, system="Be brief.", tools=OFFERED
    ).input_tokens
    usage = ask(client, max_tokens=1).usage
    assert few == usage.input_tokens + usage.cache_read_input_tokens < more


def test_keys_and_errors(models: Any) -> None:
    with served(models(PLAIN), api_key="s3cret") as address:
        with client_of(address, "wrong") as client, pytest.raises(anthropic.AuthenticationError):
            ask(client, max_tokens=1)
        with client_of(address, "s3cret") as client:
            assert ask(client, max_tokens=1).content
            with pytest.raises(anthropic.BadRequestError) as error:
                ask(client, max_tokens=0)
        assert error.value.body["type"] == "error"
        assert error.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "So"}]}, "last one"),
        ({"messages": [{"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "x", "content": "1"}]}]}, "'x'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text of text"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"tools": [{**OFFERED[0], "defer_loading": True}]}, "defer_loading"),
        ({"tools": OFFERED, "tool_choice": {"type": "tool", "name": "x"}}, "'x'"),
        ({"tools": OFFERED, "tool_choice": {"type": "tool"}}, "its name"),
        ({"container": "c"}, "container"), ({"mcp_servers": []}, "mcp_servers"),
        ({"n": 2}, "n is no field"), ({"stop_sequences": ["a"] * 90}, "stop_sequences"),
        ({"max_tokens": None}, "max_tokens"), ({"store": True}, "store"),
        ({"messages": []}, "messages"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused(address: str, more: dict[str, Any], told: str) -> None:
    status, _, found = asked(address, PATH, settings(**more))
    assert status == 400 and found["type"] == "error" and told in found["error"]["message"], found


def test_a_stream_that_fails_says_so(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen.serve.refused import Refused
    from fastgen.serve.service import LiveRun

    async def failing(run: LiveRun) -> Any:
        if run:
            raise Refused(503, "the service is being stopped", code="stopping")
        yield

    monkeypatch.setattr(LiveRun, "tokens", failing)
    _, _, text = asked(address, PATH, settings(stream=True))
    last = text.split("\n\n")[-2]
    assert last.startswith("event: error\n") and "overloaded_error" in last
    with client_of(address) as client, pytest.raises(anthropic.APIStatusError, match="stopped"):
        list(client.messages.create(**settings(stream=True)))


def test_blocks_as_messages() -> None:
    sent = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "text", "text": "So"},
            {"type": "tool_use", "id": "t", "name": "now", "input": {"exact": True}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t", "is_error": True,
             "content": [{"type": "text", "text": "no"}]},
            {"type": "text", "text": "c"}]},
    ]  # fmt: skip
    call = {"id": "t", "type": "function",
            "function": {"name": "now", "arguments": '{"exact": true}'}}  # fmt: skip
    assert messages_of(sent, [{"type": "text", "text": "Be brief."}]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "reasoning_content": "hm", "content": "So", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t",
         "content": [{"type": "text", "text": "Error:"}, {"type": "text", "text": "no"}]},
        {"role": "user", "content": "c"},
    ]  # fmt: skip
