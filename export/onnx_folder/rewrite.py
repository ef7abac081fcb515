"""Their graph -> ours: the contract of `fastgen.store.graph_io`, whatever tool wrote the graph.

Attention reads and writes the engine's buffers, positions come from outside, and `lm_head` runs
where logits are asked. What then still reads an input that ours does not have is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel
from fastgen.export.onnx_folder import attention, plain, rotary, shapes
from fastgen.export.onnx_folder.attention import Feed, is_grouped
from fastgen.export.onnx_folder.prepare import drop_idle, prepare
from fastgen.export.onnx_folder.signature import KEEP, LOGITS, MASK, POSITIONS, Signature
from fastgen.export.rewrite import contract
from fastgen.export.rewrite.edit import (
    add_initializer,
    clean_up,
    constant,
    input_of,
    insert,
    is_constant,
    rank,
    set_type,
    transposed,
)
from fastgen.export.rewrite.trim import products_without_reshapes
from fastgen.store.graph_io import TOKENS, GraphIO, fed_tokens

# Sizes of the two runs: no dimension of one name is as large as another's, in both.
ROWS, NEW, PAST = (2, 3), (4, 7), (6, 11)
TOTALS = (NEW[0] + PAST[0], NEW[1] + PAST[1])
KEPT, CAPACITY = (5, 8), (13, 22)
LONG = 2048  # tokens up to which a mask is looked at where no configuration names a window
LARGEST_LONG = 1 << 28  # bytes of keys and values of such a run

HEADS = {"MatMul", "MatMulNBits", "MatMulBnb4", "FusedMatMul", "MatMulInteger", "Gemm"}
RESHAPING = {"Reshape", "Squeeze", "Unsqueeze"}
LATE = {"Cast", "Mul", "Div", "Add", "Tanh", "Reshape", "Identity", "Sub"}  # behind lm_head


@dataclass(frozen=True)
class Rewritten:
    """A graph of the contract.

    Attributes:
        layers: (kv_heads, head_dim) of each.
        windows: tokens that each layer's queries see; None for all, or what its node says.
        halves: whether the folder's graph was in half precision.
        kinds: of its attention: "GroupQueryAttention" or "joined keys".
    """

    model: ir.Model
    layers: list[tuple[int, int]]
    windows: list[int | None]
    halves: bool
    kinds: list[str]


def rewrite(
    model: ir.Model, signature: Signature, vocab: int, window: int | None, limit: int | None
) -> Rewritten:
    """Rewrite a graph.

    Args:
        model: of a folder, as it was read; it is not to be used any more.
        signature: of it.
        vocab: ids below which the model reads.
        window: that the folder's configuration names, so that a run goes beyond it.
        limit: positions that the model was made for.

    Raises:
        UnsupportedModel: with the layer and the operator that stand in the way.
    """
    model, halves = prepare(model)
    graph = model.graph
    single = signature.single()
    attention.refuse_unknown(graph, single)
    # Some tools' GroupQueryAttention reads several tokens after a past for one row only.
    alone = any(is_grouped(node) for node in graph)
    fed = [
        _random(single, vocab, 1 if alone else rows, new, past, seed)
        for seed, (rows, new, past) in enumerate(zip(ROWS, NEW, PAST, strict=True))
    ]
    seen = shapes.observe(model, fed)
    names = {"rows": ROWS, "new": NEW, "past": PAST, "total": TOTALS}
    shapes.name_shapes(graph, seen, names)
    drop_idle(graph)
    attention.turn_apart(graph)
    kinds, windows = _attend(model, seen, fed[0], single, vocab, window, limit)
    clean_up(model)
    _positions(model, seen)
    _uncut_tables(model)
    clean_up(model)
    products_without_reshapes(graph)
    _gather(graph, seen)
    clean_up(model)
    _hold_tables(graph)
    io = _sign(model, single, vocab)
    _settle(model, io)
    return Rewritten(model, list(io.layers), windows, halves, kinds)


def _random(
    signature: Signature, vocab: int, rows: int, new: int, past: int, seed: int
) -> dict[str, NDArray[Any]]:
    """Random ids after a random past."""
    random = np.random.default_rng(seed)
    held = [
        random.normal(size=array.shape).astype(array.dtype)
        for array in signature.nothing(rows, past)
    ]
    return signature.feeds(random.integers(0, vocab, (rows, new)), held)


def _new_inputs(graph: ir.Graph) -> Feed:
    """Add the contract's inputs that the folder's graph does not have."""
    theirs = {value.name for value in graph.inputs}
    added = {spec.name: contract.value(spec) for spec in TOKENS if spec.name not in theirs}
    graph.inputs.extend(added.values())
    return Feed(added["seqlens_k"], added["total_sequence_length"], added["query_seqlens"])


def _input(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.inputs if value.name == name)


# Attention


def _attend(
    model: ir.Model,
    seen: shapes.Seen,
    fed: Mapping[str, Any],
    signature: Signature,
    vocab: int,
    window: int | None,
    limit: int | None,
) -> tuple[list[str], list[int | None]]:
    """Replace the attention of all layers; say what kinds there were, and each one's window."""
    graph = model.graph
    writers = [attention.writer(graph, signature, i, 0) for i in range(signature.layers)]
    joined = {
        layer: attention.joined(graph, layer, signature)
        for layer, node in enumerate(writers)
        if not is_grouped(node)
    }
    longer = _long_run(model, list(joined.values()), signature, window, limit) if joined else {}
    feed, ids = _new_inputs(graph), _input(graph, "input_ids")
    windows: list[int | None] = []
    for layer, node in enumerate(writers):
        if layer in joined:
            means = attention.meaning(joined[layer], {**fed, **seen[0]}, longer)
            attention.group(graph, joined[layer], means, signature, feed, ids)
            windows.append(means.window)
        else:
            size = node.attributes.get_int("local_window_size", -1)
            windows.append(size if size > 0 else None)
            attention.regroup(graph, node, layer, signature, feed)
    kinds = ["joined keys" if i in joined else "GroupQueryAttention" for i in range(len(writers))]
    return kinds, windows


