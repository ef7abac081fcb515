"""Matrices that lie on a grid already, as a GGUF file's do: their codes and scales are found again.

ggml's types of 4, 5 and 8 bits without a minimum (Q4_0, Q5_0, Q8_0) have a scale for each block of
32 weights, as the kernel in blocks has. So their numbers need no other ones. Types with a minimum
(Q4_1, Q5_1, Q4_K, Q5_K) have some 16 or 32 levels in a block, a step apart, of which zero is none.
A whole part of that step is found of which zero is nearly a multiple, so that 8 bits with a zero
point say every level but for the same small error. All else, such as types whose scales are for 16
weights, gets the nearest codes of 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from fastgen.export.quantize import parts
from fastgen.export.quantize.kernels import (
    Choice,
    Floats,
    Kernel,
    Product,
    block_codes,
    blocks,
    codes_values,
    products,
    quantize,
)

BLOCK = 32
FOUR, EIGHT = Kernel(4, BLOCK), Kernel(8, BLOCK)
EIGHT_FROM_LOWEST = Kernel(8, BLOCK, zero_points=True)
# The code of the weight that is the largest of a block: ggml takes it for the end of the grid.
LOWEST_OF_4, LOWEST_OF_5, HIGHEST_OF_8 = -8, -16, 127
ENDS_OF_8 = (HIGHEST_OF_8, LOWEST_OF_5, LOWEST_OF_4)
FEW = 32  # outputs that tell whether a matrix may lie on a grid
# Steps from the lowest level of a block to its highest: any number up to 31 has a multiple here.
# Nearly all blocks have one of the first two, those of 4 and of 5 bits whose ends are both used.
STEPS = (15, 31, *range(30, 15, -1))
LAST = 255  # the largest code with a zero point
SOME = 1 / 8  # of the blocks that must be on levels, for zero points to be worth their bytes
OFF = 1e-3  # of a step that a weight may be off its level: what float32 rounds is less


def choice_of(weight: Floats) -> Choice:
    """The kernel in blocks that holds a matrix [in, out]: 4 bits where they are exact, or 8."""
    every = max(1, weight.shape[1] // FEW)
    few = np.ascontiguousarray(weight[:, ::every])  # most matrices show here what they are not on
    if _is_held(few, _nearest(few, FOUR, (LOWEST_OF_4,))):
        choice = _nearest(weight, FOUR, (LOWEST_OF_4,))
        if _is_held(weight, choice):
            return choice
    zeros = _from_lowest(few).zeros
    if zeros is not None and (zeros != EIGHT.middle).mean() > SOME:
        return _from_lowest(weight)
    return _nearest(weight, EIGHT, ENDS_OF_8)


def _is_held(weight: Floats, choice: Choice) -> bool:
    """True if the codes of a matrix stand for its very numbers."""
    assert choice.codes is not None and choice.scales is not None
    codes = choice.codes.astype(np.uint8, copy=False)
    values = codes_values(codes, choice.kernel, choice.scales, len(weight))
    return np.array_equal(values, weight)


def _nearest(weight: Floats, kernel: Kernel, ends: Sequence[int]) -> Choice:
    """The nearest codes, by the scale of each block that leaves the least.

    Args:
        ends: codes that the largest weight of a block may be.
    """
    size, out = weight.shape
    scales = np.empty((out, -(-size // BLOCK)), np.float32)

    def part(some: slice) -> None:
        scales[some], _ = _steps(blocks(weight[:, some], BLOCK), ends)

    parts.each(out, size, part)
    return Choice(kernel, scales, block_codes(weight, kernel, scales))


def _steps(values: Floats, ends: Sequence[int]) -> tuple[Floats, Floats]:
    """Scales of blocks [.., block] without zero points, and how far a weight is off at most."""
    at = np.abs(values).argmax(axis=-1, keepdims=True)
    peak = np.take_along_axis(values, at, axis=-1)
    scales = np.empty(peak.shape[:-1], np.float32)
    least = np.full_like(scales, np.inf)
    for end in ends:
        step = np.where(peak == 0, np.float32(1), peak / np.float32(end))
        codes = values / step
        left = np.abs(codes - np.rint(codes)).max(axis=-1) * np.abs(step[..., 0])
        better = left < least
        scales = np.where(better, step[..., 0], scales)
        least = np.where(better, left, least)
    return scales, least


def _from_lowest(weight: Floats) -> Choice:
    """Codes with zero points, for blocks whose levels are a step apart from a lowest one on; those
    of 8 bits without, if there are none.
    """
    size, out = weight.shape
    scales = np.empty((out, -(-size // BLOCK)), np.float32)
    zeros = np.full(scales.shape, EIGHT.middle, np.uint8)

    def part(some: slice) -> None:
        values = blocks(weight[:, some], BLOCK)
        found, left = _steps(values, ENDS_OF_8)
        odd = left > OFF * np.abs(found)
        step, zero, off = _levels(values[odd])
        better = off < left[odd]
        found[odd] = np.where(better, step, found[odd])
        scales[some] = found
        zeros[some][odd] = np.where(better, zero, np.float32(EIGHT.middle))

    parts.each(out, size, part)
    if (zeros == EIGHT.middle).all():
        return Choice(EIGHT, scales, block_codes(weight, EIGHT, scales))
    kernel = EIGHT_FROM_LOWEST
    return Choice(kernel, scales, block_codes(weight, kernel, scales, zeros), zeros)


def _levels(values: Floats) -> tuple[Floats, Floats, Floats]:
    """Scales and zero points of blocks [count, block] on levels, and how far each weight is off.

    That is infinite where a block is on none.
    """
    low = values.min(axis=-1)
    reach = values.max(axis=-1) - low
    steps = np.zeros(len(values), np.float32)
    missing = np.flatnonzero(reach > 0)
    for count in STEPS:
        codes = values[missing] - low[missing, None]
        codes *= (np.float32(count) / reach[missing])[:, None]
        on = np.abs(codes - np.rint(codes)).max(axis=-1, initial=0) < OFF
        steps[missing[on]] = count
        missing = missing[~on]
    return _parts_of_steps(low, reach, steps)


def _parts_of_steps(low: Floats, reach: Floats, steps: Floats) -> tuple[Floats, Floats, Floats]:
    """The whole part of each block's step of which zero is nearest to a multiple; see `_levels`.

    Args:
        low, reach: the lowest level, and how far the highest is from it.
        steps: between the two; 0 for none.
    """
    scales, zeros = np.ones_like(low), np.zeros_like(low)
    least = np.full_like(low, np.inf)
    for part in range(1, LAST // min(STEPS) + 1):
        last = steps * np.float32(part)  # the code of the highest level, if the lowest has 0
        scale = np.divide(reach, last, out=np.ones_like(low), where=last > 0)
        first = np.rint(low / scale)
        zero = np.clip(-first, 0, LAST)
        fits = (last > 0) & (first + zero >= 0) & (first + zero + last <= LAST)
        off = np.where(fits, np.abs(low - first * scale), np.inf)
        better = off < least
        for mine, other in ((scales, scale), (zeros, zero), (least, off)):
            np.copyto(mine, other, where=better)
    return scales, zeros, least


def hold(model: ir.Model, shown: Callable[[int, int], None]) -> list[str]:
    """Hold every matrix of a graph in the kernel of its grid, in place.

    Args:
        model: the trimmed graph in float32.
        shown: called with the number of matrices done and their total, as they are.

    Returns:
        The kernel of each.
    """
    total = len(products(model.graph))
    kernels: list[str] = []

    def choose(product: Product) -> Choice:
        shown(len(kernels), total)
        choice = choice_of(product.weight)
        kernels.append(str(choice.kernel))
        return choice

    quantize(model, choose)
    return kernels
