"""`POST /v1/messages`: Anthropic's conversations, by the way that chats take."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastgen.engine.output import Token
from fastgen.serve import talk
from fastgen.serve.blocks import Block, Blocks, Event
from fastgen.serve.front import Front
from fastgen.serve.refused import MESSAGES, Refused, renamed, told
from fastgen.serve.rendered import event
from fastgen.serve.response import BegunAnswer
from fastgen.serve.talk import ChatText
from fastgen.serve.wire_messages import NAMES, chat_of


async def count(front: Front, body: Any) -> dict[str, Any]:
    """Count the tokens of a conversation.

    Raises:
        Refused: what cannot be done.
    """
    try:
        return {"input_tokens": len((await talk.read(front, chat_of(body))).ids)}
    except Refused as error:
        raise renamed(error, NAMES) from error


async def answer(front: Front, body: Any) -> MessageAnswer:
    """Begin an answer.

    Raises:
        Refused: what cannot be done.
    """
    try:
        begun = await talk.begin(front, chat_of(body), body.max_tokens)
    except Refused as error:
        raise renamed(error, NAMES) from error
    text = begun.texts[0]
    return MessageAnswer(front, begun.run, begun.request, bool(body.stream), text, body)


@dataclass
class MessageAnswer(BegunAnswer):
    """A message that has begun."""

    text: ChatText
    body: Any

    LAST = b""

    def __post_init__(self) -> None:
        thinking = self.body.thinking
        self._blocks = Blocks(thinking is not None and thinking.display == "omitted")

    def _message(self, content: list[Block], reason: str | None) -> dict[str, Any]:
        return {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self.front.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": self._stopped_by if reason else None,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        cached = self.run.cached_tokens
        return {
            "input_tokens": self.run.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.run.new_tokens,
        }

    @property
    def _stopped_by(self) -> str | None:
        """The text that has ended it, if it is one of the request's."""
        by = self.text.text.stopped_by
        return by if by in (self.body.stop_sequences or ()) else None

    def _reason(self) -> str:
        """The reason of its end, in Anthropic's words."""
        text = self.text.text
        if text.reason == "length":
            full = text.count < self.body.max_tokens
            return "model_context_window_exceeded" if full else "max_tokens"
        if self._stopped_by is not None:
            return "stop_sequence"
        return "tool_use" if self.text.whole.calls else "end_turn"

    def _read(self, token: Token) -> list[Event]:
        return [*self._blocks.take(self.text.push(token))]

    def _over(self) -> list[Event]:
        return [*self._blocks.end(self.text.text.reason != "length")]

    async def whole(self) -> dict[str, Any]:
        async for _, token in self.run.tokens():
            self._read(token)
        return await self.front.put_together(self.size, self._made)

    def _made(self) -> dict[str, Any]:
        self._over()
        each = zip(self._blocks.blocks, self._blocks.whole, strict=True)
        blocks = [block for block, whole in each if whole or block["type"] != "tool_use"]
        return {**self._message(blocks, self._reason()), **self.run.warnings()}

    async def chunks(self) -> AsyncIterator[Event | None]:
        """Anthropic's events; None for a token that says nothing yet."""
        start = self._message([], None)
        yield {"type": "message_start", "message": {**start, **self.run.warnings()}}
        async for _, token in self.run.tokens():
            if self.text.text.reason is not None:
                continue
            events = self._read(token)
            for one in events:
                yield one
            if not events:
                yield None
        for one in self._over():
            yield one
        delta = {"stop_reason": self._reason(), "stop_sequence": self._stopped_by}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage()}
        yield {"type": "message_stop"}

    def sent(self, chunk: dict[str, Any]) -> bytes:
        return event(chunk, chunk["type"])

    def failed(self, error: Refused) -> dict[str, Any]:
        return told(error, MESSAGES)
