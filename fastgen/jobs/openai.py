"""Lines of OpenAI's batch API: read and answered by the service's own code (extra `serve`).

A line is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}; its
answer is {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from pydantic import ValidationError

from fastgen.engine.call import Call
from fastgen.engine.output import Token
from fastgen.engine.prefill import CHUNK
from fastgen.engine.schedule import Job
from fastgen.engine.writer import Writer
from fastgen.generator import CausalLM
from fastgen.jobs.row import LENGTHS, Outcome, seed_of
from fastgen.serve import chats, completions
from fastgen.serve.dialects import given
from fastgen.serve.engine import Stream
from fastgen.serve.refused import Refused
from fastgen.serve.service import Run, Service
from fastgen.serve.wire import ChatCompletion, Completion, Wish

ROUTES: dict[str, tuple[type[Any], Any]] = {
    "/v1/completions": (Completion, completions.answer),
    "/v1/chat/completions": (ChatCompletion, chats.answer),
}
FIELDS = {"custom_id", "method", "url", "body"}
OF_LENGTH = (*LENGTHS, "max_tokens", "max_completion_tokens")


@dataclass
class Held(Run):
    """A request's calls before they are made, and their tokens when they are over.

    Attributes:
        usual: new tokens where nobody says how many, and there is room for so many.
        kept: special tokens that are part of the text.
        came: the tokens of each call.
    """

    prompts: Sequence[list[int]] = field(kw_only=True)
    wish: Wish = field(kw_only=True)
    usual: int = field(kw_only=True)
    kept: frozenset[int] = field(kw_only=True)
    came: Sequence[Sequence[Token]] = ()

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        for place, tokens in enumerate(self.came):
            for token in tokens:
                for text in self.places(place, token):
                    yield text, token


class Offline(Service):
    """The service's door and its answers, without its thread.

    Args:
        knobs: the job's own, for lines that say nothing else.
        seed: the job's. A line without a seed of its own has one made of it.
        created: when the answers were made, as they say (Unix seconds).
    """

    def __init__(self, model: CausalLM, knobs: Mapping[str, Any], seed: int, created: int) -> None:
        super().__init__(model, chunk=CHUNK)
        self.knobs, self.seed, self.created = dict(knobs), seed, created
        self._runner = asyncio.Runner()
        weakref.finalize(self, self._runner.close)

    async def run(
        self,
        prompts: Sequence[list[int]],
        wish: Wish,
        usual: int,
        kept: frozenset[int] = frozenset(),
    ) -> Run:
        """A request whose calls the job makes and runs."""
        texts = self.texts(len(prompts), wish, kept)
        return Held(
            self.engine,
            [],
            asyncio.Queue(),
            texts,
            wish.copies,
            sum(map(len, prompts)),
            prompts=prompts,
            wish=wish,
            usual=usual,
            kept=kept,
            same=wish.same,
        )

    async def _through(self, jobs: Sequence[tuple[Job, Writer | None]]) -> list[tuple[int, Token]]:
        """What becomes of them here and now: a job has no clients who wait."""
        return [
            (place, token)
            for place, (job, writer) in enumerate(jobs)
            for step in job.steps()
            for token in (writer.take(step.events) if writer and step else ())
        ]

    def streams(self, run: Held, name: str) -> list[Stream]:
        """The calls of a request, a prompt each.

        Raises:
            Refused: one that cannot be.
        """
        made = []
        for place, ids in enumerate(run.prompts):
            seed = {"seed": seed_of(self.seed, f"{name} {place}")}
            off = {name: None for name, value in self.knobs.items() if value is None}
            wish = replace(run.wish, knobs=off | seed | run.wish.knobs)
            (call,) = self._calls([ids], wish, run.usual)
            made.append(Stream(call, self.model.writer(call, not run.kept), place, run.inbox))
            run.notes |= dict.fromkeys(call.notes)
        return made

    def line(self, fields: Mapping[str, Any], name: str) -> Line:
        """What a line asks for. One that cannot be has its reason instead."""
        try:
            return Line(self, fields, name, self._runner.run(self._begun(fields)))
        except Refused as error:
            return Line(self, fields, name, error)

    async def _begun(self, fields: Mapping[str, Any]) -> Any:
        if odd := sorted(set(fields) - FIELDS):
            raise Refused(400, f"{odd[0]} is no field of a line: it has {', '.join(FIELDS)}")
        if fields.get("method", "POST") != "POST":
            raise Refused(400, f"method must be POST, got {fields['method']!r}", param="method")
        url, asked = fields.get("url"), fields.get("body")
        if not isinstance(url, str) or url not in ROUTES:
            known = " or ".join(ROUTES)
            raise Refused(400, f"url must be {known}, got {url!r}", param="url")
        if not isinstance(asked, Mapping):
            raise Refused(400, "body must be an object", param="body")
        kind, answer = ROUTES[url]
        try:
            body = kind.model_validate(self._with_knobs(asked))
        except ValidationError as error:
            first = error.errors()[0]
            where = str(first["loc"][0])
            raise Refused(400, f"{where}: {first['msg']}", param=where) from error
        if body.stream:
            raise Refused(400, "stream must be false: a line has one answer", param="stream")
        return await answer(self, body)

    def _with_knobs(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A body with the job's knobs where it has none. Whoever sets a length sets it alone."""
        knobs = dict(self.knobs)
        if any(body.get(name) is not None for name in OF_LENGTH):
            knobs = {name: value for name, value in knobs.items() if name not in LENGTHS}
        return {**knobs, **given(body)}

    def whole(self, answer: Any) -> dict[str, Any]:
        """An answer whose tokens are there."""
        found: dict[str, Any] = self._runner.run(answer.whole())
        return found


