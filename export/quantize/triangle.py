"""Triangular factors of symmetric matrices, by blocks: nearly all of it is products, on one core.

LAPACK's, as numpy's wheels have it, takes almost four times as long for 1,536 numbers a side, and
numpy has no solver for triangles.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastgen.export.quantize import blas

BLOCK = 64  # rows that LAPACK is asked for at a time

Floats = NDArray[np.float32]


@blas.one_thread()  # many small products: several threads would wait for each other
def cholesky(symmetric: Floats) -> Floats:
    """Lower triangle L with L L^T = a positive definite matrix.

    Raises:
        numpy.linalg.LinAlgError: it is not positive definite.
    """
    lower, size = np.zeros_like(symmetric), len(symmetric)
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        left = symmetric[start:, start:end] - lower[start:, :start] @ lower[start:end, :start].T
        block = lower[start:end, start:end] = np.linalg.cholesky(left[: end - start])
        lower[end:, start:end] = left[end - start :] @ np.linalg.inv(block).T
    return lower


@blas.one_thread()
def solved(lower: Floats, wanted: Floats) -> Floats:
    """X with G^T G X = what is wanted, [size, columns], of a lower triangle G."""
    found = np.array(wanted, np.float32)
    blocks = [slice(at, min(at + BLOCK, len(lower))) for at in range(0, len(lower), BLOCK)]
    inverses = [np.linalg.inv(lower[block, block]) for block in blocks]
    for block, inverse in zip(blocks[::-1], inverses[::-1], strict=True):
        found[block] -= lower[block.stop :, block].T @ found[block.stop :]
        found[block] = inverse.T @ found[block]
    for block, inverse in zip(blocks, inverses, strict=True):
        found[block] -= lower[block, : block.start] @ found[: block.start]
        found[block] = inverse @ found[block]
    return found
