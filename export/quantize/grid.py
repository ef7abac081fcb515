"""Matrices that lie on a grid already, as a GGUF file's do: their codes and scales are found again.

ggml's types of 4, 5 and 8 bits without a minimum (Q4_0, Q5_0, Q8_0) have a scale for each block of
32 weights, as the kernel in blocks has. So their numbers need no other ones. Types with a minimum,
and those whose scales are for 16 weights, get the nearest codes of 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable

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
    products,
    quantize,
)

BLOCK = 32
FOUR, EIGHT = Kernel(4, BLOCK), Kernel(8, BLOCK)
# The code of the weight that is the largest of a block: ggml takes it for the end of the grid.
LOWEST_OF_4, LOWEST_OF_5, HIGHEST_OF_8 = -8, -16, 127
OFF_GRID = 1e-3  # of a step, that a weight may lie beside its code


def choice_of(weight: Floats) -> Choice:
    """The kernel in blocks that holds a matrix [in, out]: 4 bits where they are exact, or 8."""
    scales, is_exact = _scales(weight, (LOWEST_OF_4,))
    if is_exact:
        return Choice(FOUR, scales, block_codes(weight, FOUR, scales))
    scales, _ = _scales(weight, (HIGHEST_OF_8, LOWEST_OF_5, LOWEST_OF_4))
    return Choice(EIGHT, scales, block_codes(weight, EIGHT, scales))


def _scales(weight: Floats, ends: tuple[int, ...]) -> tuple[Floats, bool]:
    """[out, blocks]: of each block the scale that leaves the least, and whether none leaves any.

    Args:
        ends: codes that the largest weight of a block may be.
    """
    size, out = weight.shape
    scales = np.empty((out, -(-size // BLOCK)), np.float32)
    exact = np.ones(out, bool)

    def part(some: slice) -> None:
        values = blocks(weight[:, some], BLOCK)
        at = np.abs(values).argmax(axis=-1, keepdims=True)
        peak = np.take_along_axis(values, at, axis=-1)
        least = np.full(peak.shape[:-1], np.inf, np.float32)
        for end in ends:
            step = np.where(peak == 0, np.float32(1), peak / np.float32(end))
            codes = values / step
            beside = np.abs(codes - np.rint(codes)).max(axis=-1)
            left = beside * np.abs(step[..., 0])
            better = left < least
            scales[some] = np.where(better, step[..., 0], scales[some])
            least = np.where(better, left, least)
            if len(ends) == 1:
                inside = (codes.min(axis=-1) > end - 0.5) & (codes.max(axis=-1) < -end - 0.5)
                exact[some] = ((beside < OFF_GRID) & inside).all(axis=-1)

    parts.each(out, size, part)
    return scales, bool(exact.all())


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
