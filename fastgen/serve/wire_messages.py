"""The body of `POST /v1/messages`, Anthropic's, and the body of a chat that asks for the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from fastgen.inputs import validators
from fastgen.serve import dialects
from fastgen.serve.dialects import Sent, given
from fastgen.serve.refused import Refused, renamed
from fastgen.serve.wire import ChatCompletion, invalid, with_knobs

Message = dict[str, Any]
Block = Mapping[str, Any]

# The chat's names of our fields.
NAMES = {
    "max_completion_tokens": "max_tokens", "max_new_tokens": "max_tokens", "prompt": "messages",
    "stop": "stop_sequences", "response_format": "output_config", "reasoning_effort":
    "output_config", "max_reasoning_tokens": "thinking",
}  # fmt: skip


class ContentBlock(Sent):
    """A text, a thought, a use of a tool, or its result."""

    model_config = ConfigDict(extra="allow")
    type: str


class InputMessage(Sent):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class Thinking(Sent):
    """The switch of its thoughts, and their length."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0, description="of thoughts, which then have to end")
    display: Literal["summarized", "omitted"] | None = None


class JsonFormat(Sent):
    """The form of the text."""

    type: Literal["json_schema"]
    of: dict[str, Any] = Field(alias="schema")


class OutputConfig(Sent):
    """The form of the text, and the effort."""

    effort: str | None = None
    format: JsonFormat | None = None


class UseOfTools(Sent):
    """The choice among tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountedMessages(Sent):
    """`POST /v1/messages/count_tokens`: what decides how many tokens a prompt has."""

    model: str | None = Field(None, description="the model; any name where there is one model")
    messages: list[InputMessage] = Field(min_length=1, description="oldest first")
    system: str | list[ContentBlock] | None = Field(None, description="before all messages")
    tools: list[dict[str, Any]] | None = Field(None, description="that may be used")
    tool_choice: UseOfTools | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = Field(None, description="accepted: all prompts are kept for a while")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="for the template")


class _CreateMessage(CountedMessages):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1, description="new tokens, at most")
    stop_sequences: list[str] | None = Field(None, description="texts that end it; left out")
    stream: bool | None = Field(False, description="server-sent events, as tokens come")
    metadata: dict[str, Any] | None = Field(None, description="accepted, and changes nothing")
    service_tier: Literal["auto", "standard_only"] | None = None
    thread: Any = Field(None, description="not supported; clients then go on without")


if TYPE_CHECKING:
    CreateMessage = _CreateMessage
else:
    CreateMessage = with_knobs(
        "CreateMessage",
        _CreateMessage,
        {},
        {"max_new_tokens", "num_return_sequences", "top_logprobs", *dialects.shared()},
    )

OURS = {*_CreateMessage.model_fields}


def chat_of(body: Any) -> ChatCompletion:
    """The body of a chat that asks for what this body does, but for the number of tokens.

    Raises:
        Refused: it asks for what is not done here.
    """
    sent = body.model_dump(exclude_unset=True, by_alias=True)
    if "thread" in sent:
        raise Refused(
            400,
            "thread is not supported: conversations are not kept, send all messages",
            param="thread",
            code="thread_unsupported_request",  # clients then send all messages
        )
    made: dict[str, Any] = {
        name: value
        for name, value in sent.items()
        if name not in OURS and name in ChatCompletion.model_fields
    }
    choice, output = sent.get("tool_choice", {}), sent.get("output_config", {})
    thinking = sent.get("thinking", {})
    variables = sent.get("chat_template_kwargs", {})
    if thinking.get("type") in ("enabled", "disabled"):
        variables = {"enable_thinking": thinking["type"] == "enabled", **variables}
    made |= given({
        "messages": messages_of(sent["messages"], sent.get("system")),
        "tools": [_function(one) for one in sent["tools"]] if "tools" in sent else None,
        "tool_choice": _choice(choice),
        "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
        "stop": sent.get("stop_sequences"),
        "max_reasoning_tokens": thinking.get("budget_tokens"),
        "reasoning_effort": output.get("effort"),
        "response_format": _format(output["format"]) if "format" in output else None,
        "chat_template_kwargs": variables or None,
    })  # fmt: skip
    try:
        return ChatCompletion.model_validate(made)
    except ValidationError as error:
        raise renamed(invalid(error), NAMES) from error


TOOL = {"name", "description", "input_schema", "strict"}
LET_GO = {"cache_control", "eager_input_streaming"}  # about how fast: no token changes


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as a chat has it."""
    kind, name = tool.get("type", "custom"), tool.get("name")
    if kind not in (None, "custom"):
        raise Refused(
            400, f"tools: {validators.shown(kind)} is none that is done here", param="tools"
        )
    for field, value in tool.items():
        if field not in TOOL | LET_GO | {"type"} and value not in (None, False, ["direct"]):
            raise Refused(
                400, f"tools: {field} of {name} is nothing that is done here", param="tools"
            )
    found = {field: tool.get(field) for field in TOOL - {"input_schema"}}
    function = given({**found, "parameters": tool.get("input_schema")})
    return {"type": "function", "function": function}


