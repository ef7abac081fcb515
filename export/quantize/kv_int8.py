"""Keys and values in 8 bits: how far each channel reaches on text, and the nodes that store it so.

GroupQueryAttention stores what it gets (keys after their rotation) as `rint(x / scale)`, int8,
with a constant scale for each channel of each head; a value that reaches further saturates. So
the scales must hold for all texts and, since a rotated key depends on its position, for all
positions: the rows that calibrate begin at positions spread over all that the model was made for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.export.quantize import calibrate
from fastgen.export.quantize.kernels import Floats
from fastgen.export.rewrite import contract
from fastgen.export.rewrite.edit import add_initializer, input_of, replace
from fastgen.export.rewrite.node import PAST_AND_SCALE, POSITIONS
from fastgen.store.graph_io import READS_PROMPT, beside

DTYPES = {"fp32": "float32", "int8": "int8"}  # of each cache precision
TOKENS = 4 * calibrate.TOKENS  # of calibration, at most: text that was not seen saturates
MARGIN = 1.1  # on what was seen; more costs resolution
FURTHEST = 1 << 15  # positions that are calibrated where the model has no limit
LONG = 1024  # tokens of a row that is measured: errors of a cache show in long contexts


def reach(
    model: ir.Model, rows: Sequence[NDArray[np.int64]], limit: int | None
) -> dict[str, Floats]:
    """The largest absolute value in each channel of each stored key and value, on `rows`.

    Args:
        model: the trimmed graph, with a cache in float32.
        rows: calibration ids.
        limit: positions that the model was made for; None without limit.

    Returns:
        float32 [kv_heads, head_dim], by the name of the graph's input for the past.
    """
    positioned = model.clone()
    (positions,) = (value for value in positioned.graph.inputs if value.name == "position_ids")
    for node in _attention(positioned):
        if node.attributes.get_int("do_rotary", 0):  # without positions it counts from zero
            node.replace_input_with(POSITIONS, positions)
    # What is stored for each past, whatever the order of the graph's outputs.
    present = {
        str(input_of(node, past).name): str(node.outputs[index + 1].name)
        for node in _attention(positioned)
        for index, (past, _) in enumerate(PAST_AND_SCALE.values())
    }
    last = (limit or FURTHEST) - max(len(row) for row in rows)
    reached: dict[str, Floats] = {}
    with calibrate.weights_directory(positioned) as directory:
        session = calibrate.running(positioned, list(present.values()), directory)
        for row, start in zip(rows, np.linspace(0, last, len(rows)).astype(int), strict=True):
            batch = calibrate.Batch.of([row])
            given = calibrate.feeds(calibrate.declared(session), batch, int(start))
            stored = session.run(list(present.values()), given)
            for name, array in zip(present, stored, strict=True):
                largest = np.abs(array).max(axis=(0, 2))
                reached[name] = np.maximum(reached.get(name, 0), largest)
    return reached


def quantize(model: ir.Model, reached: dict[str, Floats]) -> NDArray[np.float32]:
    """Store keys and values in int8, in place; prompts are read into float32 ones.

    Attention to codes is fast for a token and slow for a prompt: there the kernel turns keys into
    floats again for every few queries. So each layer attends in one of two ways, by the input
    `reads_prompt`: to `prompt_key_values.{i}.key/value`, float32, or to the past in int8. What it
    does not attend to passes through; the runtime carries tokens from the one to the other.

    Args:
        model: the trimmed graph.
        reached: what `reach` found.

    Returns:
        The scales of all keys and values, layer by layer, each [kv_heads, head_dim], flat.
    """
    graph = model.graph
    reads_prompt = contract.value(READS_PROMPT)
    graph.inputs.append(reads_prompt)
    stored_scales: dict[str, Floats] = {}
    for node in list(_attention(model)):
        constants = {}
        for kind, (past, _) in PAST_AND_SCALE.items():
            name = str(input_of(node, past).name)
            stored_scales[name] = scales(reached[name])
            constants[kind] = add_initializer(graph, f"{name}.scale", stored_scales[name])
        _split(graph, node, constants, reads_prompt)
    inputs = (str(value.name) for value in graph.inputs)
    return np.concatenate([stored_scales[name].ravel() for name in inputs if name in stored_scales])


def _split(
    graph: ir.Graph, node: ir.Node, constants: dict[str, ir.Value], reads_prompt: ir.Value
) -> None:
    """An attention node becomes two, of which one runs."""
    pasts = [past for past, _ in PAST_AND_SCALE.values()]
    codes = [input_of(node, past) for past in pasts]
    floats = [contract.value(beside(contract.spec(value))) for value in codes]
    graph.inputs.extend(floats)
    for value in codes:
        value.dtype = ir.DataType.INT8
    prompt = _branch("prompt", node, dict(zip(pasts, floats, strict=True)), codes)
    scaled = {scale: constants[kind] for kind, (_, scale) in PAST_AND_SCALE.items()}
    kinds: dict[str, int | str] = {f"{kind}_quant_type": "PER_CHANNEL" for kind in PAST_AND_SCALE}
    step = _branch("step", node, scaled, floats, kinds | {"kv_cache_bit_width": 8})
    # Their outputs in one order: found, codes, floats.
    prompt.outputs[:] = [prompt.outputs[0], *prompt.outputs[3:], *prompt.outputs[1:3]]
    either = ir.node(
        "If",
        [reads_prompt],
        {"then_branch": prompt, "else_branch": step},
        num_outputs=len(prompt.outputs),
    )
    graph.insert_before(node, either)
    for old, new in zip(node.outputs, either.outputs, strict=False):
        replace(old, new)
    for value, new in zip(codes, either.outputs[1:3], strict=True):
        new.dtype, new.shape = ir.DataType.INT8, value.shape
    for stored, new in zip(either.outputs[1:3], either.outputs[3:], strict=True):
        contract.declare(new, beside(contract.spec(stored)))
        graph.outputs.append(new)
    graph.remove(node, safe=True)


def _branch(
    name: str,
    node: ir.Node,
    inputs: dict[int, ir.Value],
    passed: Sequence[ir.Value],
    attributes: dict[str, int | str] | None = None,
) -> ir.Graph:
    """The graph of an attention node with some other inputs, and of what passes it by."""
    changed = [inputs.get(index, value) for index, value in enumerate(node.inputs)]
    kept = {key: attribute.value for key, attribute in node.attributes.items()}
    attends = ir.node(
        node.op_type,
        changed,
        kept | (attributes or {}),
        domain=node.domain,
        num_outputs=len(node.outputs),
    )
    passes = [ir.node("Identity", [value]) for value in passed]
    nodes = [attends, *passes]
    outputs = [value for each in nodes for value in each.outputs]
    for index, value in enumerate(outputs):  # names are the whole graph's
        value.name = f"{node.outputs[1].name}.{name}.{index}"
    return ir.Graph([], outputs, nodes=nodes, name=name)


def scales(reached: Floats) -> Floats:
    """[1, kv_heads, 1, head_dim] from [kv_heads, head_dim]; a silent channel has the largest."""
    bounds = MARGIN * np.where(reached == 0, reached.max() or 1, reached)
    return np.asarray(bounds / 127, np.float32)[None, :, None, :]


def long_rows(
    rows: Sequence[NDArray[np.int64]], limit: int | None, tokens: int | None = None
) -> list[NDArray[np.int64]]:
    """`rows` joined to rows of LONG tokens, or as many as the model takes; no shorter rest.

    Args:
        limit: tokens that the model takes; None without limit.
        tokens: of all together at most, but for a first row; None for all.
    """
    if not rows:
        return []
    ids = np.concatenate(rows)
    length = min(LONG, limit or LONG, len(ids))
    ids = ids[: max(length, len(ids) if tokens is None else tokens)]
    return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]


def _attention(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.op_type == "GroupQueryAttention")
