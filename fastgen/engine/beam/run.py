"""A search from its prompts to its tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

from fastgen.engine.beam.diverse import DiverseSearch
from fastgen.engine.beam.hypotheses import Hypothesis
from fastgen.engine.beam.plain import BeamSearch
from fastgen.engine.beam.search import TopLogprobs, kept
from fastgen.engine.model import Model
from fastgen.engine.prefill import WHOLE, Chunks
from fastgen.engine.request import Request, Row
from fastgen.engine.step import Event, Kind, Step


def search(model: Model, request: Request, chunks: Chunks = WHOLE) -> Iterator[Step]:
    """Search; the last step has all tokens, in the order in which a batch would have made them.

    Args:
        request: with one row for each sequence that is wanted; its `scores` and `logits` are
            float32 [prompts * num_beams, vocab] a step.
        chunks: tokens that are read at a time.

    Raises:
        ValueError: knobs that do not fit each other, or scores that leave no token.
    """
    kind = BeamSearch if request.params.num_beam_groups == 1 else DiverseSearch
    searching = kind(model, request, chunks)
    with contextlib.closing(searching):
        yield from searching.steps()
    yield Step(Kind.TOKENS, _events(request, searching.results(), searching.top))


def _events(
    request: Request, sequences: Sequence[Hypothesis], top: Sequence[dict[int, TopLogprobs]]
) -> list[Event]:
    """Give each row its sequence, step by step, row by row.

    Args:
        top: see `Search`.
    """
    events = []
    for step in range(max(len(best.tokens) for best in sequences)):
        for row, best in zip(request.rows, sequences, strict=True):
            if step < len(best.tokens):
                likeliest = top[step][int(best.beams[step])] if top else None
                events.append(_event(row, best, step, likeliest))
    for row, best in zip(request.rows, sequences, strict=True):
        row.score, row.beams = best.score, best.beams
        row.end(best.reason)
    return events


def _event(row: Row, best: Hypothesis, step: int, likeliest: TopLogprobs | None) -> Event:
    """Let `row` have the token of `best` at `step`."""
    if likeliest is not None:
        row.request.top_logprobs[row.index].append(likeliest)
    token = int(best.tokens[step])
    row.push(token)
    logprob = float(best.logprobs[step]) if row.request.logprobs else math.nan
    return Event(row, token, logprob, likeliest)


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
    if kept(request) > (beams // groups) * vocab_size:
        raise ValueError(
            f"num_beams={beams} with {len(params.eos_token_id or ())} eos_token_id needs "
            f"{kept(request)} candidates, a vocabulary of {vocab_size} does not have them"
        )
