"""How each precision is made: which kernel for which matrix, and what stays in a wider type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from fastgen.export import calibrate, smooth
from fastgen.export.gptq import gptq, search_scales
from fastgen.export.quantize import (
    W8A8,
    Choice,
    Floats,
    Kernel,
    Product,
    block_codes,
    in_two_levels,
    products,
    quantize,
)
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fastgen.export import experts

OUT_OF_LINE = 2.5  # times the median error of the layers: such a matrix is kept wider
BUDGET = 0.08  # of the quantised size, for matrices in a wider type
SAMPLE = 256  # tokens that an error is measured on


@dataclass(frozen=True)
class Recipe:
    """The kernels of a precision.

    Attributes:
        layer: of the decoder's matrices.
        head: of `lm_head`, and of the embedding that shares its matrix.
        wide: of matrices whose error is out of line.
        experts: of the experts of a mixture.
        tokens: of calibration, at most: ranges want less text than moments. (Experts have all.)
    """

    layer: Kernel
    head: Kernel
    wide: Kernel
    experts: Kernel
    tokens: int


# `lm_head` runs at a few positions only, where MatMulNBits is the fastest, and its codes serve the
# embedding too. Block sizes: see bench/README.md. Experts have scales for blocks: their kernel then
# quantises its inputs as well, which is what makes it fast.
RECIPES = {
    "int8": Recipe(
        layer=W8A8,
        head=Kernel(8, 256),
        wide=Kernel(8, 32),
        experts=Kernel(8, 128),
        tokens=calibrate.TOKENS // 2,
    ),
    "int4": Recipe(
        layer=Kernel(4, 128),
        head=Kernel(4, 128),
        wide=Kernel(8, 128),
        experts=Kernel(4, 128),
        tokens=calibrate.TOKENS,
    ),
}


@dataclass(frozen=True)
class Made:
    """What became of a matrix.

    Attributes:
        kernel: how it is stored.
        error: of its output on the calibration text, relative.
        wide: whether it is kept in a wider type than others, for its error was out of line.
    """

    name: str
    kernel: str
    error: float
    wide: bool


def make(
    model: ir.Model,
    precision: str,
    rows: Sequence[NDArray[np.int64]],
    shown: Callable[[int, int], None],
) -> tuple[list[Made], list[str], list[experts.Reached]]:
    """Quantise a trimmed graph in place.

    Activations and weights are in files, and read a matrix at a time. What is chosen for one is
    scales, and codes where they are not the nearest: nothing here is as large as the weights.

    Args:
        model: the graph in float32.
        precision: "int8" or "int4".
        rows: calibration ids.
        shown: called with the number of matrices done and their total, as they are.

    Returns:
        What became of each matrix, the names of those that were smoothed, and which experts the
        calibration text came to.
    """
    recipe = RECIPES[precision]
    experts = _experts(model.graph)
    mixed, reached = experts.plan(model, recipe.experts, rows, shown) if experts else ({}, [])
    found = products(model.graph)
    plans: dict[str, Plan] = {}
    smoothed: list[str] = []
    used = rows[: max(1, recipe.tokens // calibrate.ROW)]
    with calibrate.activations(model, found, used) as inputs:
        for value, x in inputs.items():
            readers = [product for product in found if product.node.inputs[0] is value]
            scales = _smoothed(model.graph, recipe, value, readers, x, found, plans)
            if scales is not None:
                x = x / scales
                smoothed += [product.name for product in readers]
            for product in readers:
                shown(len(plans), len(found))
                plans[product.name] = _plan(recipe, product, x, scales)
        wide = _keep_wide(found, plans, inputs)
    made = [
        Made(p.name, str(plan.choice.kernel), round(plan.error, 6), p.name in wide)
        for p in found
        for plan in [plans[p.name]]
    ]
    made += [
        Made(name, str(stored.kernel), round(stored.error, 6), wide=False)
        for name, stored in (experts.quantize(model, mixed) if experts else ())
    ]
    quantize(model, lambda product: plans.pop(product.name).choice)
    return made, smoothed, reached


def _experts(graph: ir.Graph) -> ModuleType | None:
    """What knows of mixtures, and of torch, which other graphs are quantised without."""
    if all(node.op_type not in ("MoE", "Loop") for node in graph):
        return None
    from fastgen.export import experts

    return experts


def _smoothed(
    graph: ir.Graph,
    recipe: Recipe,
    value: ir.Value,
    readers: Sequence[Product],
    x: Floats,
    found: Sequence[Product],
    plans: dict[str, Plan],
) -> Floats | None:
    """Scales [in] that `value` is divided by from now on; None where nothing is done.

    Args:
        x: what the value is on the calibration text, float32 [tokens, in].
        readers: the products that read it.
        found, plans: all products, and what is planned for those before it.
    """
    place = smooth.place_of(value, readers)
    if place is None:
        return None
    scales = smooth.best_scales(x, [one.weight for one in readers], recipe.layer)
    if scales is None:
        return None
    if place.column is None:
        smooth.fold_into_norm(graph, place.node, scales)
        return scales
    for product in found:
        if product.node is place.node:
            columns = np.ones(product.weight.shape[1], np.float32)
            columns[place.column : place.column + len(scales)] = scales
            plan = plans[product.name]
            plan.choice = replace(plan.choice, columns=columns)
            plan.wide = replace(plan.wide, columns=columns)
            return scales
    return None


@dataclass
class Plan:
    """What a matrix may become.

    Attributes:
        choice: by the recipe, and `error` of its output on the calibration text, relative.
        wide: a wider type.
    """

    choice: Choice
    error: float
    wide: Choice


def _plan(recipe: Recipe, product: Product, x: Floats, scales: Floats | None) -> Plan:
    """Try a product's kernels on its input x [tokens, in], which was divided by `scales`."""
    product = _multiplied(product, scales)
    choice = _choice(product, fitting(recipe.head if product.is_head else recipe.layer, product), x)
    wide = Choice(fitting(recipe.wide, product), rows=scales)
    return Plan(replace(choice, rows=scales), _error(product, choice, x), wide)