@dataclass
class Line:
    """What a line asks for, or why it cannot be.

    Attributes:
        name: what tells the line from others; its seed and its ids depend on it.
        begun: an answer of the service that has begun.
    """

    service: Offline
    fields: Mapping[str, Any]
    name: str
    begun: Any

    @property
    def length(self) -> int:
        """Tokens that its longest prompt may come to."""
        run = getattr(self.begun, "run", None)
        if not isinstance(run, Held):
            return 0
        return max(map(len, run.prompts)) + (run.wish.new or run.usual)

    def calls(self) -> list[tuple[Call, Writer]]:
        """Its calls, a prompt each; none where its prompts are only scored.

        Raises:
            Refused: it cannot be.
        """
        if isinstance(self.begun, Refused):
            raise self.begun
        run = self.begun.run
        if isinstance(run, Held):
            run.streams = self.service.streams(run, self.name)
        return [(stream.call, stream.writer) for stream in run.streams]

    def answer(self, tokens: Sequence[Sequence[Token]], notes: Sequence[str]) -> Outcome:
        """Its answer, of its calls' tokens."""
        run = self.begun.run
        if isinstance(run, Held):
            run.came = tokens
        body = self.service.whole(self.begun)
        kind = body["id"].partition("-")[0]
        body |= {"id": f"{kind}-{self._id('body')}", "created": self.service.created}
        for choice in body["choices"]:
            for place, call in enumerate(choice.get("message", {}).get("tool_calls", ())):
                call["id"] = "call_" + self._id(f"call {choice['index']} {place}")
        return Outcome(self._said(200, body), sum(map(len, tokens)))

    def refused(self, error: Exception) -> Outcome:
        """Its answer where it came to nothing."""
        if isinstance(error, ValueError):
            error = Refused(400, str(error))
        if not isinstance(error, Refused):
            raise error
        return Outcome(self._said(error.status, error.body), bad=" ".join(str(error).split()))

    def _said(self, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
        request = {"status_code": status, "request_id": f"req_{self._id('request')}", "body": body}
        return {
            "id": f"batch_req_{self._id('line')}",
            "custom_id": self.fields.get("custom_id"),
            "response": request,
            "error": None,
        }

    def _id(self, of: str) -> str:
        """24 hexadecimal digits: the same whenever the job is done again."""
        text = f"{self.service.seed} {self.service.created} {self.name} {of}"
        return blake2b(text.encode(), digest_size=12).hexdigest()
