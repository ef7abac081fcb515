"""The rows of one call, and what they share: knobs, processors, chance and limits."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.guidance import Unconditional
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.inputs.params import Params
from fastgen.sampling import sampler
from fastgen.sampling.constraint import Constraint
from fastgen.sampling.processors import Chain, Context
from fastgen.sampling.stop import Criterion, Deadline, StopText


class State(enum.Enum):
    """The states of a row, in their order; some rows leave out one or the other."""

    WAITING = "its prompt is being read, or its beams are being searched"
    RUNNING = "it gets tokens"
    LINGERING = "it has ended, and gets tokens until all rows of its request have ended"
    FINISHED = "it gets no more tokens"


# By name, since every row asks at every step: looking into an Enum takes as long as comparing.
WAITING, RUNNING, LINGERING, FINISHED = State


@dataclass(eq=False)
class Row:
    """One sequence while it grows.

    Attributes:
        index: of the row in the call, and so in the result.
        prompt: int64, the tokens that the model sees, without padding.
        ids: int64 [max_length], the prompt as given (padding included), then what was generated.
        length: how much of `ids` there is.
        width: of a row that has ended, how much there was then (it may linger).
        logits: float32 [vocab] for the next token, when they are known already.
        state: see `State`.
        finish_reason: set once it has ended (see `output.Token`).
        score: of beam search: its log-probability over its length penalty.
        beams: of beam search: int32 [new], the beam of the call that each token continued.
    """

    request: Request
    index: int
    prompt: NDArray[np.int64]
    ids: NDArray[np.int64]
    length: int
    pad: int
    width: int = 0
    logits: NDArray[np.float32] | None = None
    state: State = WAITING
    finish_reason: str | None = None
    score: float = float("nan")
    beams: NDArray[np.int32] | None = None

    @property
    def history(self) -> NDArray[np.int64]:
        """int64 [length]: the ids so far."""
        return self.ids[: self.length]

    @property
    def generated(self) -> NDArray[np.int64]:
        """int64 [new]: what was generated so far."""
        return self.ids[self.request.prompt_length : self.length]

    @property
    def seen(self) -> NDArray[np.int64]:
        """int64: what the model has seen or will see, the padding left out."""
        return np.concatenate([self.prompt, self.generated])

    def after(self, guess: Sequence[int] | NDArray[np.int64]) -> Row:
        """This row as it would be if `guess` came next; for looking ahead."""
        ids = np.concatenate([self.history, np.asarray(guess, np.int64)])
        return Row(self.request, self.index, self.prompt, ids, len(ids), self.pad)

    def unread(self, held: int) -> NDArray[np.int64]:
        """int64 [new]: what the model has not seen of it, if it has seen `held` tokens."""
        seen = len(self.prompt) + self.length - self.request.prompt_length
        return self.ids[self.length - (seen - held) : self.length]

    def push(self, token: int) -> None:
        self.ids[self.length] = token
        self.length += 1

    def end(self, reason: str | None) -> None:
        """End it here, if there is a reason and it has not ended before."""
        if reason is not None and self.finish_reason is None:
            self.finish_reason, self.width = reason, self.length
            self.state = LINGERING if self.request.lingers else FINISHED

    def begin(self) -> None:
        """Let it run, unless it has ended while it waited."""
        if self.state is WAITING:
            self.state = RUNNING

    def gets_tokens(self) -> bool:
        """True while it runs or lingers; a row that has lingered long enough finishes here."""
        if self.state is LINGERING:
            request = self.request
            if self.length >= (request.width if request.done else request.max_length):
                self.state = FINISHED
        return self.state is not FINISHED


@dataclass(eq=False)
class Request:
    """The rows of one call and what they share.

    Attributes:
        prompt_length: width of the prompt, padding included.
        max_length: length, padding included, at which rows end.
        chain: the processors; None where there is nothing to do. Requests with equal knobs may
            share one, and rows that share one are processed together.
        constraint: what the text of each row has to be, if anything.
        forces: whether tokens that are certain by `constraint` are taken without a step.
        unconditional: what classifier-free guidance steers away from, if it does.
        prefix_cache: where keys and values of the prompts are kept across calls, if anywhere.
        torch: the module, where the caller works with tensors and its generator is ours.
        lingers: whether rows that have ended get tokens until all have ended: transformers' way
            where no end of text is known.
        streams: the source of chance: one for all rows, or one for each; empty when greedy.
        scores, logits: a step: float32 [rows, vocab], if asked for.
        top_logprobs: a row: a step: the likeliest tokens, if asked for.
        started: when its prompts were begun to be read, where it has waited for that
            (`time.perf_counter`).
        cached_tokens: tokens of its prompts that `prefix_cache` knew.
        error: what ended its rows, if something went wrong while a token was chosen.
    """

    params: Params
    prompts: Sequence[NDArray[np.int64]]
    padded: NDArray[np.int64]
    pads: NDArray[np.int64]
    max_length: int
    chain: Chain | None = None
    criteria: Sequence[Criterion] = ()
    stop_text: StopText | None = None
    constraint: Constraint | None = None
    forces: bool = False
    unconditional: Unconditional | None = None
    logprobs: bool = False  # whether tokens carry their log-probability
    of_model: bool = False  # whether that is the model's own, and not of the processed scores
    prefix_cache: PrefixCache | None = None
    torch: Any | None = None
    streams: list[sampler.Stream] = field(default_factory=list)
    scores: list[NDArray[np.float32]] = field(default_factory=list)
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        params = self.params
        self.prompt_length = int(self.padded.shape[1])
        self.error: Exception | None = None
        self.started: float | None = None
        self.cached_tokens = 0
        self.deadline = Deadline(params.max_time)
        self.eos = frozenset(params.eos_token_id or ())
        knows_ends = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        self.lingers = self.constraint is None and not self.eos and not knows_ends
        for i, prompt in enumerate(self.prompts):
            for copy in range(self.copies):
                ids = np.zeros(self.max_length, np.int64)
                ids[: self.prompt_length] = self.padded[i]
                pad = int(self.pads[i])
                row = Row(self, i * self.copies + copy, prompt, ids, self.prompt_length, pad)
                self.rows.append(row)
        self.top_logprobs: list[list[tuple[tuple[int, float], ...]]] = [[] for _ in self.rows]
        if params.do_sample:
            alone = self.rows if params.num_beams == 1 else self.prompts  # beams draw together
            self.streams = streams(params.seed, len(alone), self.torch)

    @property
    def copies(self) -> int:
        """Rows of each prompt."""
        return self.params.num_return_sequences

    @property
    def pad_token_id(self) -> int:
        """The token that fills rows which end early: the pad token, or the first end-of-text token.

        transformers' beam search takes a pad token of 0 for none, and without an end of text
        it fills with -1 (`pad_token_id or eos_token_id[0] if eos_token_id is not None else -1`).
        """
        pad, eos = self.params.pad_token_id, self.params.eos_token_id
        if self.params.num_beams > 1 and self.params.num_beam_groups == 1:
            return (pad or eos[0]) if eos else -1
        if pad is not None:
            return pad
        return eos[0] if eos else 0

    @property
    def done(self) -> bool:
        return all(row.finish_reason for row in self.rows)

    def end(self, reason: str) -> None:
        """End the rows that have not ended."""
        for row in self.rows:
            row.end(reason)

    def fail(self, error: Exception) -> None:
        """End its rows by an error, which is raised where they are waited for."""
        self.error = error
        self.abandon("error")

    def abandon(self, reason: str) -> None:
        """End the rows that have not ended, and let none linger."""
        self.lingers = False
        self.end(reason)
        for row in self.rows:
            row.state = FINISHED

    @property
    def width(self) -> int:
        """The length of the longest row, now or when it ended."""
        return max(row.width or row.length for row in self.rows)

    def uniform(self, rows: Sequence[Row], size: int) -> list[sampler.Words]:
        """The draws [size] of each of `rows` (of this request) for its next token."""
        lengths = [row.length for row in self.rows if row.state is not FINISHED]
        if len(self.streams) == 1:
            self.streams[0].forget(min(lengths) - self.prompt_length)
        else:
            for row in rows:
                self.streams[row.index].forget(row.length - self.prompt_length)
        return [self.draws(row.length - self.prompt_length, row.index, size) for row in rows]

    def draws(self, step: int, index: int, size: int) -> sampler.Words:
        """The draws [size] of a row (of a prompt, if it has beams) at `step`, counted from 0."""
        if self.params.num_beams > 1:  # all beams are at one step
            self.streams[0 if len(self.streams) == 1 else index].forget(step)
        if len(self.streams) == 1:
            return self.streams[0].row(step, index, size)
        return self.streams[index].row(step, 0, size)

    def split_chain(self, names: Sequence[str]) -> tuple[Chain, Chain]:
        """The processors in two parts: up to the last of those in `names`, and the rest."""
        steps = self.chain.steps if self.chain else ()
        border = max((i + 1 for i, step in enumerate(steps) if step.name in names), default=0)
        return Chain(steps[:border]), Chain(steps[border:])

    @functools.cached_property
    def keeps(self) -> bool:
        """True if anything of a step is recorded besides its tokens."""
        return self.keeps_logits or self.keeps_scores or self.params.top_logprobs > 0

    @property
    def keeps_logits(self) -> bool:
        """True if the model's logits are kept: asked for, and there is a record to show them."""
        return self.params.output_logits and self.params.return_dict_in_generate

    @property
    def keeps_scores(self) -> bool:
        """True if processed scores are kept, for the record and for stopping criteria."""
        return self.params.output_scores and self.params.return_dict_in_generate

    def keep(
        self, rows: Sequence[Row], logits: NDArray[np.float32], scores: NDArray[np.float32]
    ) -> None:
        """Record what `output_logits`, `output_scores` and `top_logprobs` ask for.

        Args:
            rows: rows of this request, before they get their next token.
            logits: float32 [rows, vocab], as the model gave them.
            scores: the same after the processors.
        """
        asked = ((self.keeps_logits, self.logits, logits),
                 (self.keeps_scores, self.scores, scores))  # fmt: skip
        for wanted, steps, values in asked:
            if wanted:
                for row, line in zip(rows, values, strict=True):
                    self._step(steps, row, values.shape[1])[row.index] = line
        if self.params.top_logprobs:
            seen = logits if self.of_model else scores
            best = sampler.top_logprobs(seen, self.params.top_logprobs)
            for row, pairs in zip(rows, best, strict=True):
                self.top_logprobs[row.index].append(tuple(pairs))

    def _step(self, steps: list[NDArray[np.float32]], row: Row, vocab: int) -> NDArray[np.float32]:
        """The record of the next step of `row`: [rows, vocab]; ended rows stay certain padding."""
        if row.length - self.prompt_length == len(steps):
            steps.append(self._blank(vocab))
        return steps[row.length - self.prompt_length]

    def _blank(self, vocab: int) -> NDArray[np.float32]:
        """float32 [rows, vocab]: scores that make padding certain, as it is for ended rows."""
        out = np.full((len(self.rows), vocab), -np.inf, np.float32)
        out[:, self.pad_token_id] = 0
        return out

    def sequences(self) -> NDArray[np.int64]:
        """int64 [rows, length]: prompts and what followed, padded on the right."""
        return self.padded_to(self.width)

    def padded_to(self, length: int) -> NDArray[np.int64]:
        """int64 [rows, length]: the rows so far, cut there or padded on the right."""
        out = np.full((len(self.rows), length), self.pad_token_id, np.int64)
        for row in self.rows:
            ids = row.history[:length]
            out[row.index, : len(ids)] = ids
        return out

    def sequences_scores(self) -> NDArray[np.float32]:
        """float32 [rows]: the scores of beam search."""
        return np.array([row.score for row in self.rows], np.float32)

    def beam_indices(self) -> NDArray[np.int32]:
        """int32 [rows, new]: the beam that each token continued, -1 after the last."""
        out = np.full((len(self.rows), self.width - self.prompt_length), -1, np.int32)
        for row in self.rows:
            if row.beams is not None:
                out[row.index, : len(row.beams)] = row.beams
        return out


