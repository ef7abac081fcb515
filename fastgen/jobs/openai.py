"""Lines of OpenAI's batch API: read and answered by the service's own code (extra `serve`).

A line is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions", "body": {...}}; its
answer is {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, TypeVar

from pydantic import ValidationError

from fastgen.engine.call import Call
from fastgen.engine.output import Token
from fastgen.engine.schedule import Job
from fastgen.engine.writer import Writer
from fastgen.generator import CausalLM
from fastgen.inputs.lengths import LENGTHS
from fastgen.jobs.row import Outcome, seed_of
from fastgen.serve import chats, completions
from fastgen.serve.dialects import given
from fastgen.serve.front import Front
from fastgen.serve.refused import Refused
from fastgen.serve.run import Run
from fastgen.serve.wire import ChatCompletion, Completion, GenerationRequest

ROUTES: dict[str, tuple[type[Any], Any]] = {
    "/v1/completions": (Completion, completions.answer),
    "/v1/chat/completions": (ChatCompletion, chats.answer),
}
FIELDS = {"custom_id", "method", "url", "body"}
OF_LENGTH = (*LENGTHS, "max_tokens", "max_completion_tokens")

Result = TypeVar("Result")


@dataclass
class BatchRun(Run):
    """A request's prompts before its calls are made, and their tokens when they are over.

    Attributes:
        usual: new tokens where nobody says how many, and there is room for them.
        kept: special tokens that are part of the text.
        came: the tokens of each call.
    """

    prompts: Sequence[list[int]] = field(kw_only=True)
    request: GenerationRequest = field(kw_only=True)
    usual: int = field(kw_only=True)
    kept: frozenset[int] = field(kw_only=True)
    came: Sequence[Sequence[Token]] = ()

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        for call, tokens in enumerate(self.came):
            for token in tokens:
                for text in self.texts_of(call, token):
                    yield text, token


def result_of(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine of `Offline`, which does all work at once and waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: Result = end.value
        return result
    coroutine.close()
    raise RuntimeError("a line of a job waited for an event loop, which it does not have")


class Offline(Front):
    """The front of the service and its answers, for calls that a job runs.

    Args:
        knobs: the job's own, for lines that say nothing else.
        seed: the job's. A line without a seed of its own has one made of it.
        created: when the answers were made, as they say (Unix seconds).
    """

    def __init__(self, model: CausalLM, knobs: Mapping[str, Any], seed: int, created: int) -> None:
        super().__init__(model)
        self.knobs, self.seed, self.created = dict(knobs), seed, created

    async def run(
        self,
        prompts: Sequence[list[int]],
        request: GenerationRequest,
        usual: int,
        kept: frozenset[int] = frozenset(),
    ) -> Run:
        """A request whose calls the job makes and runs."""
        return BatchRun(
            self.texts(len(prompts), request, kept),
            request.copies,
            sum(map(len, prompts)),
            prompts=prompts,
            request=request,
            usual=usual,
            kept=kept,
            same=request.same,
        )

    async def through(self, jobs: Sequence[tuple[Job, Writer | None]]) -> list[tuple[int, Token]]:
        """Run jobs here and now: a job has no clients who wait."""
        return [
            (index, token)
            for index, (job, writer) in enumerate(jobs)
            for step in job.steps()
            for token in (writer.take(step.events) if writer and step else ())
        ]

    def calls_of(self, run: BatchRun, name: str) -> list[tuple[Call, Writer]]:
        """The calls of a request, a prompt each, with the writers of their tokens.

        Raises:
            Refused: one that cannot be.
        """
        calls = []
        for index, ids in enumerate(run.prompts):
            seed = {"seed": seed_of(self.seed, f"{name} {index}")}
            off = {knob: None for knob, value in self.knobs.items() if value is None}
            request = replace(run.request, knobs=off | seed | run.request.knobs)
            (call,) = self.calls([ids], request, run.usual)
            calls.append((call, self.model.writer(call, not run.kept)))
            run.notes |= dict.fromkeys(call.notes)
        return calls

    def line(self, fields: Mapping[str, Any], name: str) -> Line:
        """The request of a line. One that cannot be has its reason instead."""
        try:
            return Line(self, fields, name, result_of(self._begun(fields)))
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


@dataclass
class Line:
    """The request of a line, or why it cannot be.

    Attributes:
        name: tells the line from others; its seed and its ids depend on it.
        begun: an answer of the service that has begun.
    """

    front: Offline
    fields: Mapping[str, Any]
    name: str
    begun: Any

    @property
    def length(self) -> int:
        """Tokens that its longest prompt may come to."""
        run = getattr(self.begun, "run", None)
        if not isinstance(run, BatchRun):
            return 0
        return max(map(len, run.prompts)) + (run.request.new or run.usual)

    def calls(self) -> list[tuple[Call, Writer]]:
        """Its calls, a prompt each; none where its prompts are only scored.

        Raises:
            Refused: it cannot be.
        """
        if isinstance(self.begun, Refused):
            raise self.begun
        run = self.begun.run
        return self.front.calls_of(run, self.name) if isinstance(run, BatchRun) else []

    def answer(self, tokens: Sequence[Sequence[Token]], notes: Sequence[str]) -> Outcome:
        """Its answer, of its calls' tokens."""
        run = self.begun.run
        if isinstance(run, BatchRun):
            run.came = tokens
        body: dict[str, Any] = result_of(self.begun.whole())
        kind = body["id"].partition("-")[0]
        body |= {"id": f"{kind}-{self._id('body')}", "created": self.front.created}
        for choice in body["choices"]:
            for index, call in enumerate(choice.get("message", {}).get("tool_calls", ())):
                call["id"] = "call_" + self._id(f"call {choice['index']} {index}")
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
        text = f"{self.front.seed} {self.front.created} {self.name} {of}"
        return blake2b(text.encode(), digest_size=12).hexdigest()
