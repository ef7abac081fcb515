"""Calls of many people, side by side: they wait in order, join between steps, and leave.

Between two steps of the rows that run there is at most one chunk of a prompt and one step of one
search (beams, guessed tokens), whatever a call holds, so that nobody who reads along waits for
long. A chunk has `chunk` tokens, of one prompt or of several; no step reads more either, of what is
certain or guessed, unless there are more rows. Chunks go by turns to the prompts that are nearest
to their end, so that a short question does not wait for a long text, and to those that came first,
so that a long text does not wait for ever. Searches take turns. Texts that are only scored take
turns with each other, and every other chunk where prompts are read too.

Continuous batching is Orca's (Yu et al. 2022, OSDI), chunks between steps are Sarathi's (Agrawal et
al. 2023, arXiv 2308.16369).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np

from fastgen.engine import memory_estimate
from fastgen.engine.batch import Batch, Joining
from fastgen.engine.call import Call
from fastgen.engine.model import Model
from fastgen.engine.prefill import CHUNK
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.request import Request
from fastgen.engine.score import Scoring
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
    """Runs many calls of one model. One thread owns it.

    A call's tokens are those that it gets alone: exactly in float32, in int8, in int4 and with int8
    keys up to the rounding that depends on what is read together (docs/precisions.md). Its error
    is its own.

    Args:
        model: what all of them run on.
        max_bytes: that the calls that run may come to hold together (see `bounds.of_call`), most
            of it keys and values; None for a quarter of the machine's memory. While the cache is
            rearranged, what is held is there twice.
        max_rows: rows that run together, at most.
        chunk: tokens that are read between two steps, and by one, a multiple of 32; None for 256,
            or 128 or 64 if that takes longer than STALL on this machine.
        prefix_cache: where prompts are kept for later ones, unless a call brings a cache of its
            own.

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
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_rows", max_rows), ("chunk", chunk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if chunk is not None and chunk % 32:
            raise ValueError(f"chunk must be a multiple of 32, got {chunk}")
        if max_bytes is None:
            max_bytes = int(SHARE * (memory_bytes() or 4e9))
        self.model, self.max_bytes, self.max_rows = model, max_bytes, max_rows
        self.prefix_cache = prefix_cache
        self.stall: float | None = None
        if chunk is None:
            chunk, self.stall = fitting_chunk(model)
        self.chunk = chunk
        self._token = max(1, model.info.cache_bytes)
        self._most = max(max_bytes, int(VIRTUAL * (memory_bytes() or 4e9)))
        self._batch = Batch(model, chunk)
        self._waiting: deque[Job] = deque()
        self._bytes: dict[int, int] = {}  # of each call that was let in, by id
        self._unread: list[Call] = []  # let in, but nothing of their prompts has been read
        self._running: list[Call] = []
        self._searches: deque[tuple[Call, Generator[Step]]] = deque()
        self._scorings: deque[tuple[Scoring, Iterator[None]]] = deque()
        self._turn, self._scored_last = 0, False

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not (self._waiting or self._bytes)

    @property
    def waiting(self) -> int:
        """The calls and texts that wait for room."""
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """The rows that run or are being read, those of searches and scored texts included."""
        searching = [call for call, _ in self._searches]
        calls = (*self._unread, *self._running, *searching)
        return sum(_rows(call) for call in calls) + len(self._scorings)

    @property
    def held(self) -> int:
        """The bytes that the calls that run may come to hold."""
        return sum(self._bytes.values())

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
            ValueError: see `check`.
        """
        self.check(job)
        if isinstance(job, Call) and job.request.prefix_cache is None:
            job.request.prefix_cache = self.prefix_cache
        self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Let a call leave before the next step, wherever it is; its rows end as "cancelled"."""
        self._waiting = deque(one for one in self._waiting if one is not job)
        if isinstance(job, Scoring):
            job.end()
            self._scorings = deque(one for one in self._scorings if one[0] is not job)
            self._bytes.pop(id(job), None)
        else:
            self._cancel(job)

    def _cancel(self, call: Call) -> None:
        call.request.abandon("cancelled")
        for one, steps in list(self._searches):
            if one is call:
                self._searches.remove((one, steps))
                steps.close()
        self._batch.leave()
        self._forget([call])

    def step(self) -> list[tuple[Job, list[Event]]]:
        """Read a chunk, advance every row that runs by a token, and one search by a step.

        Returns:
            The calls that got tokens or have ended, with their new tokens, row by row. A call has
            ended when its `request` is done; if by an error, that is `request.error`. A text that
            has been scored comes without tokens; what was found, or its error, is its own.
        """
        self._let_in()
        scored = self._read()
        out = self._by_call(self._advance())
        searched = self._search()
        if searched is not None:
            out.append(searched)
        self._forget([call for call, _ in out if call.request.done])
        self._tidy()
        return [*out, *((scoring, []) for scoring in scored)]

    def close(self) -> None:
        """Cancel everything, and give the memory back."""
        for call in [
            *self._waiting,
            *self._unread,
            *self._running,
            *(c for c, _ in self._searches),
            *(c for c, _ in self._scorings),
        ]:
            self.cancel(call)
        self._batch.close()

    def _let_in(self) -> None:
        """Let in what comes next, as long as there is room; nobody overtakes."""
        while self._waiting:
            call = self._waiting[0]
            needed, rows = self._needs(call), self.rows + _rows(call)
            if self.held + needed > self.max_bytes or rows > self.max_rows:
                return
            if isinstance(call, Call) and not self._has_buffers(call, rows):
                return
            self._waiting.popleft()
            self._bytes[id(call)] = needed
            if isinstance(call, Scoring):
                self._scorings.append((call, call.steps(self.chunk)))
            elif call.searches:
                self._searches.append((call, call.steps(self.chunk)))
            else:
                self._unread.append(call)

    def _needs(self, job: Job) -> int:
        """The bytes that it may come to hold."""
        return job.bytes if isinstance(job, Scoring) else bytes_of(job, self.chunk)

    def _has_buffers(self, call: Call, rows: int) -> bool:
        """Whether the cache may be so large that `rows` fit, the call's own being the last."""
        needed = rows * self._longest([call]) * self._token
        return rows == _rows(call) or needed <= self._most

    def _longest(self, calls: Sequence[Call]) -> int:
        """Tokens of the longest row that runs, or that these calls may come to have."""
        every = (*calls, *self._unread, *self._running)
        return max((call.request.max_length for call in every), default=0) + CHUNK

    def _read(self) -> list[Scoring]:
        """Read one chunk, of some prompt or of a text that is scored, which may be over by it."""
        others = self._unread or self._batch.joining
        if self._scorings and not (others and self._scored_last):
            self._scored_last = True
            return self._score()
        self._scored_last = False
        self._read_prompt()
        return []

    def _score(self) -> list[Scoring]:
        """Score a chunk of the text whose turn it is; it comes back where it is over."""
        scoring, steps = self._scorings.popleft()
        try:
            next(steps, None)
        except Exception as error:  # logits without a number, or no memory
            scoring.end(error)
        if not scoring.done:
            self._scorings.append((scoring, steps))
            return []
        del self._bytes[id(scoring)]
        return [scoring]

    def _read_prompt(self) -> None:
        """Read one chunk of some prompt."""
        self._turn += 1
        joining = self._oldest() if self._turn % 2 else self._nearest()
        if joining is None:
            return
        try:
            self._batch.read(joining)
        except Exception as error:  # a damaged prefix cache, or no memory
            _fail((row.request for rows in joining.rows for row in rows), error)
            self._batch.leave()

    def _oldest(self) -> Joining | None:
        """What has been let in first, and what is read together with it."""
        return self._batch.joining[0] if self._batch.joining else self._begin(self._unread)

    def _nearest(self) -> Joining | None:
        """What is nearest to its end: short prompts together, or the rest of a longer one."""
        short = sorted(self._unread, key=_prompt)
        begun = min(self._batch.joining, key=lambda one: one.left, default=None)
        if begun and (not short or begun.left <= _prompt(short[0])):
            return begun
        return self._begin(short)

    def _begin(self, calls: Sequence[Call]) -> Joining | None:
        """Begin with the first of these calls, and with others that fit into its only chunk."""
        if not calls:
            return None
        count = 1
        while count < len(calls) and self._fit(calls[: count + 1]):
            count += 1
        begun = list(calls[:count])
        self._unread = [call for call in self._unread if call not in begun]
        self._running += begun
        requests = [call.request for call in begun]
        try:
            self._make_room(begun)
            return self._batch.begin(requests)
        except Exception as error:  # no memory
            _fail(requests, error)
            return None

    def _fit(self, calls: Sequence[Call]) -> bool:
        """Whether the prompts of these calls are read in one chunk together."""
        prompts = sum(len(call.request.prompts) for call in calls)
        same = {id(call.request.prefix_cache) for call in calls}
        return prompts * max(map(_prompt, calls)) <= self.chunk and len(same) == 1

    def _make_room(self, calls: Sequence[Call]) -> None:
        """Let the cache have slots for these calls, and more, so that it seldom grows.

        The buffers are as long as the longest row. What is not reached takes no memory, but the
        system does not promise it without bounds: then they are made anew, no larger than needed.
        """
        cache, longest = self._batch.cache, self._longest(calls)
        needed = self._batch.end + sum(map(_rows, calls))
        rows = max(cache.rows, 1 << (needed - 1).bit_length())
        if rows * max(longest, cache.capacity) * self._token <= self._most:
            cache.reserve(rows, longest)
        else:
            cache.renew(needed, longest)

    def _search(self) -> tuple[Call, list[Event]] | None:
        """A step of the search whose turn it is; beams' tokens come when it is over."""
        if not self._searches:
            return None
        call, steps = self._searches.popleft()
        events: list[Event] = []
        try:
            step = next(steps, None)  # None of a call that was cancelled before it came
            events += step.events if step else ()
        except Exception as error:
            call.request.fail(error)
        if not call.request.done:
            self._searches.append((call, steps))
            return (call, events) if events else None
        steps.close()
        return call, events

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
        mine: dict[int, list[Event]] = {}
        for event in events:
            mine.setdefault(id(event.row.request), []).append(event)
        calls = [(call, mine.get(id(call.request), [])) for call in self._running]
        return [(call, got) for call, got in calls if got or call.request.done]

    def _forget(self, calls: Sequence[Call]) -> None:
        """Free what these calls were promised."""
        gone = {id(call) for call in calls}
        for call in calls:
            self._bytes.pop(id(call), None)
        self._unread = [call for call in self._unread if id(call) not in gone]
        self._running = [call for call in self._running if id(call) not in gone]

    def _tidy(self) -> None:
        """Give memory back that earlier rows have reached and those of now have not."""
        cache = self._batch.cache
        if cache.reached() * self._token > self.max_bytes:
            cache.renew(max(1, self._batch.end), self._longest([]))


