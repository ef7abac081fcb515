"""Two sets of logits beside each other, position by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.export.quantize import parts

Logits = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Beside:
    """Logits beside those that they should be, each [positions].

    Attributes:
        kl: Kullback-Leibler divergence from those expected, in nats.
        expected_total, actual_total: logarithm of the sum of exponents.
        largest, mean: absolute difference of a logit, at most and on average.
        reach: the largest absolute logit that is expected.
        same: whether the same token is likeliest.
    """

    kl: Doubles
    expected_total: Doubles
    actual_total: Doubles
    largest: Doubles
    mean: Doubles
    reach: Doubles
    same: NDArray[np.bool_]


def beside(expected: Logits, actual: Logits) -> Beside:
    """Compare logits [positions, vocab]: on all cores, a few positions at a time.

    The divergence is the mean difference of the logits, by the expected probabilities, less that of
    the sums' logarithms: two exponents for each logit, and no array of logarithms.
    """
    count, vocab = expected.shape
    kl, totals, others, largest, mean, reach = (np.empty(count) for _ in range(6))
    found = Beside(kl, totals, others, largest, mean, reach, np.empty(count, np.bool_))

    def part(some: slice) -> None:
        p, q = expected[some], actual[some]
        difference = p - q
        weights, total, top = _exponents(p)
        _, other, other_top = _exponents(q)
        gap = np.vecdot(weights, difference) / total
        found.kl[some] = gap - (top - other_top) - (np.log(total) - np.log(other))
        found.expected_total[some] = top + np.log(total)
        found.actual_total[some] = other_top + np.log(other)
        found.same[some] = p.argmax(axis=1) == q.argmax(axis=1)
        np.abs(difference, out=difference)
        found.largest[some], found.mean[some] = difference.max(axis=1), difference.mean(axis=1)
        found.reach[some] = np.maximum(top, -p.min(axis=1))

    parts.each(count, vocab, part)
    return found


def _exponents(logits: Logits) -> tuple[Logits, Doubles, Any]:
    """Exponents of what logits are less than their largest, their sum, and the largest."""
    top = logits.max(axis=1)
    weights = logits - top[:, None]
    np.exp(weights, out=weights)
    return weights, weights.sum(axis=1).astype(np.float64), top.astype(np.float64)