def streams(
    seed: int | Sequence[int] | None, rows: int, torch: Any | None = None
) -> list[sampler.Stream]:
    """One stream that `rows` share, or one for each where each has a seed.

    Args:
        torch: the module, if its default generator is to be drawn from where there is no seed.

    Raises:
        ValueError: another number of seeds than of rows.
    """
    if seed is None and torch is not None:
        return [sampler.TorchStream(torch, rows)]
    if seed is None or isinstance(seed, int):
        return [sampler.Stream(seed, rows)]
    if len(seed) != rows:
        raise ValueError(f"seed has {len(seed)} values for {rows} rows: give one, or one a row")
    return [sampler.Stream(own) for own in seed]


def context(rows: Sequence[Row]) -> Context:
    """Make of `rows` what processors are shown."""
    return Context(
        ids=[row.history for row in rows],
        prompt_lengths=np.array([row.request.prompt_length for row in rows]),
        pads=np.array([row.pad for row in rows]),
        batch_ids=np.array([row.index // row.request.copies for row in rows]),
        beams=np.array([row.index for row in rows]),
        max_lengths=np.array([row.request.max_length for row in rows]),
    )


def context_of_beams(
    request: Request,
    ids: Sequence[NDArray[np.int64]],
    prompts: NDArray[np.int64],
    beams: NDArray[np.int64],
) -> Context:
    """Make of beams what processors are shown.

    Args:
        ids: int64 [length] of each beam.
        prompts: int64 [beams], which prompt of the call each belongs to.
        beams: int64 [beams], which beam of the call each is.
    """
    return Context(
        ids=ids,
        prompt_lengths=np.full(len(ids), request.prompt_length),
        pads=request.pads[prompts],
        batch_ids=prompts,
        max_lengths=np.full(len(ids), request.max_length),
        beams=beams,
    )
