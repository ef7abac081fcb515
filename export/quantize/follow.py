"""Codes of one matrix after the other, each for what those before it have left of its inputs.

A matrix W reads X' where it should read X, since what is before it is quantised already. It is
moved to the one whose product with X' is closest to X W (the first step of Qronos, Zhang et al.
2025, arXiv 2505.11695), and, where that is added to a value R that is R' by then, to X W + R - R':
so it makes good what it can of all errors so far. Then it is rounded by the moments of X'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.quantize import calibrate
from fastgen.export.quantize.kernels import Floats, Product
from fastgen.export.quantize.passage import Passage
from fastgen.export.rewrite.edit import is_constant, rank, sizes_of

ROWS = 8  # whose tokens are looked at together

Rows = Sequence[NDArray[np.int64]]


@dataclass(frozen=True)
class Turn:
    """A matrix whose turn it is.

    Attributes:
        weight: float32 [in, out], what it should be rounded to.
        moments: float32 [in, in], E[x^T x] of what it reads by then.
        tokens: that they are of.
    """

    product: Product
    weight: Floats
    moments: Floats
    tokens: int


def follow(
    model: ir.Model,
    products: Sequence[Product],
    rows: Rows,
    directory: Path,
    make: Callable[[Turn], Floats],
) -> None:
    """Have codes made of some products of a graph, in order.

    Args:
        model: a graph that can be cut (see `passage.can_be_cut`).
        rows: of ids.
        directory: of the file that its weights are in.
        make: gives the matrix [in, out] that codes stand for; it is asked for those that read the
            same value one after the other.
    """
    exact = Passage(model, rows, directory)
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
        with calibrate.shelf(directory) as kept:
            for turn in _turns(readers, exact, ours, rows, kept):
                values = make(turn)
                replaced[turn.product.node] = values.T if turn.product.transposed else values


def _in_order(products: Sequence[Product], passage: Passage) -> list[list[Product]]:
    """Products by what they read, in the order of the graph."""
    by_input: dict[ir.Value, list[Product]] = {}
    for product in products:
        by_input.setdefault(product.input, []).append(product)
    return sorted(by_input.values(), key=lambda some: min(passage.index(one.node) for one in some))


def _turns(
    readers: Sequence[Product],
    exact: Passage,
    ours: Passage,
    rows: Rows,
    kept: calibrate.Shelf,
) -> Iterator[Turn]:
    """Turns of products that read the same value.

    Args:
        kept: holds moments.
    """
    value, tokens = readers[0].input, sum(map(len, rows))
    size = readers[0].shape[0]
    moments, apart = (kept.room((size, size), np.float32) for _ in range(2))
    beside = {one.name: _beside(one) for one in readers}
    lost = {
        one.name: kept.room(one.shape, np.float32)
        for one in readers
        if (added := beside[one.name]) is not None and exact.has(added)
    }
    for at in range(0, len(rows), ROWS):
        some = slice(at, at + ROWS)
        x = ours.seen(value, some)
        moments += x.T @ x
        apart += x.T @ (exact.seen(value, some) - x)
        for name, sums in lost.items():
            added = beside[name]
            assert added is not None
            sums += x.T @ (exact.seen(added, some) - ours.seen(added, some))
    damping = calibrate.damping(size, tokens) * np.trace(moments) / size + 1e-12
    for product in readers:
        weight = np.ascontiguousarray(product.weight)
        wanted = apart @ weight
        if product.name in lost:
            wanted += lost[product.name]
        if wanted.any():
            damped = moments + np.diag(np.full(size, damping, np.float32))
            weight = weight + np.linalg.solve(damped, wanted)
        yield Turn(product, weight, np.asarray(moments / tokens, np.float32), tokens)


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
