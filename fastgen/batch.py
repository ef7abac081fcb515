"""THE LOOP: rows join by prefill, step together, and leave when they have ended.

One prompt, a ragged batch, several sequences of one prompt, a stream and a server's requests
are all rows here. `step` is: logits, processors, pick, stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgen import pick, stop
from fastgen.cache import Cache
from fastgen.model import Model
from fastgen.prefix import PrefixCache
from fastgen.request import Request, Row, by_request, context

CHUNK = 256  # tokens of one row that are prefilled at a time
TOGETHER = 512  # tokens of several rows that are prefilled at a time
CALL = 20  # tokens that take as long as a call without any: reading the weights, mostly


States = dict[int, list[NDArray[np.float32]]]  # of a row, by how many tokens were read


@dataclass(frozen=True)
class Event:
    """One new token of one row."""

    row: Row
    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] | None


class Batch:
    """The rows that run, in the first slots of one cache."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.rows: list[Row] = []
        self.cache = model.borrow_cache(rows=0, capacity=0)

    def add(self, request: Request) -> None:
        """Let the rows of `request` join: their prompts are prefilled, once each."""
        first = len(self.rows)
        copies = len(request.rows) // len(request.prompts)
        # Shortest first: in a chunk, the rows that have more to come are then neighbours.
        order = np.argsort([len(prompt) for prompt in request.prompts], kind="stable")
        self.cache.reserve(first + len(request.rows), request.max_length + CHUNK)
        prompts = [request.prompts[i] for i in order]
        logits = prefill(self.model, self.cache, prompts, first, request.prefix_cache)
        if copies > 1:
            parents = first + np.repeat(np.arange(len(order)), copies)
            self.cache.take(np.concatenate([np.arange(first), parents]))
        for place, prompt in enumerate(order):
            for row in request.rows[prompt * copies : (prompt + 1) * copies]:
                row.logits = logits[place]
                self.rows.append(row)

    def close(self) -> None:
        """Give the cache's memory back to the model: nothing runs any more."""
        self.model.give_back(self.cache)

    def step(self) -> list[Event]:
        """Advance every row by one token."""
        logits = self._logits()
        events: list[Event] = []
        for places in self._alike():
            # Without a copy where all rows are alike, as they are outside of a server.
            mine = logits if len(places) == len(self.rows) else logits[places]
            rows = [self.rows[i] for i in places]
            events += take_in(rows, mine, *choose(rows, mine))
        self._end_step()
        return events

    def _end_step(self) -> None:
        """Look at the clock, and let rows that have ended leave."""
        for request, _ in by_request(self.rows):
            if request.deadline.passed():
                request.end("time")
        self._leave()

    def _alike(self) -> list[list[int]]:
        """Places of the rows that share their processors and their kind of pick."""
        groups: dict[tuple[int, bool], list[int]] = {}
        for place, row in enumerate(self.rows):
            key = (id(row.request.chain), row.request.params.do_sample)
            groups.setdefault(key, []).append(place)
        return list(groups.values())

    def _logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab] for the next token: of the prefill, or of a step."""
        running = [row for row in self.rows if row.logits is None]
        joined = [row for row in self.rows if row.logits is not None]  # always the last slots
        parts: list[NDArray[np.float32]] = []
        if running:
            last = [row.ids[row.length - 1 : row.length] for row in running]
            parts.append(self.model.forward(last, self.cache)[:, 0])
        for row in joined:
            assert row.logits is not None
            parts.append(row.logits[None])
            row.logits = None
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _leave(self) -> None:
        """Free the slots of rows that have ended; the rest move up, as few as possible."""
        stay = [row for row in self.rows if not row.finish_reason or _lingering(row)]
        if len(stay) == len(self.rows):
            return
        slots = {id(row): slot for slot, row in enumerate(self.rows)}
        holes = [i for i, row in enumerate(self.rows[: len(stay)]) if row not in stay]
        late = [row for row in stay if slots[id(row)] >= len(stay)]
        rows = self.rows[: len(stay)]
        for hole, row in zip(holes, late, strict=True):
            rows[hole] = row
        self.cache.take([slots[id(row)] for row in rows])
        self.rows = rows


def choose(
    rows: Sequence[Row], logits: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Processed scores [rows, vocab] and the next token [rows] of rows that are alike.

    `logits` may be overwritten, but where the request keeps them.

    Raises:
        ValueError: the scores hold nan, or rule out what would be drawn.
    """
    request, scores = rows[0].request, logits
    if request.chain is not None:
        scores = request.chain(context(rows), logits, spare=not request.keeps_logits)
    if not request.params.do_sample:
        return scores, pick.greedy(scores)
    draws: list[pick.Words] = [np.empty(0, np.uint64)] * len(rows)
    for request, places in by_request(rows):
        mine = request.uniform([rows[i] for i in places], scores.shape[1])
        for i, draw in zip(places, mine, strict=True):
            draws[i] = draw
    try:
        return scores, pick.sample(scores, draws)
    except pick.NothingLeft as error:
        if request.chain is None:
            raise
        by = request.chain.ruling_out(context(rows), scores.shape[1])
        raise pick.NothingLeft(by) from error


