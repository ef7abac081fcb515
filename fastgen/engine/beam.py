"""Beam search: the likeliest sequences of each prompt, searched side by side.

Three searches share one loop (`_Search`), which differs from the loop of `batch` in that rows
are compared with each other and change places:

- beam search and beam sampling as transformers 5.24's `_beam_search` does them: the same tokens,
  `sequences_scores` and `beam_indices` (`Beams`);
- diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424; AAAI 2018), which transformers
  has moved to remote code (`Group`, which says what it follows and where it differs).

Work that is not done: a prompt is prefilled once, not once for each beam. A beam whose parent
lives on in another slot of the cache is not moved at all: beams are dealt out to the slots so that
every parent keeps its own, and only the further children of a parent are copied, from the token on
at which they differ from what the slot held. Prompts whose search is over leave the batch;
in transformers they run on until the last is done, which changes nothing of theirs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.batch import Event
from fastgen.engine.model import Model
from fastgen.engine.prefill import CHUNK, Prefill
from fastgen.engine.request import Request, context_of_beams
from fastgen.sampling import pick, stop
from fastgen.sampling.softmax import log_softmax, normalisers

Scores = NDArray[np.float32]
Ids = NDArray[np.int64]
TopLogprobs = tuple[tuple[int, float], ...]

DEAD = np.float32(-1e9)  # added to the score of what may not go on, as transformers does


class Candidates(NamedTuple):
    """The best continuations [K] of the beams of one prompt, best first."""

    scores: Scores  # log-probability of the whole sequence, without a length penalty
    parents: Ids  # the beam that is continued, counted within the prompt (or the group)
    tokens: Ids
    logprobs: Scores  # of the token alone


class Move(NamedTuple):
    """A copy within the cache: `slot` becomes what `source` is, from token `start` on."""

    slot: int
    source: int
    start: int


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A sequence that has ended.

    Attributes:
        score: log-probability / length ** length_penalty; the length is that of `tokens`.
        tokens: int64 [new], what was generated.
        beams: int32 [new], the beam of the call that each token continued.
        logprobs: float32 [new], of the tokens.
        reason: why it ended (see `output.Token`).
    """

    score: float
    tokens: Ids
    beams: NDArray[np.int32]
    logprobs: Scores
    reason: str


