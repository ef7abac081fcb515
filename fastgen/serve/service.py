"""A request from its prompts to its tokens: calls are made, run by the engine, and cancelled."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastgen import chat, score
from fastgen.call import Call
from fastgen.generator import CausalLM
from fastgen.output import Token
from fastgen.params import NAMES
from fastgen.serve import tools
from fastgen.serve.answers import Text
from fastgen.serve.engine import Engine, Full, News, Stopping, Stream
from fastgen.serve.metrics import Metrics
from fastgen.serve.wire import MOST_PROMPTS, Refused, Wish

RETRY = 1  # seconds after which a client may try again where the queue is full


@dataclass
class Run:
    """The calls of one request while they run.

    Attributes:
        texts: of each row of each call, in order.
        prompt_tokens: of all prompts, each counted once.
        behind: whether there are more tokens at hand than the one that `tokens` gave last.
    """

    engine: Engine
    streams: list[Stream]
    inbox: asyncio.Queue[News]
    texts: list[Text]
    copies: int
    prompt_tokens: int
    behind: bool = field(default=False, init=False)

    @property
    def new_tokens(self) -> int:
        return sum(text.count for text in self.texts)

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        """Each new token, and which text it belongs to.

        Raises:
            Refused: no token can be chosen; the service is stopped.
        """
        left = len(self.streams)
        while left:
            stream, tokens, done = await self.inbox.get()
            for left_here, token in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
                self.behind = left_here > 0 or not self.inbox.empty()
                yield stream.place * self.copies + token.row, token
            left -= done
            if stream.error is not None:
                raise refusal(stream.error)

    def cancel(self) -> None:
        """Let what is not over leave."""
        for stream in self.streams:
            self.engine.cancel(stream)


def refusal(error: Exception) -> Refused:
    """An error of a call as its client gets to see it."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Stopping):
        return Refused(503, "the service is being stopped", code="stopping")
    if isinstance(error, Full):
        return Refused(
            429, "as many requests wait as may: try again later", code="queue_full",
            headers={"Retry-After": str(RETRY)},
        )  # fmt: skip
    if isinstance(error, ValueError):
        return _wrong(str(error), {})
    return failure(error)


def _wrong(message: str, names: Mapping[str, str]) -> Refused:
    """What is wrong with a request, in the words that it used itself (see `Wish.names`)."""
    first = message.partition(" ")[0].partition("=")[0]
    for ours, theirs in names.items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    return Refused(400, message, param=names.get(first, first) if first in NAMES else None)


def failure(error: Exception) -> Refused:
    """An error that is none of the client's."""
    return Refused(500, f"{type(error).__name__}: {error}", code="internal_error")


