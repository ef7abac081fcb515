"""Each rewriting rule fires where it should, and the logits stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny

from fastgen.export.quantize.calibrate import Batch, declared, feeds
from fastgen.export.rewrite import edit, trim
from fastgen.export.trace import graph

# Which rules an architecture is known to need, so that a rule that stops firing is noticed.
EXPECTED = {
    "gpt2": {"share_tied_weights", "products_without_reshapes", "drop_round_trips",
             "pack_attention"},
    "llama": {"rotate_flat", "drop_round_trips", "pack_attention", "merge_products"},
    "qwen2": {"rotate_flat", "pack_attention", "merge_products"},
    "gemma2": {"share_tied_weights", "rotate_flat", "pack_attention", "merge_products"},
    "olmo2": {"rotate_flat", "merge_products"},
    "phi": {"drop_round_trips", "merge_products"},
}  # fmt: skip

NODES = {"gpt2": 50, "llama": 32}  # of two layers; each takes its time in every step


@pytest.fixture(scope="module", params=EXPECTED)
def converted(request, convert_once):
    model = tiny.build(request.param)
    return request.param, convert_once(model, graph.kept_by(model)), tmp_logits


def tmp_logits(model: ir.Model, directory) -> np.ndarray:
    path = directory / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, 30)
    return session.run(["logits"], feeds(declared(session), Batch.of([ids])))[0]


def test_rules_fire_and_keep_the_logits(converted, tmp_path):
    kind, model, logits = converted
    before, nodes = logits(model, tmp_path), len(model.graph)
    fired = trim.trim(model, 128)
    after = logits(model, tmp_path)
    assert {name for name, count in fired.items() if count} >= EXPECTED[kind]
    assert np.abs(after - before).max() <= 2e-6 * np.abs(before).max()
    assert len(model.graph) < nodes
    assert len(model.graph) == NODES.get(kind, len(model.graph))


def test_a_table_of_rotations_is_what_the_graph_computes_and_ends(convert_once):
    model = tiny.build("llama")
    kept = graph.kept_by(model)
    tabled, computed = (convert_once(model, kept) for _ in range(2))
    trim.trim(tabled, 128)
    trim.trim(computed, None)
    assert trim.rotations_are_tabled(tabled) and not trim.rotations_are_tabled(computed)
    table = tabled.graph.initializers["rotation.cos"].const_value.numpy()
    frequencies = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    expected = np.cos(np.arange(128)[:, None] * frequencies)
    np.testing.assert_allclose(table, expected, atol=1e-5)


def test_a_number_stays_a_number_as_a_constant():
    """A shape of one dimension in its place could not be joined with others."""
    held = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    assert edit.constant(edit.add_initializer(held, "four", np.array(4))).shape == ()
