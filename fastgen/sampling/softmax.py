"""Probabilities and log-probabilities of logits along the last axis, in their own precision."""

from __future__ import annotations

import numpy as np

_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")


@_quiet
def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities; nan where a row has no finite logit."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


@_quiet
def normalisers(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two numbers of each row, such that `(logits - one) - other` is `log_softmax` to the bit.

    Args:
        logits: float32 [rows, vocab].

    Returns:
        float32 [rows] each: the largest logit, and the logarithm of the sum.
    """
    top, total = logits.max(axis=-1), np.empty(len(logits), logits.dtype)
    work = np.empty_like(logits[0])  # a row at a time stays in a core's own memory
    for index, row in enumerate(logits):
        np.exp(np.subtract(row, top[index], out=work), out=work)
        total[index] = work.sum()
    return top, np.log(total)


@_quiet
def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities; nan where a row has no finite logit."""
    out = logits - logits.max(axis=-1, keepdims=True)
    out -= np.log(np.exp(out).sum(axis=-1, keepdims=True))
    return np.asarray(out)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Sum over positions of the Kullback-Leibler divergence of q from p, in nats.

    Args:
        p, q: logarithms of probabilities, float32 [positions, vocab].
    """
    return float((np.exp(p) * (p - q)).sum(dtype=np.float64))
