"""Orthogonal matrices that spread outliers: products of signs, Hadamard and Hartley matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastgen.export.quantize import parts

Floats = NDArray[np.float32]

SEED = 0  # of the signs
FACTOR = 64  # a Hadamard matrix of a size above is made of two of smaller ones
COLUMNS = 256  # of a matrix that are changed by one product


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R = S K [size, size]: random signs S, and K, symmetric, flat.

    K is the Kronecker product of Hadamard matrices, and of a Hartley matrix for the odd part.

    Attributes:
        size: of what is turned.
        signed: whether S is more than the identity.
    """

    size: int
    signed: bool = True

    @cached_property
    def _signs(self) -> Floats:
        if not self.signed:
            return np.ones(self.size, np.float32)
        return np.random.default_rng(SEED).choice([-1, 1], self.size).astype(np.float32)

    @cached_property
    def _factors(self) -> list[Floats]:
        power, odd = self.size & -self.size, self.size // (self.size & -self.size)
        sizes = []
        while power > 1:
            sizes.append(min(power, FACTOR))
            power //= sizes[-1]
        return [hadamard(size) for size in sizes] + ([_hartley(odd)] if odd > 1 else [])

    def forward(self, x: Floats) -> Floats:
        """x R [..., size]."""
        rows = x.reshape(-1, self.size)
        return self.of_columns(rows.T).T.reshape(x.shape)

    def of_columns(self, x: Floats) -> Floats:
        """R^T x [..., size, columns], a factor of K at a time: fewer and larger products than for
        rows, which are turned over for it.
        """
        shape, behind = x.shape, self.size * x.shape[-1]
        x = x * self._signs[:, None]
        for factor in self._factors:
            behind //= len(factor)
            x = factor @ x.reshape(-1, len(factor), behind)
        return x.reshape(shape)


def turned(x: Floats, size: int) -> Floats:
    """x [..., in] with each `size` channels multiplied by a Hadamard matrix; twice gives x again.

    Args:
        size: a power of two that divides the channels.
    """
    return np.asarray((x.reshape(*x.shape[:-1], -1, size) @ hadamard(size)).reshape(x.shape))


def turned_columns(x: Floats, size: int) -> Floats:
    """x [in, columns] with each `size` channels multiplied by a Hadamard matrix."""
    return np.asarray((hadamard(size) @ x.reshape(-1, size, x.shape[1])).reshape(x.shape))


def hadamard(size: int) -> Floats:
    """float32 [size, size], symmetric and orthogonal, all entries as large; size a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(size), np.float32)


def _hartley(size: int) -> Floats:
    """Symmetric and orthogonal, no entry above sqrt(2 / size) (Bracewell 1983)."""
    angle = 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
    return np.asarray((np.cos(angle) + np.sin(angle)) / np.sqrt(size), np.float32)


def by_columns(change: Callable[[Floats], Floats], matrix: Floats) -> Floats:
    """Apply `change` to the columns of a matrix [size, columns]; laid out as it is.

    The same columns are changed together however many parts there are: what a product rounds
    depends on how many columns it has.
    """
    result = np.empty_like(matrix)
    starts = range(0, matrix.shape[1], COLUMNS)

    def part(some: slice) -> None:
        for start in starts[some]:
            columns = slice(start, start + COLUMNS)
            result[:, columns] = change(matrix[:, columns])

    parts.each(len(starts), len(matrix) * COLUMNS, part)
    return result


def by_rows(change: Callable[[Floats], Floats], matrix: Floats) -> Floats:
    """Apply `change` to the rows of a matrix [rows, size], as `by_columns` does."""
    return by_columns(lambda columns: change(columns.T).T, matrix.T).T