def _long_run(
    model: ir.Model,
    layers: list[attention.Joined],
    signature: Signature,
    window: int | None,
    limit: int | None,
) -> Mapping[str, Any]:
    """Scores of all layers after a past that is longer than a window, if there is one."""
    each = sum(array.nbytes for array in signature.nothing(1, 1))
    most = min(limit or LONG, max(LARGEST_LONG // each, 64))
    length = max(1, min(most - 3, (window or LONG) + 5))
    fed = signature.feeds(np.zeros((1, 3), np.int64), signature.nothing(1, length))
    wanted = [layer.softmax.inputs[0] for layer in layers]
    return plain.observe(model, [value for value in wanted if value is not None], [fed], 1 << 30)[0]


# Positions


def _positions(model: ir.Model, seen: shapes.Seen) -> None:
    """Let positions that the graph counts from the past or the mask come from outside.

    Values are looked for that were the positions of the new tokens in both runs. The latest such
    value is replaced first, and what led to it goes, until nothing reads the mask or the past.
    """
    graph = model.graph
    for value in reversed([output for node in graph for output in node.outputs]):
        node, name = value.producer(), str(value.name)
        if node is None or node.graph is None:
            continue
        if name not in seen[0] or not value.uses() or not _leans(graph, value):
            continue
        if all(
            _are_positions(run[name], past, new)
            for run, past, new in zip(seen, PAST, NEW, strict=True)
        ):
            value.replace_all_uses_with(_input(graph, POSITIONS))
            clean_up(model)


def _are_positions(array: Any, past: int, new: int) -> bool:
    return (
        isinstance(array, np.ndarray)
        and array.dtype == np.int64
        and array.ndim == 2
        and array.shape[1] == new
        and bool((array == np.arange(past, past + new)).all())
    )


def _leans(graph: ir.Graph, value: ir.Value) -> bool:
    """Tell if a value depends on the mask or the past."""
    pending, done = [value], set()
    while pending:
        current = pending.pop()
        if current in done or current is None:
            continue
        done.add(current)
        if current.is_graph_input() and (
            current.name == MASK or str(current.name).startswith("past")
        ):
            return True
        node = current.producer()
        if node is not None and not is_grouped(node):
            pending += [source for source in node.inputs if source is not None]
    return False


def _uncut_tables(model: ir.Model) -> None:
    """A table that is cut to the tokens so far, and then read at positions, is read whole."""
    for node in list(model.graph):
        if node.op_type != "Slice" or constant(node.inputs[0]) is None:
            continue
        starts, axes = constant(node.inputs[1]), constant(node.inputs[3])
        ends = constant(node.inputs[2])
        if starts is None or ends is not None or axes is None or starts.any():
            continue
        if _read_at_positions(node.outputs[0], int(np.asarray(axes).reshape(-1)[0])):
            node.outputs[0].replace_all_uses_with(input_of(node, 0))
    clean_up(model)


def _read_at_positions(value: ir.Value, axis: int) -> bool:
    """Tell if only Gather reads a value, along the axis that was cut."""
    for use in value.uses():
        node = use.node
        if node.op_type == "Gather" and use.idx == 0 and node.attributes.get_int("axis", 0) == 0:
            continue
        squeezes = node.op_type == "Squeeze" and axis == 2
        passes = squeezes or node.op_type == "Cast"
        if not passes or not _read_at_positions(node.outputs[0], 0 if squeezes else axis):
            return False
    return True


# The last product


def _gather(graph: ir.Graph, seen: shapes.Seen) -> None:
    """`lm_head` runs only at `logits_positions` [rows, keep] of the hidden states."""
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    head = _head(logits, seen)
    reader, hidden = head, input_of(head, 0)
    before = hidden
    while (node := before.producer()) is not None:
        before = input_of(node, 0)
        if node.op_type == "DynamicQuantizeLinear":
            reader, hidden = node, before
        elif _picks(node, seen) or (node.op_type in RESHAPING and rank(hidden) != 3):
            hidden = before  # of all positions, as [rows, new, size]
        elif node.op_type not in RESHAPING:
            break
    if hidden.shape is None or len(hidden.shape) != 3:
        raise UnsupportedModel(f"lm_head ({head.name}) reads {hidden.name} of shape {hidden.shape}")
    last = add_initializer(graph, "last_axis", np.array([-1], np.int64))
    positions = _input(graph, "logits_positions")
    (places,) = insert(reader, "Unsqueeze", [positions, last])
    (picked,) = insert(reader, "GatherND", [hidden, places], {"batch_dims": 1})
    set_type(picked, hidden)
    picked.shape = ir.Shape(["rows", "keep", hidden.shape[2]])
    reader.replace_input_with(0, picked)


def _head(logits: ir.Value, seen: shapes.Seen) -> ir.Node:
    """The product behind the logits."""
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in HEADS and (
            node.op_type not in ("MatMul", "Gemm")
            or constant(node.inputs[1]) is not None
            or _is_weight(node.inputs[1])
        ):
            return node
        if node.op_type not in LATE:
            break
        sized = [
            operand
            for operand in node.inputs
            if operand is not None and operand.producer() is not None
        ]
        wide = [operand for operand in sized if _width(operand, seen) == _width(logits, seen)]
        value = next(iter(wide or sized), None)
    last = None if value is None else value.producer()
    source = "an input" if last is None else last.op_type
    raise UnsupportedModel(f"its logits come from {source}, which is not known as an lm_head")


def _is_weight(value: ir.Value | None) -> bool:
    """Tell if a matrix is a constant that is turned or unpacked."""
    while value is not None and constant(value) is None:
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "DequantizeLinear", "Cast"):
            return False
        value = node.inputs[0]
    return value is not None


def _width(value: ir.Value, seen: shapes.Seen) -> int | None:
    name = str(value.name)
    shape = shapes.shape_of(seen[0][name]) if name in seen[0] else ()
    return shape[-1] if len(shape) > 1 else None


def _picks(node: ir.Node, seen: shapes.Seen) -> bool:
    """Tell if a node only takes some of the positions, as tools do for the last logits."""
    if node.op_type not in ("Gather", "Slice", "GatherND", "GatherElements"):
        return False
    given, out = (str(value.name) for value in (input_of(node, 0), node.outputs[0]))
    if given not in seen[0]:
        return False
    before, after = (shapes.shape_of(seen[0][name]) for name in (given, out))
    return len(before) == 3 and before[-1] == after[-1]


def _hold_tables(graph: ir.Graph) -> None:
    """A table that is a matrix transposed as the graph runs is kept as a table.

    `trim` then lets both, which are tied, be one.
    """
    for node in list(graph):
        if node.op_type != "Transpose" or not is_constant(node.inputs[0]):
            continue
        matrix, out = input_of(node, 0), node.outputs[0]
        read = any(use.node.op_type == "Gather" and use.idx == 0 for use in out.uses())
        if not read or rank(matrix) != 2:
            continue
        out.replace_all_uses_with(transposed(graph, matrix))


# The contract's names


def _sign(model: ir.Model, signature: Signature, vocab: int) -> GraphIO:
    """Give inputs and outputs the contract's names, types, shapes and order.

    Raises:
        UnsupportedModel: something still reads what the contract does not have.
    """
    graph = model.graph
    by_name = {str(value.name): value for value in graph.inputs}
    for name in (MASK, *KEEP):
        if name in by_name and by_name[name].uses():
            node = next(use.node for use in by_name[name].uses())
            raise UnsupportedModel(
                f"{name} is read by {node.op_type} ({node.name}) besides attention: it has no "
                "place in a graph that reads rows of any lengths"
            )
    for name in signature.past:
        odd = [use.node for use in by_name[name].uses() if not is_grouped(use.node)]
        if odd:
            raise UnsupportedModel(
                f"{name} is read by {odd[0].op_type} ({odd[0].name}) besides attention: what "
                "depends on the length of the past cannot be read for rows of any lengths"
            )
    outputs = {str(value.name): value for value in graph.outputs}
    past = [by_name[name] for name in signature.past]
    present = [outputs[name] for name in signature.present]
    io = GraphIO(vocab, signature.heads())
    for pair, before, after in zip(io.key_values["float32"], past, present, strict=True):
        contract.declare(before, pair.past)
        contract.declare(after, pair.present)
    tokens = [by_name[spec.name] for spec in TOKENS]
    for value, spec in zip(tokens, TOKENS, strict=True):
        theirs = value.dtype
        contract.declare(value, spec)
        if theirs is not None and theirs != value.dtype:
            _cast(graph, value, theirs)
    graph.inputs[:] = [*tokens, *past]
    logits = outputs[LOGITS]
    logits.dtype, logits.shape = ir.DataType.FLOAT, None
    graph.outputs[:] = [logits, *present]
    clean_up(model)
    return io


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Cast an input for a graph that reads another type, such as ids in 32 bits."""
    uses = [(use.node, use.idx) for use in value.uses()]
    (cast,) = insert(graph[0], "Cast", [value], {"to": int(dtype)})
    for node, index in uses:
        node.replace_input_with(index, cast)


def _settle(model: ir.Model, io: GraphIO) -> None:
    """Run the new graph twice for its shapes, and fold those that are constant."""
    sizes = {"rows": ROWS, "new": NEW, "keep": KEPT, "capacity": CAPACITY}
    fed = [_ours(io, {name: run[i] for name, run in sizes.items()}) for i in range(2)]
    seen = shapes.observe(model, fed)
    if shapes.fold(model, seen, sizes) + attention.take_scales(model.graph):
        clean_up(model)
        seen = shapes.observe(model, fed)
    _undo_turns(model)
    shapes.name_shapes(model.graph, seen, sizes)
    if rotary.turn(model.graph, seen):
        clean_up(model)
        seen = shapes.observe(model, fed)
        shapes.name_shapes(model.graph, seen, sizes)
    logits = next(value for value in model.graph.outputs if value.name == LOGITS)
    shape = shapes.shape_of(seen[0][LOGITS])
    if len(shape) != 3 or shape[:2] != (ROWS[0], KEPT[0]):
        raise UnsupportedModel(f"its logits have the shape {shape}, expected [rows, keep, vocab]")
    logits.shape = ir.Shape(["rows", "keep", shape[2]])


def _ours(io: GraphIO, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Random inputs as the engine would give them: rows after 2 tokens each."""
    rows, new, keep = sizes["rows"], sizes["new"], sizes["keep"]
    random = np.random.default_rng(rows)
    ids = random.integers(0, io.vocab_size, (rows, new))
    fed = fed_tokens(ids, random.integers(0, new, (rows, keep)), held=2)
    for pair in io.key_values["float32"]:
        past = pair.past.zeros(**sizes)
        fed[pair.past.name] = random.normal(size=past.shape).astype(past.dtype)
    return fed


def _undo_turns(model: ir.Model) -> None:
    """Two Transposes, one after the other, of which the second undoes the first."""
    for node in list(model.graph):
        if node.op_type != "Transpose":
            continue
        before = input_of(node, 0).producer()
        if before is None or before.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        first = list(before.attributes.get_ints("perm", ()))
        second = list(node.attributes.get_ints("perm", ()))
        if [first[axis] for axis in second] == sorted(first):
            node.outputs[0].replace_all_uses_with(input_of(before, 0))
    clean_up(model)
