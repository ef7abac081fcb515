"""The one thread that runs the model: calls reach it, and their tokens leave it, through here.

On its side a `Scheduler` steps as long as anything runs. On the other side is an event loop with
the clients: it is told of a step's tokens all at once, and is never waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastgen.engine.output import Token
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.schedule import Job, Scheduler
from fastgen.engine.writer import Writer
from fastgen.generator import CausalLM
from fastgen.serve.refused import Full, Stopping

QUEUE = 256  # calls that may wait


class Progress(NamedTuple):
    """A step of one call: its new tokens, whether it is over, and the error that ended it."""

    call: RunningCall
    tokens: list[Token]
    done: bool
    error: Exception | None = None


@dataclass(eq=False)
class RunningCall:
    """One call, or one text that is scored, on its way, as the event loop sees it.

    Attributes:
        writer: makes tokens of its events; None for a text, which has none.
        index: its number among the calls of its request.
        inbox: takes its steps, with those of the other calls of its request.
        begun: the time of its submission (`time.perf_counter`).
        done: whether it is over.
        error: the error that ended it, if any.
    """

    call: Job
    writer: Writer | None
    index: int
    inbox: asyncio.Queue[Progress]
    begun: float = field(default_factory=time.perf_counter)
    done: bool = False
    error: Exception | None = None

    def tell(self, progress: Progress) -> None:
        """Pass on a step; in the event loop."""
        if not self.done:
            self.done, self.error = progress.done, progress.error
            self.inbox.put_nowait(progress)


class Engine:
    """Runs calls of one model in a thread of its own.

    Args:
        model: whose calls they are.
        prefix_cache: what is kept of their prompts.
        queue: calls that may wait until there is room.
        max_bytes, max_rows, chunk, max_buffers: see `Scheduler`.
        watch: told of each step, in the event loop.

    Raises:
        ValueError: a setting that cannot be.
    """

    def __init__(
        self,
        model: CausalLM,
        prefix_cache: PrefixCache,
        *,
        queue: int = QUEUE,
        max_bytes: int | None = None,
        max_rows: int | None = None,
        chunk: int | None = None,
        max_buffers: int | None = None,
        watch: Callable[[list[Progress]], None] = lambda steps: None,
    ) -> None:
        if queue < 1:
            raise ValueError(f"queue must be positive, got {queue}")
        rows = {} if max_rows is None else {"max_rows": max_rows}
        self.prefix_cache = prefix_cache
        self.scheduler = Scheduler(
            model.model,
            max_bytes=max_bytes,
            chunk=chunk,
            prefix_cache=prefix_cache,
            max_buffers=max_buffers,
            **rows,
        )
        self.queue = queue
        self._watch = watch
        self._streams: dict[int, RunningCall] = {}  # by the id of the call
        self._inbox: deque[tuple[str, RunningCall]] = deque()
        self._changed = threading.Condition()
        self._refusing = self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="fastgen-engine", daemon=True)

    # --- in the event loop -----------------------------------------------------------------------

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def serving(self) -> bool:
        """True while new calls are taken."""
        return self._thread.is_alive() and not self._refusing

    @property
    def waiting(self) -> int:
        """The calls that wait for room, or to be looked at."""
        return self.scheduler.waiting + sum(kind == "submit" for kind, _ in list(self._inbox))

    @property
    def running(self) -> int:
        """The calls that are not over, waiting ones included."""
        return len(self._streams)

    def submit(
        self, call: Job, writer: Writer | None, index: int, inbox: asyncio.Queue[Progress]
    ) -> RunningCall:
        """Let a call wait for its turn; its tokens come to `inbox`.

        Raises:
            Full, Stopping: not now.
            ValueError: it can never run.
        """
        if self._refusing:
            raise Stopping
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")
        if self.waiting >= self.queue:
            raise Full
        self.scheduler.check(call)
        stream = RunningCall(call, writer, index, inbox)
        self._streams[id(call)] = stream
        self._post("submit", stream)
        return stream

    def cancel(self, stream: RunningCall) -> None:
        """Let a call leave before the next step."""
        if not stream.done:
            self._post("cancel", stream)

    async def drain(self, grace: float) -> None:
        """Take nothing new; end when all is done, or after `grace` seconds with what is not."""
        self._refusing = True
        until = time.monotonic() + grace
        while self._streams and time.monotonic() < until and self._thread.is_alive():
            await asyncio.sleep(0.02)
        with self._changed:
            self._ended = True
            self._changed.notify()
        while self._thread.is_alive():
            await asyncio.sleep(0.02)

    def _post(self, kind: str, stream: RunningCall) -> None:
        with self._changed:
            self._inbox.append((kind, stream))
            self._changed.notify()

    def _tell(self, steps: list[Progress]) -> None:
        for progress in steps:
            if progress.done:
                self._streams.pop(id(progress.call.call), None)
            progress.call.tell(progress)
        self._watch(steps)

    # --- in the engine's thread ------------------------------------------------------------------

    def _run(self) -> None:
        streams: dict[int, RunningCall] = {}
        try:
            while self._look(streams):
                steps = []
                for call, events in self.scheduler.step():
                    stream, done = streams[id(call)], call.done
                    if done:
                        del streams[id(call)]
                    tokens = stream.writer.take(events) if stream.writer else []
                    steps.append(Progress(stream, tokens, done, call.error))
                if steps:
                    self._report(steps)
            over: Exception = Stopping()
        except BaseException as error:
            over = RuntimeError(f"the engine has failed: {error!r}")
            raise
        finally:
            self._refusing = True
            self.scheduler.close()
            self._report([Progress(stream, [], True, over) for stream in streams.values()])

    def _report(self, steps: list[Progress]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nobody to be told
            self._loop.call_soon_threadsafe(self._tell, steps)

    def _look(self, streams: dict[int, RunningCall]) -> bool:
        """Take in what came, waiting where nothing runs; False when all is over."""
        with self._changed:
            while not self._inbox and self.scheduler.idle and not self._ended:
                self._changed.wait()
            if self._ended:
                return False
            came, self._inbox = self._inbox, deque()
        for kind, stream in came:
            if kind == "submit":
                streams[id(stream.call)] = stream
                self.scheduler.submit(stream.call)
            elif streams.pop(id(stream.call), None):
                self.scheduler.cancel(stream.call)
                self._report([Progress(stream, [], True)])
        return True
