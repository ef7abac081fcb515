"""The cost of a precision on text: the exported model beside the original, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.model import Model
from fastgen.export.quantize.parts import CHUNK
from fastgen.sampling.softmax import divergence, log_softmax

TOKENS = 1024  # of a text that precisions are measured on, at most


@dataclass(frozen=True)
class Quality:
    """The exported model against the original in float32, on text it was not calibrated on.

    Its KL divergence is what a target is set for; all else is shown.

    Attributes:
        tokens: predicted tokens.
        perplexity: of the export; `reference_perplexity` is the original's.
        kl: mean Kullback-Leibler divergence from the original, in nats.
        top1: share of positions with the same likeliest token.
        max_difference: largest difference of a logit, as a share of the largest logit.
        mean_difference: the mean, likewise.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    top1: float
    max_difference: float
    mean_difference: float

    @property
    def more_perplexity(self) -> float:
        """Relative to the original's."""
        return self.perplexity / self.reference_perplexity - 1

    def summary(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} against {self.reference_perplexity:.3f} "
            f"({self.more_perplexity:+.2%}), KL {self.kl:.1e}, top-1 {self.top1:.2%}"
        )


def measure(
    original: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    exported: Model,
    rows: Sequence[NDArray[np.int64]],
    shown: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Compare on `rows` of ids, each from scratch; the original's logits are held for one row.

    Args:
        original: ids [length] -> its logits, float32 [length, vocab].
        shown: called with the number of rows done and their total, as they are.
    """
    tokens, agree = 0, 0
    loss = reference_loss = lost = mean = largest = scale = 0.0
    for done, row in enumerate(rows):
        shown(done, len(rows))
        reference = original(row)
        for start, logits in _logits(exported, row[:-1]):
            expected = reference[start : start + len(logits)]
            targets = row[start + 1 : start + 1 + len(logits)]
            p, q = log_softmax(expected), log_softmax(logits)
            positions = np.arange(len(logits))
            loss -= float(q[positions, targets].sum(dtype=np.float64))
            reference_loss -= float(p[positions, targets].sum(dtype=np.float64))
            lost += divergence(p, q)
            agree += int((expected.argmax(1) == logits.argmax(1)).sum())
            difference = np.abs(expected - logits)
            largest = max(largest, float(difference.max()))
            scale = max(scale, float(np.abs(expected).max()))
            mean += float(difference.mean(dtype=np.float64)) * len(positions)
            tokens += len(positions)
        del reference, expected  # the next row's are as large
    return Quality(
        tokens=tokens,
        perplexity=float(np.exp(loss / tokens)),
        reference_perplexity=float(np.exp(reference_loss / tokens)),
        kl=max(0.0, lost / tokens),
        top1=agree / tokens,
        max_difference=largest / (scale or 1),
        mean_difference=mean / tokens / (scale or 1),
    )


def _logits(model: Model, row: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """A row in chunks: where each starts, and its float32 [chunk, vocab], valid until the next."""
    cache = model.new_cache(1, 2 * len(row))
    for start in range(0, len(row), CHUNK):
        new = row[start : start + CHUNK]
        positions = np.arange(len(new))[None]
        yield start, model.forward([new], cache, logits_positions=positions)[0]
