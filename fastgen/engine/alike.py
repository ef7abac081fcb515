"""Rows that are alike, and a step of theirs: processors, sampler, stop.

Their requests share their processors and their way of sampling. What a step asks of them is found
out once, when rows join or leave.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.request import Request, Row, context
from fastgen.engine.step import Event
from fastgen.sampling import sampler, stop


class Part(NamedTuple):
    """Some of several rows.

    Attributes:
        indices: of these rows among all.
        places: the same, as a slice where they are neighbours: then nothing is copied.
    """

    alike: Alike
    indices: list[int]
    places: slice | list[int]


def parts(rows: Sequence[Row]) -> list[Part]:
    """The rows that share their processors and their way of sampling, as parts of all."""
    return _split(rows, lambda row: (id(row.request.chain), row.request.params.do_sample,
                                     row.request.of_model))  # fmt: skip


def _split(rows: Sequence[Row], key: Callable[[Row], Hashable]) -> list[Part]:
    groups: dict[Hashable, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(key(row), []).append(index)
    return [Part(Alike([rows[i] for i in of]), of, _neighbours(of)) for of in groups.values()]


def _neighbours(indices: list[int]) -> slice | list[int]:
    first, stop = indices[0], indices[0] + len(indices)
    return slice(first, stop) if indices == list(range(first, stop)) else indices


class Alike:
    """Rows whose next tokens are chosen together.

    Args:
        rows: of requests with one chain and one way of sampling.

    Attributes:
        requests: theirs.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        first = rows[0].request
        self.requests, self._parts = [first], [Part(self, [*range(len(rows))], slice(None))]
        if any(row.request is not first for row in rows):
            self._parts = _split(rows, lambda row: id(row.request))
            self.requests = [part.alike.requests[0] for part in self._parts]
        self._chain, self._samples, self._of_model = (
            first.chain, first.params.do_sample, first.of_model)  # fmt: skip
        self._spare = not (first.keeps_logits or first.of_model)
        self._one_pick = len(self.requests) > 1 and all(map(_plain, self.requests))
        self._logprobs = any(request.logprobs for request in self.requests)
        self._constrained = any(request.constraint for request in self.requests)

    def advance(self, logits: NDArray[np.float32]) -> list[Event]:
        """Give each row a token; an error ends the request it is of.

        Args:
            logits: float32 [rows, vocab]; may be overwritten, as for `choose`.
        """
        try:
            scores = self._processed(logits)
        except Exception as error:  # whatever a caller's function raises
            for request in self.requests:
                request.fail(error)
            return []
        if self._one_pick:
            tokens = scores.argmax(axis=1)
            if np.isfinite(scores[np.arange(len(tokens)), tokens]).all():
                return self.append(logits, scores, tokens)
        events: list[Event] = []
        for alike, _, places in self._parts:
            try:
                mine = scores[places]
                events += alike.append(logits[places], mine, alike._picked(mine))
            except Exception as error:
                alike.requests[0].fail(error)
        return events

    def choose(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Processed scores [rows, vocab] and the next token [rows] of each row.

        `logits` may be overwritten, but where the request keeps or shows them.

        Raises:
            ValueError: the scores hold nan, or rule out what would be drawn.
        """
        scores = self._processed(logits)
        return scores, self._picked(scores)

    def _processed(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._chain is None:
            return logits
        return np.asarray(self._chain(context(self.rows), logits, spare=self._spare))

    def _picked(self, scores: NDArray[np.float32]) -> NDArray[np.int64]:
        if not self._samples:
            tokens = sampler.greedy(scores)
            if self._constrained:
                self._refuse_nothing(scores, tokens)
            return tokens
        draws: list[sampler.Words] = [np.empty(0, np.uint64)] * len(self.rows)
        for alike, indices, _ in self._parts:
            mine = alike.requests[0].uniform(alike.rows, scores.shape[1])
            for i, draw in zip(indices, mine, strict=True):
                draws[i] = draw
        try:
            return sampler.sample(scores, draws)
        except sampler.NothingLeft as error:
            if self._chain is None:
                raise
            raise self._nothing_left(scores) from error

    def _refuse_nothing(self, scores: NDArray[np.float32], tokens: NDArray[np.int64]) -> None:
        """Raise a ValueError if every token is ruled out, and so the likeliest is none."""
        if self._chain and (scores[np.arange(len(tokens)), tokens] == -np.inf).any():
            raise self._nothing_left(scores)

    def _nothing_left(self, scores: NDArray[np.float32]) -> sampler.NothingLeft:
        assert self._chain is not None
        by = self._chain.ruling_out(context(self.rows), scores.shape[1])
        return sampler.NothingLeft(by)

    def append(
        self,
        logits: NDArray[np.float32],
        scores: NDArray[np.float32],
        tokens: NDArray[np.int64],
    ) -> list[Event]:
        """Append one token to each row, keep what its request asks for, and end rows."""
        logprobs = [float("nan")] * len(self.rows)
        if self._logprobs:
            seen = logits if self._of_model else scores
            logprobs = sampler.logprob_of(seen, tokens).tolist()
        for alike, _, places in self._parts:
            if alike.requests[0].keeps:
                alike.requests[0].keep(alike.rows, logits[places], scores[places])
        events = []
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs, strict=True):
            row.push(token)
            top = row.request.top_logprobs[row.index]
            events.append(Event(row, token, logprob, top[-1] if top else None))
            row.end(reason(row))
        for alike, _, _ in self._parts:
            if alike.requests[0].criteria:
                _ask(alike.rows)
        return events


def _plain(request: Request) -> bool:
    """True if its rows take the likeliest token, and nothing that can go wrong looks at it."""
    looked_at = request.keeps or request.criteria or request.constraint
    return not (looked_at or request.params.do_sample)


def reason(row: Row) -> str | None:
    """The reason that ends `row`, which has a new token; None if it goes on."""
    request = row.request
    if int(row.ids[row.length - 1]) in request.eos:
        return "eos"
    if request.stop_text is not None and request.stop_text(row.history):
        return "stop_string"
    full, form = row.length >= request.max_length, request.constraint
    if form is not None and (full or not form.ends) and form.complete(row.generated):
        return "grammar"
    return "length" if full else None


def _ask(rows: Sequence[Row]) -> None:
    """End rows of one request, equally long, by its callers' criteria, which see all its rows."""
    request, length = rows[0].request, rows[0].length
    steps = length - request.prompt_length
    scores = tuple(request.scores[:steps]) if request.keeps_scores else None
    ended = stop.asked(request.criteria, request.padded_to(length), scores)
    for row in rows:
        row.end("criterion" if ended[row.index] else None)
