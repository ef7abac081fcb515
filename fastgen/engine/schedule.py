"""Calls of many people, side by side: they wait in order, join between steps, and leave.

Between two steps of the rows that run there is at most one chunk of a prompt and one step of one
search (beams, guessed tokens), whatever a call holds, so that a stream of tokens never stops for
long. A chunk has `chunk` tokens, of one prompt or of several; no step reads more either, of forced
or guessed tokens, unless there are more rows. Chunks go by turns to the prompts that are nearest
to their end, so that a short question does not wait for a long text, and to those that came first,
so that a long text does not wait for ever. Searches take turns. Texts that are only scored take
turns with each other, and every other chunk where prompts are read too. `plan` decides all that.

Continuous batching is Orca's (Yu et al. 2022, OSDI), chunks between steps are Sarathi's (Agrawal et
al. 2023, arXiv 2308.16369).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np

from fastgen.engine import memory_estimate
from fastgen.engine.batch import Batch, Joining
from fastgen.engine.cache import Cache
from fastgen.engine.call import Call
from fastgen.engine.model import Model
from fastgen.engine.plan import Entry, Planner, Work
from fastgen.engine.prefill import CHUNK, WHOLE, Chunks, cuts_of
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.request import Request
from fastgen.engine.score import Choosing, Scoring
from fastgen.engine.speculative import Assistant
from fastgen.engine.step import Event, Step
from fastgen.system.cpu import memory_bytes

SHARE = 0.25  # of the machine's memory that calls may come to hold
VIRTUAL = 0.5  # of the machine's memory that buffers may be as large as, reached or not
MAX_ROWS = 64
STALL = 0.1  # seconds that a chunk may keep running rows waiting
CHUNKS = (CHUNK, CHUNK // 2, CHUNK // 4)  # tokens, of which the largest is taken that keeps to it
READINGS = 4  # of a chunk, to see how long it takes

Job = Call | Scoring


class Scheduler:
    """Runs many calls of one model: a step is planned, and the plan is run.

    One thread submits, steps and cancels. `check`, `waiting`, `rows` and `held` may be asked from
    others, such as a service's event loop: they read a number, or what never changes.

    A call's tokens are those that it gets alone: exactly in float32, in int8, in int4 and with int8
    keys up to the rounding that depends on what is read together (docs/precisions.md). Its error
    is its own.

    Args:
        model: the model of all calls.
        max_bytes: that the calls that run may come to hold together, most of it keys and values
            (see `memory_estimate.of_call`); None for a quarter of the machine's memory. While the
            cache is rearranged, what is held is there twice.
        max_rows: rows that run together, at most.
        chunk: tokens that are read between two steps, and by one, a multiple of 32; None for 256,
            or 128 or 64 if that takes longer than STALL on this machine.
        prefix_cache: where prompts are kept for later ones, unless a call brings a cache of its
            own.
        max_buffers: bytes that the buffers of the cache may be as large as, reached or not (and at
            least `max_bytes`); None for half of the machine's memory.

    Attributes:
        max_bytes, max_rows, chunk: as above, with their defaults.
        stall: seconds that a chunk took when it was measured; None if `chunk` was given.

    Raises:
        ValueError: an argument that cannot be.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_bytes: int | None = None,
        max_rows: int = MAX_ROWS,
        chunk: int | None = None,
        prefix_cache: PrefixCache | None = None,
        max_buffers: int | None = None,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_rows", max_rows), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if chunk is not None and chunk % 32:
            raise ValueError(f"chunk must be a multiple of 32, got {chunk}")
        usual, buffers = memory_shares()
        max_bytes = usual if max_bytes is None else max_bytes
        max_buffers = buffers if max_buffers is None else max_buffers
        self.model, self.max_bytes, self.max_rows = model, max_bytes, max_rows
        self.prefix_cache = prefix_cache
        self.stall: float | None = None
        if chunk is None:
            chunk, self.stall = fitting_chunk(model)
        self.chunk = chunk
        self._token = max(1, model.info.cache_bytes)
        max_tokens = max(max_bytes, max_buffers) // self._token
        chunks = Chunks.of(chunk)
        self.planner = Planner(
            max_bytes, max_rows, cuts_of(model, chunks), max_tokens, margin=WHOLE.margin
        )
        self._batch = Batch(model, chunks)
        self._entries: dict[int, Entry] = {}  # of each job that is not over, by its id
        self._searches: dict[int, Generator[Step]] = {}
        self._scorings: dict[int, Iterator[None]] = {}

    @property
    def idle(self) -> bool:
        """True if nothing runs and nothing waits."""
        return not self._entries

    @property
    def waiting(self) -> int:
        """The number of calls and texts that wait for room."""
        return len(self.planner.waiting)

    @property
    def rows(self) -> int:
        """The rows that run or are being read, those of searches and scored texts included."""
        return self.planner.rows

    @property
    def cache(self) -> Cache:
        """The keys and values of the rows that run or are being read, but for searches'."""
        return self._batch.cache

    @property
    def held(self) -> int:
        """The bytes that the calls that run may come to hold."""
        return self.planner.held

    def check(self, job: Job) -> None:
        """Raise a ValueError if a call can never run: it needs more than there is of something."""
        needed, rows = self._needs(job), _rows(job)
        if needed > self.max_bytes:
            raise ValueError(
                f"this may need {needed:,} bytes of memory, calls have {self.max_bytes:,} here: "
                "a shorter prompt, a lower max_new_tokens, fewer rows or beams need less"
            )
        if rows > self.max_rows:
            raise ValueError(
                f"this has {rows} rows or beams, {self.max_rows} may run here: ask for fewer"
            )

    def submit(self, job: Job) -> None:
        """Let a call, or a text that is to be scored, wait for its turn.

        Raises:
            ValueError: see `check`. It could wait for ever, so it is not taken on trust.
        """
        self.check(job)
        if isinstance(job, Call) and job.request.prefix_cache is None:
            job.request.prefix_cache = self.prefix_cache
        elif isinstance(job, Choosing) and job.prefix_cache is None:
            job.prefix_cache = self.prefix_cache
        entry = self._entries[id(job)] = _entry(job, self._needs(job))
        self.planner.waiting.append(entry)

    def cancel(self, job: Job) -> None:
        """Let a call leave before the next step, wherever it is; its rows end as "cancelled"."""
        if isinstance(job, Scoring):
            job.end()
        else:
            job.request.abandon("cancelled")
            self._batch.leave()
        self._forget(job)

    def step(self) -> list[tuple[Job, list[Event]]]:
        """Read a chunk, advance every row that runs by a token, and one search by a step.

        Returns:
            The calls that got tokens or have ended, with their new tokens, row by row. A call has
            ended when its `request` is done; if by an error, that is `request.error`. A text that
            has been scored comes without tokens; its numbers, or its error, are its own.
        """
        plan = self.planner.plan(self._batch.joining)
        for entry in plan.enter:
            self._enter(entry)
        out: list[tuple[Job, list[Event]]] = []
        if plan.score is not None:
            self._score(plan.score)
        elif plan.begin:
            self._read(self._begin(plan.begin))
        else:
            self._read(plan.read)
        out += self._by_call(self._advance())
        if plan.search is not None:
            out += self._search(plan.search)
        if plan.score is not None and plan.score.job.done:
            out.append((plan.score.job, []))
        for job, _ in out:
            if job.done:
                self._forget(job)
        self._tidy()
        return out

    def close(self) -> None:
        """Cancel everything, and give the memory back."""
        for entry in [*self._entries.values()]:
            self.cancel(entry.job)
        self._batch.close()

    def _needs(self, job: Job) -> int:
        """The bytes that it may come to hold."""
        return job.bytes if isinstance(job, Scoring) else bytes_of(job, self.chunk)

    def _enter(self, entry: Entry) -> None:
        """Let a job begin its own steps, if it has any."""
        if entry.work is Work.SEARCH:
            entry.job.request.started = time.perf_counter()
            self._searches[id(entry)] = entry.job.steps(Chunks.of(self.chunk))
        elif entry.work is Work.SCORING:
            self._scorings[id(entry)] = entry.job.steps(self.chunk)

    def _score(self, entry: Entry) -> None:
        """Score a chunk of a text."""
        try:
            next(self._scorings[id(entry)], None)
        except Exception as error:  # logits without a number, or no memory
            entry.job.end(error)

    def _begin(self, entries: Sequence[Entry]) -> Joining | None:
        """Begin to read the prompts of calls, together."""
        requests = [entry.job.request for entry in entries]
        for request in requests:
            request.started = time.perf_counter()
        try:
            self._make_room(sum(entry.rows for entry in entries))
            return self._batch.begin(requests)
        except Exception as error:  # no memory
            _fail(requests, error)
            return None

    def _read(self, joining: Joining | None) -> None:
        """Read one chunk of prompts, if there are any."""
        if joining is None:
            return
        try:
            self._batch.read(joining)
        except Exception as error:  # a damaged prefix cache, or no memory
            _fail((row.request for rows in joining.rows for row in rows), error)
            self._batch.leave()

    def _make_room(self, new: int) -> None:
        """Let the cache have slots for `new` rows, and more, so that it seldom grows.

        The buffers are as long as the longest row. What is not reached takes no memory, but the
        system does not promise it without bounds: then they are made anew, no larger than needed.
        """
        cache, longest = self.cache, self.planner.longest()
        needed = self._batch.end + new
        rows = max(cache.rows, 1 << (needed - 1).bit_length())
        if rows * max(longest, cache.capacity) <= self.planner.max_tokens:
            cache.reserve(rows, longest)
        else:
            cache.renew(needed, longest)

    def _advance(self) -> list[Event]:
        """A step of the rows that run."""
        if not self._batch.rows:
            return []
        try:
            return self._batch.step()
        except Exception as error:  # of the model itself: nobody knows what the rows hold
            _fail((row.request for row in self._batch.rows), error)
            self._batch.leave()
            return []

    def _by_call(self, events: Sequence[Event]) -> list[tuple[Call, list[Event]]]:
        """The new tokens of each call that has any, and the calls that have ended."""
        mine: dict[int, list[Event]] = {}
        for event in events:
            mine.setdefault(id(event.row.request), []).append(event)
        calls = [(entry.job, mine.get(id(entry.job.request), [])) for entry in self.planner.begun]
        return [(call, got) for call, got in calls if got or call.done]

    def _search(self, entry: Entry) -> list[tuple[Call, list[Event]]]:
        """A step of a search; beams' tokens come when it is over."""
        call: Call = entry.job
        events: list[Event] = []
        try:
            step = next(self._searches[id(entry)], None)  # None: cancelled before it came
            events += step.events if step else ()
        except Exception as error:
            call.request.fail(error)
        return [(call, events)] if events or call.done else []

    def _forget(self, job: Job) -> None:
        """Free the room of a job that is over."""
        entry = self._entries.pop(id(job), None)
        if entry is None:
            return
        self.planner.leave(entry)
        self._scorings.pop(id(entry), None)
        if (steps := self._searches.pop(id(entry), None)) is not None:
            steps.close()

    def _tidy(self) -> None:
        """Shrink the cache if what rows have reached of it outgrew `max_bytes`."""
        cache = self.cache
        if cache.reached() * self._token > self.max_bytes:
            cache.renew(max(1, self._batch.end), self.planner.longest())


