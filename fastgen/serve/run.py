"""The texts of one request while they are generated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastgen.engine.output import Token
from fastgen.serve.answers import GeneratedText, usage


@dataclass
class Run:
    """The texts of one request; without any, its prompts are only scored.

    Attributes:
        texts: of each row of each call, in order.
        copies: sequences of each prompt.
        prompt_tokens: of all prompts, each counted once.
        notes: the parts of a form that its texts are not held to; in order, each once.
        same: whether the texts of a call are copies of its only row.
        first: when its first token came (`time.perf_counter`); None before.
        behind: whether there are more tokens at hand than the one that `tokens` gave last.
    """

    texts: list[GeneratedText]
    copies: int
    prompt_tokens: int
    notes: dict[str, None] = field(default_factory=dict, init=False)
    same: bool = field(default=False, kw_only=True)
    first: float | None = field(default=None, init=False)
    behind: bool = field(default=False, init=False)

    @property
    def new_tokens(self) -> int:
        return sum(text.count for text in self.texts)

    @property
    def cached_tokens(self) -> int:
        """Tokens of its prompts that were known, and not read again."""
        return 0

    def usage(self) -> dict[str, Any]:
        """The tokens so far, as OpenAI counts them."""
        return usage(self.prompt_tokens, self.new_tokens, self.cached_tokens)

    def warnings(self) -> dict[str, list[str]]:
        """The notes as a field of an answer; of a stream in its first piece only."""
        notes, self.notes = [*self.notes], {}
        return {"warnings": notes} if notes else {}

    def texts_of(self, call: int, token: Token) -> Sequence[int]:
        """The texts that a token of a call belongs to."""
        first = call * self.copies
        return range(first, first + self.copies) if self.same else (first + token.row,)

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        """Each new token, and the text that it belongs to.

        Raises:
            Refused: no token can be chosen; the service is stopped.
        """
        none: list[tuple[int, Token]] = []
        for pair in none:
            yield pair

    def cancel(self) -> None:
        """Let calls that are not over leave."""
