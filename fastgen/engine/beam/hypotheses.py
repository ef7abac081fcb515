"""The running beams of a search, and the sequences that have ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.request import Request
from fastgen.engine.slots import Move

Scores = NDArray[np.float32]
Ids = NDArray[np.int64]

DEAD = np.float32(-1e9)  # added to the score of what may not go on, as transformers does


class Candidates(NamedTuple):
    """The best continuations [K] of the beams of one prompt, best first."""

    scores: Scores  # log-probability of the whole sequence, without a length penalty
    parents: Ids  # the beam that is continued, counted within the prompt (or the group)
    tokens: Ids
    logprobs: Scores  # of the token alone


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
    """The running beams of one prompt, or of one group of them, and the best of what has ended.

    The rules of a search (which candidates go on, which are kept when they have ended, when
    nothing can change any more) are those of `plain.PromptBeams` and of `diverse.Group`.

    Attributes:
        prompt: the index of its prompt in the call.
        first: the index of its first beam among all beams of the call.
        slots: int64 [size], where in the cache each beam is.
        scores: float32 [size]. At first the beams are one: all but beam 0 count as dead.
        ids: int64 [size, max_length], prompts with their padding, then what was generated.
        length: how much of `ids` there is.
        ended: what has ended; `size` at most.
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
        """The number of tokens that were generated."""
        return self.length - self.request.prompt_length

    @property
    def histories(self) -> Ids:
        """int64 [size, length]: the beams so far."""
        return self.ids[:, : self.length]

    @property
    def indices(self) -> Ids:
        """int64 [size]: the index of each beam among all beams of the call."""
        return self.first + np.arange(self.size)

    def continued(self, candidates: Candidates) -> Ids:
        """int64 [K, length + 1]: the sequences that the candidates would make."""
        ids = self.histories[candidates.parents]
        return np.concatenate((ids, candidates.tokens[:, None]), axis=1)

    def penalised(self, score: Any, length: int) -> Any:
        """A score over its length penalty, in its own precision."""
        try:
            penalty = float(length**self.request.params.length_penalty)
        except OverflowError:
            penalty = math.inf
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            return np.divide(score, penalty, dtype=np.result_type(score))

    def nothing(self) -> Hypothesis:
        """The sequence that stands where fewer sequences were found than were wanted."""
        return self.hypothesis(float(DEAD), 0, "length", 0)

    def completed(self, candidates: Candidates, rank: int, score: float, reason: str) -> Hypothesis:
        """The sequence that candidate `rank` completes."""
        parent = int(candidates.parents[rank])
        before = self.hypothesis(score, parent, reason, self.new)
        return Hypothesis(
            score=score,
            tokens=np.append(before.tokens, candidates.tokens[rank]),
            beams=np.append(before.beams, np.int32(self.first + parent)),
            logprobs=np.append(before.logprobs, candidates.logprobs[rank]),
            reason=reason,
        )

    def hypothesis(self, score: float, beam: int, reason: str, new: int) -> Hypothesis:
        """`new` tokens of a running beam as a sequence that has ended."""
        start = self.request.prompt_length
        return Hypothesis(
            score=score,
            tokens=self.ids[beam, start : start + new].copy(),
            beams=self._beams[beam, :new].copy(),
            logprobs=self._logprobs[beam, :new].copy(),
            reason=reason,
        )

    def go_on(self, candidates: Candidates, chosen: Ids, scores: Scores) -> list[Move]:
        """Make the chosen candidates the running beams; returns the copies that the cache needs."""
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
        """Deal the slots out: the first child of a parent stays in its slot."""
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
        """The leading tokens of the cache that two beams share (padding is not in the cache)."""
        start = self.request.prompt_length
        differ = self.ids[one, start : self.length] != self.ids[other, start : self.length]
        alike = int(differ.argmax()) if differ.any() else self.new
        return len(self.request.prompts[self.prompt]) + alike
