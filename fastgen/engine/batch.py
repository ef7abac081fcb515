"""THE LOOP: rows join by prefill, step together, and leave when they have ended.

One prompt, a ragged batch, several sequences of one prompt, a stream and a service's requests
are all rows here. `step` is: logits, processors, sampler, stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.alike import parts, reason
from fastgen.engine.cuts import CALL
from fastgen.engine.model import Model
from fastgen.engine.prefill import WHOLE, Chunks, Prefill
from fastgen.engine.request import RUNNING, Request, Row
from fastgen.engine.slots import Slots
from fastgen.engine.step import Event

FORCED = 64  # tokens of a row, at most, that are taken in a step because they must follow


@dataclass(eq=False)
class Joining:
    """Rows whose prompts are being read.

    Attributes:
        prefill: the prompts.
        rows: the rows of each of them.
        before: other prompts that their requests have read first, such as negative ones.
    """

    prefill: Prefill
    rows: list[list[Row]]
    before: list[Prefill]

    def read(self) -> None:
        """Read a chunk."""
        if self.before:
            self.before[0].read()
            self.before = [prefill for prefill in self.before if not prefill.done]
        else:
            self.prefill.read()

    @property
    def slots(self) -> range:
        return range(self.prefill.first, self.prefill.first + len(self.rows))

    @property
    def left(self) -> int:
        """The number of tokens that are still to be read."""
        return sum(prefill.left for prefill in (*self.before, self.prefill))

    @property
    def wanted(self) -> bool:
        """True while a row has not ended."""
        return any(not row.finish_reason for rows in self.rows for row in rows)


class Batch:
    """The rows that run, in the first slots of one cache, and behind them those that join.

    Args:
        model: computes the logits.
        chunks: tokens that are read at a time.

    Attributes:
        rows: those that run.
        parts: which of them are alike.
        joining: those whose prompts are being read.
    """

    def __init__(self, model: Model, chunks: Chunks = WHOLE) -> None:
        self.model, self.chunks = model, chunks
        self._run([])
        self.joining: list[Joining] = []
        self.cache = model.borrow_cache(rows=0, capacity=0)
        self._slots = Slots(self.cache)

    def _run(self, rows: list[Row]) -> None:
        """Let these be the rows that run, from the first slot on."""
        self.rows, self.parts = rows, parts(rows)
        self._forces = any(row.request.forces for row in rows)

    def add(self, request: Request) -> None:
        """Let the rows of `request` join at once: its prompts are prefilled, once each."""
        joining = self.begin([request])
        while joining in self.joining:
            self.read(joining)

    def begin(self, requests: Sequence[Request]) -> Joining:
        """Let the rows of `requests` join when their prompts have been read, by calls of `read`.

        Args:
            requests: with one prefix cache, or none; their prompts are read together.
        """
        copies = [len(request.rows) // len(request.prompts) for request in requests]
        waiting = [
            (prompt, request.rows[index * count : (index + 1) * count])
            for request, count in zip(requests, copies, strict=True)
            for index, prompt in enumerate(request.prompts)
        ]
        # Shortest first: in a chunk, the rows that have more to come are then neighbours.
        waiting.sort(key=lambda pair: len(pair[0]))
        first = self.end
        longest = max(request.max_length for request in requests)
        rows = sum(len(request.rows) for request in requests)
        self.cache.reserve(first + rows, longest + self.chunks.margin)
        prompts = [prompt for prompt, _ in waiting]
        known = requests[0].prefix_cache
        prefill = Prefill(self.model, self.cache, prompts, first, known, self.chunks)
        guided = (request.unconditional for request in requests)
        before = filter(None, [guide.begin(self.chunks) for guide in guided if guide])
        self.joining.append(Joining(prefill, [rows for _, rows in waiting], [*before]))
        return self.joining[-1]

    def read(self, joining: Joining) -> None:
        """Read a chunk of these prompts; after the last one, their rows run."""
        joining.read()
        if joining.prefill.done:
            self._join(joining)

    @property
    def end(self) -> int:
        """The first slot behind all that are used."""
        return max([len(self.rows), *(joining.slots.stop for joining in self.joining)])

    def _join(self, joining: Joining) -> None:
        """Move what was read behind the rows that run, once for each row of a prompt."""
        self.joining.remove(joining)
        sources = np.repeat(np.asarray(joining.slots), [len(rows) for rows in joining.rows])
        others = [other.slots for other in self.joining]
        firsts = self._slots.insert(sources, len(self.rows), others)
        for other, first in zip(self.joining, firsts, strict=True):
            other.prefill.first = first
        prefill = joining.prefill
        for rows, logits, reused in zip(joining.rows, prefill.logits, prefill.reused, strict=True):
            rows[0].request.cached_tokens += reused
            for row in rows:
                row.logits = logits
                row.begin()
        self._run([*self.rows, *(row for rows in joining.rows for row in rows)])
        self.leave()
        self._clear()  # the slots that they were read into

    def close(self) -> None:
        """Give the cache's memory back to the model: nothing runs any more."""
        self.model.give_back(self.cache)

    def step(self) -> list[Event]:
        """Advance every row by one token.

        What goes wrong while a token is chosen ends the rows of its request, whose `error` it
        becomes; no other row notices.
        """
        logits = self._logits()
        events: list[Event] = []
        for alike, _, places in self.parts:
            events += alike.advance(logits[places])
        return events + self._end_step()

    def _end_step(self) -> list[Event]:
        """Append forced tokens, look at the clock, and let rows that have ended leave."""
        events = append_forced(self.rows, self.chunks.step) if self._forces else []
        for alike, _, _ in self.parts:
            for request in alike.requests:
                if request.deadline.passed():
                    request.end("time")
        self.cache.forget(0, len(self.rows))
        self.leave()
        return events

    def _logits(self) -> NDArray[np.float32]:
        """float32 [rows, vocab] for the next token: of the prefill, or of a step."""
        joined = [row for row in self.rows if row.logits is not None]  # always the last slots
        running = self.rows[: len(self.rows) - len(joined)]
        made: list[NDArray[np.float32]] = []
        if running:
            held = self.cache.lengths[: len(running)].tolist()
            new = [row.unread(count) for row, count in zip(running, held, strict=True)]
            made.append(self.model.forward(new, self.cache)[:, 0])
        for row in joined:
            assert row.logits is not None
            made.append(row.logits[None])
            row.logits = None
        return made[0] if len(made) == 1 else np.concatenate(made)

    def leave(self) -> None:
        """Free the slots of rows that have ended; the rest move up, as few as possible."""
        stay = [row for row in self.rows if row.state is RUNNING or row.gets_tokens()]
        joining = [joining for joining in self.joining if joining.wanted]
        if len(stay) < len(self.rows) or len(joining) < len(self.joining):
            self.joining = joining
            self._move_up(stay)
            self._clear()

    def _move_up(self, stay: list[Row]) -> None:
        """Let `stay` be the rows that run."""
        if len(stay) == len(self.rows):
            return
        slots = {id(row): slot for slot, row in enumerate(self.rows)}
        held = [slots[id(row)] for row in stay]
        # Rows that have not taken a step yet stay the last.
        late = [row for row, slot in zip(stay, held, strict=True) if slot >= len(stay)]
        in_order = any(row.logits is not None for row in late)
        # The prompts that are being read behind the rows stay where they are.
        end = max((joining.slots.stop for joining in self.joining), default=0)
        now = self._slots.close_gaps(held, end, in_order)
        self._run([row for _, row in sorted(zip(now, stay, strict=True), key=lambda p: p[0])])

    def _clear(self) -> None:
        """Clear unused slots."""
        read = (slot for joining in self.joining for slot in joining.slots)
        self._slots.clear({*range(len(self.rows)), *read})


