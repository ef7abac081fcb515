"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outlier channels move into the weights.

An activation channel that is large for every token forces a coarse scale on all others. Dividing
it by s and multiplying its row of the matrix by s changes nothing but the ranges. The division is
folded into the norm that makes the activation; where there is no norm, nothing is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from fastgen.export.calibrate import output_error
from fastgen.export.quantize import Choice, Floats, Kernel, Product
from fastgen.export.trim import add_initializer, constant

STRENGTHS = (0.3, 0.5, 0.7)  # the paper's alpha; the best on the calibration text is taken
GAIN = 0.9  # an error that does not fall below this share is not worth a change

# Where a norm keeps what multiplies its output: the inputs that are divided, by operator.
FOLDED = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
    "RMSNormalization": (1,),
}


def smooth(
    graph: ir.Graph, products: Sequence[Product], inputs: dict[ir.Value, Floats], kernel: Kernel
) -> list[str]:
    """Fold scales into the norms before `products` (all quantised by `kernel`), in place.

    Args:
        graph: the trimmed graph; norms and matrices are replaced by scaled ones.
        products: what will be quantised.
        inputs: calibration activations of each input; scaled along.
        kernel: how they will be quantised.

    Returns:
        Names of the matrices that were scaled.
    """
    groups: dict[ir.Value, list[Product]] = {}
    for product in products:
        groups.setdefault(product.node.inputs[0], []).append(product)
    changed = []
    for value, readers in groups.items():
        norm = value.producer()
        if norm is None or norm.op_type not in FOLDED or value is not norm.outputs[0]:
            continue
        if len(value.uses()) != len(readers) or any(reader.transposed for reader in readers):
            continue
        scales = _best_scales(inputs[value], [reader.weight for reader in readers], kernel)
        if scales is None:
            continue
        _fold(graph, norm, scales)
        for reader in readers:
            weight = reader.weight * scales[:, None]
            matrix = add_initializer(graph, f"{reader.name}.smooth", weight)
            reader.node.replace_input_with(1, matrix)
            changed.append(reader.name)
        inputs[value] = inputs[value] / scales
    return changed


def _best_scales(x: Floats, weights: Sequence[Floats], kernel: Kernel) -> Floats | None:
    """Scales [in] of the channels, or None where they do not help."""
    weight = np.concatenate(weights, axis=1)
    reach_x, reach_w = np.abs(x).max(axis=0), np.abs(weight).max(axis=1)
    sample = x[:: max(1, len(x) // 256)]
    least = GAIN * output_error(sample, weight, Choice(kernel))
    best = None
    for strength in STRENGTHS:
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = reach_x**strength / reach_w ** (1 - strength)
        scales = np.where(np.isfinite(scales) & (scales > 0), scales, 1).astype(np.float32)
        scales /= np.exp(np.log(scales).mean())
        error = output_error(sample / scales, weight * scales[:, None], Choice(kernel))
        if error < least:
            best, least = scales, error
    return best


def _fold(graph: ir.Graph, norm: ir.Node, scales: Floats) -> None:
    for place in FOLDED[norm.op_type]:
        if place < len(norm.inputs) and norm.inputs[place] is not None:
            array = constant(norm.inputs[place])
            assert array is not None
            name = f"{norm.inputs[place].name}.smooth"
            norm.replace_input_with(place, add_initializer(graph, name, array / scales))
