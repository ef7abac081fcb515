"""`POST /v1/responses`: items to items, by the way that chats take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgen.engine.output import Token
from fastgen.serve import talk
from fastgen.serve.answers import chat_logprobs
from fastgen.serve.front import Front
from fastgen.serve.items import Item, items_of, messages_of, new_id
from fastgen.serve.kept import KeptResponses, is_whole, size_of
from fastgen.serve.output_items import Event, OutputItems
from fastgen.serve.refused import Refused, renamed
from fastgen.serve.rendered import event
from fastgen.serve.response import BegunAnswer, Chunks
from fastgen.serve.talk import ChatText, Talk
from fastgen.serve.wire import ChatCompletion
from fastgen.serve.wire_responses import NAMES, chat_of, notes

CODES = {429: "rate_limit_exceeded"}  # of an answer that fails; else "server_error"


@dataclass
class Input:
    """The items of a request, and the conversation that it goes on from.

    Attributes:
        chat: the body of a chat that asks for the same.
    """

    items: list[Item]
    before: list[Item]
    chat: ChatCompletion


def read(body: Any, kept: KeptResponses) -> Input:
    """Read the body of a request.

    Raises:
        Refused: what cannot be done; a response or an item that is not kept.
    """
    before: list[Item] = []
    if body.previous_response_id is not None:
        try:
            before = kept.get(body.previous_response_id).conversation
        except Refused as error:
            raise Refused(
                404,
                f"previous_response_id: {error}",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from error
    sent = body.input
    given = sent if sent is None or isinstance(sent, str) else [one.model_dump() for one in sent]
    items = items_of(given, kept.item)
    return Input(items, before, chat_of(body, messages_of([*before, *items], body.instructions)))


async def count(front: Front, body: Any, kept: KeptResponses) -> dict[str, Any]:
    """Count the tokens of a request.

    Raises:
        Refused: what cannot be done.
    """
    try:
        prompt = await talk.read(front, read(body, kept).chat)
    except Refused as error:
        raise renamed(error, NAMES) from error
    return {"object": "response.input_tokens", "input_tokens": len(prompt.ids)}


async def answer(front: Front, body: Any, kept: KeptResponses) -> ResponseAnswer:
    """Begin an answer.

    Raises:
        Refused: what cannot be done.
    """
    given = read(body, kept)
    try:
        begun = await talk.begin(front, given.chat)
    except Refused as error:
        raise renamed(error, NAMES) from error
    begun.run.notes |= dict.fromkeys(notes(body))
    return ResponseAnswer(
        front, begun.run, begun.request, bool(body.stream), begun, body, given, kept
    )


@dataclass
class ResponseAnswer(BegunAnswer):
    """A response that has begun."""

    talk: Talk
    body: Any
    given: Input
    kept: KeptResponses
    created: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        wanted = self.request.alternatives is not None
        self._output = OutputItems(self._logprobs if wanted else None)
        self._about = self._described()
        self._number = 0

    @property
    def _text(self) -> ChatText:
        return self.talk.texts[0]

    def _logprobs(self, tokens: Sequence[Token]) -> list[Any]:
        found: list[Any] = chat_logprobs(tokens, self.front.model.tokenizer)["content"]
        for one in found:
            for token in (one, *one["top_logprobs"]):
                token["bytes"] = token["bytes"] or []  # of a token without a spelling
        return found

    def _described(self) -> dict[str, Any]:
        """The fields that are known at the beginning: those asked for, as they are done."""
        sent = self.body.model_dump(exclude_unset=True, by_alias=True)
        defaults = self.front.defaults
        usual = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0,
                 "frequency_penalty": 0.0}  # fmt: skip
        used = {
            name: sent.get(name, defaults.get(name) if defaults.get(name) is not None else value)
            for name, value in usual.items()
        }
        back = ("instructions", "previous_response_id", "max_output_tokens", "max_tool_calls",
                "prompt_cache_key", "safety_identifier", "user")  # fmt: skip
        text = sent.get("text", {})
        about = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(self.created),
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            **{name: sent.get(name) for name in back},
            "metadata": sent.get("metadata", {}),
            "model": self.front.name,
            "output": [],
            "parallel_tool_calls": sent.get("parallel_tool_calls", True),
            **used,
            "reasoning": {"effort": sent.get("reasoning", {}).get("effort"), "summary": None},
            "service_tier": "default",
            "store": sent.get("store", True),
            "text": {**text, "format": text.get("format", {"type": "text"})},
            "tool_choice": sent.get("tool_choice", "auto"),
            "tools": [_shown(tool) for tool in sent.get("tools", ())],
            "top_logprobs": sent.get("top_logprobs", 0),
            "truncation": "disabled",
            "usage": None,
        }
        if "prompt_cache_retention" in sent:
            about["prompt_cache_retention"] = sent["prompt_cache_retention"]
        return about

    def _usage(self) -> dict[str, Any]:
        prompt, new = self.run.prompt_tokens, self.run.new_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": self.run.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": self._text.thought},
            "total_tokens": prompt + new,
        }

    def _ended(self, items: Sequence[Item]) -> dict[str, Any]:
        """The response when all is done."""
        cut = self._text.text.reason == "length"
        return {
            **self._about,
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [*items],
            "usage": self._usage(),
            **self.run.warnings(),
        }

    async def _keep(self, response: dict[str, Any]) -> None:
        if not self._about["store"]:
            return
        given, before = self.given.items, self.given.before
        size = await self.front.put_together(self.size, lambda: size_of(response, given, before))
        self.kept.add(response, given, before, size)

    def _read(self, token: Token) -> Iterator[Event]:
        """Read one more token; the events that it brings must all be taken."""
        text = self._text
        events = text.push(token)
        tokens, text.tokens = text.tokens, []
        yield from self._output.take(events, tokens if text.kind == "content" else [])

    async def whole(self) -> dict[str, Any]:
        async for _, token in self.run.tokens():
            _run(self._read(token))
        _run(self._output.end(self._text.text.reason != "length"))
        items = self._output.items
        whole = [one for one in items if one["type"] != "function_call" or is_whole(one)]
        response = await self.front.put_together(self.size, lambda: self._ended(whole))
        await self._keep(response)
        return response

    async def chunks(self) -> Chunks:
        for kind in ("created", "in_progress"):
            yield self._numbered({"type": f"response.{kind}", "response": self._about})
        async for _, token in self.run.tokens():
            if self._text.text.reason is not None:
                continue
            events = [*self._read(token)]
            for one in events:
                yield self._numbered(one)
            if not events:
                yield None
        for one in self._output.end(self._text.text.reason != "length"):
            yield self._numbered(one)
        response = self._ended(self._output.items)
        await self._keep(response)
        yield self._numbered({"type": f"response.{response['status']}", "response": response})

    def _numbered(self, one: Event) -> Event:
        self._number += 1
        return {**one, "sequence_number": self._number - 1}

    def sent(self, chunk: dict[str, Any]) -> bytes:
        return event(chunk, chunk["type"])

    def failed(self, error: Refused) -> dict[str, Any]:
        told = {"code": CODES.get(error.status, "server_error"), "message": str(error)}
        response = {**self._about, "status": "failed", "error": told, "usage": self._usage()}
        response["output"] = [one for one in self._output.items if one["status"] != "in_progress"]
        return self._numbered({"type": "response.failed", "response": response})


def _shown(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as a response shows it."""
    return {
        "type": "function",
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        "strict": tool.get("strict") or False,
    }


def _run(events: Iterable[Event]) -> None:
    for _ in events:
        pass


# --- what is kept --------------------------------------------------------------------------------


def listed(
    kept: KeptResponses, name: str, after: str | None, limit: int, order: str
) -> dict[str, Any]:
    """The items that a response came of, those of the conversation before it included.

    Args:
        after: the id of the item that the list begins behind.
        limit: items at most.
        order: "desc", the latest first, or "asc".

    Raises:
        Refused: there is no such response, or no such item in it.
    """
    found = kept.get(name)
    items = [*found.before, *found.input]
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise Refused(400, f"after: there is no item {after!r} in it", param="after")
    first = 0 if after is None else ids.index(after) + 1
    data = items[first : first + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": first + limit < len(items),
    }
