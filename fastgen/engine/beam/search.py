"""The loop that all beam searches share: candidates, the cache of the beams, and records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from fastgen.engine.beam.hypotheses import Beams, Candidates, Hypothesis, Ids, Scores
from fastgen.engine.model import Model
from fastgen.engine.prefill import Chunks, Prefill
from fastgen.engine.request import Request, context_of_beams
from fastgen.engine.slots import Move, Slots
from fastgen.engine.step import Kind, Step
from fastgen.sampling import sampler, stop
from fastgen.sampling.processors import Chain, Context
from fastgen.sampling.softmax import log_softmax

TopLogprobs = tuple[tuple[int, float], ...]
Moves = Mapping[int, Sequence[Move]]  # of each prompt
B = TypeVar("B", bound=Beams)


class Search(ABC, Generic[B]):
    """The prompts whose search goes on, and the cache that holds their beams.

    Args:
        model: computes the logits.
        request: the call.
        chunks: tokens that are read at a time.
        kind: of beams, with the rules of the search.
        chain: the processors that all beams go through at once.

    Attributes:
        prompts: for each prompt its groups of beams; one, unless the search is diverse.
        running: those of them whose search goes on.
        logits: float32 [slots, vocab], after the last token of each beam.
        top: a step: for each beam of the call its likeliest tokens, if `top_logprobs` asks.
    """

    def __init__(
        self, model: Model, request: Request, chunks: Chunks, kind: type[B], chain: Chain
    ) -> None:
        self.model, self.request, self.chain = model, request, chain
        self.groups = request.params.num_beam_groups
        self.top: list[dict[int, TopLogprobs]] = []
        # What `output_scores` and `output_logits` show of a prompt goes on after its end.
        self._prompts_leave = not (request.keeps_scores or request.keeps_logits)
        count, beams = len(request.prompts), request.params.num_beams
        # Shortest first, as `prefill` wants them.
        order = np.argsort([len(prompt) for prompt in request.prompts], kind="stable")
        ranks = np.argsort(order, kind="stable")
        self.running: list[list[B]] = [
            self._start(kind, prompt, rank * beams + np.arange(beams))
            for prompt, rank in enumerate(ranks.tolist())
        ]
        self.prompts = self.running
        self.cache = model.borrow_cache(count * beams, request.max_length + chunks.margin)
        self.slots = Slots(self.cache)
        in_order = [request.prompts[i] for i in order]
        negative = request.unconditional and request.unconditional.begin(chunks)
        self.prefill = Prefill(model, self.cache, in_order, 0, request.prefix_cache, chunks)
        self._readings = [*([negative] if negative else []), self.prefill]

    def _start(self, kind: type[B], prompt: int, slots: Ids) -> list[B]:
        beams = len(slots)
        size = beams // self.groups
        return [
            kind(self.request, prompt, prompt * beams + start, slots[start : start + size])
            for start in range(0, beams, size)
        ]

    def steps(self) -> Iterator[Step]:
        """Search: a chunk of the prompts, or a token of every beam, at a time."""
        for reading in self._readings:
            while not reading.done:
                reading.read()
                yield Step(Kind.READ)
        self.request.cached_tokens = sum(self.prefill.reused)
        count, beams = len(self.prompts), self.request.params.num_beams
        self.slots.insert(np.repeat(np.arange(count), beams), 0)
        self.logits = np.repeat(self.prefill.logits, beams, axis=0)
        while self.running:
            self._step()
            yield Step(Kind.SEARCHED)

    def results(self) -> list[Hypothesis]:
        """The sequences of all prompts, one after the other, those of a prompt best first."""
        return [sequence for groups in self.prompts for sequence in self.best(groups)]

    def close(self) -> None:
        """Give the cache's memory back to the model."""
        self.model.give_back(self.cache)

    @abstractmethod
    def choose(self) -> tuple[bool, Moves]:
        """Continue every prompt's beams by a token.

        Returns:
            Whether the search is over, and the copies that the cache needs.
        """

    @abstractmethod
    def best(self, groups: Sequence[B]) -> list[Hypothesis]:
        """The sequences of a prompt, `num_return_sequences` of them, best first."""

    def _step(self) -> None:
        """Choose the next token of every beam, and compute the logits that follow it."""
        over, moves = self.choose()
        self._finish(over, moves)
        if self.running:
            self._forward()

    # --- what the searches choose from -----------------------------------------------------------

    def scored(self, beams: Sequence[B]) -> tuple[Scores, Scores]:
        """float32 [beams, vocab]: logits as the model gave them, and processed scores."""
        logits = self.logits[np.concatenate([group.slots for group in beams])]
        scores = log_softmax(logits)
        if self.chain:
            scores = self.chain(self.context(beams), scores, spare=True)
        return logits, scores

    def context(self, beams: Sequence[B]) -> Context:
        """Make of beams what processors are shown."""
        return context_of_beams(
            self.request,
            [ids for group in beams for ids in group.histories],
            np.repeat([group.prompt for group in beams], beams[0].size),
            np.concatenate([group.indices for group in beams]),
        )

    def candidates(self, beams: Sequence[B], scores: Scores) -> list[Candidates]:
        """For each prompt the best continuations of its beams, or a draw among them."""
        norms, size = self._norms(scores), beams[0].size
        return [
            self._candidates_of(group, scores[at : at + size], norms[at : at + size])
            for group, at in zip(beams, range(0, len(scores), size), strict=True)
        ]

    def _candidates_of(self, beams: B, scores: Scores, norms: Scores) -> Candidates:
        with np.errstate(over="ignore"):  # scores may be as large as a caller's processor likes
            total = (scores + beams.scores[:, None]).ravel()
        count = kept(self.request)
        # A constraint may leave nothing: then the search of this prompt is over.
        nothing = self.request.constraint is not None and total.max() == -np.inf
        if self.request.params.do_sample and not nothing:
            draws = self.request.draws(beams.new, beams.prompt, len(total))
            drawn = sampler.sample_several(total, draws, count)
            chosen = drawn[np.argsort(-total[drawn], kind="stable")]
        else:
            chosen = sampler.largest(total, count)
        parents, tokens = np.divmod(chosen, scores.shape[1])
        logprobs = scores[parents, tokens] - norms[parents]
        return Candidates(total[chosen], parents, tokens, logprobs)

    def _norms(self, scores: Scores) -> Scores:
        """float32 [beams]: subtracted, they make log-probabilities of scores, if any are asked."""
        if not (self.request.logprobs and self.request.chain):
            return np.zeros(len(scores), np.float32)
        top = scores.max(axis=1)
        alive = top > -np.inf  # a constraint may leave a beam nothing
        top = np.where(alive, top, 0)
        sums = np.exp(scores - top[:, None]).sum(axis=1)
        return np.asarray(top + np.log(np.where(alive, sums, 1)), np.float32)

    # --- the ends of sequences -------------------------------------------------------------------

    def eos_or(
        self, candidates: Sequence[Candidates], others: Sequence[str | None]
    ) -> list[list[str | None]]:
        """For each prompt, the reason that ends each of its candidates [K]; None for none.

        Args:
            others: the reasons other than an eos, of all candidates one after the other.
        """
        eos, count = self.request.eos, len(candidates[0].tokens)
        return [
            [
                "eos" if token in eos else other
                for token, other in zip(mine.tokens.tolist(), others[at : at + count], strict=True)
            ]
            for mine, at in zip(candidates, range(0, len(others), count), strict=True)
        ]

    def other_reasons(self, length: int, count: int, rows: Callable[[], Ids]) -> list[str | None]:
        """The reason, other than an eos, that ends each of `count` sequences of `length`.

        Args:
            rows: gives their ids, int64 [count, length]; only asked if somebody looks at them.
        """
        request, full = self.request, length >= self.request.max_length
        form = request.constraint
        if form is not None and form.ends and not full:
            form = None
        seen = request.stop_text is not None or request.criteria or form is not None
        ids = rows() if seen else np.empty((count, 0), np.int64)
        hit = [False] * count
        if request.criteria:
            scores = tuple(request.scores) if request.keeps_scores else None
            hit = stop.asked(request.criteria, ids, scores).tolist()
        late = "time" if request.deadline.passed() else None
        reasons = ["length" if full else "criterion" if by_criterion else late
                   for by_criterion in hit]  # fmt: skip
        if form is not None:
            whole = (form.complete(row[request.prompt_length :]) for row in ids)
            pairs = zip(whole, reasons, strict=True)
            reasons = ["grammar" if is_whole else other for is_whole, other in pairs]
        if request.stop_text is not None:
            stops = [request.stop_text(row) for row in ids]
            pairs = zip(stops, reasons, strict=True)
            reasons = ["stop_string" if stopped else other for stopped, other in pairs]
        return reasons

    # --- records ---------------------------------------------------------------------------------

    def keep(self, beams: Sequence[B], logits: Scores, scores: Sequence[Scores]) -> None:
        """Record what `output_logits`, `output_scores` and `top_logprobs` ask for.

        Args:
            beams: those of all running prompts, group by group.
            logits: float32 [beams, vocab], as the model gave them.
            scores: for each group float32 [prompts * size, vocab], from which it chooses.
        """
        request, params = self.request, self.request.params
        if request.keeps_logits:
            request.logits.append(logits)
        if not (request.keeps_scores or params.top_logprobs):
            return
        shape = (len(self.running), -1, logits.shape[1])
        every = np.concatenate([rows.reshape(shape) for rows in scores], axis=1)
        every = every.reshape(logits.shape)
        if request.keeps_scores:
            request.scores.append(every)
        if params.top_logprobs:
            indices = np.concatenate([group.indices for group in beams]).tolist()
            likeliest = map(tuple, sampler.top_logprobs(every, params.top_logprobs))
            self.top.append(dict(zip(indices, likeliest, strict=True)))

    # --- the cache -------------------------------------------------------------------------------

    def _finish(self, over: bool, moves: Moves) -> None:
        """Let go of the prompts that are done, of all if the search is over; move the rest."""
        done = [all(group.done for group in groups) for groups in self.running]
        if over or all(done):
            self.running = []
            return
        count = self._count()
        if self._prompts_leave and any(done):
            pairs = zip(self.running, done, strict=True)
            self.running = [groups for groups, gone in pairs if not gone]
        copies = [move for groups in self.running for move in moves[groups[0].prompt]]
        self.slots.copy(copies, count)
        if self._count() < count:
            self._move_up()

    def _count(self) -> int:
        """The beams that run, which are as many slots."""
        return sum(group.size for groups in self.running for group in groups)

    def _move_up(self) -> None:
        """Fill the slots of prompts that are gone."""
        beams = [group for groups in self.running for group in groups]
        held = np.concatenate([group.slots for group in beams])
        now = np.array(self.slots.close_gaps(held.tolist()))
        for group, slots in zip(beams, np.split(now, len(beams)), strict=True):
            group.slots = slots

    def _forward(self) -> None:
        """Compute the logits after the beams' last tokens."""
        last = np.empty(self._count(), np.int64)
        for groups in self.running:
            for group in groups:
                last[group.slots] = group.histories[:, -1]
        self.logits = self.model.forward(list(last[:, None]), self.cache)[:, 0]
        self.cache.forget(0, len(last))


def kept(request: Request) -> int:
    """The number of candidates: enough to go on if every likely one ends its sequence."""
    size = request.params.num_beams // request.params.num_beam_groups
    return max(2, 1 + len(request.params.eos_token_id or ())) * size