def append_forced(rows: Sequence[Row], most: int) -> list[Event]:
    """Give rows the tokens that must follow by their constraints, as far as that pays.

    The next step reads them together with the one before, and all rows as many as the longest.
    Rows that end by them are not read any more. What is not taken here is picked, the same, later.

    Args:
        most: tokens that the next step may read, padding included.
    """
    events: list[Event] = []
    ahead: list[tuple[Row, list[int]]] = []
    for row in rows:
        if row.finish_reason is None:
            tokens = _forced(row)
            if tokens and _ends_by(row, tokens):
                events += _append(row, tokens)
            else:
                ahead.append((row, tokens))
    if any(tokens for _, tokens in ahead):
        counts = [1 + len(tokens) for _, tokens in ahead]
        width = _paying([min(count, max(1, most // len(ahead))) for count in counts])
        for row, tokens in ahead:
            events += _append(row, tokens[: width - 1])
    return events


def _forced(row: Row) -> list[int]:
    """The next tokens that must follow; if that cannot be told, it is its request's error."""
    request = row.request
    if request.constraint is None or not request.forces:
        return []
    try:
        most = min(FORCED, request.max_length - row.length)
        return request.constraint.certain(row.generated, most)
    except ValueError as error:
        request.fail(error)
        return []


def _ends_by(row: Row, tokens: Sequence[int]) -> bool:
    """True if `row` ends with these tokens."""
    request = row.request
    if tokens[-1] in request.eos or row.length + len(tokens) >= request.max_length:
        return True
    return (
        request.constraint is not None
        and not request.constraint.ends
        and (request.constraint.complete(row.after(tokens).generated))
    )


def _append(row: Row, tokens: Sequence[int]) -> list[Event]:
    """Append forced tokens to `row`, until it ends."""
    events = []
    for token in tokens:
        if row.finish_reason is None:
            row.push(token)
            events.append(Event(row, token, 0.0 if row.request.logprobs else float("nan"), None))
            row.end(reason(row))
    return events


def _paying(counts: Sequence[int]) -> int:
    """The tokens that rows may be read at once, of the `counts` that they have: what saves most.

    A call costs its reading of the weights and all positions, those of padding too; it saves the
    calls that its tokens would be otherwise, some for each row.
    """
    rows = len(counts)

    def saved(width: int) -> float:
        tokens = sum(min(count, width) for count in counts)
        return tokens * (CALL + rows) / rows - (CALL + rows * width)

    return max(sorted({1, *counts}), key=saved)
