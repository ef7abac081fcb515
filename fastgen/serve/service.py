"""The service of one model: calls of requests are run by the engine, and cancelled."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastgen.engine.call import Call
from fastgen.engine.output import Token
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.schedule import Job
from fastgen.engine.writer import Writer
from fastgen.generator import CausalLM
from fastgen.sampling import constraint, trial
from fastgen.serve.engine import Engine, Progress, RunningCall
from fastgen.serve.front import Front, Made
from fastgen.serve.limits import RequestLimits
from fastgen.serve.metrics import ModelMetrics
from fastgen.serve.refused import refusal
from fastgen.serve.run import Run
from fastgen.serve.wire import GenerationRequest


@dataclass
class LiveRun(Run):
    """The calls of one request in the engine."""

    engine: Engine = field(kw_only=True)
    streams: list[RunningCall] = field(kw_only=True)
    inbox: asyncio.Queue[Progress] = field(kw_only=True)

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        running = len(self.streams)
        while running:
            call, tokens, done, error = await self.inbox.get()
            if tokens and self.first is None:
                self.first = time.perf_counter()
            for later, token in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
                self.behind = later > 0 or not self.inbox.empty()
                for text in self.texts_of(call.index, token):
                    yield text, token
            running -= done
            if error is not None:
                raise refusal(error)

    @property
    def cached_tokens(self) -> int:
        calls = (stream.call for stream in self.streams)
        return sum(call.request.cached_tokens for call in calls if isinstance(call, Call))

    def cancel(self) -> None:
        for stream in self.streams:
            self.engine.cancel(stream)


class Service(Front):
    """One model, its engine and its counts.

    Args:
        grammars: the most that a new grammar may take until it is compiled.
        metrics: its counts, and what is kept of prompts; None for new ones.
        settings: see `Front` and `Engine`.

    Raises:
        ValueError: a setting that cannot be.
    """

    def __init__(
        self,
        model: CausalLM,
        name: str | None = None,
        limits: RequestLimits | None = None,
        grammars: trial.Limits | None = None,
        *,
        metrics: ModelMetrics | None = None,
        reasoning: str = "auto",
        plain_tools: bool = False,
        free_calls: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(
            model,
            name,
            limits,
            reasoning=reasoning,
            plain_tools=plain_tools,
            free_calls=free_calls,
        )
        self._queues = {
            kind: ThreadPoolExecutor(1, f"fastgen-{kind}") for kind in ("tokens", "grammars")
        }
        if grammars is not None and model.has_tokenizer:
            constraint.of(model.tokenizer).limits = grammars
        metrics = metrics or ModelMetrics(PrefixCache())
        self.engine = Engine(model, metrics.prefix_cache, watch=metrics.step, **settings)
        metrics.watch(self.engine)

    async def start(self) -> None:
        """Start the engine."""
        await asyncio.to_thread(getattr, self, "shown")  # templates take their time
        self.engine.start()

    async def close(self, grace: float) -> None:
        """End when all is done, or after `grace` seconds with what is not."""
        await self.engine.drain(grace)
        for queue in self._queues.values():
            queue.shutdown(wait=False)

    async def aside(self, work: Callable[[], Made], queue: str | None = None) -> Made:
        """Do work beside the event loop, and return its result."""
        if queue is None:
            return await asyncio.to_thread(work)
        return await asyncio.get_running_loop().run_in_executor(self._queues[queue], work)

    async def run(
        self,
        prompts: Sequence[list[int]],
        request: GenerationRequest,
        usual: int,
        kept: frozenset[int] = frozenset(),
    ) -> Run:
        await self.compiled(request.knobs)
        prompts, request = await self.healed(prompts, request)
        jobs = await self.aside(partial(self.written, prompts, request, usual, kept))
        inbox: asyncio.Queue[Progress] = asyncio.Queue()
        run = LiveRun(
            self.texts(len(jobs), request, kept),
            request.copies,
            sum(map(len, prompts)),
            same=request.same,
            engine=self.engine,
            streams=self._submitted(jobs, inbox),
            inbox=inbox,
        )
        run.notes = dict.fromkeys(note for job, _ in jobs for note in getattr(job, "notes", ()))
        return run

    async def through(self, jobs: Sequence[tuple[Job, Writer | None]]) -> list[tuple[int, Token]]:
        """Run jobs to their end; if whoever waits for them leaves, so do they."""
        inbox: asyncio.Queue[Progress] = asyncio.Queue()
        streams = self._submitted(jobs, inbox)
        run = LiveRun([], 1, 0, engine=self.engine, streams=streams, inbox=inbox)
        try:
            return [progress async for progress in run.tokens()]
        finally:
            run.cancel()

    def _submitted(
        self, jobs: Sequence[tuple[Job, Writer | None]], inbox: asyncio.Queue[Progress]
    ) -> list[RunningCall]:
        """Submit all jobs of one request, or none of them."""
        streams: list[RunningCall] = []
        try:
            for index, (job, writer) in enumerate(jobs):
                streams.append(self.engine.submit(job, writer, index, inbox))
        except Exception as error:
            for stream in streams:
                self.engine.cancel(stream)
            raise refusal(error) from error
        return streams
