"""Matrices that are quantised one after the other, each for what is before it by then."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
import tiny

from fastgen.export import export
from fastgen.export.quantize import calibrate, follow, passage, recipe, values_apart
from fastgen.export.quantize.kernels import products

ROWS = [np.arange(5, 5 + length) % 90 for length in (24, 9, 17, 30)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model in float32, whose layers have biases, and no other model's."""
    path = tmp_path_factory.mktemp("follow") / "model"
    export(tiny.build("llama"), path, precision="fp32", progress=None)
    return path


@pytest.fixture
def model(directory):
    return ir.load(directory / "model.onnx")


@pytest.fixture
def layers(model):
    return [product for product in products(model.graph) if not product.is_head]


def test_a_passage_says_at_each_place_what_the_whole_graph_does(directory, model, layers):
    wanted = list(dict.fromkeys(product.input for product in layers))
    way = passage.Passage(model, ROWS)
    assert len(way.batches) == 1 and (way.batches[0].counts < len(ROWS[3])).any()  # padded
    with calibrate.values(model, wanted, sorted(ROWS, key=len, reverse=True)) as seen:
        for value in wanted:
            first = next(one for one in layers if one.input is value)
            way.run(way.index(first.node), {})
            found = way.seen(value, 0)
            np.testing.assert_allclose(found, seen[value], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [ROWS[1:2], ROWS, 3 * ROWS], ids=["few", "some", "many"])
def test_inputs_have_the_moments_of_all_tokens(directory, model, layers, rows, monkeypatch):
    """Tokens are kept where they are fewer than the channels, else their squares are added up."""
    monkeypatch.setattr(calibrate, "TOGETHER", 40)
    monkeypatch.setattr(calibrate, "SAMPLE", 16)
    wanted, tokens = list(dict.fromkeys(one.input for one in layers)), sum(map(len, rows))
    with (
        calibrate.inputs(model, layers, rows) as found,
        calibrate.values(model, wanted, rows) as seen,
    ):
        assert {held.every is None for held in found.values()} == {
            tokens > value.shape[-1] for value in wanted
        }
        for value, held in found.items():
            x = seen[value]
            every = max(1, tokens // 16)
            ends = np.cumsum([len(row) for row in rows])
            some = np.concatenate([part[::every] for part in np.split(x, ends[:-1])])
            np.testing.assert_allclose(held.sample, some, rtol=0, atol=1e-5)
            for scales in (1, np.linspace(0.5, 2, x.shape[1], dtype=np.float32)):
                held.divide(np.ones(x.shape[1], np.float32) * scales)
                squares = (x / scales).T @ (x / scales) / tokens
                np.testing.assert_allclose(held.moments, squares, rtol=0, atol=1e-4)
            np.testing.assert_allclose(held.sample, some / scales, rtol=0, atol=1e-5)


def test_pieces_of_layers_that_are_alike_are_one_session(directory, model, layers, monkeypatch):
    opened, asked = [], []
    monkeypatch.setattr(
        passage.onnxruntime,
        "InferenceSession",
        lambda content, *rest, make=passage.onnxruntime.InferenceSession, **more: (
            opened.append(content) or make(content, *rest, **more)
        ),
    )
    monkeypatch.setattr(
        passage.Sessions,
        "of",
        lambda self, piece, of=passage.Sessions.of: asked.append(piece) or of(self, piece),
    )
    follow.follow(model, layers, ROWS, lambda turn: turn.weight)
    assert len(layers) == 8 and len(asked) == 8 + 7  # the first for both
    assert len(opened) == 6


def test_a_passage_runs_with_other_matrices(directory, model, layers):
    first, second = layers[0], layers[1]
    ways = [passage.Passage(model, ROWS) for _ in range(2)]
    for way, replaced in zip(ways, ({}, {first.node: 0 * first.weight}), strict=True):
        way.run(way.index(first.node), {})
        assert way.copy().at == way.at
        way.run(way.index(second.node), replaced)
    assert ways[0].seen(second.input, 0).any()
    assert not ways[1].seen(second.input, 0).any()  # nothing to attend to


def test_each_matrix_makes_good_what_those_before_it_lost(directory, model, layers):
    """On the whole, and more so than with weights that are as they were."""
    noise = np.random.default_rng(1)
    last = layers[-1]

    def lost(change):
        turns = []

        def make(turn):
            turns.append(turn.product.name)
            weight = change(turn)
            spoiled = noise.standard_normal(weight.shape).astype(np.float32)
            return weight + 0.2 * weight.std() * spoiled if turn.product is not last else weight

        kept = {}

        def watched(turn):
            kept[turn.product.node] = make(turn)
            return kept[turn.product.node]

        follow.follow(model, layers, ROWS, watched)
        assert turns == [product.name for product in layers]
        ways = [passage.Passage(model, ROWS) for _ in range(2)]
        head = next(one for one in products(model.graph) if one.is_head)
        end = ways[0].index(head.node)
        ways[0].run(end, {})
        ways[1].run(end, kept)
        right, ours = (way.seen(head.input, 0) for way in ways)
        return np.square(ours - right).mean()

    assert lost(lambda turn: turn.weight) < 0.8 * lost(lambda turn: turn.product.weight)


def test_graphs_with_graphs_inside_are_not_cut(model):
    assert passage.can_be_cut(model.graph)
    inner = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    node = ir.node("If", [ir.val("asked", ir.DataType.BOOL, [])], num_outputs=1)
    node.attributes["then_branch"] = ir.AttrGraph("then_branch", inner)
    model.graph.append(node)
    assert not passage.can_be_cut(model.graph)


def test_bits_are_spent_on_matrices_and_no_more_than_there_are(tmp_path):
    out = tmp_path / "out"
    model = tiny.build("llama", num_hidden_layers=4)
    export(model, out, precision="int4", allow_mismatch=True, progress=None)
    report = json.loads((out / "report.json").read_text())
    wide = [one for one in report["matrices"] if one["wide"]]
    assert wide and all("int8" in one["kernel"] for one in wide)
    bits = recipe.RECIPES["int4"].bits
    assert bits - 0.3 < report["weight_bits"] <= bits


def test_values_have_a_product_of_their_own_that_says_the_same(directory, model):
    seen = {}
    for split in (False, True):
        if split:
            assert values_apart.split(model.graph) == 2
        shapes = [product.shape for product in products(model.graph) if not product.is_head]
        assert ((64, 32) in shapes) is split
        with calibrate.shelf(directory) as kept:
            seen[split] = [x.copy() for x in calibrate.logits(model, ROWS, directory, kept)]
    for one, other in zip(*seen.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert values_apart.split(model.graph) == 0
