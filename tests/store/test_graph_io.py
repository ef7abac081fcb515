"""The graph's contract by itself: its groups, their order, and what a check refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir
import pytest

import fastgen
from fastgen.export.rewrite import contract
from fastgen.store.graph_io import (
    READS_PROMPT,
    TOKENS,
    Declared,
    GraphIO,
    TensorSpec,
    fed_tokens,
    layer_and_half,
)
from fastgen.store.model_info import GRAPH

PLAIN = GraphIO(99, ((2, 16), (4, 8)))
WHOLE = GraphIO(99, ((2, 16), (4, 8)), ((6, 3),), (8, None), "int8")


def declared(specs: list[TensorSpec]) -> list[Declared]:
    return [(spec.name, spec.type, list(spec.shape)) for spec in specs]


def names(specs: Any) -> list[str]:
    return [spec.name for spec in specs]


def test_the_groups_of_a_plain_model_in_order():
    assert names(PLAIN.inputs) == [
        *names(TOKENS),
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
    assert names(PLAIN.outputs)[:3] == ["logits", "present.0.key", "present.0.value"]
    assert PLAIN.reads_prompt is None and PLAIN.window_starts == {} and PLAIN.state_pairs == []
    (pairs,) = PLAIN.key_values.values()
    assert pairs[2].past == TensorSpec(
        "past_key_values.1.key", "float32", ("rows", 4, "capacity", 8)
    )
    assert all(pair.past.shape == pair.present.shape for pair in pairs)


def test_the_groups_of_a_model_with_all_of_them():
    assert list(WHOLE.key_values) == ["int8", "float32"] and WHOLE.reads_prompt == READS_PROMPT
    assert names(WHOLE.window_starts.values()) == ["window_start.8"]
    rest = names(WHOLE.inputs)[len(TOKENS) + 4 :]
    assert rest[:4] == ["past_state.0", "window_start.8", "reads_prompt", "prompt_key_values.0.key"]
    assert names(WHOLE.outputs)[5:7] == ["present_state.0", "prompt_present.0.key"]
    assert len(WHOLE.inputs) == len(TOKENS) + 4 + 3 + 4 and len(WHOLE.outputs) == 1 + 4 + 1 + 4
    for pairs in WHOLE.key_values.values():
        assert [pair.window for pair in pairs] == [8, 8, None, None]
    stored, prompts = WHOLE.key_values.values()
    assert {pair.past.type for pair in stored} == {"tensor(int8)"}
    assert prompts[0].past.shape == ("prompt_rows", 2, "prompt_capacity", 16)


@pytest.mark.parametrize("io", [PLAIN, WHOLE])
def test_a_graph_that_declares_the_same_passes_in_any_order(io):
    inputs, outputs = declared(io.inputs), declared(io.outputs)
    io.check("a graph", inputs, outputs)
    io.check("a graph", inputs[::-1], outputs[::-1])
    io.check("a graph", [(name, kind, []) for name, kind, _ in inputs], outputs)  # no shapes


def changed(name: str, kind: str | None = None, shape: Any = None) -> list[Declared]:
    """The inputs and outputs of WHOLE with another type or shape of one of them."""
    return [
        (one, kind or its, shape or sizes) if one == name else (one, its, sizes)
        for one, its, sizes in declared([*WHOLE.inputs, *WHOLE.outputs])
    ]


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (changed("")[1:], "a graph has 16 inputs, expected 17; the difference: input_ids"),
        ([("odd", "tensor(float)", []), *changed("")[1:]], "difference: input_ids, odd"),
        (changed("")[:-1], r"a graph has 9 outputs, expected 10; .* prompt_present\.1\.value"),
        (
            changed("past_key_values.1.key", "tensor(float16)"),
            r"takes keys and values as tensor\(float16\), tensor\(int8\), expected tensor\(int8\)",
        ),
        (changed("seqlens_k", "tensor(int64)"), r"seqlens_k as tensor\(int64\), expected .*int32"),
        (changed("logits", shape=["rows", "keep", 98]), r"logits of shape .*98\], .*None, 99\)"),
        (changed("present.0.key", shape=["rows", 2, "n", 8]), r"present\.0\.key of shape"),
        (changed("past_state.0", shape=["rows", 6]), r"past_state\.0 of shape"),
    ],
)
def test_what_differs_is_named(graph, words):
    ends = len(WHOLE.inputs) + min(0, len(graph) - len(changed(""))) * (graph[0][0] != "input_ids")
    with pytest.raises(fastgen.ModelError, match=words):
        WHOLE.check("a graph", graph[:ends], graph[ends:])


def test_the_names_of_keys_and_values_are_read():
    assert layer_and_half("past_key_values.12.value") == (12, "value")
    assert layer_and_half("present.0.key") == (0, "key")
    others = ("present_state.0", "prompt_present.0.key", "present.0.keys", "input_ids", None)
    assert [layer_and_half(name) for name in others] == [None] * len(others)


def test_zeros_and_the_tokens_of_a_step():
    past = WHOLE.key_values["int8"][0].past.zeros(rows=3, capacity=5)
    assert past.shape == (3, 2, 5, 16) and past.dtype == np.int8
    fed = fed_tokens(np.arange(6).reshape(2, 3), np.zeros((2, 1), np.int64), held=4)
    sizes = {"rows": 2, "new": 3, "keep": 1}
    for spec in TOKENS:
        assert fed[spec.name].shape == spec.zeros(**sizes).shape
        assert fed[spec.name].dtype == spec.dtype
    assert fed["position_ids"][1].tolist() == [4, 5, 6] and fed["seqlens_k"].tolist() == [6, 6]
    assert fed["total_sequence_length"] == 7


def test_a_value_and_its_declaration_agree():
    model = onnx_ir.Model(
        onnx_ir.Graph(
            [contract.value(spec) for spec in WHOLE.inputs],
            [contract.value(spec) for spec in WHOLE.outputs],
            nodes=[],
        ),
        ir_version=10,
    )
    contract.check(model, WHOLE, "nothing")
    with pytest.raises(fastgen.ModelError, match="the graph after nothing has 17 inputs, expected"):
        contract.check(model, replace(WHOLE, windows=()), "nothing")


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mamba"])
def test_the_graph_of_an_export_passes(pair, kind):
    """And its order is that of the contract. (Each export checks its own graphs by it, too.)"""
    changes = {"state_size": 8, "intermediate_size": 128} if kind == "mamba" else {}
    _, model = pair(kind, **changes)
    graph = onnx_ir.load(model.directory / GRAPH)
    contract.check(graph, GraphIO.of(model.model.info), "an export")
    assert [value.name for value in graph.graph.inputs] == names(model.model.io.inputs)
    assert [value.name for value in graph.graph.outputs] == names(model.model.io.outputs)
