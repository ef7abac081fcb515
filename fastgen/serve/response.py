"""An answer that has begun: what every API's has, and OpenAI's frame around choices."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastgen.serve.front import Front
from fastgen.serve.refused import Refused
from fastgen.serve.rendered import event
from fastgen.serve.run import Run
from fastgen.serve.wire import GenerationRequest, StreamOptions

Chunks = AsyncIterator[dict[str, Any] | None]


@dataclass
class BegunAnswer(ABC):
    """An answer that has begun, of any API."""

    front: Front
    run: Run
    request: GenerationRequest
    streamed: bool

    LAST: ClassVar[bytes] = b"data: [DONE]\n\n"  # what ends a stream

    @property
    def events(self) -> Callable[[], Chunks] | None:
        """Gives the chunks of a stream; None where the answer is wanted whole."""
        return self.chunks if self.streamed else None

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """The answer, when all is done."""

    @abstractmethod
    def chunks(self) -> Chunks:
        """The chunks of a stream; None for a token that says nothing yet."""

    def sent(self, chunk: dict[str, Any]) -> bytes:
        """A chunk as a server-sent event."""
        return event(chunk)

    def failed(self, error: Refused) -> dict[str, Any]:
        """The chunk that tells what has ended a stream."""
        return error.body

    @property
    def size(self) -> int:
        """Tokens of the answer so far, each with its alternatives."""
        return self.run.new_tokens * (1 + (self.request.alternatives or 0))


@dataclass
class Answer(BegunAnswer):
    """An answer with choices that has begun."""

    options: StreamOptions

    ID: ClassVar[str]  # its id begins with it

    def __post_init__(self) -> None:
        self.about = {
            "id": f"{self.ID}-{secrets.token_hex(12)}",
            "object": self.kind,
            "created": int(time.time()),
            "model": self.front.name,
        }

    @property
    @abstractmethod
    def kind(self) -> str:
        """OpenAI's name of this kind of object."""

    def usage(self) -> dict[str, Any]:
        """The tokens so far, as OpenAI counts them."""
        return self.run.usage()

    def with_choices(self, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The whole answer of these choices."""
        return {**self.about, "choices": choices, "usage": self.usage(), **self.run.warnings()}

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A chunk of a stream; its usage is null, unless each chunk is to have it."""
        made = {**self.about, "choices": [choice]}
        if self.options.include_usage:
            made["usage"] = self.usage() if self.options.continuous_usage_stats else None
        return {**made, **self.run.warnings()}

    def last_chunks(self) -> list[dict[str, Any]]:
        """The chunk with the usage, which ends a stream that asked for it."""
        if not self.options.include_usage:
            return []
        return [{**self.about, "choices": [], "usage": self.usage()}]