class Beams:
    """The running beams of one prompt, and the best sequences that have ended.

    Attributes:
        prompt: which prompt of the call.
        first: the place of its first beam among all beams of the call.
        slots: int64 [size], where in the cache each beam is.
        scores: float32 [size]. At first the beams are one: all but beam 0 count as dead.
        ids: int64 [size, max_length], prompts with their padding, then what was generated.
        length: how much of `ids` there is.
        ended: what has ended, best first; `size` at most.
        done: whether nothing can change any more.
    """

    def __init__(self, request: Request, prompt: int, first: int, slots: Ids) -> None:
        self.request, self.prompt, self.first, self.slots = request, prompt, first, slots
        self.size, self.length = len(slots), request.prompt_length
        self.scores = np.full(self.size, DEAD)
        self.scores[0] = 0
        new = request.max_length - self.length
        self.ids = np.zeros((self.size, request.max_length), np.int64)
        self.ids[:, : self.length] = request.padded[prompt]
        self._beams = np.full((self.size, new), -1, np.int32)
        self._logprobs = np.zeros((self.size, new), np.float32)
        self.ended: list[Hypothesis] = []
        self.done = False

    @property
    def new(self) -> int:
        """How many tokens were generated."""
        return self.length - self.request.prompt_length

    @property
    def histories(self) -> Ids:
        """int64 [size, length]: the beams so far."""
        return self.ids[:, : self.length]

    @property
    def places(self) -> Ids:
        """int64 [size]: where its beams are among all beams of the call."""
        return self.first + np.arange(self.size)

    def continued(self, candidates: Candidates) -> Ids:
        """int64 [K, length + 1]: the sequences that the candidates would make."""
        ids = self.histories[candidates.parents]
        return np.concatenate((ids, candidates.tokens[:, None]), axis=1)

    def advance(self, candidates: Candidates, reasons: Sequence[str | None]) -> list[Move]:
        """Continue by one token.

        Args:
            candidates: those of all beams.
            reasons: why each of them ends its sequence; None if it does not.

        Returns:
            What has to be copied in the cache.
        """
        self._accept(candidates, reasons)
        hit = np.array([reason is not None for reason in reasons])
        running = np.where(hit, candidates.scores + DEAD, candidates.scores)
        chosen = np.argsort(-running, kind="stable")[: self.size]
        moves = self._continue(candidates, chosen, running[chosen])
        self.done = self.done or not self._improvable() or self._closed()
        return moves

    def results(self) -> list[Hypothesis]:
        """`num_return_sequences` sequences, best first."""
        missing = self.request.params.num_return_sequences - len(self.ended)
        every = self.ended + [self.nothing()] * missing
        return every[: self.request.params.num_return_sequences]

    def nothing(self) -> Hypothesis:
        """What there is where fewer sequences were found than were wanted."""
        return self._hypothesis(float(DEAD), 0, "length", 0)

    def _accept(self, candidates: Candidates, reasons: Sequence[str | None]) -> None:
        """Keep those that have ended, were among the first and are better than what is kept."""
        if self.done:
            return
        for rank, reason in enumerate(reasons[: self.size]):
            if reason is not None:
                score = self._by_length(candidates.scores[rank], self.new + 1)
                if score >= DEAD:  # a text that is there already is better than none
                    self.ended.append(self._ending(candidates, rank, float(score), reason))
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self.ended[self.size :]

    def _improvable(self) -> bool:
        """Whether the best running beam could still become better than the worst that ended.

        "never" supposes it as long as it may get; else its present length counts.
        """
        params, length = self.request.params, self.new
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self.request.max_length - self.request.prompt_length
        worst = np.float32(self.ended[-1].score) if len(self.ended) == self.size else DEAD
        return bool(self._by_length(self.scores[0], length) > worst)

    def _closed(self) -> bool:
        return self.request.params.early_stopping is True and len(self.ended) == self.size

    def _by_length(self, score: Any, length: int) -> Any:
        """A score over its length penalty, in its own precision."""
        try:
            penalty = float(length**self.request.params.length_penalty)
        except OverflowError:
            penalty = math.inf
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return np.divide(score, penalty, dtype=np.result_type(score))

    def _ending(
        self, candidates: Candidates, rank: int, score: float, reason: str, with_token: bool = True
    ) -> Hypothesis:
        """The sequence that candidate `rank` completes."""
        parent = int(candidates.parents[rank])
        before = self._hypothesis(score, parent, reason, self.new)
        return Hypothesis(
            score=score,
            tokens=np.append(before.tokens, candidates.tokens[rank]),
            beams=np.append(before.beams, np.int32(self.first + parent)),
            logprobs=np.append(before.logprobs, candidates.logprobs[rank]),
            reason=reason,
        )

    def _hypothesis(self, score: float, beam: int, reason: str, new: int) -> Hypothesis:
        """`new` tokens of a running beam as a sequence that has ended."""
        start = self.request.prompt_length
        return Hypothesis(
            score=score,
            tokens=self.ids[beam, start : start + new].copy(),
            beams=self._beams[beam, :new].copy(),
            logprobs=self._logprobs[beam, :new].copy(),
            reason=reason,
        )

    def _continue(self, candidates: Candidates, chosen: Ids, scores: Scores) -> list[Move]:
        """Make the chosen candidates the running beams."""
        parents, new = candidates.parents[chosen], self.new
        moves = self._deal(parents)
        if (parents != np.arange(self.size)).any():
            for tracks in (
                self.ids[:, self.length - new : self.length],
                self._beams[:, :new],
                self._logprobs[:, :new],
            ):
                tracks[:] = tracks[parents]
        self.ids[:, self.length] = candidates.tokens[chosen]
        self._beams[:, new] = self.first + parents
        self._logprobs[:, new] = candidates.logprobs[chosen]
        self.scores = scores
        self.length += 1
        return moves

    def _deal(self, parents: Ids) -> list[Move]:
        """Deal the slots out: a parent's first child stays where the parent is."""
        slots, old = np.empty_like(self.slots), self.slots
        heirs: dict[int, int] = {}  # the first child of each parent
        for beam, parent in enumerate(parents.tolist()):
            slots[heirs.setdefault(parent, beam)] = old[parent]
        others = [beam for beam in range(self.size) if heirs[int(parents[beam])] != beam]
        childless = [beam for beam in range(self.size) if beam not in heirs]
        moves = []
        for beam, dead in zip(others, childless, strict=True):
            parent = int(parents[beam])
            slots[beam] = old[dead]
            moves.append(Move(int(old[dead]), int(old[parent]), self._alike(dead, parent)))
        self.slots = slots
        return moves

    def _alike(self, one: int, other: int) -> int:
        """How many leading tokens of the cache two beams share (padding is not in the cache)."""
        start = self.request.prompt_length
        differ = self.ids[one, start : self.length] != self.ids[other, start : self.length]
        alike = int(differ.argmax()) if differ.any() else self.new
        return len(self.request.prompts[self.prompt]) + alike


