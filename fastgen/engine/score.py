"""The log-probabilities of given tokens: of texts, continuations and generated tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.engine import memory_estimate
from fastgen.engine.cache import Cache
from fastgen.engine.model import Model
from fastgen.engine.output import Decision
from fastgen.engine.prefill import CHUNK as READ_AT_ONCE
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.prompt_reader import PromptReader
from fastgen.sampling import sampler
from fastgen.sampling.softmax import log_softmax, normalisers

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]

TOGETHER = 4  # rows that are read at a time
CHUNK = 64  # tokens of each that are read at a time: so many logits are held, and no more
SCORING = 4  # times those are there while they become log-probabilities and are put in order


def log_probabilities(
    model: Model,
    rows: Sequence[Ids],
    prefix: Ids | None = None,
    prefix_cache: PrefixCache | None = None,
    chunk: int = CHUNK,
) -> list[Scores]:
    """The log-probability of each token, given those before it.

    Args:
        rows: int64 [length] each, at least one token.
        prefix: what comes before every row; it is read once.
        prefix_cache: where its keys and values are kept, if anywhere.
        chunk: tokens of a row that are read at a time.

    Returns:
        float32 [length] of each row. Without a prefix nothing predicts the first token: nan.

    Raises:
        ValueError: the model's logits hold nan, or there is not the memory.
    """
    size = bytes_of(model, rows, prefix, chunk)
    memory_estimate.check({"keys and values": size}, "shorter texts need less")
    out: list[Scores] = []
    for _ in _scored(model, rows, prefix, prefix_cache, chunk, chunk, out):
        pass
    return out


def bytes_of(model: Model, rows: Sequence[Ids], prefix: Ids | None, chunk: int) -> int:
    """The bytes of keys, values and states while rows after a prefix are scored."""
    info, together = model.info, min(len(rows), TOGETHER)
    token = info.cache_bytes + info.reading_bytes
    return together * (_capacity(rows, prefix, chunk) * token + info.state_bytes)


def _capacity(rows: Sequence[Ids], prefix: Ids | None, chunk: int) -> int:
    """Tokens of a slot in which a row is scored."""
    return (0 if prefix is None else len(prefix)) + max(map(len, rows)) + chunk


def _scored(
    model: Model,
    rows: Sequence[Ids],
    prefix: Ids | None,
    prefix_cache: PrefixCache | None,
    of_prefix: int,
    chunk: int,
    out: list[Scores],
) -> Iterator[None]:
    """Score rows, a call of the model at each step; `log_probabilities` says the rest.

    Args:
        of_prefix: tokens of the prefix that are read at a time.
        out: gets the numbers of each row, in the end.
    """
    together, capacity = min(len(rows), TOGETHER), _capacity(rows, prefix, max(of_prefix, chunk))
    reader = PromptReader(model, model.new_cache(together, capacity), together, capacity)
    cache, firsts = reader.floats, np.full(len(rows), np.nan, np.float32)
    if prefix is None:
        yield from _reading(reader, np.empty(0, np.int64), None, of_prefix)
    else:
        yield from _reading(reader, prefix[:-1], prefix_cache, of_prefix)
        # Its last token predicts the first of every row: it is read once for all of them.
        logits = model.forward([prefix[-1:]], cache)[0]
        (top,), (norm,) = normalisers(logits)
        firsts = (logits[0, [int(row[0]) for row in rows]] - top) - norm
        sampler.refuse_nan(firsts)
        yield
    begun = cache.state(0)
    found: list[Scores] = [np.empty(0, np.float32)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for first in range(0, len(rows), TOGETHER):
        indices = order[first : first + TOGETHER]
        cache.restore(0, begun)
        cache.take([0] * len(indices))
        parts: list[list[Scores]] = [[] for _ in indices]
        yield from _predicted(model, cache, [rows[i] for i in indices], chunk, parts)
        for index, mine in zip(indices, parts, strict=True):
            found[index] = np.concatenate([firsts[index : index + 1], *mine]).astype(np.float32)
    out += found


class Scoring:
    """One row of ids whose tokens are being scored, a chunk at a time, for whoever has others too.

    Args:
        ids: int64 [length], at least one token.
        count: alternatives of each token, the likeliest at its place; 0 for none.

    Attributes:
        logprobs: of each token that was scored so far; the first, which nothing predicts, has nan.
        tops: of each of these the likeliest (token, log-probability) pairs, best first, in the
            same numbers; None of the first, and of all where none were asked for.
        done: whether it is over: all are scored, or it was cancelled, or there is an error.
        error: what ended it, if something went wrong.
    """

    def __init__(self, model: Model, ids: Sequence[int], count: int = 0) -> None:
        self.model, self.ids, self.count = model, np.array(ids, np.int64), count
        self.logprobs: list[float] = [float("nan")]
        self.tops: list[tuple[tuple[int, float], ...] | None] = [None]
        self.done = False
        self.error: Exception | None = None

    @property
    def bytes(self) -> int:
        """The bytes that it may come to hold."""
        info, length = self.model.info, len(self.ids)
        kept = (length + CHUNK) * (info.cache_bytes + info.reading_bytes) + info.state_bytes
        logits = min(length, CHUNK) * info.vocab_size * memory_estimate.FLOAT * SCORING
        return kept + logits + length * memory_estimate.PAIR * (1 + self.count)

    def steps(self, chunk: int = CHUNK) -> Iterator[None]:
        """Score a chunk of tokens at each step.

        Raises:
            ValueError: the model's logits hold nan.
        """
        chunk, row = min(chunk, CHUNK), self.ids
        cache = self.model.new_cache(1, len(row) + CHUNK, reads_prompts=True)
        for at in range(0, len(row) - 1, chunk):
            new = row[at : min(at + chunk, len(row) - 1)]
            logits = self.model.forward([new], cache, 0, np.arange(len(new))[None])[0]
            self._take(log_softmax(logits), row[at + 1 : at + 1 + len(new)])
            cache.forget(0, 1)
            self.done = at + chunk >= len(row) - 1
            yield
        self.done = True

    def _take(self, logprobs: Scores, targets: Ids) -> None:
        """Note the log-probabilities of the next tokens, `logprobs` being float32 [new, vocab]."""
        of_targets = logprobs[np.arange(len(targets)), targets]
        sampler.refuse_nan(of_targets)
        self.logprobs += of_targets.tolist()
        if self.count:
            self.tops += map(tuple, sampler.best(logprobs, self.count))
        else:
            self.tops += [None] * len(targets)

    def end(self, error: Exception | None = None) -> None:
        """End it before its time."""
        self.done, self.error = True, error


class Choosing(Scoring):
    """The options after one prompt, whose tokens are scored a step at a time.

    The prompt is read once, and the first tokens of all options are scored together.

    Args:
        prompt: int64 [length], at least one token.
        options: int64 [length] each, at least one token.
        prefix_cache: where the prompt's keys and values are kept, if anywhere.

    Attributes:
        logprobs: of the tokens of all options, one option after the other, once it is over.
        option_logprobs: float32 [length] of each option, once it is over.
    """

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        options: Sequence[Sequence[int]],
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        super().__init__(model, prompt)
        self.options = [np.array(option, np.int64) for option in options]
        self.prefix_cache = prefix_cache
        self.logprobs, self.tops = [], []
        self.option_logprobs: list[Scores] = []

    @property
    def bytes(self) -> int:
        """The bytes that it may come to hold."""
        rows = min(len(self.options), TOGETHER)
        read = min(CHUNK, max(map(len, self.options)))
        logits = max(rows * read, len(self.options)) * self.model.info.vocab_size
        logits *= memory_estimate.FLOAT * SCORING
        tokens = sum(map(len, self.options)) * memory_estimate.PAIR
        return bytes_of(self.model, self.options, self.ids, READ_AT_ONCE) + logits + tokens

    def steps(self, chunk: int = READ_AT_ONCE) -> Iterator[None]:
        """Read a chunk of the prompt at each step, then score some tokens of the options.

        Raises:
            ValueError: the model's logits hold nan.
        """
        most, kept = min(chunk, CHUNK), self.prefix_cache
        scored = _scored(
            self.model, self.options, self.ids, kept, chunk, most, self.option_logprobs
        )
        yield from scored
        self.logprobs = [float(one) for option in self.option_logprobs for one in option]
        self.done = True


def decision(
    options: Sequence[Any],
    logprobs: Sequence[Scores],
    temperature: float = 1.0,
    per_token: bool = False,
) -> Decision:
    """The decision that the log-probabilities of options make.

    Args:
        options: as they are given back.
        logprobs: float32 [length] of each option: of its tokens.
        temperature: that the log-probabilities are divided by.
        per_token: whether options are compared by the mean of their tokens, not by the sum.
    """
    sums = np.array([one.sum(dtype=np.float64) for one in logprobs])
    lengths = np.array([len(one) if per_token else 1 for one in logprobs])
    scores = sums / lengths / temperature
    weights = np.exp(scores - scores.max())
    probabilities = (weights / weights.sum()).tolist()
    index = int(scores.argmax())
    return Decision(index, options[index], probabilities, sums.tolist())


def perplexity(logprobs: Sequence[Scores]) -> float:
    """exp of the mean negative log-probability of all tokens that something predicts."""
    known = np.concatenate(logprobs).astype(np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        raise ValueError("perplexity needs a text of at least two tokens")
    return float(np.exp(-known.mean()))


def _reading(
    reader: PromptReader, ids: Ids, prefix_cache: PrefixCache | None, chunk: int
) -> Iterator[None]:
    """Read `ids` into the first slot, which is empty, a chunk at a step; nobody wants logits."""
    model, cache = reader.model, reader.cache
    many = model.reads_as_many(len(ids))
    if prefix_cache is not None:
        prefix_cache.fetch(model.fingerprint, [ids], cache, 0, chunk)
    reader.load(0, 1)
    nothing, states = np.zeros((1, 0), np.int64), {}
    while (at := int(cache.lengths[0])) < len(ids):
        reader.forward([ids[at : (at // chunk + 1) * chunk]], 0, 0, nothing, many)
        if prefix_cache is not None:
            length, state = cache.state(0)
            states[length] = state
        yield
    if prefix_cache is not None:
        prefix_cache.keep(model.fingerprint, ids, cache, 0, chunk, states)


def _predicted(
    model: Model, cache: Cache, rows: Sequence[Ids], chunk: int, out: list[list[Scores]]
) -> Iterator[None]:
    """Find how likely the tokens of each row after the first are, a call of the model at a step.

    The rows, longest first, go to the first slots; what the slots hold comes before them.

    Args:
        out: gets float32 [new] of each row, part by part.
    """
    for at in range(0, len(rows[0]) - 1, chunk):
        going = [row for row in rows if len(row) - 1 > at]
        new = [row[at : min(at + chunk, len(row) - 1)] for row in going]
        ends = np.array([[len(ids) - 1] for ids in new])
        positions = np.minimum(np.arange(len(new[0])), ends)
        logits = model.forward(new, cache, 0, positions)
        for index, (row, ids) in enumerate(zip(going, new, strict=True)):
            targets = row[at + 1 : at + 1 + len(ids)]
            logprobs = sampler.logprob_of(logits[index, : len(ids)], targets)
            sampler.refuse_nan(logprobs)
            out[index].append(logprobs.astype(np.float32))
        yield


def transition_scores(
    sequences: Ids,
    scores: Sequence[Scores],
    beam_indices: NDArray[Any] | None = None,
    normalize_logits: bool = False,
) -> Scores:
    """transformers' `compute_transition_scores`: the score of each generated token.

    Args:
        sequences: int64 [rows, length], prompts and what was generated.
        scores: a step: float32 [rows (or beams), vocab].
        beam_indices: int32 [rows, new], the beam that each token continued, -1 after the last.
        normalize_logits: whether to give log-probabilities.

    Returns:
        float32 [rows, new]; 0 where `beam_indices` is negative.
    """
    if beam_indices is None:
        beam_indices = np.repeat(np.arange(len(scores[0]))[:, None], len(scores), axis=1)
    new = int((beam_indices >= 0).sum(axis=1).max())
    tokens = sequences[:, sequences.shape[1] - new :]
    out = np.zeros((len(sequences), new), np.float32)
    for step in range(new):
        rows = np.flatnonzero(beam_indices[:, step] >= 0)
        chosen = scores[step][beam_indices[rows, step]]
        if normalize_logits:
            chosen = log_softmax(chosen)
        out[rows, step] = chosen[np.arange(len(rows)), tokens[rows, step]]
    return out
