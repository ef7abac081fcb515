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
def upper(symmetric: Floats) -> Floats:
    """Upper triangle U with U U^T = a positive definite matrix, in whose place it is made.

    Raises:
        numpy.linalg.LinAlgError: it is not positive definite; some of it is overwritten.
    """
    for end in range(len(symmetric), 0, -BLOCK):
        start = max(0, end - BLOCK)
        behind = symmetric[start:end, end:]
        left = symmetric[:end, start:end] - symmetric[:end, end:] @ behind.T
        block = np.linalg.cholesky(left[start:][::-1, ::-1])[::-1, ::-1]
        symmetric[start:end, start:end] = block
        symmetric[:start, start:end] = left[:start] @ np.linalg.inv(block).T
        symmetric[end:, start:end] = 0
    return symmetric


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
