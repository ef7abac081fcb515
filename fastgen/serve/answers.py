"""Tokens to OpenAI's answers: texts cut at stop texts, log-probabilities, choices, usage."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from fastgen.engine.output import Token
from fastgen.text.tokenizer import Tokenizer

# Why a row has ended (see `fastgen.Token`), in OpenAI's words.
REASONS = {"length": "length", "time": "length"}
LOWEST = -9999.0  # for a log-probability of -inf, which JSON does not have: as OpenAI has it


def reason_of(token: Token) -> str | None:
    reason = token.finish_reason
    return None if reason is None else REASONS.get(reason, "stop")


@dataclass
class GeneratedText:
    """A row's text as it comes, cut before the first stop text.

    `sampling.stop` has ended the row at the token that completes a stop text. Here the text is cut
    before it, within a token, and a piece that could begin one is held back until that is known:
    clients never see a part of it. Stop texts are looked for in the text with its special tokens,
    which are then left out.

    Attributes:
        stop: texts that end it.
        hidden: the spelling of each special token that the text is given out without, whether it
            was decoded with them or not.
        given: characters that have been given out.
        tokens: those whose text has begun to be given out.
        starts: of each of them, how many characters come before its own.
        count: all tokens, those that were cut off too.
        reason: OpenAI's, once it has ended.
        stopped_by: the stop text that has ended it, if one has.
    """

    stop: Sequence[str]
    hidden: Mapping[int, str] = field(default_factory=dict)
    given: int = 0
    tokens: list[Token] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    count: int = 0
    reason: str | None = None
    stopped_by: str | None = None
    _held: list[tuple[str, bool]] = field(default_factory=list)  # characters, and whether shown
    _waiting: deque[tuple[int, Token]] = field(default_factory=deque)
    _length: int = 0

    def push(self, token: Token) -> tuple[str, list[Token]]:
        """The text, and the tokens, that one more token lets out."""
        if self.reason is not None:
            return "", []
        self.count += 1
        self._waiting.append((self._length, token))
        spelt = self.hidden.get(token.id, "")
        shown = token.text.removesuffix(spelt)
        self._held += [(char, False) for char in spelt]
        self._held += [(char, True) for char in shown]
        self._length += len(shown)
        self.reason = reason_of(token)
        text = "".join(char for char, _ in self._held)
        cut, self.stopped_by = self._cut(text)
        if self.stopped_by is not None:
            text, self.reason = text[:cut], "stop"
        keep = 0 if self.reason else self._begins(text)
        return self._give(len(text) - keep), self._let_out(token.finish_reason == "eos")

    def _cut(self, text: str) -> tuple[int, str | None]:
        """The place of the first stop text, and that text; None where there is none."""
        found = ((text.find(stop), stop) for stop in self.stop)
        return min((one for one in found if one[0] >= 0), default=(len(text), None))

    def _begins(self, text: str) -> int:
        """Characters at the end of what is held that may begin a stop text."""
        longest = max(map(len, self.stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop):
                return size
        return 0

    def _give(self, count: int) -> str:
        """Let out the first `count` characters that were held; returns those that are shown."""
        piece = "".join(char for char, shown in self._held[:count] if shown)
        del self._held[:count]
        self.given += len(piece)
        return piece

    def _let_out(self, ended: bool) -> list[Token]:
        """Tokens whose text has begun to be given out; an end-of-text token never is."""
        if ended:
            self._waiting.pop()
        whole = self.reason is not None and self.given == self._length
        out = []
        while self._waiting and (whole or self._waiting[0][0] < self.given):
            start, token = self._waiting.popleft()
            self.starts.append(start)
            out.append(token)
        self.tokens += out
        return out


def chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    """As an answer of a chat has them."""
    return {
        "content": [
            _one(token.id, token.logprob, tokenizer)
            | {"top_logprobs": [_one(i, p, tokenizer) for i, p in token.top_logprobs or ()]}
            for token in tokens
        ],
        "refusal": None,
    }


def _one(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    spelt = tokenizer.spelling(token)
    return {
        "token": spelling(token, tokenizer),
        "logprob": number(logprob),
        "bytes": None if spelt is None else list(spelt),
    }


def logprobs(
    tokens: Sequence[Token], tokenizer: Tokenizer, starts: Sequence[int]
) -> dict[str, Any]:
    """As a completion has them; `starts` says where the text of each token begins."""
    return {
        "tokens": [spelling(token.id, tokenizer) for token in tokens],
        "token_logprobs": [number(token.logprob) for token in tokens],
        "top_logprobs": [by_spelling(token.top_logprobs, tokenizer) for token in tokens],
        "text_offset": list(starts),
    }


def starts(tokens: Sequence[Token]) -> list[int]:
    """The number of characters of the text of `tokens` before each of them."""
    return [0, *accumulate(len(token.text) for token in tokens)][: len(tokens)]


def by_spelling(
    pairs: Sequence[tuple[int, float]] | None, tokenizer: Tokenizer
) -> dict[str, float | None] | None:
    """{spelling: log-probability}, the likeliest first; of equal spellings the likelier one."""
    if pairs is None:
        return None
    out: dict[str, float | None] = {}
    for token, logprob in pairs:
        out.setdefault(spelling(token, tokenizer), number(logprob))
    return out


def spelling(token: int, tokenizer: Tokenizer) -> str:
    """A token as a text; bytes that are no character alone as `bytes:\\xe4`, as OpenAI has them."""
    spelt = tokenizer.spelling(token)
    if spelt is None:
        return f"<{token}>"
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def number(logprob: float) -> float | None:
    """A log-probability in JSON; None for nan: nothing predicts the first token of a prompt."""
    return None if math.isnan(logprob) else max(logprob, LOWEST)


def usage(prompt: int, new: int, cached: int) -> dict[str, Any]:
    """The tokens of a request, as OpenAI counts them.

    Args:
        cached: of the prompt, those that were known, and not read again.
    """
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
