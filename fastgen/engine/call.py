"""One call of `generate`, checked and ready to run (see `prepare`)."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.engine import speculative
from fastgen.engine.batch import Batch
from fastgen.engine.model import Model
from fastgen.engine.output import GenerateOutput
from fastgen.engine.prefill import WHOLE, Chunks
from fastgen.engine.request import Request
from fastgen.engine.step import Event, Kind, Step
from fastgen.inputs import validators
from fastgen.inputs.prompt import Prompts


@dataclass(eq=False)
class Call:
    """One call, ready to run.

    Attributes:
        draft: guesses tokens, if anything does.
        cautions: what the caller is to be warned of: its lengths and its padding.
    """

    model: Model
    request: Request
    prompts: Prompts
    draft: speculative.Draft | None = None
    cautions: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """The parts of the form that was asked for to which the text is not held."""
        return () if self.request.constraint is None else self.request.constraint.notes

    @property
    def searches(self) -> bool:
        """True if it has a cache of its own: its rows are compared, or their tokens guessed."""
        params = self.request.params
        return params.num_beams > 1 or params.num_beam_groups > 1 or self.draft is not None

    @property
    def done(self) -> bool:
        """True once all its rows have ended."""
        return self.request.done

    @property
    def error(self) -> Exception | None:
        """The error that ended it, if something went wrong."""
        return self.request.error

    def steps(self, chunks: Chunks = WHOLE) -> Generator[Step]:
        """Run it, step by step. The tokens of beams come in the last step.

        Args:
            chunks: tokens that a step may read.

        Raises:
            Exception: what a caller's function raises, or a ValueError: no token can be chosen.
        """
        if self.draft is None and self.searches:
            from fastgen.engine.beam import run as beams  # late: a process starts sooner without

            yield from beams.search(self.model, self.request, chunks)
        else:
            yield from self._batch_steps(chunks)

    def _batch_steps(self, chunks: Chunks) -> Generator[Step]:
        """Run it in a batch of its own."""
        if self.draft is None:
            batch = Batch(self.model, chunks)
        else:
            # An assistant keeps to transformers' rules, as asked.
            by_itself = isinstance(self.draft, speculative.Assistant)
            budget = None if by_itself else speculative.SpeculationBudget()
            batch = speculative.Speculation(self.model, self.draft, budget, chunks)
        with contextlib.closing(batch):
            joining = batch.begin([self.request])
            batch.read(joining)
            while joining in batch.joining:
                yield Step(Kind.READ)
                batch.read(joining)
            while batch.rows:
                events = batch.step()
                if self.request.error is not None:
                    raise self.request.error
                yield Step(Kind.TOKENS, events)

    def tell(self, streamer: Any) -> None:
        """Run it, and give a streamer the prompt and then every step's tokens.

        They come as transformers puts them: the prompt's rows, then int64 [rows] a step, or
        int64 [1, new] where tokens are guessed; tensors if the ids came as one.
        """
        if not callable(getattr(streamer, "put", None)) or not callable(
            getattr(streamer, "end", None)
        ):
            raise ValueError(
                f"streamer must have put(ids) and end(), got {validators.shown(streamer)}"
            )
        if self.request.params.num_beams > 1:
            raise ValueError(
                f"streamer cannot be used with num_beams={self.request.params.num_beams}: beams "
                "change until the end"
            )
        rows = len(self.request.rows)
        if self.draft is not None and rows > 1:
            raise ValueError(
                f"streamer cannot follow {rows} rows that advance by different numbers of guessed "
                "tokens: use one row, or CausalLM.stream"
            )
        ids = self.prompts.ids
        self.request.forces = False  # a step is a token of each row
        streamer.put(self.prompts.array(np.repeat(ids, rows // len(ids), axis=0)))
        for step in self.steps():
            if step.kind is Kind.TOKENS:
                new = step.events
                tokens = _column(self.request, new) if self.draft is None else _tokens(new)
                streamer.put(self.prompts.array(tokens))
        streamer.end()

    def result(self) -> Any:
        """The result of `generate`, once all steps are through."""
        request, array = self.request, self.prompts.array
        params = request.params
        sequences = self.prompts.give_back(request.sequences())
        if not params.return_dict_in_generate:
            return sequences
        beams = params.num_beams > 1
        scored = beams and params.output_scores
        # A row that went on after its end may have gone further than the longest.
        new = None if beams else request.width - request.prompt_length
        return GenerateOutput(
            sequences=sequences,
            scores=tuple(map(array, request.scores[:new])) if params.output_scores else None,
            logits=tuple(map(array, request.logits[:new])) if params.output_logits else None,
            sequences_scores=array(request.sequences_scores()) if scored else None,
            beam_indices=array(request.beam_indices()) if beams else None,
            finish_reasons=[row.finish_reason or "" for row in request.rows],
            top_logprobs=request.top_logprobs if params.top_logprobs else None,
        )


def _column(request: Request, events: Sequence[Event]) -> NDArray[np.int64]:
    """int64 [rows]: the new token of each row, padding for those that have ended."""
    out = np.full(len(request.rows), request.pad_token_id, np.int64)
    for event in events:
        out[event.row.index] = event.token
    return out


def _tokens(events: Sequence[Event]) -> NDArray[np.int64]:
    """int64 [1, new]: the new tokens of the only row."""
    return np.array([[event.token for event in events]], np.int64)