def _fail(requests: Iterable[Request], error: Exception) -> None:
    for request in requests:
        request.fail(error)


def _rows(job: Job) -> int:
    if isinstance(job, Scoring):
        return 1
    request = job.request
    return max(len(request.rows), len(request.prompts) * request.params.num_beams)


def _prompt(call: Call) -> int:
    """Tokens of its longest prompt."""
    return max(map(len, call.request.prompts))


def bytes_of(call: Call, chunk: int = CHUNK) -> int:
    """The bytes that a call may come to hold."""
    request: Request = call.request
    helper = call.draft.model.info if isinstance(call.draft, Assistant) else None
    prompts, width = request.padded.shape
    parts = memory_estimate.of_call(
        call.model.info, request.params, prompts, width, request.max_length, helper, chunk
    )
    return sum(parts.values())


def fitting_chunk(model: Model) -> tuple[int, float]:
    """Tokens of a chunk, and the seconds it takes: the largest of CHUNKS within STALL, or the last.

    The time is the shortest of READINGS: the first one touches the memory, and of a machine that
    is busy at the moment the others say little.
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
            model.forward([ids], cache, 0, nothing, model.reads_apart(len(ids)))
            seconds = min(seconds, time.perf_counter() - start)
        if seconds <= STALL:
            break
    return chunk, seconds
