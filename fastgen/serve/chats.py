"""`POST /v1/chat/completions`: a conversation to the model's answer, or to its calls of tools."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen import chat
from fastgen.output import Token
from fastgen.serve import tools
from fastgen.serve.answers import chat_logprobs, usage
from fastgen.serve.service import Run, Service
from fastgen.serve.wire import Refused, Wish, wish


@dataclass
class Answer:
    """An answer that has begun.

    Attributes:
        events: gives the chunks of a stream; None where the answer is wanted whole.
        reads: what finds calls of tools in a text; None where there are no tools. A text with
            tools is streamed in one piece: what it is, is known at its end.
    """

    service: Service
    run: Run
    wish: Wish
    reads: tools.Reader | None
    include_usage: bool
    streamed: bool

    def __post_init__(self) -> None:
        self.about = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if self.streamed else "chat.completion",
            "created": int(time.time()),
            "model": self.service.name,
        }
        self.events = self._events if self.streamed else None

    async def whole(self) -> dict[str, Any]:
        """The answer, when all is done."""
        parts: list[list[str]] = [[] for _ in self.run.texts]
        async for place, token in self.run.tokens():
            parts[place].append(self.run.texts[place].push(token)[0])
        choices = []
        for index, text in enumerate(self.run.texts):
            content, calls = self._read("".join(parts[index]))
            message: dict[str, Any] = {"role": "assistant", "content": content or None if calls
                                       else content, "refusal": None}  # fmt: skip
            if calls:
                message["tool_calls"] = tools.in_message(calls)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(text.tokens),
                    "finish_reason": "tool_calls" if calls else text.reason,
                }
            )
        total = usage(self.run.prompt_tokens, self.run.new_tokens)
        return {**self.about, "choices": choices, "usage": total}

    def _read(self, text: str) -> tuple[str, tools.Found]:
        if self.reads is None:
            return text, []
        content, calls = self.reads(text)
        content = self.service.without_special_tokens(content)
        return content.strip() if calls else content, calls

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.wish.alternatives is None:
            return None
        return chat_logprobs(tokens, self.service.model.tokenizer)

    async def _events(self) -> AsyncIterator[dict[str, Any] | None]:
        """A chunk for each piece of an answer; None for a token that adds nothing to it yet."""
        for index in range(len(self.run.texts)):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
        parts: list[list[str]] = [[] for _ in self.run.texts]
        async for place, token in self.run.tokens():
            text = self.run.texts[place]
            piece, tokens = text.push(token)
            reason = text.reason
            delta: dict[str, Any] = {"content": piece}
            if self.reads is not None:
                parts[place].append(piece)
                if reason is None:
                    yield None
                    continue
                content, calls = self._read("".join(parts[place]))
                delta, tokens = {"content": content}, text.tokens
                if calls:
                    reason, numbered = "tool_calls", enumerate(tools.in_message(calls))
                    delta = {"content": content or None}
                    delta["tool_calls"] = [{"index": i, **one} for i, one in numbered]
            says = any(delta.values()) or tokens or reason
            yield self._chunk(place, delta, self._logprobs(tokens)) if says else None
            if reason:
                yield self._chunk(place, {}, None, reason)
        if self.include_usage:
            total = usage(self.run.prompt_tokens, self.run.new_tokens)
            yield {**self.about, "choices": [], "usage": total}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {
            **self.about,
            "choices": [choice],
            **({"usage": None} if self.include_usage else {}),
        }


async def answer(service: Service, body: Any) -> Answer:
    """Begin an answer.

    Raises:
        Refused: what cannot be done.
    """
    wished = wish(body, service.defaults)
    if wished.new == 0:
        raise Refused(400, "an answer has one token at least", param="max_tokens")
    if body.response_format is not None:
        wished.knobs.update(_format(body.response_format))
    functions = _functions(service, body)
    messages = [_message(one.model_dump(exclude_unset=True)) for one in body.messages]
    ids = await asyncio.to_thread(
        service.conversation, messages, functions, body.chat_template_kwargs or {}
    )
    reads = service.reads_tools if functions else None
    usual = service.defaults.get("max_new_tokens") or chat.MAX_NEW_TOKENS
    run = await service.run([ids], wished, usual, special=reads is not None)
    options = body.stream_options
    include = bool(options and options.include_usage)
    return Answer(service, run, wished, reads, include, body.stream)


def _format(wanted: Any) -> dict[str, Any]:
    """The knobs that a `response_format` stands for."""
    if wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json_schema": {"type": "object"}}
    schema = (wanted.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        raise Refused(
            400, 'response_format of json_schema needs {"json_schema": {"schema": {...}}}',
            param="response_format",
        )  # fmt: skip
    return {"json_schema": schema}


def _functions(service: Service, body: Any) -> list[dict[str, Any]] | None:
    """The tools that the template gets to see."""
    choice = body.tool_choice
    if choice not in (None, "none", "auto"):
        raise Refused(
            400, f"tool_choice must be none or auto, got {choice!r}: no call can be forced",
            param="tool_choice",
        )  # fmt: skip
    if not body.tools or choice == "none":
        return None
    if service.has_template and service.reads_tools is None:
        raise Refused(
            400,
            "tools: the chat template does not show in a known form how the model calls them",
            param="tools",
        )
    return list(body.tools)


def _message(sent: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates expect it: its content a text."""
    parts = sent.get("content")
    if isinstance(parts, list):
        kinds = {part["type"] for part in parts} - {"text"}
        if kinds:
            raise Refused(
                400, f"content of type {', '.join(sorted(kinds))} is not supported: text alone",
                param="messages",
            )  # fmt: skip
        sent["content"] = "".join(part.get("text") or "" for part in parts)
    return sent
