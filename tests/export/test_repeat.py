"""Layers that are alike are traced once: the graph is that of a trace of all, or there is none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import onnx_ir
import pytest
import tiny
import torch

from fastgen.export import pipeline
from fastgen.export.rewrite import trim
from fastgen.export.trace import graph, repeat

LAYERS = 6
UNLIKE: dict[str, Callable[[torch.nn.ModuleList], object]] = {
    "a number": lambda layers: setattr(layers[4].mlp, "dropout", 0.3),
    "a buffer": lambda layers: layers[4].register_buffer("shift", torch.ones(1)),
    "a weight": lambda layers: setattr(layers[4].mlp, "up_proj", torch.nn.Linear(64, 96)),
    "code": lambda layers: setattr(layers[4].mlp, "forward", torch.nn.Identity().forward),
    "a hook": lambda layers: layers[4].register_forward_hook(lambda *_: None),
    "shared": lambda layers: setattr(layers[4], "mlp", layers[5].mlp),
}


def deep(kind: str, **changes):
    counts = {"num_hidden_layers": LAYERS} | ({"n_layer": LAYERS} if kind == "gpt2" else {})
    return tiny.build(kind, **counts, **changes)


def content(model: onnx_ir.Model):
    """Each node by what it is made of, how often it occurs; and so the graph's outputs, by name."""
    known: dict[onnx_ir.Value | None, object] = {value: value.name for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        known[value] = hash((array.shape, array.tobytes()))
    known[None] = None
    nodes: Counter[int] = Counter()
    for node in model.graph:
        made = hash((repr(repeat._kind(node)), *(known[value] for value in node.inputs)))
        known |= {value: hash((made, place)) for place, value in enumerate(node.outputs)}
        nodes[made] += 1
    outputs = [(value.name, known[value]) for value in model.graph.outputs]
    return nodes, outputs, [value.name for value in model.graph.inputs]


KINDS = ["llama", "gpt2", "qwen3", "phi", "opt", "cohere", "mixtral"]


pytestmark = pytest.mark.usefixtures("converted_anew")


@pytest.mark.parametrize("kind", tiny.some(KINDS, ["llama"]))
def test_the_graph_is_that_of_a_trace_of_all_layers(kind):
    """The same nodes of the same weights; also where norms begin as ones, in layers and behind."""
    model = deep(kind)
    with torch.no_grad():
        norms = [p for name, p in model.named_parameters() if "norm.weight" in name]
        for i, norm in enumerate(norms):
            norm.fill_(2 if i == len(norms) - 3 else 1)
    modules = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    kept = graph.kept_by(model)
    one, two = (graph.convert(model, kept, whole) for whole in (False, True))
    assert one.meta["repeated"] and not two.meta["repeated"]
    assert modules == [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    for made in (one, two):
        trim.trim(made, 64)
    assert content(one) == content(two)


def test_layers_that_are_not_alike_are_not_repeated():
    model = deep("llama")
    kept = graph.kept_by(model).layers
    assert repeat.find(model, kept) is not None
    assert repeat.find(model, kept[:-1]) is None
    for change in UNLIKE.values():
        model = deep("llama")
        change(model.model.layers)
        assert repeat.find(model, kept) is None
    model = deep("gemma2")  # windows in every other layer
    assert repeat.find(model, graph.kept_by(model).layers) is None


@pytest.mark.slow
def test_a_graph_whose_layers_differ_is_traced_whole(monkeypatch):
    """They look alike, and the third does something else: the trace tells."""
    model = deep("llama")
    kept = graph.kept_by(model)
    layers = repeat.find(model, kept.layers)
    monkeypatch.setattr(repeat, "find", lambda model, kept: layers)
    model.model.layers[2].self_attn.scaling *= 2
    assert graph.convert(model, graph.kept_by(model)).meta["repeated"] is False


@pytest.mark.slow
def test_a_repetition_that_is_wrong_is_found_out_and_all_layers_are_traced(tmp_path, monkeypatch):
    """A layer that differs, and nobody looks: the proof sees it."""
    model = deep("llama")
    layers = repeat.find(model, graph.kept_by(model).layers)
    monkeypatch.setattr(repeat, "find", lambda model, kept: layers)
    model.model.layers[4].self_attn.scaling *= 2
    out = pipeline.export(model, tmp_path / "out", precision="fp32", progress=None)
    report = json.loads((out / "report.json").read_text())
    steps = [step["step"] for step in report["steps"]]
    assert steps.count("convert") == 2 and not report["mismatch"]
