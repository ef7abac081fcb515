"""The body of `POST /v1/responses`, and the body of a chat that asks for the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from fastgen.inputs import validators
from fastgen.serve.dialects import Sent, given
from fastgen.serve.items import Message
from fastgen.serve.refused import Refused, renamed
from fastgen.serve.wire import ChatCompletion, invalid, with_knobs

LOGPROBS = "message.output_text.logprobs"
# What may be included: log-probabilities, and what is there in any case (as the thoughts' text).
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
# What is kept elsewhere, or done to no text of ours: such a field is told what there is instead.
NOT_HERE = {
    "conversation": "conversations are not kept: use previous_response_id, or send all items",
    "prompt": "prompt templates are not kept here: send instructions and input",
    "moderation": "nothing is moderated here",
    "context_management": "nothing is left out of a conversation here",
    "background_options": "nothing runs in the background here",
    "prompt_cache_options": "what is kept of prompts is not up to a request",
    "access_programs": "there are none here",
    "image": "no picture is read here",
}
# The chat's names of our fields.
NAMES = {
    "max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens",
    "max_new_tokens": "max_output_tokens", "response_format": "text", "messages": "input",
    "prompt": "input", "reasoning_effort": "reasoning", "verbosity": "text",
    "logprobs": "top_logprobs",
}  # fmt: skip


class InputItem(Sent):
    """A message, a call, the output of one, reasoning, or a reference to one of these."""

    model_config = ConfigDict(extra="allow")
    type: str | None = None


class ReasoningOptions(Sent):
    """The effort of its thoughts."""

    effort: str | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Sent):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Sent):
    """The form of the text, and its length."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Sent):
    """Options of a stream."""

    include_obfuscation: bool | None = None


class CountedInput(Sent):
    """`POST /v1/responses/input_tokens`: what decides how many tokens a prompt has."""

    model: str | None = Field(None, description="the model; any name where there is one model")
    input: str | list[InputItem] | None = Field(None, description="a text or items, oldest first")
    instructions: str | None = Field(None, description="a system message before all others")
    previous_response_id: str | None = Field(None, description="a response that is kept")
    tools: list[dict[str, Any]] | None = Field(None, description="functions that may be called")
    tool_choice: Any = Field(None, description="none, auto, required, a function, or allowed_tools")
    parallel_tool_calls: bool | None = Field(None, description="whether several calls may come")
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="disabled alone")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="for the template")
    conversation: Any = Field(None, description="not supported")


class _CreateResponse(CountedInput):
    """`POST /v1/responses`."""

    max_output_tokens: int | None = Field(None, ge=1, description="new tokens, at most")
    max_reasoning_tokens: int | None = Field(
        None, ge=0, description="of reasoning, which then has to end"
    )
    max_tool_calls: int | None = Field(None, ge=1, description="of hosted tools: there are none")
    top_logprobs: int | None = Field(None, ge=0, description="alternatives a token")
    include: list[str] | None = Field(None, description=f"{' or '.join(INCLUDED)}")
    store: bool | None = Field(None, description="whether it is kept for later requests")
    stream: bool | None = Field(False, description="server-sent events, as tokens come")
    stream_options: ResponseStreamOptions | None = None
    background: bool | None = Field(None, description="false alone is accepted")
    metadata: dict[str, str] | None = Field(None, description="comes back as it is")
    user: str | None = Field(None, description="comes back as it is")
    safety_identifier: str | None = Field(None, description="comes back as it is")
    prompt_cache_key: str | None = Field(None, description="comes back as it is")
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt: Any = Field(None, description="not supported")
    moderation: Any = Field(None, description="not supported")
    context_management: Any = Field(None, description="not supported")
    background_options: Any = Field(None, description="not supported")
    prompt_cache_options: Any = Field(None, description="not supported")
    access_programs: Any = Field(None, description="not supported")
    image: Any = Field(None, description="not supported")


if TYPE_CHECKING:
    CreateResponse = _CreateResponse
else:
    CreateResponse = with_knobs(
        "CreateResponse", _CreateResponse, {}, ("max_new_tokens", "num_return_sequences")
    )

# The same in a chat, knobs besides.
ALIKE = ("parallel_tool_calls", "chat_template_kwargs", "max_reasoning_tokens")
OURS = {*_CreateResponse.model_fields} - {*ALIKE}


def chat_of(body: Any, messages: Sequence[Message]) -> ChatCompletion:
    """The body of a chat of `messages` that asks for what the body of a response does.

    Raises:
        Refused: it asks for what is not done here.
    """
    sent = body.model_dump(exclude_unset=True, by_alias=True)
    _check(sent)
    made: dict[str, Any] = {
        name: value
        for name, value in sent.items()
        if name not in OURS and name in ChatCompletion.model_fields
    }
    reasoning, text = sent.get("reasoning", {}), sent.get("text", {})
    made |= given({
        "messages": messages,
        "tools": [_function(one) for one in sent["tools"]] if "tools" in sent else None,
        "tool_choice": sent.get("tool_choice"),
        "max_completion_tokens": sent.get("max_output_tokens"),
        "reasoning_effort": reasoning.get("effort"),
        "verbosity": text.get("verbosity"),
        "response_format": _format(text["format"]) if "format" in text else None,
    })  # fmt: skip
    if "top_logprobs" in sent or LOGPROBS in sent.get("include", ()):
        made |= {"logprobs": True, "top_logprobs": sent.get("top_logprobs", 0)}
    try:
        return ChatCompletion.model_validate(made)
    except ValidationError as error:
        raise renamed(invalid(error), NAMES) from error


def notes(body: Any) -> list[str]:
    """Tell of what is asked for and done in another way."""
    reasoning = body.reasoning
    if reasoning is None or not (reasoning.summary or reasoning.generate_summary):
        return []
    return ["reasoning.summary: no summary is made, the thoughts are the item's content"]


def _check(sent: Mapping[str, Any]) -> None:
    """Refuse what is not done here."""
    for name, instead in NOT_HERE.items():
        if name in sent:
            raise Refused(400, f"{name} is not supported: {instead}", param=name)
    if sent.get("background"):
        raise Refused(
            400, "background must be false: nothing runs in the background", param="background"
        )
    if sent.get("truncation", "disabled") != "disabled":
        raise Refused(
            400, 'truncation must be "disabled": no item is left out here', param="truncation"
        )
    for name in sent.get("include", ()):
        if name not in INCLUDED:
            raise Refused(
                400, f"include has {' or '.join(INCLUDED)}, got {name!r}", param="include"
            )


FUNCTION = {"type", "name", "description", "parameters", "strict"}


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as a chat has it."""
    kind, name = tool.get("type"), tool.get("name")
    if kind != "function":
        raise Refused(
            400,
            f"tools: {validators.shown(kind)} is none that is done here: functions alone are",
            param="tools",
        )
    if "function" in tool:
        raise Refused(
            400,
            'tools: a function is {"type": "function", "name": ..., "parameters": ...} here',
            param="tools",
        )
    for field, value in tool.items():
        if field not in FUNCTION and value not in (None, False):
            raise Refused(
                400, f"tools: {field} of {name} is nothing that is done here", param="tools"
            )
    return {
        "type": "function",
        "function": given({field: tool.get(field) for field in FUNCTION - {"type"}}),
    }


def _format(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """A form of the text as a chat has it."""
    if wanted["type"] != "json_schema":
        return {"type": wanted["type"]}
    if "schema" not in wanted:
        raise Refused(400, 'text.format of json_schema needs "schema", a JSON schema', param="text")
    return {"type": "json_schema", "json_schema": {k: v for k, v in wanted.items() if k != "type"}}
