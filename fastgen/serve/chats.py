"""`POST /v1/chat/completions`: a conversation to the model's answer, or to its calls of tools."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen import chat, schema
from fastgen.output import Token
from fastgen.serve import dialects, tools
from fastgen.serve.answers import chat_logprobs, usage
from fastgen.serve.refused import Refused
from fastgen.serve.service import Run, Service, put_together, so_far
from fastgen.serve.wire import StreamOptions, Wish, wish


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
    options: StreamOptions
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
        return await put_together(self.size, lambda: self._made(parts))

    @property
    def size(self) -> int:
        """Tokens of the answer so far, each with its alternatives."""
        return self.run.new_tokens * (1 + (self.wish.alternatives or 0))

    def _made(self, parts: Sequence[Sequence[str]]) -> dict[str, Any]:
        """The answer of the pieces of each text."""
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
        return {**self.about, "choices": choices, "usage": total, **self.run.warnings()}

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
        if self.options.include_usage:
            total = usage(self.run.prompt_tokens, self.run.new_tokens)
            yield {**self.about, "choices": [], "usage": total}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {
            **self.about,
            "choices": [choice],
            **so_far(self.run, self.options),
            **self.run.warnings(),
        }


async def answer(service: Service, body: Any) -> Answer:
    """Begin an answer.

    Raises:
        Refused: what cannot be done.
    """
    wished = wish(body, service.defaults, service.limits)
    if wished.new == 0:
        raise Refused(400, "an answer has one token at least", param="max_tokens")
    if body.response_format is not None:
        wished.knobs.update(_format(body.response_format))
    functions = _functions(service, body)
    messages = [one.model_dump(exclude_unset=True) for one in body.messages]
    variables = _variables(service, body) | (body.chat_template_kwargs or {})
    ids = await service.conversation(messages, functions, variables)
    reads = service.reads_tools if functions else None
    usual = service.defaults.get("max_new_tokens") or chat.MAX_NEW_TOKENS
    run = await service.run([ids], wished, usual, special=reads is not None)
    options = body.stream_options or StreamOptions()
    return Answer(service, run, wished, reads, options, bool(body.stream))


def _variables(service: Service, body: Any) -> dict[str, Any]:
    """What else the template gets to see; the log is told of what nothing looks at."""
    sent = body.model_dump(exclude_unset=True)
    used = dialects.for_template(sent, service.template)
    service.noted(sent, used)
    return used


def _format(wanted: Any) -> dict[str, Any]:
    """The knobs that a `response_format` stands for."""
    if wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json_schema": {"type": "object"}}
    given = wanted.json_schema or {}
    if not isinstance(given.get("schema"), dict):
        raise Refused(
            400, 'response_format of json_schema needs {"json_schema": {"schema": {...}}}',
            param="response_format",
        )  # fmt: skip
    if not given.get("strict"):
        return {"json_schema": given["schema"]}
    try:
        return {"json_schema": schema.strict(given["schema"])}
    except ValueError as error:
        raise Refused(400, f"response_format: {error}", param="response_format") from error


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
