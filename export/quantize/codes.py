"""Scales and codes of the matrices of a graph, each made once for a kernel.

Where a graph can be cut into pieces, codes of 4 bits are made for what the matrices before have
left of their inputs (see `follow`), for the kernels that are settled on; until then they are the
nearest ones, which say what a kind of matrix costs beside the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.quantize import calibrate, rotation
from fastgen.export.quantize.follow import Turn, follow
from fastgen.export.quantize.gptq import factor, gptq
from fastgen.export.quantize.kernels import (
    Choice,
    Floats,
    Kernel,
    Product,
    block_codes,
    block_grid,
    channel_codes,
    channel_scales,
    codes_shape,
    turned_matrix,
)
from fastgen.export.quantize.parts import side_by_side

Seen = Mapping[ir.Value, calibrate.Input]


class Codes:
    """Scales and codes of matrices."""

    def __init__(self, inputs: Seen, kept: calibrate.Shelf) -> None:
        """
        Args:
            inputs: what the products read, on the calibration text.
            kept: holds codes.
        """
        self._inputs, self._kept = inputs, kept
        self._made: dict[tuple[str, Kernel], Choice] = {}
        self._last = threading.local()  # factor of each thread

    def of(self, product: Product, kernel: Kernel) -> Choice:
        """Those of a product, for a kernel."""
        if (product.name, kernel) not in self._made:
            make = self._nearest if product.is_head else self._first
            self._made[product.name, kernel] = make(product, kernel)
        return self._made[product.name, kernel]

    def make(self, kernels: Mapping[Product, Kernel], shown: Callable[[int, int], None]) -> None:
        """Make those that are missing, side by side where products read different values.

        Args:
            kernels: of the products.
            shown: called with the number of values done and their total, as they are.
        """
        together: dict[tuple[ir.Value, int], list[Product]] = {}
        for product, kernel in kernels.items():
            if product.is_head:  # the largest, on all cores
                self.of(product, kernel)
            elif (product.name, kernel) not in self._made:
                together.setdefault((product.input, kernel.turned), []).append(product)

        def all_of(products: Sequence[Product]) -> None:
            for product in products:
                self.of(product, kernels[product])

        for done, _ in enumerate(side_by_side(all_of, list(together.values()))):
            shown(done, len(together))

    def settle(self, kernels: Mapping[Product, Kernel], shown: Callable[[int, int], None]) -> None:
        """Make those that are used, if they are to be others than the first ones.

        Args:
            kernels: of all products but heads.
            shown: called with the number of matrices done and their total, as they are.
        """

    def _first(self, product: Product, kernel: Kernel) -> Choice:
        """GPTQ's, for what the product reads in float32."""
        seen = self._inputs[product.input]
        moments = self._factor_of(product.input, seen.moments, seen.tokens, kernel.turned)
        return self._best(product.weight, kernel, moments)[0]

    def _nearest(self, product: Product, kernel: Kernel) -> Choice:
        """The nearest ones. Heads have them: theirs may be the embedding's, the largest."""
        weight = product.weight
        if kernel.turned:
            weight = turned_matrix(kernel.turned, False, weight)
        if kernel.block == 0:
            return Choice(kernel)
        scales, zeros = block_grid(weight, kernel)
        codes = self._kept.room(codes_shape(scales, kernel), np.uint8)
        return Choice(kernel, scales, block_codes(weight, kernel, scales, zeros, out=codes), zeros)

    def _best(self, weight: Floats, kernel: Kernel, moments: Floats) -> tuple[Choice, Floats]:
        """GPTQ's of a matrix [in, out], and the matrix that they stand for.

        Args:
            moments: their factor, turned as the kernel says.
        """
        if kernel.turned:
            weight = turned_matrix(kernel.turned, False, weight)
        weight = np.ascontiguousarray(weight)
        if kernel.block == 0:
            scales = channel_scales(weight)
            values = gptq(weight, kernel, moments, scales).values
            choice = Choice(kernel, scales, self._kept(channel_codes(values, scales)[0]))
        else:
            made = gptq(weight, kernel, moments)
            values = made.values
            codes = self._kept(block_codes(values, kernel, made.scales, made.zeros))
            choice = Choice(kernel, made.scales, codes, made.zeros)
        if kernel.turned:
            values = turned_matrix(kernel.turned, False, values)
        return choice, values

    def _factor_of(self, value: ir.Value, moments: Floats, tokens: int, turned: int) -> Floats:
        """Of the moments of a value: products that read the same one come one by one."""
        key, held = (value, turned), getattr(self._last, "factor", None)
        if held is None or held[0] != key:
            if turned:
                moments = rotation.turned(rotation.turned_columns(moments, turned), turned)
            held = key, factor(moments, calibrate.damping(len(moments), tokens))
            self._last.factor = held
        return np.asarray(held[1])


class FollowedCodes(Codes):
    """Codes that are made for what is before them."""

    def __init__(
        self,
        inputs: Seen,
        kept: calibrate.Shelf,
        model: ir.Model,
        rows: Sequence[NDArray[np.int64]],
    ) -> None:
        """
        Args:
            model: a graph that can be cut.
            rows: the calibration text.
        """
        super().__init__(inputs, kept)
        self._model, self._rows = model, rows
        self._settled: dict[str, Kernel] = {}

    def settle(self, kernels: Mapping[Product, Kernel], shown: Callable[[int, int], None]) -> None:
        wanted = {product.name: kernel for product, kernel in kernels.items()}
        if wanted == self._settled:
            return
        self._settled = wanted
        self._made = {key: made for key, made in self._made.items() if key[0] not in wanted}
        others = len(self._made)  # heads, which do not follow: the largest, and made once

        def make(turn: Turn) -> Floats:
            shown(len(self._made) - others, len(kernels))
            product, kernel = turn.product, kernels[turn.product]
            lower = turn.factor
            if kernel.turned:
                lower = self._factor_of(product.input, turn.moments, turn.tokens, kernel.turned)
            choice, values = self._best(turn.weight, kernel, lower)
            self._made[product.name, kernel] = choice
            return values

        self._last = threading.local()
        follow(self._model, list(kernels), self._rows, make)

    def _first(self, product: Product, kernel: Kernel) -> Choice:
        return self._nearest(product, kernel)
