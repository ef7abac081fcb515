"""Codes of 4 bits that minimise the error of the output, not of the weights.

Scales: for each block the one of a grid that minimises the squared error of its weights, each
weighed by the second moment of its input. Codes: GPTQ (Frantar et al. 2022, arXiv 2210.17323):
inputs are rounded one after the other, and the error of each is made good by those that follow,
through the inverse of the inputs' second moments.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from fastgen.export import parts
from fastgen.export.quantize import LEVELS, STEPS, Floats, Kernel, blocks
from numpy.typing import NDArray

GRID = np.linspace(0.7, 1.05, 15, dtype=np.float32)  # scales that are tried, of the largest weight
DAMPING = 0.01  # of the mean diagonal, as in the paper
SMALL = 128  # rows of a triangle that is inverted at once


def search_scales(weight: Floats, kernel: Kernel, second_moments: Floats) -> Floats:
    """[out, blocks] float32: scales that minimise sum(E[x^2] (w - w')^2) within each block.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size.
        second_moments: float32 [in], E[x^2] of each input.
    """
    weigh = blocks(second_moments[:, None].astype(np.float32), kernel.block)  # [1, blocks, block]
    size, out = weight.shape
    found = np.empty((out, weigh.shape[1]), np.float32)

    def part(some: slice) -> None:
        found[some] = _search(blocks(weight[:, some], kernel.block), kernel, weigh)

    parts.each(out, size, part)
    return found


def _search(weights: Floats, kernel: Kernel, weigh: Floats) -> Floats:
    """`search_scales` of weights [out, blocks, block], weighed by [1, blocks, block]."""
    level = np.float32(LEVELS[kernel.bits])
    largest = np.abs(weights).max(axis=-1) / level
    # A block of zeros takes any scale, but a large one would cost the others of its output theirs.
    largest = np.maximum(largest, largest.max(axis=1, keepdims=True) / STEPS)
    largest[largest == 0] = 1
    best = largest.copy()
    least = np.full(largest.shape, np.inf, np.float32)
    error = np.empty_like(weights)
    for share in GRID:
        scales = largest * share
        np.divide(weights, scales[..., None], out=error)
        np.clip(np.rint(error, out=error), -level - 1, level, out=error)
        error *= scales[..., None]
        np.square(np.subtract(weights, error, out=error), out=error)
        error *= weigh
        found = error.sum(axis=-1)
        better = found < least
        best[better], least[better] = scales[better], found[better]
    return best


def gptq(weight: Floats, kernel: Kernel, scales: Floats, inputs: Floats) -> Floats:
    """A matrix [in, out] whose weights lie on the grid of `scales`, closest in its output.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size.
        scales: [out, blocks].
        inputs: float32 [tokens, in]: calibration activations.
    """
    size, count = weight.shape
    inverse = _inverse_cholesky(inputs)
    rest = weight.astype(np.float32)  # [in, out], errors made good as we go
    out = np.empty_like(rest)
    errors = np.empty((kernel.block, count), np.float32)
    for start in range(0, size, kernel.block):
        end = min(start + kernel.block, size)
        scale = np.ascontiguousarray(scales[:, start // kernel.block])
        mine = rest[start:end], out[start:end], errors[: end - start]
        part = partial(_round, *mine, inverse[start:end, start:end], scale, LEVELS[kernel.bits])
        parts.each(count, end - start, part)
        rest[end:] -= inverse[start:end, end:].T @ errors[: end - start]
    return out


def _round(
    weight: Floats,
    rounded: Floats,
    errors: Floats,
    inverse: Floats,
    scale: Floats,
    level: int,
    some: slice,
) -> None:
    """The rows of a block, one after the other, of some outputs.

    Args:
        weight: [block, out].
        rounded, errors: [block, out], to be filled.
        inverse: [block, block] of the Cholesky factor.
        scale: [out].
    """
    rest, scale = weight[:, some].copy(), scale[some]
    made = np.empty_like(rest)
    for i in range(len(rest)):
        row, error = rounded[i, some], errors[i, some]
        np.divide(rest[i], scale, out=row)
        np.clip(np.rint(row, out=row), -level - 1, level, out=row)
        row *= scale
        np.subtract(rest[i], row, out=error)
        error /= inverse[i, i]
        np.multiply(inverse[i, i + 1 :, None], error, out=made[i + 1 :])
        rest[i + 1 :] -= made[i + 1 :]


def _inverse_cholesky(inputs: Floats) -> NDArray[np.float32]:
    """Upper Cholesky factor of the inverse of the damped second moments [in, in].

    By the inverse of the factor of the moments themselves, both read from the end: a third of the
    work of inverting them first.
    """
    moments = (inputs.T @ inputs).astype(np.float64)
    moments /= len(inputs)
    moments[np.diag_indices_from(moments)] += DAMPING * np.diag(moments).mean() + 1e-12
    lower = np.linalg.cholesky(moments[::-1, ::-1])
    del moments
    _invert_inplace(lower)
    return lower[::-1, ::-1].astype(np.float32)


def _invert_inplace(lower: NDArray[np.float64]) -> None:
    """A lower triangle [n, n] becomes its inverse, by halves: nearly all of it is products."""
    size = len(lower)
    if size <= SMALL:
        lower[:] = np.tril(np.linalg.inv(lower))
        return
    half = size // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_inplace(first)
    _invert_inplace(second)
    below[:] = -(second @ (below @ first))