class Group(Beams):
    """One group of a prompt's beams in diverse beam search.

    The groups of a prompt take their steps one after the other; each is a beam search of its own
    with `num_beams // num_beam_groups` beams, in which a token loses `diversity_penalty` for every
    beam of an earlier group that has taken it in this step: the paper's Hamming diversity.

    It follows transformers 4.5x, the last that had it built in (`_group_beam_search`,
    `BeamSearchScorer`, `HammingDiversityLogitsProcessor`): the penalty comes after guidance_scale
    and sequence_bias and before every other processor and is part of the scores; only an eos
    ends a sequence before all do; a group is done when it has as many ended sequences as beams and
    the best candidate cannot beat the worst of them; a group that is done takes the pad token,
    which later groups are penalised for as well; the results are the best of all groups together.

    It differs where that was plainly accidental: `beam_indices` are those of the call (there, of
    the group), several eos ids come back as they were chosen (there, as the first of them), no
    eos is added where none was chosen, and a prompt that is done has no say in whether the
    callers' stopping criteria end the call.
    """

    def advance(self, candidates: Candidates, reasons: Sequence[str | None]) -> list[Move]:
        """As `Beams.advance`; here only an eos may be a reason."""
        if self.done:
            return self._pad()
        chosen: list[int] = []
        for rank, reason in enumerate(reasons):
            if reason is None:
                chosen.append(rank)
            elif rank < self.size:
                score = float(self._by_length(float(candidates.scores[rank]), self.new + 1))
                self._add(self._ending(candidates, rank, score, reason))
            if len(chosen) == self.size:
                break
        places = np.array(chosen)
        moves = self._continue(candidates, places, candidates.scores[places])
        self.done = self._settled(float(candidates.scores.max()))
        return moves

    def end(self, reasons: Sequence[str | None]) -> None:
        """Take the running beams for ended ones: nothing goes on."""
        if not self.done:
            for beam, reason in enumerate(reasons):
                score = float(self._by_length(float(self.scores[beam]), self.new))
                self._add(self._hypothesis(score, beam, reason or "length", self.new))
        self.done = True

    def _add(self, hypothesis: Hypothesis) -> None:
        """Keep it if there is room, or in place of the worst."""
        if len(self.ended) < self.size or hypothesis.score > self._worst():
            self.ended.append(hypothesis)
        if len(self.ended) > self.size:
            self.ended.remove(min(self.ended, key=lambda kept: kept.score))

    def _worst(self) -> float:
        return min(kept.score for kept in self.ended)

    def _settled(self, best: float) -> bool:
        """Whether the best candidate, of log-probability `best`, cannot beat what has ended."""
        params, length = self.request.params, self.new
        if len(self.ended) < self.size:
            return False
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self.request.max_length - self.request.prompt_length
        return bool(self._worst() >= self._by_length(best, length))

    def _pad(self) -> list[Move]:
        """Go through the motions until the other groups of the prompt are done."""
        self.ids[:, self.length] = self.request.pad_token_id
        self._beams[:, self.new] = self.places
        self.length += 1
        return []


