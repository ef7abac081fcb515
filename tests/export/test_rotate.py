"""Rotations: orthogonal, exact where they are folded in, and left out where they do not belong."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import tiny

import fastgen
from fastgen.export import bundle, export
from fastgen.export.prove import check
from fastgen.export.quantize import parts, rotate, rotation
from fastgen.export.rewrite import onnx_file
from fastgen.store.model_info import ModelInfo


@pytest.mark.parametrize("size", [1, 12, 64, 96, 128, 576, 640, 896])
def test_a_rotation_is_orthogonal_and_flat(size):
    turn = rotation.Rotation(size)
    matrix = turn.forward(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)
    assert np.abs(matrix).max() <= 2 / np.sqrt(size) + 1e-6
    x = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    np.testing.assert_allclose(turn.forward(x), x @ matrix, atol=1e-5)
    np.testing.assert_allclose(turn.of_columns(x.T), matrix.T @ x.T, atol=1e-5)
    pair = np.stack([x.T, 2 * x.T])
    np.testing.assert_allclose(turn.of_columns(pair), matrix.T @ pair, atol=1e-5)


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_is_turned_by_parts_is_the_same_to_the_bit(order, monkeypatch):
    """However many parts, columns and rows; and it is laid out as it was."""
    turn, random = rotation.Rotation(96), np.random.default_rng(1)
    tall = np.array(random.standard_normal((96, 700)), np.float32, order=order)
    flat = np.array(random.standard_normal((700, 96)), np.float32, order=order)
    found = []
    for part, cores in ((1 << 30, 1), (640, 3)):
        monkeypatch.setattr(parts, "PART", part)
        monkeypatch.setattr(parts, "physical_cores", lambda cores=cores: cores)
        columns = rotation.by_columns(turn.of_columns, tall)
        found.append((columns, rotation.by_rows(turn.forward, flat)))
    for one, two, given in zip(*found, (tall, flat), strict=True):
        assert one.tobytes() == two.tobytes() and one.strides == given.strides
    matrix = turn.forward(np.eye(96, dtype=np.float32))
    np.testing.assert_allclose(found[0][0], matrix.T @ tall, atol=1e-4)
    np.testing.assert_allclose(found[0][1], flat @ matrix, atol=1e-4)


# What of a kind of model is turned: norms with and without a mean, with and without biases, tied
# and not; norms behind products, experts and cross-attention's kin leave the stream as it is.
TURNED = {
    "llama": (2, 64),
    "gpt2": (2, 32),
    "gpt_neox": (None, 64),
    "qwen2": (2, 64),
    "gemma2": (4, None),
    "olmo2": (2, None),
    "mixtral": (1, None),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", TURNED)
def test_what_is_turned_says_the_same(kind, tied, tmp_path):
    model = tiny.build(kind, tie_word_embeddings=tied)
    path = export(model, tmp_path / "model", precision="fp32", progress=None)
    graph = ir.load(path / "model.onnx")
    before = len(graph.graph)
    done = rotate.rotate(graph)
    layers, stream = TURNED[kind]
    expected = [f"values of {layers} layers"] if layers else []
    assert done == expected + ([f"residual stream of {stream}"] if stream else [])
    turned = tmp_path / "turned"
    turned.mkdir()
    onnx_file.save(graph, turned / "model.onnx")
    bundle.seal(turned, ModelInfo.parse(path))
    assert len(graph.graph) <= before + 3
    rows = [np.array([5, 7, 9, 11, 20, 3]), np.array([8, 4])]
    one, other = (check.exported_logits(fastgen.load(p).model, rows) for p in (path, turned))
    said = check.compare(one, other)
    assert said.max_difference < 1e-5 and said.top1 == 1
