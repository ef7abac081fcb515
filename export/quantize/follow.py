"""Codes of one matrix after the other, each for what those before it have left of its inputs.

A matrix W reads X' where it should read X, since what is before it is quantised already. It is
moved to the one whose product with X' is closest to X W (the first step of Qronos, Zhang et al.
2025, arXiv 2505.11695), and, where that is added to a value R that is R' by then, to X W + R - R':
so it makes good what it can of all errors so far. Then it is rounded by the moments of X'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.quantize import calibrate, triangle
from fastgen.export.quantize.gptq import factor
from fastgen.export.quantize.kernels import Floats, Product
from fastgen.export.quantize.parts import side_by_side
from fastgen.export.quantize.passage import Passage
from fastgen.export.rewrite.edit import is_constant, rank, sizes_of

SHARES = 2  # of the text, whose sums are made side by side, each by one core

Rows = Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class Turn:
    """A matrix whose turn it is.

    Attributes:
        weight: float32 [in, out], what it should be rounded to.
        moments: float32 [in, in], E[x^T x] of what it reads by then.
        tokens: that they are of.
        factor: of the moments (see `gptq.factor`).
    """

    product: Product
    weight: Floats
    moments: Floats
    tokens: int
    factor: Floats


def follow(
    model: ir.Model,
    products: Sequence[Product],
    rows: Rows,
    make: Callable[[Turn], Floats],
) -> None:
    """Have codes made of some products of a graph, in order.

    Args:
        model: a graph that can be cut (see `passage.can_be_cut`).
        rows: of ids.
        make: gives the matrix [in, out] that codes stand for; it is asked for those that read the
            same value one after the other.
    """
    exact = Passage(model, rows)
    ours: Passage | None = None
    replaced: dict[ir.Node, Floats] = {}
    for readers in _in_order(products, exact):
        end = min(exact.index(product.node) for product in readers)
        exact.run(end, {})
        if ours is None:
            ours = exact.copy()
        else:
            ours.run(end, replaced)
        replaced = {node: held for node, held in replaced.items() if exact.index(node) >= end}
        for turn in _turns(readers, exact, ours):
            values = make(turn)
            replaced[turn.product.node] = values.T if turn.product.transposed else values


def _in_order(products: Sequence[Product], passage: Passage) -> list[list[Product]]:
    """Products by what they read, in the order of the graph."""
    by_input: dict[ir.Value, list[Product]] = {}
    for product in products:
        by_input.setdefault(product.input, []).append(product)
    return sorted(by_input.values(), key=lambda some: min(passage.index(one.node) for one in some))


def _turns(readers: Sequence[Product], exact: Passage, ours: Passage) -> Iterator[Turn]:
    """Turns of products that read the same value.

    What the value has lost times W, and what is lost beside that product, are looked at together
    where both are there: so the moments of what was lost are only made where nothing is beside.
    """
    value, size = readers[0].input, readers[0].shape[0]
    weights = {one.name: np.ascontiguousarray(one.weight) for one in readers}
    beside = {one.name: _beside(one) for one in readers}
    added = {name: other for name, other in beside.items() if other and exact.has(other)}

    def sums(batches: Sequence[int]) -> list[Floats]:
        """Moments, those of what was lost, and what each of `added` should make good."""
        moments = np.zeros((size, size), np.float32)
        apart = np.zeros_like(moments if len(added) < len(readers) else moments[:0])
        wanted = [np.zeros_like(weights[name]) for name in added]
        for at in batches:
            x = ours.seen(value, at)
            lost = exact.seen(value, at) - x
            moments += x.T @ x
            for (name, other), good in zip(added.items(), wanted, strict=True):
                left = lost @ weights[name]
                left += exact.seen(other, at)
                left -= ours.seen(other, at)
                good += x.T @ left
            if len(apart):
                apart += x.T @ lost
        return [moments, apart, *wanted]

    every = range(len(exact.batches))
    shares = [every[at::SHARES] for at in range(SHARES)]
    moments, apart, *others = (sum(some) for some in zip(*side_by_side(sums, shares), strict=True))
    wanted = dict(zip(added, others, strict=True))
    tokens = sum(int(batch.counts.sum()) for batch in exact.batches)
    moments /= tokens
    lower = factor(moments, calibrate.damping(size, tokens))
    for product in readers:
        weight = weights[product.name]
        better = wanted[product.name] if product.name in added else apart @ weight
        if better.any():
            weight = weight + triangle.solved(lower, better / tokens)
        yield Turn(product, weight, moments, tokens, lower)


def _beside(product: Product) -> ir.Value | None:
    """The value that a product's output is added to, perhaps after a constant."""
    value = product.node.outputs[0]
    while True:
        uses = [use for use in value.uses() if use.node.op_type != "Shape"]
        if len(uses) != 1 or uses[0].node.op_type != "Add" or value.is_graph_output():
            return None
        node = uses[0].node
        other = node.inputs[1 - uses[0].idx]
        if other is None:
            return None
        if not is_constant(other):
            same = rank(other) == 3 and sizes_of(other)[-1] == product.shape[1]
            return other if same else None
        value = node.outputs[0]
