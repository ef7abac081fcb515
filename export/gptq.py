"""Codes that minimise the error of the output, not of the weights.

Scales: for each block the one of a grid that minimises the squared error of its weights, each
weighed by the second moment of its input. Codes: GPTQ (Frantar et al. 2022, arXiv 2210.17323):
inputs are rounded one after the other, and the error of each is made good by those that follow.
It is written as Babai's nearest plane, which it is (Chen et al. 2025, arXiv 2507.18553): an input
takes its share of all errors before it when its turn comes.
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
from fastgen.export import parts
from fastgen.export.quantize import LEVELS, STEPS, Floats, Kernel, blocks

GRID = np.linspace(0.7, 1.05, 15, dtype=np.float32)  # scales that are tried, of the largest weight
TOGETHER = 32  # inputs that are rounded one by one before the others hear of it
DAMPING = 0.01  # of the mean diagonal, as in the paper


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


def gptq(weight: Floats, kernel: Kernel, scales: Floats, moments: Floats) -> Floats:
    """A matrix [in, out] whose weights lie on the grid of `scales`, closest in its output.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size.
        scales: [out, blocks].
        moments: float32 [in, in], second moments of the inputs: E[x^T x].
    """
    size, count = weight.shape
    factor = _factor(moments)
    diagonal = np.diag(factor)
    rounded = np.empty((size, count), np.float32)
    errors = np.empty((size, count), np.float32)
    for start in range(0, size, TOGETHER):
        end = min(start + TOGETHER, size)
        # What an input takes over of the error of each one before it.
        shares = factor[start:end, :end] / diagonal[start:end, None]
        wanted = weight[start:end] + shares[:, :start] @ errors[:start]
        scale = np.ascontiguousarray(scales[:, start // (kernel.block or size)])
        part = partial(
            _round, weight[start:end], wanted, rounded[start:end], errors[start:end],
            shares[:, start:], scale, LEVELS[kernel.bits],
        )  # fmt: skip
        parts.each(count, end - start, part)
    return rounded


def _round(
    weight: Floats,
    wanted: Floats,
    rounded: Floats,
    errors: Floats,
    shares: Floats,
    scale: Floats,
    level: int,
    some: slice,
) -> None:
    """The rows of a block, one after the other, of some outputs.

    Args:
        weight: [block, out].
        wanted: [block, out], with the errors of earlier blocks made good.
        rounded, errors: [block, out], to be filled.
        shares: [block, block].
        scale: [out].
    """
    rest, scale = wanted[:, some], scale[some]
    made = np.empty_like(rest)
    for i in range(len(rest)):
        row, error = rounded[i, some], errors[i, some]
        np.divide(rest[i], scale, out=row)
        np.clip(np.rint(row, out=row), -level - 1, level, out=row)
        row *= scale
        np.subtract(weight[i, some], row, out=error)
        np.multiply(shares[i + 1 :, i, None], error, out=made[i + 1 :])
        rest[i + 1 :] += made[i + 1 :]


def _factor(moments: Floats) -> Floats:
    """Lower triangle G [in, in] with G^T G = the damped second moments of the inputs.

    It is the inverse of the factor that the paper has, of the inverse of the moments: nothing has
    to be inverted. Damping bounds the moments' condition by in / DAMPING, so that what float32
    rounds is to them as if the damping were a few hundredths more or less.
    """
    backwards = np.ascontiguousarray(moments[::-1, ::-1])
    diagonal = np.einsum("ii->i", backwards)
    diagonal += DAMPING * diagonal.mean(dtype=np.float64) + 1e-12
    torch = sys.modules.get("torch")  # twice as fast; folders are exported without
    if torch is None:
        factor = np.linalg.cholesky(backwards)
    else:
        factor = torch.linalg.cholesky(torch.from_numpy(backwards)).numpy()
    return np.asarray(factor[::-1, ::-1].T)
