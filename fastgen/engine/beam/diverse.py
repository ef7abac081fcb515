"""Diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424; AAAI 2018).

transformers has moved it to remote code; `Group` says what it follows here, and where it differs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastgen.engine.beam.hypotheses import Beams, Candidates, Hypothesis, Ids, Scores
from fastgen.engine.beam.search import Moves, Search
from fastgen.engine.model import Model
from fastgen.engine.prefill import Chunks
from fastgen.engine.request import Request
from fastgen.engine.slots import Move

# transformers 4.5x has diversity_penalty after these, and before the other processors.
EARLY = ("guidance_scale", "sequence_bias")


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
                score = float(self.penalised(float(candidates.scores[rank]), self.new + 1))
                self._add(self.completed(candidates, rank, score, reason))
            if len(chosen) == self.size:
                break
        going_on = np.array(chosen)
        moves = self.go_on(candidates, going_on, candidates.scores[going_on])
        self.done = self._settled(float(candidates.scores.max()))
        return moves

    def end(self, reasons: Sequence[str | None]) -> None:
        """Take the running beams for ended ones: nothing goes on."""
        if not self.done:
            for beam, reason in enumerate(reasons):
                score = float(self.penalised(float(self.scores[beam]), self.new))
                self._add(self.hypothesis(score, beam, reason or "length", self.new))
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
        """True if the best candidate, of log-probability `best`, cannot beat what has ended."""
        params, length = self.request.params, self.new
        if len(self.ended) < self.size:
            return False
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self.request.max_length - self.request.prompt_length
        return bool(self._worst() >= self.penalised(best, length))

    def _pad(self) -> list[Move]:
        """Go through the motions until the other groups of the prompt are done."""
        self.ids[:, self.length] = self.request.pad_token_id
        self._beams[:, self.new] = self.indices
        self.length += 1
        return []


class DiverseSearch(Search[Group]):
    """The search of all prompts, whose groups take their turns in each step."""

    def __init__(self, model: Model, request: Request, chunks: Chunks) -> None:
        early, self._late = request.split_chain(EARLY)
        super().__init__(model, request, chunks, Group, early)

    def choose(self) -> tuple[bool, Moves]:
        """As `Search.choose`."""
        everyone = [group for groups in self.running for group in groups]
        logits, scores = self.scored(everyone)
        moves: dict[int, list[Move]] = {}
        seen: list[Scores] = []
        for turn in range(self.groups):
            beams = [groups[turn] for groups in self.running]
            seen.append(self._of_group(turn, beams, scores))
            if len(seen) == self.groups:  # before anyone's criteria look at them
                self.keep(everyone, logits, seen)
            candidates = self.candidates(beams, seen[-1])
            count = len(candidates[0].tokens) * len(beams)
            reasons = self.eos_or(candidates, [None] * count)
            for group, options, why in zip(beams, candidates, reasons, strict=True):
                moves.setdefault(group.prompt, []).extend(group.advance(options, why))
        return self._ended(), moves

    def best(self, groups: Sequence[Group]) -> list[Hypothesis]:
        """As `Search.best`: of all groups of the prompt together."""
        ended = [hypothesis for group in groups for hypothesis in group.ended]
        # Of equals the one that came last, as there.
        ended = sorted(ended, key=lambda hypothesis: hypothesis.score)[::-1]
        if self.request.constraint is not None:
            # What a constraint rules out is no answer, where there are no others.
            nothing = groups[0].nothing()
            ended = [
                hypothesis if hypothesis.score > -math.inf else nothing for hypothesis in ended
            ]
        return ended[: self.request.params.num_return_sequences]

    def _of_group(self, turn: int, beams: Sequence[Group], scores: Scores) -> Scores:
        """float32 [beams of the group, vocab]: the scores that a group chooses from.

        A token loses `diversity_penalty` for each beam of an earlier group that has just taken it.
        """
        vocab = scores.shape[1]
        mine = scores.reshape(len(self.running), self.groups, -1, vocab)[:, turn].copy()
        penalty = np.float32(self.request.params.diversity_penalty)
        for rows, groups in zip(mine, self.running, strict=True):
            taken = [token for group in groups[:turn] for token in group.histories[:, -1].tolist()]
            for token in taken:
                rows[:, token] -= penalty
        mine = mine.reshape(-1, vocab)
        return self._late(self.context(beams), mine, spare=True) if self._late else mine

    def _ended(self) -> bool:
        """End all groups if the callers' criteria, the clock or the length end all their beams."""
        going = [group for groups in self.running for group in groups if not group.done]
        if not going:
            return True
        size = going[0].size

        def rows() -> Ids:
            return np.concatenate([group.histories for group in going])

        reasons = self.other_reasons(going[0].length, size * len(going), rows)
        if not all(reasons):
            return False
        for at, group in enumerate(going):
            group.end(reasons[at * size : (at + 1) * size])
        return True
