"""An answer that has begun: OpenAI's frame around its choices, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastgen.serve.answers import usage
from fastgen.serve.front import Front
from fastgen.serve.run import Run
from fastgen.serve.wire import GenerationRequest, StreamOptions


@dataclass
class Answer(ABC):
    """An answer that has begun.

    Attributes:
        events: gives the chunks of a stream; None where the answer is wanted whole.
    """

    front: Front
    run: Run
    request: GenerationRequest
    options: StreamOptions
    streamed: bool

    ID: ClassVar[str]  # its id begins with it

    def __post_init__(self) -> None:
        self.about = {
            "id": f"{self.ID}-{secrets.token_hex(12)}",
            "object": self.kind,
            "created": int(time.time()),
            "model": self.front.name,
        }
        self.events = self.chunks if self.streamed else None

    @property
    @abstractmethod
    def kind(self) -> str:
        """OpenAI's name of this kind of object."""

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """The answer, when all is done."""

    @abstractmethod
    def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """The chunks of a stream; None for a token that says nothing yet."""

    @property
    def size(self) -> int:
        """Tokens of the answer so far, each with its alternatives."""
        return self.run.new_tokens * (1 + (self.request.alternatives or 0))

    def with_choices(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The whole answer of these choices."""
        total = usage(self.run.prompt_tokens, self.run.new_tokens)
        return {**self.about, "choices": choices, "usage": total, **self.run.warnings()}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a stream."""
        return {
            **self.about,
            "choices": [choice],
            **self.run.so_far(self.options),
            **self.run.warnings(),
        }

    def last_chunks(self) -> list[dict[str, Any]]:
        """The chunk with the usage, which ends a stream that asked for it."""
        if not self.options.include_usage:
            return []
        total = usage(self.run.prompt_tokens, self.run.new_tokens)
        return [{**self.about, "choices": [], "usage": total}]
