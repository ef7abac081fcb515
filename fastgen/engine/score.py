"""The log-probabilities of given tokens: of texts, continuations and generated tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.engine import memory_estimate
from fastgen.engine.cache import Cache
from fastgen.engine.model import Model
from fastgen.engine.prefix_cache import PrefixCache
from fastgen.engine.prompt_reader import PromptReader
from fastgen.sampling import sampler
from fastgen.sampling.softmax import log_softmax

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
    held = np.empty(0, np.int64) if prefix is None else prefix[:-1]
    start = held[:0] if prefix is None else prefix[-1:]
    longest = max(len(row) for row in rows)
    together, capacity = min(len(rows), TOGETHER), len(held) + longest + chunk
    token = model.info.cache_bytes + model.info.reading_bytes
    size = together * (capacity * token + model.info.state_bytes)
    memory_estimate.check({"keys and values": size}, "shorter texts need less")
    reader = PromptReader(model, model.new_cache(together, capacity), together, capacity)
    _read(reader, held, prefix_cache, chunk)
    cache = reader.floats
    begun = cache.state(0)
    out: list[Scores] = [np.empty(0, np.float32)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for first in range(0, len(rows), TOGETHER):
        indices = order[first : first + TOGETHER]
        cache.restore(0, begun)
        cache.take([0] * len(indices))
        texts = [np.concatenate((start, rows[i])) for i in indices]
        predicted = _predicted(model, cache, texts, chunk)
        for index, logprobs in zip(indices, predicted, strict=True):
            missing = len(rows[index]) - len(logprobs)
            out[index] = np.append(np.full(missing, np.nan, np.float32), logprobs)
    return out


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


def perplexity(logprobs: Sequence[Scores]) -> float:
    """exp of the mean negative log-probability of all tokens that something predicts."""
    known = np.concatenate(logprobs).astype(np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        raise ValueError("perplexity needs a text of at least two tokens")
    return float(np.exp(-known.mean()))


def _read(reader: PromptReader, ids: Ids, prefix_cache: PrefixCache | None, chunk: int) -> None:
    """Read `ids` into the first slot, which is empty; nobody wants logits."""
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
    if prefix_cache is not None:
        prefix_cache.keep(model.fingerprint, ids, cache, 0, chunk, states)


def _predicted(model: Model, cache: Cache, rows: Sequence[Ids], chunk: int) -> list[Scores]:
    """float32 [length - 1] of each row, longest first: how likely its tokens after the first are.

    The rows go to the first slots; what the slots hold comes before them.
    """
    out: list[list[Scores]] = [[] for _ in rows]
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
    return [np.concatenate(parts) if parts else np.empty(0, np.float32) for parts in out]


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