def _choice(choice: Mapping[str, Any]) -> Any:
    if choice.get("type") == "tool":
        if choice.get("name") is None:
            raise Refused(400, "tool_choice of a tool needs its name", param="tool_choice")
        return {"type": "function", "function": {"name": choice["name"]}}
    return {"any": "required", "auto": "auto", "none": "none", None: None}[choice.get("type")]


def _format(wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": wanted["schema"]}}


# --- messages ------------------------------------------------------------------------------------


def messages_of(sent: Sequence[Mapping[str, Any]], system: Any) -> list[Message]:
    """The messages of a chat.

    Raises:
        Refused: a block of another kind; a result of no use of a tool; the last message is an
            answer already.
    """
    made: list[Message] = []
    if system is not None:
        made.append({"role": "system", "content": _parts(_texts(system))})
    used: set[str] = set()
    for message in sent:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message["role"] == "assistant":
            made.append(_answer(blocks))
            used |= {call["id"] for call in made[-1].get("tool_calls", ())}
        else:
            made += _asked(message["role"], blocks, used)
    if sent[-1]["role"] == "assistant":
        raise _refused("the last one must be the user's: an answer is not gone on with")
    return made


def _answer(blocks: Sequence[Block]) -> Message:
    """The assistant's message of blocks."""
    kinds = ("text", "thinking", "tool_use")
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for block in blocks:
        kind = _kind(block, kinds)
        found[kind].append(_call(block) if kind == "tool_use" else _field(block, kind, str))
    return given({
        "role": "assistant",
        "reasoning_content": "".join(found["thinking"]) or None,
        "content": _parts(found["text"]) if found["text"] or not found["tool_use"] else None,
        "tool_calls": found["tool_use"] or None,
    })  # fmt: skip


def _call(block: Block) -> dict[str, Any]:
    arguments = json.dumps(_field(block, "input", dict), ensure_ascii=False)
    function = {"name": _field(block, "name", str), "arguments": arguments}
    return {"id": _field(block, "id", str), "type": "function", "function": function}


def _asked(role: str, blocks: Sequence[Block], used: set[str]) -> Iterator[Message]:
    """The messages of blocks: results of tools, and then what the user says."""
    texts: list[str] = []
    for block in blocks:
        if _kind(block, ("text", "tool_result")) == "text":
            texts.append(_field(block, "text", str))
            continue
        name = _field(block, "tool_use_id", str)
        if name not in used:
            raise _refused(f"no tool_use before it has the id {name!r}")
        content = _parts(_texts(block.get("content", "")))
        if block.get("is_error"):
            content = _parts(["Error:", *_texts(block.get("content", ""))])
        yield {"role": "tool", "tool_call_id": name, "content": content}
    if texts:
        yield {"role": role, "content": _parts(texts)}


def _texts(content: Any) -> list[str]:
    """The texts of a text, or of blocks of them."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise _refused(f"a content is a text or blocks of text, got {validators.shown(content)}")
    return [_field(block, _kind(block, ("text",)), str) for block in content]


def _parts(texts: Sequence[str]) -> Any:
    """Texts as the content of a chat's message."""
    if len(texts) < 2:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _kind(block: Any, kinds: Sequence[str]) -> str:
    """The type of a block, which must be one of these."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind not in kinds:
        raise _refused(f"a block here is {' or '.join(kinds)}, got {validators.shown(kind)}")
    return str(kind)


def _field(block: Block, name: str, kind: type) -> Any:
    value = block.get(name)
    if not isinstance(value, kind):
        what = "a text" if kind is str else "an object"
        raise _refused(f"{name} of {block['type']} must be {what}, got {validators.shown(value)}")
    return value


def _refused(what: str) -> Refused:
    return Refused(400, f"messages: {what}", param="messages")
