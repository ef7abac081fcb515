"""Codes of 4 bits that minimise the error of the output, not of the weights.

Scales: for each block the one of a grid that minimises the squared error of its weights, each
weighed by the second moment of its input. Codes: GPTQ (Frantar et al. 2022, arXiv 2210.17323):
inputs are rounded one after the other, and the error of each is made good by those that follow,
through the inverse of the inputs' second moments.
"""

from __future__ import annotations

import numpy as np
from fastgen.export.quantize import LEVELS, Floats, Kernel, blocks
from numpy.typing import NDArray

GRID = np.linspace(0.7, 1.05, 15, dtype=np.float32)  # scales that are tried, of the largest weight
CHUNK = 1 << 20  # weights whose scales are searched at a time
DAMPING = 0.01  # of the mean diagonal, as in the paper


def search_scales(weight: Floats, kernel: Kernel, second_moments: Floats) -> Floats:
    """[out, blocks] float32: scales that minimise sum(E[x^2] (w - w')^2) within each block.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size.
        second_moments: float32 [in], E[x^2] of each input.
    """
    step = max(1, CHUNK // len(weight))
    return np.concatenate(
        [
            _search(weight[:, at : at + step], kernel, second_moments)
            for at in range(0, weight.shape[1], step)
        ]
    )


def _search(weight: Floats, kernel: Kernel, second_moments: Floats) -> Floats:
    """`search_scales` of a few outputs: it holds several copies of their weights."""
    parts = blocks(weight, kernel.block)  # [out, blocks, block]
    weigh = blocks(second_moments[:, None].astype(np.float32), kernel.block)  # [1, blocks, block]
    level = np.float32(LEVELS[kernel.bits])
    largest = np.abs(parts).max(axis=-1) / level
    largest[largest == 0] = 1
    best = largest.copy()
    least = np.full(largest.shape, np.inf, np.float32)
    for share in GRID:
        scales = largest * share
        codes = np.clip(np.rint(parts / scales[..., None]), -level - 1, level)
        error = (weigh * (parts - codes * scales[..., None]) ** 2).sum(axis=-1)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return best


def gptq(weight: Floats, kernel: Kernel, scales: Floats, inputs: Floats) -> Floats:
    """A matrix [in, out] whose weights lie on the grid of `scales`, closest in its output.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size.
        scales: [out, blocks].
        inputs: float32 [tokens, in]: calibration activations.
    """
    level = LEVELS[kernel.bits]
    size = len(weight)
    inverse = _inverse_cholesky(inputs)
    rest = weight.astype(np.float32).copy()  # [in, out], errors made good as we go
    out = np.empty_like(rest)
    for start in range(0, size, kernel.block):
        end = min(start + kernel.block, size)
        scale = scales[:, start // kernel.block]
        errors = np.empty((end - start, rest.shape[1]), np.float32)
        for i in range(start, end):
            out[i] = np.clip(np.rint(rest[i] / scale), -level - 1, level) * scale
            errors[i - start] = (rest[i] - out[i]) / inverse[i, i]
            rest[i + 1 : end] -= np.outer(inverse[i, i + 1 : end], errors[i - start])
        rest[end:] -= inverse[start:end, end:].T @ errors
    return out


def _inverse_cholesky(inputs: Floats) -> NDArray[np.float32]:
    """Upper Cholesky factor of the inverse of the damped second moments [in, in]."""
    moments = (inputs.T @ inputs).astype(np.float64) / len(inputs)
    diagonal = np.diag(moments).copy()
    moments[np.diag_indices_from(moments)] += DAMPING * diagonal.mean() + 1e-12
    inverse = np.linalg.inv(moments)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
