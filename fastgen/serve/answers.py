"""Tokens to OpenAI's answers: texts cut at stop texts, log-probabilities, choices, usage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgen.output import Token
from fastgen.tokenizer import Tokenizer

# Why a row has ended (see `fastgen.Token`), in OpenAI's words.
REASONS = {"length": "length", "time": "length"}


def reason_of(token: Token) -> str | None:
    found = token.finish_reason
    return None if found is None else REASONS.get(found, "stop")


@dataclass
class Text:
    """A row's text as it comes, cut before the first stop text.

    What could be the beginning of one is held back until it is known.

    Attributes:
        given: characters that have been given out.
        tokens: those whose text has begun to be given out.
        count: all tokens, those that were cut off too.
        reason: OpenAI's, once it has ended.
    """

    stop: Sequence[str]
    given: int = 0
    tokens: list[Token] = field(default_factory=list)
    count: int = 0
    reason: str | None = None
    _held: str = ""
    _waiting: list[tuple[int, Token]] = field(default_factory=list)
    _length: int = 0

    def push(self, token: Token) -> tuple[str, list[Token]]:
        """The text, and the tokens, that one more token lets out."""
        if self.reason is not None:
            return "", []
        self.count += 1
        self._waiting.append((self._length, token))
        self._held += token.text
        self._length += len(token.text)
        self.reason = reason_of(token)
        cut = self._cut() if token.finish_reason == "stop_string" else None
        if cut is not None:
            self._held = self._held[:cut]
        keep = 0 if self.reason else self._begins()
        piece = self._held[: len(self._held) - keep]
        self._held = self._held[len(piece) :]
        self.given += len(piece)
        return piece, self._let_out(token.finish_reason == "eos")

    def _cut(self) -> int | None:
        places = [self._held.find(one) for one in self.stop]
        return min((place for place in places if place >= 0), default=None)

    def _begins(self) -> int:
        """Characters at the end of what is held that may begin a stop text."""
        longest = max(map(len, self.stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(one.startswith(self._held[-size:]) for one in self.stop):
                return size
        return 0

    def _let_out(self, ended: bool) -> list[Token]:
        """Tokens whose text has begun to be given out; an end-of-text token never is."""
        if ended:
            self._waiting.pop()
        out = []
        while self._waiting:
            start, token = self._waiting[0]
            if start >= self.given and not (self.reason and not token.text and not self._cut_off):
                break
            out.append(token)
            del self._waiting[0]
        self.tokens += out
        return out

    @property
    def _cut_off(self) -> bool:
        return self.given < self._length


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
        "logprob": finite(logprob),
        "bytes": None if spelt is None else list(spelt),
    }


def logprobs(tokens: Sequence[Token], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """As a completion has them; `offset` is where the first token's text begins."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [spelling(token.id, tokenizer) for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [by_spelling(token.top_logprobs, tokenizer) for token in tokens],
        "text_offset": offsets,
    }


def by_spelling(
    pairs: Sequence[tuple[int, float]] | None, tokenizer: Tokenizer
) -> dict[str, float | None] | None:
    """{spelling: log-probability}, the likeliest first; of equal spellings the likelier one."""
    if pairs is None:
        return None
    out: dict[str, float | None] = {}
    for token, logprob in pairs:
        out.setdefault(spelling(token, tokenizer), finite(logprob))
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


def finite(value: float) -> float | None:
    """JSON has no infinity and no nan: None."""
    return value if abs(value) < float("inf") else None


def usage(prompt: int, new: int) -> dict[str, int]:
    """What a request took, in tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