class Service:
    """One model, its engine and its counts.

    Args:
        model: what answers.
        name: what clients see it called; None for its own name.
        settings: see `Engine`.

    Raises:
        ValueError: a setting that cannot be.
    """

    def __init__(self, model: CausalLM, name: str | None = None, **settings: Any) -> None:
        self.model = model
        self.metrics = Metrics()
        self.engine = Engine(model, watch=self.metrics.step, **settings)
        self.metrics.watch(self.engine)
        self.started = time.time()
        self.info = model.model.info
        self.name = name or self.info.name or model.directory.name
        self.defaults = model.generation_config.to_dict()
        self.has_template = model.has_tokenizer and chat.has_template(
            model.directory, model.tokenizer.config
        )
        self.reads_tools = (
            tools.reader(chat.source(model.directory, model.tokenizer.config, True))
            if self.has_template
            else None
        )

    # --- prompts ---------------------------------------------------------------------------------

    def prompts(self, given: Any) -> list[list[int]]:
        """The ids of the prompts of a completion.

        Raises:
            Refused: a text without a tokenizer, or too many.
        """
        if isinstance(given, str) or not given or isinstance(given[0], int):
            given = [given]
        if len(given) > MOST_PROMPTS:
            raise Refused(400, f"prompt has {len(given)} prompts, {MOST_PROMPTS} may be",
                          param="prompt")  # fmt: skip
        ids = [self.ids(one) if isinstance(one, str) else list(one) for one in given]
        for place, one in enumerate(ids):
            if not one:
                raise Refused(400, f"prompt {place} is empty", param="prompt")
        return ids

    def ids(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text.

        Raises:
            Refused: the model has no tokenizer, or it is no text.
        """
        if not self.model.has_tokenizer:
            raise Refused(400, "this model was exported for ids only: send token ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused(400, f"the text is no Unicode: {error.reason}") from error
        return self.model.tokenizer.encode(text, add_special_tokens=special)

    def without_special_tokens(self, text: str) -> str:
        """A text that was decoded with them."""
        tokenizer = self.model.tokenizer
        for token in tokenizer.special_ids():
            text = text.replace(tokenizer.token(token) or "", "")
        return text

    def conversation(
        self, messages: Sequence[dict[str, Any]], functions: Any, variables: dict[str, Any]
    ) -> list[int]:
        """The ids of a conversation, by the model's chat template.

        Raises:
            Refused: it has none, or that refuses the messages.
        """
        if not self.has_template:
            raise Refused(400, f"{self.name} has no chat template: use /v1/completions")
        try:
            text = chat.prompt(
                self.model.directory, self.model.tokenizer.config, messages, functions, **variables
            )
        except (ValueError, TypeError) as error:
            raise Refused(400, str(error), param="messages") from error
        return self.ids(text, special=False)

    # --- calls -----------------------------------------------------------------------------------

    async def run(
        self, prompts: Sequence[list[int]], wish: Wish, usual: int, special: bool = False
    ) -> Run:
        """Let the calls of a request begin.

        Args:
            usual: new tokens where nobody says how many, and there is room for so many.
            special: whether special tokens are part of the text.

        Raises:
            Refused: a call that cannot be, or cannot be now.
        """
        calls = await asyncio.to_thread(self._calls, prompts, wish, usual)
        inbox: asyncio.Queue[News] = asyncio.Queue()
        streams: list[Stream] = []
        try:
            for place, call in enumerate(calls):
                writer = self.model.writer(call, skip_special_tokens=not special)
                streams.append(self.engine.submit(call, writer, place, inbox))
        except Exception as error:
            for stream in streams:
                self.engine.cancel(stream)
            raise refusal(error) from error
        texts = [Text(wish.stop) for _ in range(len(calls) * wish.copies)]
        return Run(self.engine, streams, inbox, texts, wish.copies, sum(map(len, prompts)))

    def _calls(self, prompts: Sequence[list[int]], wish: Wish, usual: int) -> list[Call]:
        knobs = dict(wish.knobs)
        by_length = wish.new is None and knobs.get("max_length") is not None
        if wish.stop:
            knobs["stop_strings"] = list(wish.stop)
        if wish.alternatives:
            knobs["top_logprobs"] = wish.alternatives
        try:
            return [
                self.model.call(
                    [ids],
                    attention_mask=[[1] * len(ids)],
                    logprobs=wish.alternatives is not None or wish.copies > wish.n,
                    max_new_tokens=None if by_length else self.room(len(ids), wish.new, usual),
                    num_return_sequences=wish.copies,
                    **knobs,
                )
                for ids in prompts
            ]
        except ValueError as error:
            raise _wrong(str(error), wish.names) from error

    def room(self, prompt: int, new: int | None, usual: int) -> int:
        """How many tokens follow a prompt of so many.

        Raises:
            Refused: they do not fit into the model's context.
        """
        limit = self.info.max_length
        if limit is not None and prompt + (new or 1) > limit:
            raise Refused(
                400,
                f"the context is {limit} tokens, this asks for {prompt + (new or 1)}: "
                f"{prompt} of the prompt and {new or 1} new ones",
                param="prompt",
                code="context_length_exceeded",
            )
        if new is None:
            return usual if limit is None else min(usual, limit - prompt)
        return new

    def scored(self, ids: Sequence[int], count: int) -> list[Token]:
        """The tokens of a prompt as if they had been generated; the first has no probability.

        Args:
            count: alternatives of each.
        """
        row = np.array(ids, np.int64)
        logprobs = self.model.score([list(ids)], attention_mask=[[1] * len(ids)])[0].tolist()
        tops = [None, *map(tuple, score.likeliest(self.model.model, row, count))] if count else None
        tokenizer = self.model.tokenizer
        shown, out = "", []
        for place, token in enumerate(ids):
            text = tokenizer.decode(ids[: place + 1], False)[len(shown) :]
            shown += text
            top = tops[place] if tops else None
            out.append(Token(token, text, logprobs[place], top, None))
        return out
