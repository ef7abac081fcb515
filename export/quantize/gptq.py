"""Codes that minimise the error of the output, not of the weights.

GPTQ (Frantar et al. 2022, arXiv 2210.17323): inputs are rounded one after the other, and the error
of each is made good by those that follow. It is written as Babai's nearest plane, which it is (Chen
et al. 2025, arXiv 2507.18553): an input takes its share of all errors before it when its turn
comes. What it is then rounded off by is what no other makes good any more, so the sum of its
squares is the error of the output.

A block's scale and zero point are found when its turn comes: of a few ranges the one whose codes
add least to that sum. Then the scale is fitted to the codes, and they to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastgen.export.quantize import parts, triangle
from fastgen.export.quantize.kernels import LEVELS, Floats, Kernel, Range, blocks, short

GRID = np.linspace(0.7, 1.05, 15, dtype=np.float32)  # scales that are tried, of the largest weight
RANGES = {4: (0.8, 0.88, 0.96, 1.04), 8: (1.0,)}  # tried, of the range of what a block has to hold
FITS = 2  # times that a scale is fitted to its codes
COPIES = 4  # arrays of a block that are worked on at once, for each range
TOGETHER = 32  # inputs that are rounded one by one before the others hear of it


def search_scales(weight: Floats, kernel: Kernel, second_moments: Floats) -> Floats:
    """Search the scales that minimise sum(E[x^2] (w - w')^2) within each block.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size; it has no zero points.
        second_moments: float32 [in], E[x^2] of each input.

    Returns:
        Scales, float32 [out, blocks].
    """
    moments = blocks(second_moments[:, None].astype(np.float32), kernel.block)  # [1, blocks, block]
    size, out = weight.shape
    scales = np.empty((out, moments.shape[1]), np.float32)

    def part(some: slice) -> None:
        scales[some] = _search(blocks(weight[:, some], kernel.block), kernel, moments)

    parts.each(out, size, part)
    return scales


def _search(weights: Floats, kernel: Kernel, moments: Floats) -> Floats:
    """`search_scales` of weights [out, blocks, block], with moments [1, blocks, block]."""
    level = np.float32(LEVELS[kernel.bits])
    largest = np.abs(weights).max(axis=-1) / level
    largest[largest == 0] = 1
    best = np.ones(weights.shape[:2], np.float32)
    least = np.full(best.shape, np.inf, np.float32)
    for share in GRID:
        scales = largest * share
        error = weights / scales[..., None]
        np.clip(np.rint(error, out=error), -level - 1, level, out=error)
        error *= scales[..., None]
        np.square(np.subtract(weights, error, out=error), out=error)
        error *= moments
        cost = error.sum(axis=-1)
        better = cost < least
        best[better], least[better] = scales[better], cost[better]
    return best


@dataclass(frozen=True)
class OnGrid:
    """A matrix that codes can say.

    Attributes:
        values: float32 [in, out].
        scales: float32 [out, blocks].
        zeros: uint8 [out, blocks], zero points; None where the kernel has none.
    """

    values: Floats
    scales: Floats
    zeros: NDArray[np.uint8] | None


def gptq(weight: Floats, kernel: Kernel, factor: Floats, scales: Floats | None = None) -> OnGrid:
    """The matrix on a grid of `kernel` that is closest to a matrix [in, out] in its output.

    Args:
        weight: float32 [in, out].
        kernel: bits and block size, and whether blocks have zero points.
        factor: of the second moments of the inputs, see `factor`.
        scales: [out], of a kernel per channel.
    """
    size, count = weight.shape
    step = kernel.block or TOGETHER
    starts = range(0, size, step)
    diagonal = np.diag(factor)
    costs = np.square(diagonal)
    values = np.empty((size, count), np.float32)
    held = np.empty((count, len(starts)), np.float32)
    zeros = np.full(held.shape, kernel.middle, np.uint8)

    def part(some: slice) -> None:
        mine = np.ascontiguousarray(weight[:, some])
        errors = np.empty_like(mine)
        for at, start in enumerate(starts):
            rows = slice(start, min(start + step, size))
            # Of an error before it or among them, that an input takes over.
            shares: Floats = np.divide(factor[rows, : rows.stop], diagonal[rows, None], order="C")
            wanted = mine[rows] + shares[:, :start] @ errors[:start]
            block = _Block(mine[rows], wanted, shares[:, start:], costs[rows])
            if scales is None:
                found = block.searched(kernel)
            else:
                found = block.rounded(scales[some], zeros[some, at].astype(np.float32), kernel)
            held[some, at], zeros[some, at] = found.scale, found.zero
            np.multiply(found.codes, found.scale, out=values[rows, some])
            np.subtract(mine[rows], values[rows, some], out=errors[rows])

    parts.each(count, COPIES * len(RANGES[kernel.bits]) * step, part, spread=True)
    return OnGrid(values, held, zeros if kernel.zero_points else None)


@dataclass
class _Codes:
    """Codes of a block, zero being zero.

    Attributes:
        scale, zero: [out].
        codes: [block, out].
        cost: [out], what they add to the error of the output.
    """

    scale: Floats
    zero: Floats
    codes: Floats
    cost: Floats

    def split(self, count: int) -> list[_Codes]:
        """Those of so many equal shares of the outputs."""
        fields = (self.scale, self.zero, self.codes, self.cost)
        shares = [np.split(field, count, axis=-1) for field in fields]
        return [_Codes(*some) for some in zip(*shares, strict=True)]

    def take(self, other: _Codes) -> None:
        """Take over what costs less in the other."""
        less = other.cost < self.cost
        for name in ("scale", "zero", "codes", "cost"):
            np.copyto(getattr(self, name), getattr(other, name), where=less)


@dataclass(frozen=True)
class _Block:
    """Inputs whose turn it is, of some outputs.

    Attributes:
        weight: [block, out].
        wanted: [block, out], with the errors of earlier blocks made good.
        shares: [block, block], what an input takes over of the error of another; ones for its own.
        costs: [block], of the square of what an input is rounded off by.
    """

    weight: Floats
    wanted: Floats
    shares: Floats
    costs: Floats

    def rounded(self, scale: Floats, zero: Floats, kernel: Kernel) -> _Codes:
        """The codes of one input after the other."""
        low, high = -zero, np.float32(2 * kernel.middle - 1) - zero
        weight, wanted = self.weight / scale, self.wanted / scale
        codes, rest, errors = (np.empty_like(wanted) for _ in range(3))
        for i, (code, left, error) in enumerate(zip(codes, rest, errors, strict=True)):
            np.matmul(self.shares[i, :i], errors[:i], out=left)
            left += wanted[i]
            np.rint(left, out=code)
            np.minimum(np.maximum(code, low, out=code), high, out=code)
            np.subtract(weight[i], code, out=error)
        rest -= codes
        return _Codes(scale, zero, codes, self.costs @ np.square(rest, out=rest) * scale**2)

    def _times(self, count: int) -> _Block:
        """The same outputs so many times, side by side: rows of few numbers cost a call each."""
        weight, wanted = (np.tile(matrix, (1, count)) for matrix in (self.weight, self.wanted))
        return _Block(weight, wanted, self.shares, self.costs)

    @cached_property
    def _target(self) -> Floats:
        """[block, out]: what `shares` times the values should be."""
        return np.asarray(self.wanted - self.weight + self.shares @ self.weight)

    def fitted(self, found: _Codes) -> _Codes:
        """The same codes with the scale that costs least with them."""
        mixed = self.shares @ found.codes
        square = self.costs @ np.square(mixed)
        scale = self.costs @ (mixed * self._target)
        fits = (square > 0) & (scale > 0)
        scale = short(np.divide(scale, square, out=found.scale.copy(), where=fits))
        cost = self.costs @ np.square(self._target - mixed * scale)
        return _Codes(scale, found.zero, found.codes, cost)

    def searched(self, kernel: Kernel) -> _Codes:
        """The codes of the best of some grids, whose scale is fitted to them."""
        scales, zeros = zip(*_grid(self.wanted, kernel), strict=True)
        best, *others = (
            self._times(len(scales))
            .rounded(np.concatenate(scales), np.concatenate(zeros), kernel)
            .split(len(scales))
        )
        for other in others:
            best.take(other)
        for again in range(FITS):
            if again:
                best.take(self.rounded(best.scale.copy(), best.zero, kernel))
            best.take(self.fitted(best))
        return best


def _grid(wanted: Floats, kernel: Kernel) -> Iterator[tuple[Floats, Floats]]:
    """Scales and zero points [out] that are tried; the middle code, where there are none."""
    if not kernel.zero_points:
        largest = np.abs(wanted).max(axis=0) / np.float32(LEVELS[kernel.bits])
        largest[largest == 0] = 1
        zero = np.full_like(largest, kernel.middle)
        for share in RANGES[kernel.bits]:
            yield short(largest * np.float32(share)), zero
        return
    held = Range.of(wanted, kernel, axis=0)
    whole = held.scale
    for share in RANGES[kernel.bits]:
        scale = short(whole * np.float32(share))
        yield scale, held.zero_point(scale)


def factor(moments: Floats, damping: float) -> Floats:
    """Lower triangle G [in, in] with G^T G = the damped second moments E[x^T x] of the inputs.

    It is the inverse of the factor that the paper has, of the inverse of the moments: nothing has
    to be inverted.

    Args:
        damping: of the mean diagonal, see `calibrate.damping`. Moments of few tokens say more of
            these than of others. It also bounds the moments' condition, so that what float32
            rounds is to them as if it were a few hundredths more or less.
    """
    damped = np.array(moments, np.float32)
    diagonal = np.einsum("ii->i", damped)
    diagonal += damping * diagonal.mean(dtype=np.float64) + 1e-12
    return triangle.upper(damped).T
