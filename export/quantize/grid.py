"""Matrices that lie on a grid already, as a GGUF file's do: their codes and scales are found again.

ggml's types of 4, 5 and 8 bits without a minimum (Q4_0, Q5_0, Q8_0) have a scale for each block of
32 weights, as the kernel in blocks has. So their numbers need no other ones. Types with a minimum,
and those whose scales are for 16 weights, get the nearest codes of 8 bits.
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
# The code of the weight that is the largest of a block: ggml takes it for the end of the grid.
LOWEST_OF_4, LOWEST_OF_5, HIGHEST_OF_8 = -8, -16, 127
FEW = 32  # outputs that tell whether a matrix may lie on a grid of 4 bits


def choice_of(weight: Floats) -> Choice:
    """The kernel in blocks that holds a matrix [in, out]: 4 bits where they are exact, or 8."""
    few = np.ascontiguousarray(weight[:, :FEW])  # most matrices show here that 4 bits are not
    if _is_held(few, _choice(few, FOUR, (LOWEST_OF_4,))):
        choice = _choice(weight, FOUR, (LOWEST_OF_4,))
        if _is_held(weight, choice):
            return choice
    return _choice(weight, EIGHT, (HIGHEST_OF_8, LOWEST_OF_5, LOWEST_OF_4))


def _is_held(weight: Floats, choice: Choice) -> bool:
    """True if the codes of a matrix stand for its very numbers."""
    assert choice.codes is not None and choice.scales is not None
    codes = choice.codes.astype(np.uint8, copy=False)
    values = codes_values(codes, choice.kernel, choice.scales, len(weight))
    return np.array_equal(values, weight)


def _choice(weight: Floats, kernel: Kernel, ends: Sequence[int]) -> Choice:
    """The nearest codes, by the scale of each block that leaves the least.

    Args:
        ends: codes that the largest weight of a block may be.
    """
    size, out = weight.shape
    scales = np.empty((out, -(-size // BLOCK)), np.float32)

    def part(some: slice) -> None:
        values = blocks(weight[:, some], BLOCK)
        at = np.abs(values).argmax(axis=-1, keepdims=True)
        peak = np.take_along_axis(values, at, axis=-1)
        least = np.full(peak.shape[:-1], np.inf, np.float32)
        for end in ends:
            step = np.where(peak == 0, np.float32(1), peak / np.float32(end))
            codes = values / step
            left = np.abs(codes - np.rint(codes)).max(axis=-1) * np.abs(step[..., 0])
            better = left < least
            scales[some] = np.where(better, step[..., 0], scales[some])
            least = np.where(better, left, least)

    parts.each(out, size, part)
    return Choice(kernel, scales, block_codes(weight, kernel, scales))


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
