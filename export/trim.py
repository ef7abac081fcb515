"""Rewriting rules on the exported graph: the same numbers from less work and less memory.

Each rule is a function `graph -> number of places` that changes the graph in place; `trim` runs
them all. A rule knows operators, never models.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

MICROSOFT = "com.microsoft"


def trim(model: ir.Model) -> dict[str, int]:
    """Apply every rule; returns how often each fired."""
    fired = {rule.__name__: rule(model.graph) for rule in RULES}
    model.opset_imports.setdefault(MICROSOFT, 1)
    return fired


def share_tied_weights(graph: ir.Graph) -> int:
    """A matrix that is another one transposed (a tied `lm_head`) reads that one instead.

    torch's exporter folds the transposition of a Linear's weight into a second copy. The fused
    product transposes while it packs, so the embedding serves both.
    """
    matrices = {
        value: value.const_value
        for value in graph.initializers.values()
        if value.const_value is not None and len(value.const_value.shape) == 2
    }
    gathered = [
        node.inputs[0] for node in graph if node.op_type == "Gather" and node.inputs[0] in matrices
    ]
    fired = 0
    for node in list(graph):
        if node.op_type != "MatMul" or node.inputs[1] not in matrices:
            continue
        weight = node.inputs[1]
        for table in gathered:
            if _is_transposed(matrices[weight], matrices[table]):
                product = ir.node(
                    "FusedMatMul", [node.inputs[0], table], {"transB": 1}, domain=MICROSOFT
                )
                ir.convenience.replace_nodes_and_values(
                    graph, node, [node], [product], node.outputs, product.outputs
                )
                fired += 1
                break
    drop_unused(graph)
    return fired


def drop_unused(graph: ir.Graph) -> int:
    """Weights that nothing reads any more are not written."""
    unused = [
        name
        for name, value in graph.initializers.items()
        if not value.uses() and not value.is_graph_output()
    ]
    for name in unused:
        del graph.initializers[name]
    return len(unused)


RULES = (share_tied_weights, drop_unused)


def _is_transposed(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    if tuple(one.shape) != tuple(other.shape)[::-1] or one.dtype != other.dtype:
        return False
    return bool(np.array_equal(one.numpy(), other.numpy().T))
