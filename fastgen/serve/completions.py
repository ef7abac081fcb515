"""`POST /v1/completions`: prompts to texts, whole or as they come, with scores where asked."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastgen.engine.output import Token
from fastgen.serve.answers import logprobs, starts, usage
from fastgen.serve.refused import Refused
from fastgen.serve.service import Run, Service, put_together, so_far
from fastgen.serve.wire import COMPLETION_TOKENS, StreamOptions, Wish, wish


@dataclass
class Answer:
    """A completion that has begun.

    Attributes:
        events: gives the chunks of a stream; None where the answer is wanted whole.
        echoes: of each prompt its text, and its tokens with their log-probabilities; empty where
            the prompt is not repeated.
    """

    service: Service
    run: Run
    wish: Wish
    echoes: list[tuple[str, list[Token]]]
    options: StreamOptions
    streamed: bool

    def __post_init__(self) -> None:
        self.about = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.name,
        }
        self.events = self._events if self.streamed else None

    async def whole(self) -> dict[str, Any]:
        """The answer, when all is done."""
        parts: list[list[str]] = [[] for _ in self.run.texts]
        made: list[list[Token]] = [[] for _ in self.run.texts]
        async for place, token in self.run.tokens():
            parts[place].append(self.run.texts[place].push(token)[0])
            made[place].append(token)
        return await put_together(self.size, lambda: self._made(parts, made))

    @property
    def size(self) -> int:
        """Tokens of the answer so far, each with its alternatives."""
        echoed = sum(len(tokens) for _, tokens in self.echoes)
        return (self.run.new_tokens + echoed) * (1 + (self.wish.alternatives or 0))

    def _made(
        self, parts: Sequence[Sequence[str]], made: Sequence[Sequence[Token]]
    ) -> dict[str, Any]:
        """The answer of the pieces of each text, and its tokens."""
        choices = []
        for index, place in enumerate(self._chosen(made)):
            said, before = self._echo(place)
            text = self.run.texts[place]
            choices.append(
                self._choice(
                    index,
                    said + "".join(parts[place]),
                    [*before, *text.tokens],
                    text.reason,
                    made[place],
                    [*starts(before), *(len(said) + at for at in text.starts)],
                )
            )
        if not self.run.streams:  # nothing but the prompts was wanted
            choices = [
                self._choice(index, said, before, "length", [], starts(before))
                for index, (said, before) in enumerate(self.echoes)
            ]
        total = usage(self.run.prompt_tokens, self.run.new_tokens)
        return {**self.about, "choices": choices, "usage": total, **self.run.warnings()}

    def _chosen(self, made: Sequence[Sequence[Token]]) -> list[int]:
        """The texts that are given out: of each prompt the n likeliest by the mean of a token."""
        n, copies = self.wish.n, self.wish.copies
        out: list[int] = []
        for first in range(0, len(made), copies):
            places = list(range(first, first + copies))
            if copies > n:
                places.sort(key=lambda place: -_mean(made[place]))
            out += places[:n]
        return out

    def _echo(self, place: int) -> tuple[str, list[Token]]:
        return self.echoes[place // self.wish.copies] if self.echoes else ("", [])

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[Token],
        reason: str | None,
        made: Sequence[Token],
        begin: Sequence[int],
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None,
                                  "finish_reason": reason}  # fmt: skip
        if self.wish.alternatives is not None and self.service.model.has_tokenizer:
            choice["logprobs"] = logprobs(tokens, self.service.model.tokenizer, begin)
        if not self.service.model.has_tokenizer:
            choice["token_ids"] = [token.id for token in made]
        return choice

    async def _events(self) -> AsyncIterator[dict[str, Any] | None]:
        """A chunk for each piece of a text; None for a token that adds nothing to it yet."""
        offsets = [0] * len(self.run.texts)
        for place in range(len(self.run.texts)) if self.echoes else ():
            said, before = self._echo(place)
            offsets[place] = len(said)
            yield {
                **self.about,
                "choices": [self._choice(place, said, before, None, [], starts(before))],
                **so_far(self.run, self.options),
                **self.run.warnings(),
            }
        async for place, token in self.run.tokens():
            text = self.run.texts[place]
            piece, tokens = text.push(token)
            if not (piece or tokens or text.reason) and self.service.model.has_tokenizer:
                yield None
                continue
            begin = [offsets[place] + at for at in text.starts[len(text.starts) - len(tokens) :]]
            choice = self._choice(place, piece, tokens, text.reason, [token], begin)
            yield {
                **self.about,
                "choices": [choice],
                **so_far(self.run, self.options),
                **self.run.warnings(),
            }
        if self.options.include_usage:
            total = usage(self.run.prompt_tokens, self.run.new_tokens)
            yield {**self.about, "choices": [], "usage": total}


async def _echoes(
    service: Service, prompts: Sequence[list[int]], wish: Wish
) -> list[tuple[str, list[Token]]]:
    """Of each prompt its text, and its tokens where log-probabilities are asked for."""
    decode = service.model.tokenizer.decode
    texts = [await asyncio.to_thread(decode, ids, False) for ids in prompts]
    if wish.alternatives is None:
        return [(text, []) for text in texts]
    scored = await service.scored(prompts, wish.alternatives)
    return list(zip(texts, scored, strict=True))


def _mean(tokens: Sequence[Token]) -> float:
    return sum(token.logprob for token in tokens) / max(1, len(tokens))


async def answer(service: Service, body: Any) -> Answer:
    """Begin a completion.

    Raises:
        Refused: what cannot be done.
    """
    if body.suffix is not None:
        raise Refused(
            400, "suffix is not supported: nothing is filled in before it", param="suffix"
        )
    wished = wish(body, service.defaults, service.limits)
    service.noted(body.model_dump(exclude_unset=True), {})
    if body.echo and not service.model.has_tokenizer:
        raise Refused(400, "echo needs a tokenizer: this model was exported for ids only")
    prompts = await service.prompts(body.prompt, wished.new)
    if wished.new == 0 and (not body.echo or body.stream or wished.n > 1):
        raise Refused(
            400, "max_tokens=0 scores a prompt: with echo, without stream and n", param="max_tokens"
        )
    echoes = await _echoes(service, prompts, wished) if body.echo else []
    if wished.new == 0:
        run = Run(service.engine, [], asyncio.Queue(), [], 1, sum(map(len, prompts)))
    else:
        run = await service.run(prompts, wished, COMPLETION_TOKENS)
    options = body.stream_options or StreamOptions()
    return Answer(service, run, wished, echoes, options, bool(body.stream))