def take_in(
    rows: Sequence[Row],
    logits: NDArray[np.float32],
    scores: NDArray[np.float32],
    tokens: NDArray[np.int64],
) -> list[Event]:
    """Append one token to each of `rows`, keep what the request asks for, and see who has ended."""
    logprobs = _logprobs(rows, scores, tokens)
    groups = by_request(rows)
    for request, places in groups:
        if request.keeps:
            request.keep([rows[i] for i in places], logits[places], scores[places])
    events = []
    for row, token, logprob in zip(rows, tokens.tolist(), logprobs, strict=True):
        row.push(token)
        top = row.request.top_logprobs[row.index]
        events.append(Event(row, token, logprob, top[-1] if top else None))
        row.end(_reason(row))
    for request, places in groups:
        if request.criteria:
            _ask([rows[i] for i in places])
    return events


def _reason(row: Row) -> str | None:
    """Why `row`, which has a new token, has ended; None if it has not."""
    request = row.request
    if int(row.ids[row.length - 1]) in request.eos:
        return "eos"
    if request.stop_text is not None and request.stop_text(row.history):
        return "stop_string"
    return "length" if row.length >= request.max_length else None


def _ask(rows: Sequence[Row]) -> None:
    """End rows of one request, equally long, by its callers' criteria, which see all its rows."""
    request, length = rows[0].request, rows[0].length
    steps = length - request.prompt_length
    scores = tuple(request.scores[:steps]) if request.keeps_scores else None
    ended = stop.asked(request.criteria, request.padded_to(length), scores)
    for row in rows:
        row.end("criterion" if ended[row.index] else None)


def _lingering(row: Row) -> bool:
    """Whether a row that has ended goes on, until all of its request are as long."""
    request = row.request
    until = request.width if request.done else request.max_length
    return request.lingers and row.length < until


def _logprobs(
    rows: Sequence[Row], scores: NDArray[np.float32], tokens: NDArray[np.int64]
) -> list[float]:
    if not any(row.request.logprobs for row in rows):
        return [float("nan")] * len(rows)
    return [float(value) for value in pick.logprob_of(scores, tokens)]


def prefill(
    model: Model,
    cache: Cache,
    prompts: Sequence[NDArray[np.int64]],
    first: int,
    prefix_cache: PrefixCache | None = None,
) -> NDArray[np.float32]:
    """Read `prompts`, shortest first, into the empty slots from `first` on, in chunks.

    Returns:
        float32 [prompts, vocab]: the logits after the last token of each.
    """
    out = np.empty((len(prompts), model.info.vocab_size), np.float32)
    for start, end in together([len(prompt) for prompt in prompts]):
        if prefix_cache is not None:
            prefix_cache.fetch(model.fingerprint, prompts[start:end], cache, first + start, CHUNK)
        states: list[States] | None = (
            None if prefix_cache is None else [{} for _ in range(start, end)]
        )
        _prefill(model, cache, prompts[start:end], first + start, out[start:end], states)
        if prefix_cache is not None and states is not None:
            for place, mine in enumerate(states, start):
                prompt = prompts[place]
                prefix_cache.keep(model.fingerprint, prompt, cache, first + place, CHUNK, mine)
    return out


def together(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Which neighbours of rows are read together: (first, last + 1) of each group.

    Rows are padded to the longest of their group, and every call has a cost of its own; the
    groups are those of the least sum. Up to TOGETHER tokens go into a call.

    Args:
        lengths: of the prompts, in ascending order.
    """
    least = [0.0] + [float("inf")] * len(lengths)  # cost of the first rows, by their number
    starts = [0] * (len(lengths) + 1)
    for end in range(1, len(lengths) + 1):
        width = min(CHUNK, lengths[end - 1])
        for start in range(end - 1, -1, -1):
            if start < end - 1 and (end - start) * width > TOGETHER:
                break
            cost = least[start] + _cost(lengths[start:end])
            if cost < least[end]:
                least[end], starts[end] = cost, start
    groups = []
    end = len(lengths)
    while end:
        groups.append((starts[end], end))
        end = starts[end]
    return groups[::-1]


def _cost(lengths: Sequence[int]) -> float:
    """Of reading rows together: tokens, padding included, and CALL for each call."""
    cost, at = 0.0, 0
    while at < lengths[-1]:
        going = sum(length > at for length in lengths)
        cost += CALL + going * min(CHUNK, lengths[-1] - at)
        at += CHUNK
    return cost


def _prefill(
    model: Model,
    cache: Cache,
    prompts: Sequence[NDArray[np.int64]],
    first: int,
    out: NDArray[np.float32],
    states: list[States] | None = None,
) -> None:
    """Read what the slots do not hold yet. Chunks end at multiples of `CHUNK`, for every row.

    Args:
        states: gets each row's states where a chunk ended; None where nobody wants them.
    """
    done = 0  # rows that are complete
    while done < len(prompts):
        held = cache.lengths[first + done : first + len(prompts)].copy()
        end = (held.min() // CHUNK + 1) * CHUNK
        chunk = [prompt[at:end] for prompt, at in zip(prompts[done:], held, strict=True)]
        ended = sum(len(prompt) <= end for prompt in prompts[done:])
        # Only a chunk in which a prompt ends needs logits.
        positions = None if ended else np.zeros((len(chunk), 0), np.int64)
        logits = model.forward(chunk, cache, first + done, positions)
        out[done : done + ended] = logits[:ended, 0] if ended else 0
        if states is not None:
            for row in range(done, len(prompts)):
                if cache.lengths[first + row] == end:
                    states[row][end] = cache.state(first + row)[1]
        done += ended
