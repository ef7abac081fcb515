"""`POST /v1/chat/completions`: a conversation to the model's answer, or to its calls of tools."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.engine.output import Token
from fastgen.serve import talk
from fastgen.serve.answers import chat_logprobs
from fastgen.serve.front import Front
from fastgen.serve.response import Answer
from fastgen.serve.talk import ChatText
from fastgen.serve.tools.reader import AnswerEvent
from fastgen.serve.tools.whole import ToolCall, WholeAnswer
from fastgen.serve.wire import StreamOptions


@dataclass
class ChatAnswer(Answer):
    """An answer that has begun.

    Attributes:
        texts: of the answer.
        named: whether the request says which tool is to be called.
    """

    texts: Sequence[ChatText]
    named: bool

    ID = "chatcmpl"

    @property
    def kind(self) -> str:
        return "chat.completion.chunk" if self.streamed else "chat.completion"

    def usage(self) -> dict[str, Any]:
        thought = sum(text.thought for text in self.texts)
        return {**super().usage(), "completion_tokens_details": {"reasoning_tokens": thought}}

    async def whole(self) -> dict[str, Any]:
        async for index, token in self.run.tokens():
            self.texts[index].push(token)
        return await self.front.put_together(self.size, self._made)

    def _made(self) -> dict[str, Any]:
        choices = []
        for index, chat_text in enumerate(self.texts):
            whole = chat_text.whole
            message: dict[str, Any] = {
                "role": "assistant",
                "content": whole.content or None if whole.calls else whole.content,
                "refusal": None,
            }
            if whole.reasoning:
                message["reasoning_content"] = whole.reasoning
            if whole.calls:
                message["tool_calls"] = [_in_message(call) for call in whole.calls]
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._logprobs(chat_text.text.tokens),
                    "finish_reason": self._reason(chat_text),
                }
            )
        return self.with_choices(choices)

    def _reason(self, chat_text: ChatText) -> str | None:
        """The reason of its end, OpenAI's: "tool_calls" only where the model chose to call."""
        called = chat_text.text.reason == "stop" and chat_text.whole.calls and not self.named
        return "tool_calls" if called else chat_text.text.reason

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.request.alternatives is None:
            return None
        return chat_logprobs(tokens, self.front.model.tokenizer)

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """A chunk for each thing that a token says; None for a token that says nothing yet."""
        for index in range(len(self.run.texts)):
            yield self._delta(index, {"role": "assistant", "content": "", "refusal": None})
        async for index, token in self.run.tokens():
            chat_text = self.texts[index]
            if chat_text.text.reason is not None:
                continue
            deltas = list(_deltas(chat_text.push(token), chat_text.whole))
            if not deltas and (chat_text.text.reason is None or not chat_text.tokens):
                yield None
            elif not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                tokens, chat_text.tokens = chat_text.tokens, []
                yield self._delta(index, delta, self._logprobs(tokens))
            if chat_text.text.reason is not None:
                yield self._delta(index, {}, None, self._reason(chat_text))
        for chunk in self.last_chunks():
            yield chunk

    def _delta(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.chunk(choice)


def _in_message(call: ToolCall) -> dict[str, Any]:
    """A call as an OpenAI message has it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": _call_id(), "type": "function", "function": function}


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _deltas(events: Sequence[AnswerEvent], whole: WholeAnswer) -> Iterator[dict[str, Any]]:
    """Events as a stream's deltas.

    Args:
        whole: what was said, these events included.
    """
    begun = sum(event.kind == "call" for event in events)
    index = whole.begun - begun - 1
    for event in events:
        if event.kind == "content" or (event.kind == "broken" and event.text):
            yield {"content": event.text}
        elif event.kind == "reasoning":
            yield {"reasoning_content": event.text}
        elif event.kind == "call":
            index += 1
            function = {"name": event.text, "arguments": ""}
            call = {"index": index, "id": _call_id(), "type": "function", "function": function}
            yield {"tool_calls": [call]}
        elif event.kind == "arguments":
            yield {"tool_calls": [{"index": index, "function": {"arguments": event.text}}]}


async def answer(front: Front, body: Any) -> ChatAnswer:
    """Begin an answer.

    Raises:
        Refused: what cannot be done.
    """
    begun = await talk.begin(front, body)
    options = body.stream_options or StreamOptions()
    return ChatAnswer(
        front, begun.run, begun.request, bool(body.stream), options, begun.texts, begun.named
    )