def search(model: Model, request: Request, chunk: int | None = None) -> Iterator[list[Event]]:
    """Search, and then tell what was found as a batch tells it: step by step, row by row.

    While it searches, it gives an empty list after each chunk of the prompts and each step, so
    that others can take theirs in between.

    Args:
        request: with one row for each sequence that is wanted; its `scores` and `logits` are
            float32 [prompts * num_beams, vocab] a step.
        chunk: tokens of the prompts that are read at a time (see `Prefill`).

    Raises:
        ValueError: knobs that do not fit each other, or scores that leave no token.
    """
    found = _Search(model, request, chunk)
    with contextlib.closing(found):
        for _ in found.steps():
            yield []
    hypotheses = [best for beams in found.results() for best in beams]
    for row, best in zip(request.rows, hypotheses, strict=True):
        row.score, row.beams = best.score, best.beams
        row.finish_reason = None if len(best.tokens) else best.reason
    for step in range(max(len(best.tokens) for best in hypotheses)):
        events = []
        for row, best in zip(request.rows, hypotheses, strict=True):
            if step < len(best.tokens):
                top = found.top[step][int(best.beams[step])] if found.top else None
                if top is not None:
                    request.top_logprobs[row.index].append(top)
                row.push(int(best.tokens[step]))
                row.finish_reason = best.reason if step == len(best.tokens) - 1 else None
                logprob = float(best.logprobs[step]) if request.logprobs else math.nan
                events.append(Event(row, int(best.tokens[step]), logprob, top))
        yield events


