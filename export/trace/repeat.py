"""Layers that are alike are traced once, and repeated in the graph.

Tracing takes torch more than half a second a layer, on one core. Where all layers of a model are
alike, three are traced. If the nodes of the third are those of the second, with other weights, then
those of all that follow are. Whatever is not as it is expected here leads to a trace of all layers;
and that what was repeated is right, the export proves.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from fastgen.export.rewrite.edit import clean_up, input_of, tensor_of
from fastgen.export.trace import stored
from fastgen.export.trace.attention import Layer
from fastgen.export.trace.stored import StandIn
from fastgen.store.graph_io import PAST, PRESENT, layer_and_half

TRACED = 3  # layers: the first, the one that is repeated, and one to see that it can be
FEWEST = 6  # layers for which it pays
OWN = {"layer_idx", "layer_id", "idx"}  # attributes in which layers that are alike differ
APART = {"_modules", "_parameters", "_buffers"}  # attributes that are looked at by themselves

Pairs = dict[ir.Value | None, ir.Value | None]  # values of one layer, and of another


class _Unlike(Exception):
    """The graph is not as it would have to be."""


@dataclass(frozen=True)
class Layers:
    """The layers of a model.

    Attributes:
        parent, name: where the list of them is.
        modules: the list.
    """

    parent: torch.nn.Module
    name: str
    modules: torch.nn.ModuleList

    @property
    def traced(self) -> torch.nn.ModuleList:
        return self.modules[:TRACED]


def find(model: PreTrainedModel, kept: Sequence[Layer]) -> Layers | None:
    """The layers of a model that are all alike; None where they are not, or too few."""
    count = len(kept)
    config = model.config.get_text_config(decoder=True)
    if count < FEWEST or getattr(config, "num_hidden_layers", None) != count:
        return None
    lists = [
        Layers(parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, torch.nn.ModuleList) and len(child) == count
    ]
    if len(lists) != 1:
        return None
    (layers,) = lists
    settings = [value for value in vars(config).values() if isinstance(value, list)]
    of_layers = [value for value in settings if len(value) == count]
    for things in (kept, *of_layers, [_looks(module) for module in layers.modules]):
        if any(thing != things[0] for thing in things):
            return None
    weights = [id(weight) for module in layers.modules for weight in module.parameters()]
    return layers if len(set(weights)) == len(weights) else None


def _looks(module: torch.nn.Module) -> list[Any]:
    """All by which two layers could compute something else, but for the numbers of weights."""
    return [
        (
            name,
            type(part),
            {k: _plain(v) for k, v in vars(part).items() if k not in OWN | APART},
            [
                (k, p is not None and (type(p), p.shape, p.dtype, p.is_contiguous()))
                for k, p in part._parameters.items()
            ],
            {k: _plain(buffer) for k, buffer in part._buffers.items()},
        )
        for name, part in module.named_modules()
    ]


def _plain(value: Any) -> Any:
    """Something that is equal where what a value is of is equal."""
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    return value.tolist() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def shortened(model: PreTrainedModel, layers: Layers) -> Iterator[None]:
    """The model with its first layers alone."""
    config = model.config.get_text_config(decoder=True)
    count = config.num_hidden_layers
    setattr(layers.parent, layers.name, layers.traced)
    config.num_hidden_layers = TRACED
    try:
        yield
    finally:
        setattr(layers.parent, layers.name, layers.modules)
        config.num_hidden_layers = count


def unroll(model: ir.Model, layers: Layers, stand_ins: Sequence[StandIn]) -> bool:
    """Put the layers that were not traced behind those that were.

    Args:
        stand_ins: for all weights of the layers that were traced.

    Returns:
        False, with the graph of no use, where it is not as expected.
    """
    clean_up(model)  # what each layer computes again of what all share, it shares now
    try:
        _Unrolling(model.graph, layers, stand_ins).run()
    except _Unlike:
        return False
    return True


@dataclass(frozen=True)
class _Own:
    """A value of one layer alone: a part of a weight, or its past keys or values.

    Attributes:
        number: of the layer.
        part: what it is there, the same in each.
        weight: for a weight's part.
    """

    number: int
    part: Any
    weight: StandIn | None = None


class _Unrolling:
    """A graph of three layers, and what it becomes.

    Attributes:
        own: what is each layer's own.
        level: the layer that a value is computed in, the last one's for what comes after it; -1
            for what all share.
    """

    def __init__(self, graph: ir.Graph, layers: Layers, stand_ins: Sequence[StandIn]) -> None:
        self.graph = graph
        self.layers = layers
        self.own = dict(_own_weights(graph, layers, stand_ins))
        for value in graph.inputs:
            if (layer_half := layer_and_half(value.name)) is not None:
                self.own[value] = _Own(*layer_half)
        self.level: dict[ir.Value, int] = {}

    def run(self) -> None:
        second, third, tail = self._blocks()
        following = self._same(second, third)
        self._check_uses(second, third, tail)
        # What a value that the second layer makes is in the latest one.
        latest: Pairs = {value: following[value] for node in second for value in node.outputs}
        last = {latest[value]: value for value in latest}
        behind = third[-1]
        for number in range(TRACED, len(self.layers.modules)):
            nodes, latest = self._repeated(second, following, latest, number)
            self.graph.insert_after(behind, nodes)
            behind = nodes[-1]
        for node in tail:
            for index, value in enumerate(node.inputs):
                if value in last:
                    node.replace_input_with(index, latest[last[value]])
        for values in (self.graph.inputs, self.graph.outputs):
            values[:] = sorted(values, key=lambda value: layer_and_half(value.name) or (-1, ""))

    def _blocks(self) -> tuple[list[ir.Node], list[ir.Node], list[ir.Node]]:
        """Nodes of the second and of the third layer, and those after it."""
        blocks: list[list[ir.Node]] = [[] for _ in range(TRACED)]
        for node in self.graph:
            if any(
                attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
            ):
                raise _Unlike
            level = max((self._level(value) for value in node.inputs), default=-1)
            if node.op_type == "Shape" and input_of(node, 0).is_graph_input():
                level = -1  # keys and values of all layers are of one shape
            self.level |= dict.fromkeys(node.outputs, level)
            if level >= 0:
                blocks[level].append(node)
        _, second, rest = blocks
        third, tail = rest[: len(second)], rest[len(second) :]
        if not second or not tail:
            raise _Unlike
        return second, third, tail

    def _level(self, value: ir.Value | None) -> int:
        if value is None:
            return -1
        return self.own[value].number if value in self.own else self.level.get(value, -1)

    def _same(self, second: list[ir.Node], third: list[ir.Node]) -> Pairs:
        """Match each value that the second layer reads or makes with its like in the third.

        Raises:
            _Unlike: they are not the same nodes.
        """
        counterparts: Pairs = {}
        if len(second) != len(third):
            raise _Unlike
        for one, other in zip(second, third, strict=True):
            if _kind(one) != _kind(other):
                raise _Unlike
            pairs = [*zip(one.inputs, other.inputs, strict=True)]
            pairs += zip(one.outputs, other.outputs, strict=True)
            for value, counterpart in pairs:
                if counterparts.setdefault(value, counterpart) is not counterpart:
                    raise _Unlike
        if not all(self._corresponds(*pair) for pair in counterparts.items()):
            raise _Unlike
        return counterparts

    def _corresponds(self, value: ir.Value | None, counterpart: ir.Value | None) -> bool:
        """Two values are what all share, the same constant, or the same one layer further in."""
        if value is counterpart:
            return self._level(value) < 0
        if value is None or counterpart is None:
            return False
        if value in self.own or counterpart in self.own:
            mine, its = self.own.get(value), self.own.get(counterpart)
            if mine is None or its is None:
                return False
            return (mine.number + 1, mine.part) == (its.number, its.part)
        if value.is_initializer() or counterpart.is_initializer():
            return _equal_constants(value, counterpart)
        return self._level(value) >= 0 and self._level(value) + 1 == self._level(counterpart)

    def _check_uses(self, second: list[ir.Node], third: list[ir.Node], tail: list[ir.Node]) -> None:
        """Layers are read by the next one, and the last one by what comes after it."""
        readers = [{*second}, {*second, *third}, {*third, *tail}]
        later = {*second, *third, *tail}
        for value, level in self.level.items():
            for use in value.uses() if level >= 0 else ():
                if use.node in later and use.node not in readers[level]:
                    raise _Unlike

    def _repeated(
        self,
        second: list[ir.Node],
        following: Pairs,
        latest: Pairs,
        number: int,
    ) -> tuple[list[ir.Node], Pairs]:
        """The nodes of another layer, and what each value that the second makes is there.

        Args:
            following: what a value that the second layer reads or makes is in the third.
            latest: what a value that the second layer makes is in the layer before.
        """
        there: Pairs = {}
        nodes = []
        for node in second:
            for value in node.inputs:
                if value in there:
                    continue
                if value in self.own:
                    there[value] = self._own(value, number)
                elif self._level(value) < 0:
                    there[value] = value  # all layers share it
                else:  # the first layer's: in the third it is the second's, and so on
                    there[value] = latest[following[value]]
            copy = ir.Node(
                node.domain,
                node.op_type,
                [there[value] for value in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
            )
            for value, output in zip(node.outputs, copy.outputs, strict=True):
                output.name = self._name(value, number)
                output.shape, output.type = value.shape, value.type
                if value.is_graph_output():
                    self.graph.outputs.append(output)
                there[value] = output
            nodes.append(copy)
        return nodes, {value: there[value] for value in latest}

    def _own(self, value: ir.Value, number: int) -> ir.Value:
        """The like of a value of one layer alone, in another layer."""
        copy = ir.Value(name=self._name(value, number), shape=value.shape, type=value.type)
        own = self.own[value]
        if own.weight is None:
            self.graph.inputs.append(copy)
            return copy
        weight = self.layers.modules[number].get_parameter(own.part[0])
        held = replace(own.weight, weight=weight).behind(tensor_of(value).numpy())
        copy.const_value = stored.read_lazily(held, str(copy.name))
        self.graph.register_initializer(copy)
        return copy

    def _name(self, value: ir.Value, number: int) -> str:
        """As a trace would call it, where that can be told."""
        name = str(value.name)
        for prefix in (f"{PAST}.", f"{PRESENT}.", f"{self.layers.name}."):
            before, matched, after = name.partition(f"{prefix}1.")
            if matched:
                return f"{before}{prefix}{number}.{after}"
        return f"{name}.{number}"


def _own_weights(
    graph: ir.Graph, layers: Layers, stand_ins: Sequence[StandIn]
) -> Iterator[tuple[ir.Value, _Own]]:
    """Of the constants of a graph those that are parts of a traced layer's weights."""
    names = {
        id(weight): (number, name)
        for number, module in enumerate(layers.traced)
        for name, weight in module.named_parameters()
    }
    for value in graph.initializers.values():
        tensor = tensor_of(value)
        if tensor.dtype != ir.DataType.FLOAT or not tensor.size:
            continue
        view = tensor.numpy()
        for stand_in in stand_ins:
            part = stand_in.behind(view)
            if part is not None and id(stand_in.weight) in names:
                number, name = names[id(stand_in.weight)]
                offset = view.ctypes.data - stand_in.array.ctypes.data
                yield value, _Own(number, (name, offset, view.shape, view.strides), stand_in)


def _kind(node: ir.Node) -> tuple[Any, ...]:
    """All of a node but what it reads and makes."""
    attributes = {
        name: attribute.value.tobytes()
        if attribute.type == ir.AttributeType.TENSOR
        else attribute.value
        for name, attribute in node.attributes.items()
    }
    return node.domain, node.op_type, attributes, len(node.inputs), len(node.outputs)


def _equal_constants(one: ir.Value, other: ir.Value) -> bool:
    a, b = one.const_value, other.const_value
    return a is not None and b is not None and np.array_equal(a.numpy(), b.numpy())
