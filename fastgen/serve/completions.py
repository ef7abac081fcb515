"""`POST /v1/completions`: prompts to texts, whole or as they come, with scores where asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastgen.engine.output import Token
from fastgen.inputs.lengths import NEW_TOKENS
from fastgen.serve.answers import logprobs, starts
from fastgen.serve.front import Front
from fastgen.serve.refused import Refused
from fastgen.serve.response import Answer
from fastgen.serve.run import Run
from fastgen.serve.wire import (
    GenerationRequest,
    StreamOptions,
    generation_request,
)


@dataclass
class CompletionAnswer(Answer):
    """A completion that has begun.

    Attributes:
        echoes: of each prompt its text, and its tokens with their log-probabilities; empty where
            the prompt is not repeated.
    """

    echoes: list[tuple[str, list[Token]]]

    ID = "cmpl"

    @property
    def kind(self) -> str:
        return "text_completion"

    async def whole(self) -> dict[str, Any]:
        parts: list[list[str]] = [[] for _ in self.run.texts]
        tokens: list[list[Token]] = [[] for _ in self.run.texts]
        async for index, token in self.run.tokens():
            parts[index].append(self.run.texts[index].push(token)[0])
            tokens[index].append(token)
        return await self.front.put_together(self.size, lambda: self._made(parts, tokens))

    @property
    def size(self) -> int:
        """Tokens of the answer so far, the prompt's too, each with its alternatives."""
        echoed = sum(len(tokens) for _, tokens in self.echoes)
        return super().size + echoed * (1 + (self.request.alternatives or 0))

    def _made(
        self, parts: Sequence[Sequence[str]], tokens: Sequence[Sequence[Token]]
    ) -> dict[str, Any]:
        """The answer of the pieces of each text, and its tokens."""
        choices = []
        for index, text_index in enumerate(self._chosen(tokens)):
            prompt, before = self._echo(text_index)
            text = self.run.texts[text_index]
            choices.append(
                self._choice(
                    index,
                    prompt + "".join(parts[text_index]),
                    [*before, *text.tokens],
                    text.reason,
                    tokens[text_index],
                    [*starts(before), *(len(prompt) + at for at in text.starts)],
                )
            )
        if not self.run.texts:  # nothing but the prompts was wanted
            choices = [
                self._choice(index, prompt, before, "length", [], starts(before))
                for index, (prompt, before) in enumerate(self.echoes)
            ]
        return self.with_choices(choices)

    def _chosen(self, tokens: Sequence[Sequence[Token]]) -> list[int]:
        """The texts that are given out: of each prompt the n likeliest by the mean of a token."""
        n, copies = self.request.n, self.request.copies
        out: list[int] = []
        for first in range(0, len(tokens), copies):
            indices = list(range(first, first + copies))
            if copies > n:
                indices.sort(key=lambda index: -_mean(tokens[index]))
            out += indices[:n]
        return out

    def _echo(self, index: int) -> tuple[str, list[Token]]:
        return self.echoes[index // self.request.copies] if self.echoes else ("", [])

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[Token],
        reason: str | None,
        generated: Sequence[Token],
        begin: Sequence[int],
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None,
                                  "finish_reason": reason}  # fmt: skip
        if self.request.alternatives is not None and self.front.model.has_tokenizer:
            choice["logprobs"] = logprobs(tokens, self.front.model.tokenizer, begin)
        if not self.front.model.has_tokenizer:
            choice["token_ids"] = [token.id for token in generated]
        return choice

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """A chunk for each piece of a text; None for a token that adds nothing to it yet."""
        offsets = [0] * len(self.run.texts)
        for index in range(len(self.run.texts)) if self.echoes else ():
            prompt, before = self._echo(index)
            offsets[index] = len(prompt)
            yield self.chunk(self._choice(index, prompt, before, None, [], starts(before)))
        async for index, token in self.run.tokens():
            text = self.run.texts[index]
            piece, tokens = text.push(token)
            if not (piece or tokens or text.reason) and self.front.model.has_tokenizer:
                yield None
                continue
            begin = [offsets[index] + at for at in text.starts[len(text.starts) - len(tokens) :]]
            yield self.chunk(self._choice(index, piece, tokens, text.reason, [token], begin))
        for chunk in self.last_chunks():
            yield chunk


async def _echoes(
    front: Front, prompts: Sequence[list[int]], request: GenerationRequest
) -> list[tuple[str, list[Token]]]:
    """Of each prompt its text, and its tokens where log-probabilities are asked for."""
    decode = front.model.tokenizer.decode
    texts = [await front.aside(partial(decode, ids, False)) for ids in prompts]
    if request.alternatives is None:
        return [(text, []) for text in texts]
    scored = await front.scored(prompts, request.alternatives)
    return list(zip(texts, scored, strict=True))


def _mean(tokens: Sequence[Token]) -> float:
    return sum(token.logprob for token in tokens) / max(1, len(tokens))


async def answer(front: Front, body: Any) -> CompletionAnswer:
    """Begin a completion.

    Raises:
        Refused: what cannot be done.
    """
    if body.suffix is not None:
        raise Refused(
            400, "suffix is not supported: nothing is filled in before it", param="suffix"
        )
    request = generation_request(body, front.defaults, front.limits)
    front.noted(body.model_dump(exclude_unset=True), {})
    if body.echo and not front.model.has_tokenizer:
        raise Refused(400, "echo needs a tokenizer: this model was exported for ids only")
    prompts = await front.prompts(body.prompt, request.new)
    if request.new == 0 and (not body.echo or body.stream or request.n > 1):
        raise Refused(
            400, "max_tokens=0 scores a prompt: with echo, without stream and n", param="max_tokens"
        )
    echoes = await _echoes(front, prompts, request) if body.echo else []
    if request.new == 0:
        run = Run([], 1, sum(map(len, prompts)))
    else:
        run = await front.run(prompts, request, NEW_TOKENS["completion"])
    options = body.stream_options or StreamOptions()
    return CompletionAnswer(front, run, request, bool(body.stream), options, echoes)
