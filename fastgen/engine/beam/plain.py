"""Beam search and beam sampling as transformers 5.24's `_beam_search` does them.

The same tokens, `sequences_scores` and `beam_indices`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastgen.engine.beam.hypotheses import DEAD, Beams, Candidates, Hypothesis, Ids, Scores
from fastgen.engine.beam.search import Moves, Search, kept
from fastgen.engine.model import Model
from fastgen.engine.prefill import Chunks
from fastgen.engine.request import Request, context_of_beams
from fastgen.engine.slots import Move
from fastgen.sampling import sampler
from fastgen.sampling.processors import Chain
from fastgen.sampling.softmax import normalisers


class PromptBeams(Beams):
    """The beams of one prompt; `ended` is in order, best first."""

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
        moves = self.go_on(candidates, chosen, running[chosen])
        self.done = self.done or not self._improvable() or self._closed()
        return moves

    def results(self) -> list[Hypothesis]:
        """`num_return_sequences` sequences, best first."""
        missing = self.request.params.num_return_sequences - len(self.ended)
        every = self.ended + [self.nothing()] * missing
        return every[: self.request.params.num_return_sequences]

    def _accept(self, candidates: Candidates, reasons: Sequence[str | None]) -> None:
        """Keep those that ended, were among the first and are better than those that are kept."""
        if self.done:
            return
        for rank, reason in enumerate(reasons[: self.size]):
            if reason is not None:
                score = self.penalised(candidates.scores[rank], self.new + 1)
                if score >= DEAD:  # a text that is there already is better than none
                    self.ended.append(self.completed(candidates, rank, float(score), reason))
        self.ended.sort(key=lambda hypothesis: -hypothesis.score)
        del self.ended[self.size :]

    def _improvable(self) -> bool:
        """True if the best running beam could still become better than the worst that ended.

        "never" supposes it as long as it may get; else its present length counts.
        """
        params, length = self.request.params, self.new
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self.request.max_length - self.request.prompt_length
        worst = np.float32(self.ended[-1].score) if len(self.ended) == self.size else DEAD
        return bool(self.penalised(self.scores[0], length) > worst)

    def _closed(self) -> bool:
        return self.request.params.early_stopping is True and len(self.ended) == self.size


class BeamSearch(Search[PromptBeams]):
    """The search of all prompts."""

    def __init__(self, model: Model, request: Request, chunks: Chunks) -> None:
        super().__init__(model, request, chunks, PromptBeams, request.chain or Chain())
        # Whether nobody but the search looks at scores, and nothing but bans changes them.
        self._unseen = (
            self.chain.only_bans
            and not (self.chain and request.logprobs)
            and not (request.params.do_sample or request.keeps)
            and not (request.criteria or request.stop_text)
        )

    def choose(self) -> tuple[bool, Moves]:
        """As `Search.choose`."""
        beams = [prompt_beams for (prompt_beams,) in self.running]
        candidates = self._likeliest(beams) if self._unseen else None
        if candidates is None:
            logits, scores = self.scored(beams)
            self.keep(beams, logits, [scores])
            candidates = self.candidates(beams, scores)
        reasons = self._reasons(beams, candidates)
        moves = {
            mine.prompt: mine.advance(options, why)
            for mine, options, why in zip(beams, candidates, reasons, strict=True)
        }
        return all(reason for why in reasons for reason in why), moves

    def best(self, groups: Sequence[PromptBeams]) -> list[Hypothesis]:
        """As `Search.best`."""
        (beams,) = groups
        return beams.results()

    def _likeliest(self, beams: Sequence[PromptBeams]) -> list[Candidates] | None:
        """As `candidates`, but scores are computed where they may be among the best only.

        None where a beam has no finite logit: then all have to be looked at.
        """
        top, norm = normalisers(self.logits)
        if not np.isfinite(top).all():
            return None
        logits, count = self._banned(beams), kept(self.request)
        return [
            Candidates(*sampler.continuations(logits, top, norm, mine.slots, mine.scores, count))
            for mine in beams
        ]

    def _banned(self, beams: Sequence[PromptBeams]) -> Scores:
        """float32 [slots, vocab]: the logits, -inf where a processor forbids a token."""
        if not self.chain:
            return self.logits
        by_slot = np.argsort(np.concatenate([mine.slots for mine in beams]))
        ids = [ids for mine in beams for ids in mine.histories]
        prompts = np.repeat([mine.prompt for mine in beams], beams[0].size)
        indices = np.concatenate([mine.indices for mine in beams])
        context = context_of_beams(
            self.request, [ids[beam] for beam in by_slot], prompts[by_slot], indices[by_slot]
        )
        return self.chain(context, self.logits, spare=True)

    def _reasons(
        self, beams: Sequence[PromptBeams], candidates: Sequence[Candidates]
    ) -> list[list[str | None]]:
        """For each prompt, the reason that ends each of its candidates [K]; None for none."""

        def rows() -> Ids:
            pairs = zip(beams, candidates, strict=True)
            return np.concatenate([mine.continued(options) for mine, options in pairs])

        count = len(candidates[0].tokens) * len(beams)
        return self.eos_or(candidates, self.other_reasons(beams[0].length + 1, count, rows))