def check(request: Request, vocab_size: int) -> None:
    """Raise a ValueError for knobs that do not fit each other."""
    params = request.params
    beams, groups, penalty = params.num_beams, params.num_beam_groups, params.diversity_penalty
    if beams % groups:
        raise ValueError(f"num_beams={beams} must be a multiple of num_beam_groups={groups}")
    if groups > 1 and not penalty > 0:
        raise ValueError(
            f"num_beam_groups={groups} needs a diversity_penalty above 0, got {penalty}: "
            "the groups would all find the same"
        )
    if groups > 1 and params.do_sample:
        raise ValueError(f"num_beam_groups={groups} cannot be sampled: set do_sample=False")
    if _kept(request) > (beams // groups) * vocab_size:
        raise ValueError(
            f"num_beams={beams} with {len(params.eos_token_id or ())} eos_token_id needs "
            f"{_kept(request)} candidates, a vocabulary of {vocab_size} does not have them"
        )


def _kept(request: Request) -> int:
    """How many candidates there are: enough to go on if every likely one ends its sequence."""
    size = request.params.num_beams // request.params.num_beam_groups
    return max(2, 1 + len(request.params.eos_token_id or ())) * size


class _Search:
    """The prompts whose search goes on, and the cache that holds their beams.

    Attributes:
        prompts: for each prompt its groups; one, unless the search is diverse.
        running: those of them whose search goes on.
        together: the processors that all beams go through at once.
        apart: those that each group goes through when its turn comes.
        top: a step: for each beam of the call its likeliest tokens, if `top_logprobs` asks.
    """

    def __init__(self, model: Model, request: Request, chunk: int | None) -> None:
        self.model, self.request = model, request
        self.groups = request.params.num_beam_groups
        self.top: list[dict[int, TopLogprobs]] = []
        # What `output_scores` and `output_logits` show of a prompt goes on after its end.
        self.leave = not (request.keeps_scores or request.keeps_logits)
        # transformers 4.5x has diversity_penalty after guidance_scale and sequence_bias, before the
        # other processors. Without groups there is no such border.
        early = None if self.groups == 1 else ("guidance_scale", "sequence_bias")
        self.together, self.apart = request.split_chain(early)
        # Whether nobody but the search looks at scores, and nothing but bans changes them.
        self.unseen = (
            self.groups == 1
            and self.together.only_bans
            and not (self.together and request.logprobs)
            and not (request.params.do_sample or request.keeps)
            and not (request.criteria or request.stop_text)
        )
        count, beams = len(request.prompts), request.params.num_beams
        # Shortest first, as `prefill` wants them.
        order = np.argsort([len(prompt) for prompt in request.prompts], kind="stable")
        self.running: list[list[Beams]] = []
        for prompt in range(count):
            place = int(np.flatnonzero(order == prompt)[0])
            self.running.append(self._start(prompt, place * beams + np.arange(beams)))
        self.cache = model.borrow_cache(count * beams, request.max_length + CHUNK)
        self.prompts = self.running
        in_order = [request.prompts[i] for i in order]
        before = request.unconditional and request.unconditional.begin(chunk)
        self.prefill = Prefill(model, self.cache, in_order, 0, request.prefix_cache, chunk)
        self.readings = [*([before] if before else []), self.prefill]

    def _start(self, prompt: int, slots: Ids) -> list[Beams]:
        kind, beams = Beams if self.groups == 1 else Group, len(slots)
        size = beams // self.groups
        return [
            kind(self.request, prompt, prompt * beams + start, slots[start : start + size])
            for start in range(0, beams, size)
        ]

    def steps(self) -> Iterator[None]:
        """Search: a chunk of the prompts, or a token of every beam, at a time."""
        for reading in self.readings:
            while not reading.done:
                reading.read()
                yield
        count, beams = len(self.prompts), self.request.params.num_beams
        self.cache.take(np.repeat(np.arange(count), beams))
        self.logits = np.repeat(self.prefill.logits, beams, axis=0)  # float32 [slots, vocab]
        while self.running:
            self._step()
            yield

    def results(self) -> list[list[Hypothesis]]:
        """The sequences of each prompt, best first."""
        return [_best(groups, self.request) for groups in self.prompts]

    def close(self) -> None:
        """Give the cache's memory back to the model."""
        self.model.give_back(self.cache)

    def _step(self) -> None:
        """Choose the next token of every beam, and compute the logits that follow it."""
        over, moves = self._choose_unseen() if self.unseen else self._choose()
        self._finish(over, moves)
        if self.running:
            self._forward()

    def _choose_unseen(self) -> tuple[bool, dict[int, list[Move]]]:
        """As `_choose`, but scores are computed where they may be among the best, nowhere else."""
        beams = [groups[0] for groups in self.running]
        top, norm = normalisers(self.logits)
        if not np.isfinite(top).all():
            return self._choose()
        logits, count = self._banned(beams), _kept(self.request)
        candidates = [
            Candidates(*pick.continuations(logits, top, norm, one.slots, one.scores, count))
            for one in beams
        ]
        reasons = self._reasons(beams, candidates)
        moves = {
            one.prompt: one.advance(options, why)
            for one, options, why in zip(beams, candidates, reasons, strict=True)
        }
        return all(reason for why in reasons for reason in why), moves

    def _banned(self, beams: Sequence[Beams]) -> Scores:
        """float32 [slots, vocab]: the logits, -inf where a processor forbids a token."""
        if not self.together:
            return self.logits
        by_slot = np.argsort(np.concatenate([one.slots for one in beams])).tolist()
        ids, prompts, places = _rows(beams)
        ids = [ids[beam] for beam in by_slot]
        context = context_of_beams(self.request, ids, prompts[by_slot], places[by_slot])
        return self.together(context, self.logits, spare=True)

    def _choose(self) -> tuple[bool, dict[int, list[Move]]]:
        """Continue every prompt's beams: whether the search is over, and what has to be moved."""
        everyone = [one for groups in self.running for one in groups]
        logits = self.logits[np.concatenate([one.slots for one in everyone])]
        scores = log_softmax(logits)
        if self.together:
            context = context_of_beams(self.request, *_rows(everyone))
            scores = self.together(context, scores, spare=True)
        moves: dict[int, list[Move]] = {}
        seen = []
        for group in range(self.groups):
            beams = [groups[group] for groups in self.running]
            mine = self._of_group(group, beams, scores)
            seen.append(mine)
            if len(seen) == self.groups:  # before anyone's criteria look at them
                self._keep(everyone, logits, seen)
            candidates = self._candidates(beams, mine)
            reasons = self._reasons(beams, candidates)
            for one, options, why in zip(beams, candidates, reasons, strict=True):
                moves.setdefault(one.prompt, []).extend(one.advance(options, why))
        if self.groups == 1:
            return all(reason for why in reasons for reason in why), moves
        return self._end_groups(), moves

    def _of_group(self, group: int, beams: Sequence[Beams], scores: Scores) -> Scores:
        """float32 [beams of the group, vocab]: what a group chooses from.

        A token loses `diversity_penalty` for each beam of an earlier group that has just taken it.
        """
        if self.groups == 1:
            return scores
        mine = scores.reshape(len(self.running), self.groups, -1, scores.shape[1])[:, group].copy()
        penalty = np.float32(self.request.params.diversity_penalty)
        for rows, groups in zip(mine, self.running, strict=True):
            taken = [token for one in groups[:group] for token in one.histories[:, -1].tolist()]
            for token in taken:
                rows[:, token] -= penalty
        mine = mine.reshape(-1, scores.shape[1])
        if not self.apart:
            return mine
        return self.apart(context_of_beams(self.request, *_rows(beams)), mine, spare=True)

    def _candidates(self, beams: Sequence[Beams], scores: Scores) -> list[Candidates]:
        """For each prompt the best continuations of its beams, or a draw among them."""
        norms, size = self._norms(scores), beams[0].size
        return [
            self._candidates_of(one, scores[at : at + size], norms[at : at + size])
            for one, at in zip(beams, range(0, len(scores), size), strict=True)
        ]

    def _candidates_of(self, beams: Beams, scores: Scores, norms: Scores) -> Candidates:
        with np.errstate(over="ignore"):  # scores may be as large as a caller's processor likes
            total = (scores + beams.scores[:, None]).ravel()
        count = _kept(self.request)
        # A constraint may leave nothing: then the search of this prompt is over.
        nothing = self.request.constraint is not None and total.max() == -np.inf
        if self.request.params.do_sample and not nothing:
            draws = self.request.draws(beams.new, beams.prompt, len(total))
            drawn = pick.sample_several(total, draws, count)
            places = drawn[np.argsort(-total[drawn], kind="stable")]
        else:
            places = pick.largest(total, count)
        parents, tokens = np.divmod(places, scores.shape[1])
        logprobs = scores[parents, tokens] - norms[parents]
        return Candidates(total[places], parents, tokens, logprobs)

    def _norms(self, scores: Scores) -> Scores:
        """float32 [beams]: what makes scores log-probabilities, where somebody asks for them."""
        if not (self.request.logprobs and self.request.chain):
            return np.zeros(len(scores), np.float32)
        top = scores.max(axis=1)
        alive = top > -np.inf  # a constraint may leave a beam nothing
        top = np.where(alive, top, 0)
        sums = np.exp(scores - top[:, None]).sum(axis=1)
        return np.asarray(top + np.log(np.where(alive, sums, 1)), np.float32)

    def _reasons(
        self, beams: Sequence[Beams], candidates: Sequence[Candidates]
    ) -> list[list[str | None]]:
        """For each prompt, why each of its candidates [K] ends; None where it goes on."""
        eos, count = self.request.eos, len(candidates[0].tokens)
        if self.groups > 1:
            others: list[str | None] = [None] * (count * len(beams))
        else:

            def rows() -> Ids:
                pairs = zip(beams, candidates, strict=True)
                return np.concatenate([one.continued(mine) for one, mine in pairs])

            others = self._other_reasons(beams[0].length + 1, count * len(beams), rows)
        return [
            [
                "eos" if token in eos else other
                for token, other in zip(mine.tokens.tolist(), others[at : at + count], strict=True)
            ]
            for mine, at in zip(candidates, range(0, len(others), count), strict=True)
        ]

    def _other_reasons(self, length: int, count: int, rows: Callable[[], Ids]) -> list[str | None]:
        """Why each of `count` sequences of `length` ends, apart from an eos.

        Args:
            rows: gives their ids, int64 [count, length]; only asked if somebody looks at them.
        """
        request, nobody = self.request, [False] * count
        text, criterion = nobody, nobody
        if request.stop_text is not None or request.criteria:
            ids = rows()
            if request.stop_text is not None:
                text = [request.stop_text(row) for row in ids]
            if request.criteria:
                scores = tuple(request.scores) if request.keeps_scores else None
                criterion = stop.asked(request.criteria, ids, scores).tolist()
        limit: list[str | None] = ["length" if length >= request.max_length else None] * count
        form = request.constraint
        if form is not None and (limit[0] or not form.ends):
            whole = [form.complete(row[request.prompt_length :]) for row in rows()]
            limit = ["grammar" if is_whole else limit[0] for is_whole in whole]
        late = "time" if request.deadline.passed() else None
        return [
            "stop_string" if by_text else by_limit or ("criterion" if by_criterion else late)
            for by_text, by_limit, by_criterion in zip(text, limit, criterion, strict=True)
        ]

    def _end_groups(self) -> bool:
        """End all groups if the callers' criteria, the clock or the length end all their beams."""
        going = [one for groups in self.running for one in groups if not one.done]
        if not going:
            return True
        size = going[0].size

        def rows() -> Ids:
            return np.concatenate([one.histories for one in going])

        reasons = self._other_reasons(going[0].length, size * len(going), rows)
        if not all(reasons):
            return False
        for at, one in enumerate(going):
            assert isinstance(one, Group)
            one.end(reasons[at * size : (at + 1) * size])
        return True

    def _keep(self, beams: Sequence[Beams], logits: Scores, seen: Sequence[Scores]) -> None:
        """Record what `output_logits`, `output_scores` and `top_logprobs` ask for.

        Args:
            beams: those of all running prompts, group by group.
            logits: float32 [beams, vocab], as the model gave them.
            seen: for each group float32 [prompts * size, vocab], what it chose from.
        """
        request, params = self.request, self.request.params
        if request.keeps_logits:
            request.logits.append(logits)
        if not (request.keeps_scores or params.top_logprobs):
            return
        shape = (len(self.running), -1, logits.shape[1])
        scores = np.concatenate([rows.reshape(shape) for rows in seen], axis=1)
        scores = scores.reshape(logits.shape)
        if request.keeps_scores:
            request.scores.append(scores)
        if params.top_logprobs:
            places = np.concatenate([one.places for one in beams]).tolist()
            best = map(tuple, pick.top_logprobs(scores, params.top_logprobs))
            self.top.append(dict(zip(places, best, strict=True)))

    def _finish(self, over: bool, moves: Mapping[int, Sequence[Move]]) -> None:
        """Let go of the prompts that are done, of all if the search is over; move the rest."""
        done = [all(one.done for one in groups) for groups in self.running]
        if over or all(done):
            self.running = []
            return
        slots = sum(one.size for groups in self.running for one in groups)
        if self.leave and any(done):
            keep = [groups for groups, gone in zip(self.running, done, strict=True) if not gone]
            self.running = keep
        self._apply([move for groups in self.running for move in moves[groups[0].prompt]], slots)
        if sum(one.size for groups in self.running for one in groups) < slots:
            self._move_up()

    def _move_up(self) -> None:
        """Fill the slots of prompts that are gone, with as few copies as possible."""
        beams = [one for groups in self.running for one in groups]
        slots = np.concatenate([one.slots for one in beams])
        free = np.setdiff1d(np.arange(len(slots)), slots)
        late = slots[slots >= len(slots)]
        moved = dict(zip(late.tolist(), free.tolist(), strict=True))
        for one in beams:
            one.slots = np.array([moved.get(slot, slot) for slot in one.slots.tolist()])
        self._apply([Move(slot, source, 0) for source, slot in moved.items()], len(slots))

    def _apply(self, moves: Sequence[Move], slots: int) -> None:
        """Make these copies in the cache and keep its first `slots` slots."""
        parents, starts = np.arange(slots), np.zeros(slots, np.int64)
        for slot, source, start in moves:
            parents[slot], starts[slot] = source, start
        self.cache.take(parents, starts)

    def _forward(self) -> None:
        """Compute the logits, float32 [slots, vocab], of the beams' last tokens."""
        last = np.empty(sum(one.size for groups in self.running for one in groups), np.int64)
        for groups in self.running:
            for one in groups:
                last[one.slots] = one.histories[:, -1]
        self.logits = self.model.forward(list(last[:, None]), self.cache)[:, 0]
        self.cache.forget(0, len(last))


def _rows(beams: Sequence[Beams]) -> tuple[list[Ids], Ids, Ids]:
    """Of each beam its ids so far [length], its prompt and its place among those of the call."""
    return (
        [ids for one in beams for ids in one.histories],
        np.repeat([one.prompt for one in beams], beams[0].size),
        np.concatenate([one.places for one in beams]),
    )


def _best(groups: Sequence[Beams], request: Request) -> list[Hypothesis]:
    """The best sequences of a prompt, of all its groups."""
    if len(groups) == 1:
        return groups[0].results()
    ended = [hypothesis for one in groups for hypothesis in one.ended]
    # Of equals the one that came last, as there.
    ended = sorted(ended, key=lambda hypothesis: hypothesis.score)[::-1]
    if request.constraint is not None:  # what it rules out is no answer, where there are no others
        nothing = groups[0].nothing()
        ended = [one if one.score > -math.inf else nothing for one in ended]
    return ended[: request.params.num_return_sequences]
