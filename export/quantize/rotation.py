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
        return self._mixed(x * self._signs)

    def back(self, x: Floats) -> Floats:
        """x R^T [..., size]."""
        return self._mixed(x) * self._signs

    def _mixed(self, x: Floats) -> Floats:
        """x K, a factor at a time."""
        shape, behind = x.shape, self.size
        for factor in self._factors:
            behind //= len(factor)
            x = factor @ x.reshape(-1, len(factor), behind)
        return np.ascontiguousarray(x.reshape(shape))


def turned(x: Floats, size: int) -> Floats:
    """x [..., in] with each `size` channels multiplied by a Hadamard matrix; twice gives x again.

    Args:
        size: a power of two that divides the channels.
    """
    return np.asarray((x.reshape(*x.shape[:-1], -1, size) @ hadamard(size)).reshape(x.shape))


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


def by_rows(change: Callable[[Floats], Floats], matrix: Floats) -> Floats:
    """Apply `change` to the rows of a matrix [rows, size], some at a time; laid out as it is."""
    result = np.empty_like(matrix)

    def part(some: slice) -> None:
        result[some] = change(matrix[some])

    parts.each(len(matrix), matrix[0].size, part)
    return result