def _fail(requests: Iterable[Request], error: Exception) -> None:
    for request in requests:
        request.fail(error)


def _rows(job: Job) -> int:
    """The rows, or beams, that it has."""
    if isinstance(job, Scoring):
        return 1
    request = job.request
    return max(len(request.rows), len(request.prompts) * request.params.num_beams)


def _entry(job: Job, needed: int) -> Entry:
    """A job for the plan; it may come to hold `needed` bytes."""
    if isinstance(job, Scoring):
        return Entry(job, Work.SCORING, 1, needed)
    request = job.request
    return Entry(
        job,
        Work.SEARCH if job.searches else Work.ROWS,
        _rows(job),
        needed,
        prompts=len(request.prompts),
        prompt=max(map(len, request.prompts)),
        longest=request.max_length,
        read_with=request.prefix_cache,
    )


def bytes_of(call: Call, chunk: int = CHUNK) -> int:
    """The bytes that a call may come to hold."""
    request: Request = call.request
    helper = call.draft.model.info if isinstance(call.draft, Assistant) else None
    prompts, width = request.padded.shape
    parts = memory_estimate.of_call(
        call.model.info, request.params, prompts, width, request.max_length, helper, chunk
    )
    return sum(parts.values())


def memory_shares(models: int = 1, max_bytes: int | None = None) -> tuple[int, int]:
    """`max_bytes` and `max_buffers` of each of several schedulers, alike.

    Args:
        max_bytes: that the calls of all may come to hold; None for SHARE of the machine's memory.
    """
    there = memory_bytes() or 4e9
    together = int(SHARE * there) if max_bytes is None else max_bytes
    return together // models, int(VIRTUAL * there) // models


def fitting_chunk(model: Model, stall: float = STALL) -> tuple[int, float]:
    """Tokens of a chunk, and the seconds it takes.

    It is the largest of CHUNKS that takes `stall` seconds at most, or the last. The time is the
    shortest of READINGS: the first one touches the memory, and of a machine that is busy at the
    moment the others say little.
    """
    most = model.info.max_length or CHUNK
    seconds = 0.0
    for chunk in CHUNKS:
        ids = np.zeros(min(chunk, most), np.int64)
        seconds = float("inf")
        for _ in range(READINGS):
            cache = model.new_cache(1, chunk, reads_prompts=True)
            start = time.perf_counter()
            nothing = np.zeros((1, 0), np.int64)
            model.forward([ids], cache, 0, nothing, model.reads_as_many(len(ids)))
            seconds = min(seconds, time.perf_counter() - start)
        if seconds <= stall:
            break
    return chunk, seconds
