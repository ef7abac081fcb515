"""Codes that minimise the error of the output, not of the weights.

Scales and zero points: for each block those of a grid that minimise the squared error of its
weights, each weighed by the second moment of its input. Codes: GPTQ (Frantar et al. 2022, arXiv
2210.17323): inputs are rounded one after the other, and the error of each is made good by those
that follow. It is written as Babai's nearest plane, which it is (Chen et al. 2025, arXiv
2507.18553): an input takes its share of all errors before it when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.export.quantize import parts
from fastgen.export.quantize.kernels import LEVELS, Floats, Kernel, blocks

GRID = np.linspace(0.7, 1.05, 15, dtype=np.float32)  # scales that are tried, of the largest weight
RANGES = np.linspace(0.75, 1.05, 8, dtype=np.float32)  # of the range of a block with a zero point
TOGETHER = 32  # inputs that are rounded one by one before the others hear of it
DAMPING = 0.01  # of the mean diagonal, as in the paper


def search_scales(
    weight: Floats, kernel: Kernel, second_moments: Floats
) -> tuple[Floats, NDArray[np.uint8]]:
    """Search the scales that minimise sum(E[x^2] (w - w')^2) within each block.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size, and whether blocks have zero points.
        second_moments: float32 [in], E[x^2] of each input.

    Returns:
        Scales, float32 [out, blocks], and zero points, uint8 likewise: the middle code where the
        kernel has none.
    """
    moments = blocks(second_moments[:, None].astype(np.float32), kernel.block)  # [1, blocks, block]
    size, out = weight.shape
    scales = np.empty((out, moments.shape[1]), np.float32)
    zeros = np.empty(scales.shape, np.uint8)

    def part(some: slice) -> None:
        scales[some], zeros[some] = _search(blocks(weight[:, some], kernel.block), kernel, moments)

    parts.each(out, size, part)
    return scales, zeros


def _search(weights: Floats, kernel: Kernel, moments: Floats) -> tuple[Floats, Floats]:
    """`search_scales` of weights [out, blocks, block], with moments [1, blocks, block]."""
    last = np.float32(2 * kernel.middle - 1)
    best = np.ones(weights.shape[:2], np.float32)
    zeros = np.zeros_like(best)
    least = np.full(best.shape, np.inf, np.float32)
    for scales, zero in _grid(weights, kernel, last):
        cost = _cost(weights, moments, scales, -zero[..., None], last - zero[..., None])
        better = cost < least
        best[better], least[better] = scales[better], cost[better]
        zeros[better] = np.broadcast_to(zero, best.shape)[better]
    return best, zeros


def _grid(weights: Floats, kernel: Kernel, last: np.float32) -> Iterator[tuple[Floats, Floats]]:
    """Scales and zero points that are tried; a single one, the middle code, where there are none.

    With zero points the middle code is the middle of a block's range. Zero is in every range, so
    that it is one of the codes.
    """
    if not kernel.zero_points:
        largest = np.abs(weights).max(axis=-1) / np.float32(LEVELS[kernel.bits])
        largest[largest == 0] = 1
        for share in GRID:
            yield largest * share, np.array(kernel.middle, np.float32)
        return
    high, low = weights.max(axis=-1).clip(0), weights.min(axis=-1).clip(None, 0)
    whole = (high - low) / last
    whole[whole == 0] = 1
    for share in RANGES:
        scales = whole * share
        yield scales, np.clip(np.rint((last - (high + low) / scales) / 2), 0, last)


def _cost(weights: Floats, moments: Floats, scales: Floats, low: Any, high: Any) -> Floats:
    """[out, blocks]: the weighed squared error of weights rounded to codes from `low` to `high`."""
    error = weights / scales[..., None]
    np.clip(np.rint(error, out=error), low, high, out=error)
    error *= scales[..., None]
    np.square(np.subtract(weights, error, out=error), out=error)
    error *= moments
    return np.asarray(error.sum(axis=-1))


def gptq(
    weight: Floats,
    kernel: Kernel,
    scales: Floats,
    factor: Floats,
    zeros: NDArray[np.uint8] | None = None,
) -> Floats:
    """A matrix [in, out] whose weights lie on the grid of `scales`, closest in its output.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size.
        scales: [out, blocks].
        factor: of the second moments of the inputs, see `factor`.
        zeros: [out, blocks], zero points, if the kernel has them.
    """
    level = np.full(scales.shape, LEVELS[kernel.bits], np.float32)
    low = -level - 1 if zeros is None else -zeros.astype(np.float32)
    high = level if zeros is None else low + (2 * kernel.middle - 1)
    size, count = weight.shape
    diagonal: Floats = np.diag(factor)
    rounded = np.empty((size, count), np.float32)
    errors = np.empty((size, count), np.float32)
    for start in range(0, size, TOGETHER):
        end = min(start + TOGETHER, size)
        # What an input takes over of the error of each one before it.
        shares = factor[start:end, :end] / diagonal[start:end, None]
        wanted = np.asarray(weight[start:end] + shares[:, :start] @ errors[:start], np.float32)
        block = start // (kernel.block or size)
        part = partial(
            _round,
            weight[start:end],
            wanted,
            rounded[start:end],
            errors[start:end],
            shares[:, start:],
            np.ascontiguousarray(scales[:, block]),
            np.ascontiguousarray(low[:, block]),
            np.ascontiguousarray(high[:, block]),
        )
        parts.each(count, end - start, part)
    return rounded


def _round(
    weight: Floats,
    wanted: Floats,
    rounded: Floats,
    errors: Floats,
    shares: Floats,
    scale: Floats,
    low: Floats,
    high: Floats,
    some: slice,
) -> None:
    """The rows of a block, one after the other, of some outputs.

    Args:
        weight: [block, out].
        wanted: [block, out], with the errors of earlier blocks made good.
        rounded, errors: [block, out], to be filled.
        shares: [block, block].
        scale, low, high: [out]; codes reach from low to high.
    """
    rest, scale, low, high = wanted[:, some], scale[some], low[some], high[some]
    change = np.empty_like(rest)
    for i in range(len(rest)):
        row, error = rounded[i, some], errors[i, some]
        np.divide(rest[i], scale, out=row)
        np.clip(np.rint(row, out=row), low, high, out=row)
        row *= scale
        np.subtract(weight[i, some], row, out=error)
        np.multiply(shares[i + 1 :, i, None], error, out=change[i + 1 :])
        rest[i + 1 :] += change[i + 1 :]


def factor(moments: Floats) -> Floats:
    """Lower triangle G [in, in] with G^T G = the damped second moments E[x^T x] of the inputs.

    It is the inverse of the factor that the paper has, of the inverse of the moments: nothing has
    to be inverted. Damping bounds the moments' condition by in / DAMPING, so that what float32
    rounds is to them as if the damping were a few hundredths more or less.
    """
    backwards = np.ascontiguousarray(moments[::-1, ::-1])
    diagonal = np.einsum("ii->i", backwards)
    diagonal += DAMPING * diagonal.mean(dtype=np.float64) + 1e-12
    return np.asarray(np.linalg.cholesky(backwards)[::-1, ::-1].T)