def _multiplied(product: Product, scales: Floats | None) -> Product:
    """With each row of its matrix multiplied by what its input is divided by."""
    return product if scales is None else replace(product, weight=product.weight * scales[:, None])


def fitting(kernel: Kernel, product: Product) -> Kernel:
    """`kernel`, or with smaller blocks where its own would fill the matrix up by over an eighth."""
    block, size = kernel.block, len(product.weight)
    while block > 32 and -size % block > size / 8:
        block //= 2
    return Kernel(kernel.bits, block)


def _choice(product: Product, kernel: Kernel, x: Floats) -> Choice:
    if kernel.bits == 8:
        return Choice(kernel)
    moments = np.einsum("ti,ti->i", x, x) / len(x)
    scales = search_scales(product.weight, kernel, moments)
    if product.is_head:  # as many outputs as words: the search for scales must do
        return Choice(kernel, scales)
    scales = in_two_levels(scales)
    on_grid = gptq(product.weight, kernel, scales, x)
    return Choice(kernel, scales, block_codes(on_grid, kernel, scales))


def _error(product: Product, choice: Choice, x: Floats) -> float:
    sample = x[:: max(1, len(x) // SAMPLE)]
    weight = product.weight
    if product.is_head:  # a part of the words tells as much
        some = slice(None, None, max(1, weight.shape[1] // 4096))
        weight = np.ascontiguousarray(weight[:, some])
        scales = None if choice.scales is None else choice.scales[some]
        choice = Choice(choice.kernel, scales)
    return calibrate.output_error(sample, weight, choice)


def _keep_wide(
    found: Sequence[Product], plans: dict[str, Plan], inputs: dict[ir.Value, Floats]
) -> set[str]:
    """Give the worst matrices a wider kernel, worst first, as long as the budget lasts.

    Args:
        inputs: float32 [tokens, in] of each product's input, not divided by anything.
    """
    kept: set[str] = set()
    layers = [product for product in found if not product.is_head]
    if not layers:
        return kept
    bound = OUT_OF_LINE * float(np.median([plans[product.name].error for product in layers]))
    left = BUDGET * sum(_bytes(product, plans[product.name].choice.kernel) for product in found)
    for product in sorted(layers, key=lambda product: -plans[product.name].error):
        plan = plans[product.name]
        more = _bytes(product, plan.wide.kernel) - _bytes(product, plan.choice.kernel)
        if plan.error <= bound or more > left:
            continue
        error = _wide_error(product, plan.wide, inputs[product.node.inputs[0]])
        if error >= plan.error / 2:
            continue
        plan.choice, plan.error = plan.wide, error
        left -= more
        kept.add(product.name)
    return kept


def _wide_error(product: Product, wide: Choice, x: Floats) -> float:
    return _error(
        _multiplied(product, wide.rows),
        Choice(wide.kernel),
        x if wide.rows is None else x / wide.rows,
    )


def _bytes(product: Product, kernel: Kernel) -> int:
    codes = product.weight.size * kernel.bits // 8
    scales = product.weight.size // kernel.block if kernel.block else product.weight.shape[1]
    return codes + 4 * scales
