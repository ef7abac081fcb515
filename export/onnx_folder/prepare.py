"""One plain graph: without functions and branches, its constants in place, in single precision."""

from __future__ import annotations

import os
from pathlib import PurePath

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from fastgen.errors import UnsupportedModel
from fastgen.export.onnx_folder.signature import BRANCH
from fastgen.export.rewrite.edit import (
    MICROSOFT,
    add_initializer,
    clean_up,
    input_of,
    is_constant,
    tensor_of,
)

OPSET = 23  # what trim's rules write
OLDEST = 11  # whose operators mean what today's do, but for those that are brought up here
REDUCTIONS = {"ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare"}
LISTS = {"Squeeze", "Unsqueeze", "ReduceSum", "Split"}  # whose attribute became an input with 13
# Before 13 they took all axes from one on: that is the last one, or the graph will not be proved.
FLATTENING = {"Softmax", "LogSoftmax", "Hardmax"}
# What quantises to whole numbers and back has scales of 16 bits, and computes as with 32.
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def prepare(model: ir.Model) -> tuple[ir.Model, bool]:
    """Bring a graph into the form that the rewriting reads.

    Half precision becomes single: a CPU computes in single precision anyway, with casts around
    each product, and one between a cache and its attention would convert the whole cache.

    Returns:
        The graph, with the weights of `model`, which is not to be used any more; and whether
        something was in half precision.

    Raises:
        UnsupportedModel: its operators are of a version that is too old.
    """
    _find_weights(model)
    passes.InlinePass()(model)
    _take_branches(model)
    model.graph.sort()  # tools that convert to half precision leave their casts at the end
    model = model.clone()  # without the branches that were not taken, which still read inputs
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _raise_opset(model)
    halves = _to_single(model)
    for node in model.graph:
        node.attributes.pop("sliding_window_cache", None)  # a ring; ours are buffers
    drop_idle(model.graph)
    clean_up(model)
    idle = [value for value in model.graph.inputs if value.name == BRANCH and not value.uses()]
    for value in idle:
        model.graph.inputs.remove(value)
    return model, halves


def _find_weights(model: ir.Model) -> None:
    """Weights are read from where they really lie.

    onnx_ir reads none through links, and caches are made of links. What stays forbidden is a graph
    that names files outside its folder.
    """
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or not tensor.base_dir:
                continue
            named = PurePath(tensor.location)
            if named.is_absolute() or ".." in named.parts:
                raise UnsupportedModel(f"its weights lie outside its folder: {named}")
            value.const_value = ir.ExternalTensor(
                os.path.realpath(tensor.path),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name or str(value.name),
            )


def _take_branches(model: ir.Model) -> None:
    """Each If that asks whether there is a past becomes its branch for a past.

    It is as right for none: the graph is given an empty one.
    """
    graph = model.graph
    asked = next((value for value in graph.inputs if value.name == BRANCH), None)
    if asked is None:
        return
    for node in list(graph):
        if node.op_type != "If":
            continue
        if _root(node.inputs[0]) is not asked:
            raise UnsupportedModel(f"its graph branches by {input_of(node, 0).name} ({node.name})")
        branch = node.attributes["then_branch"].as_graph()
        outputs = list(branch.outputs)
        branch.outputs.clear()
        for value in list(branch.initializers.values()):
            inner = branch.initializers.pop(str(value.name))
            if inner.name in graph.initializers:
                inner.name = f"{inner.name}.branch"
            graph.register_initializer(inner)
        inside = list(branch)
        branch.remove(inside)
        graph.insert_before(node, inside)
        for old, new in zip(node.outputs, outputs, strict=True):
            if old in graph.outputs and (new.producer() is None or new in graph.outputs):
                copy = ir.node("Identity", [new])  # it gives what it got
                graph.insert_before(node, copy)
                new = copy.outputs[0]
            name, old.name = old.name, f"{old.name}.if"
            new.name = name
            if new.type is None:
                new.type, new.shape = old.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _root(value: ir.Value | None) -> ir.Value | None:
    """The value that one is a copy or a cast of."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Cast", "Identity", "Squeeze", "Reshape"):
            break
        value = node.inputs[0]
    return value


def _raise_opset(model: ir.Model) -> None:
    """Declare today's operators, after what changed since was rewritten."""
    version = model.opset_imports.get("", OPSET)
    if version < OLDEST:
        raise UnsupportedModel(
            f"its graph uses ONNX operators of version {version}; from {OLDEST} on they can be read"
        )
    for node in list(model.graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        kind = node.op_type
        if (version < 18 and kind in REDUCTIONS) or (version < 13 and kind in LISTS):
            name = "split" if kind == "Split" else "axes"
            if name in node.attributes:
                held = np.array(node.attributes.pop(name).as_ints(), np.int64)
                node.resize_inputs(2)
                initializer = add_initializer(model.graph, f"{node.name}.{name}", held)
                node.replace_input_with(1, initializer)
        if version < 18 and kind == "Split" and len(node.inputs) < 2:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        if version < 13 and kind in FLATTENING and "axis" not in node.attributes:
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
    model.opset_imports[""] = max(version, OPSET)
    model.opset_imports.setdefault(MICROSOFT, 1)
    model.ir_version = max(model.ir_version or 0, 10)


def _to_single(model: ir.Model) -> bool:
    """float16 and bfloat16 become float32: initializers, casts, constants, inputs and outputs."""
    graph, changed = model.graph, False
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in HALVES:
            changed = True
            value.const_value = _widened(tensor)
            value.dtype = ir.DataType.FLOAT
    for value in (
        *graph.inputs,
        *(output for node in graph.all_nodes() for output in node.outputs),
    ):
        if value.dtype in HALVES:
            value.dtype, changed = ir.DataType.FLOAT, True
    for node in graph.all_nodes():
        for name in ("to", "dtype", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.value in [int(half) for half in HALVES]:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
                changed = True
        held = node.attributes.get("value")
        tensor = None if held is None else held.value
        if isinstance(tensor, ir.TensorProtocol) and tensor.dtype in HALVES:
            single = ir.tensor(tensor.numpy().astype(np.float32))
            node.attributes["value"] = ir.AttrTensor("value", single)
    return changed


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The tensor in float32, made where it is read, and not kept."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().astype(np.float32))),
        ir.DataType.FLOAT,
        ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )


def drop_idle(graph: ir.Graph) -> None:
    """Nodes that give what they get."""
    known = {str(value.name): value.dtype for value in graph.inputs}
    for node in list(graph):
        kind = node.op_type
        if kind == "Cast":
            source = input_of(node, 0)
            to = node.attributes.get_int("to")
            given = _dtype(source, known)
            for output in node.outputs:
                known[str(output.name)] = ir.DataType(to)
            if given is None or int(given) != to:
                continue
        elif not (kind in ("Identity", "Dropout") or (kind == "Concat" and len(node.inputs) == 1)):
            continue
        skip(graph, node)


def _dtype(value: ir.Value, known: dict[str, ir.DataType | None]) -> ir.DataType | None:
    if is_constant(value):
        return tensor_of(value).dtype
    return known.get(str(value.name)) or value.dtype


def skip(graph: ir.Graph, node: ir.Node) -> None:
    """Readers of a node read what it reads; one that names an output of the graph stays."""
    source, output = input_of(node, 0), node.outputs[0]
    if len(node.outputs) > 1 and node.outputs[1].uses():
        return
    if output.is_graph_output():
        producer = source.producer()
        if producer is None or source.is_graph_output():
            return
        output.name, source.name = f"{output.name}.idle", output.name
        source.type = source.type or output.type
        source.shape = source.shape or output.shape
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
