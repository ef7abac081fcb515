"""Bad input gets one clear error at the door, and nothing is ignored in silence."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import fastgen
from fastgen.export import bundle
from fastgen.store.model_info import ModelInfo


@pytest.fixture(scope="module")
def model(pair):
    return pair("gpt2")[1]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "empty"),
        ([[]], "row 0 .* empty"),
        ([[1], []], "row 1 .* empty"),
        (np.zeros((0,), int), "empty"),
        (np.zeros((1, 0), int), "empty"),
        (np.zeros((1, 2, 3), int), r"1 or 2 dimensions.*\(1, 2, 3\)"),
        (np.array([[1.0, 2.0]]), "integers, got float64"),
        (torch.tensor([1.5]), "integers, got float32"),
        ([1, 2.5], "integers, got 2.5"),
        ([[1, True]], "integers, got True"),
        ([[1], "ab"], "row 1"),
        ("text", "got str"),
        (5, "got int"),
        ([1, 99], r"99 \(row 0, position 1\).*vocabulary of 99"),
        ([[4], [5, -1]], r"-1 \(row 1, position 1\)"),
        ([5] * 128, "no room|exceed"),
        ([5] * 129, "129 tokens, the model takes at most 128"),
    ],
)
def test_ids(model, ids, words):
    with pytest.raises(ValueError, match=words):
        model.generate(ids)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1]], r"shape \(1, 2\), the ids have \(1, 3\)"),
        ([1, 1, 1, 1], "shape"),
        ([[0, 0, 0]], "row 0 .* empty"),
        ([[1, 2, 1]], "0 and 1"),
        ([[1, 1], [1]], "rectangular"),
    ],
)
def test_masks(model, mask, words):
    with pytest.raises(ValueError, match=words):
        model.generate([[5, 6, 7]], attention_mask=mask)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"max_new_token": 3}, "max_new_token is not a keyword.*did you mean max_new_tokens"),
        ({"temprature": 3}, "did you mean temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer, got 2.5"),
        ({"max_length": 3}, "no room"),
        ({"max_new_tokens": 126}, "exceed the 128 positions.*lower max_new_tokens to 125"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be .*above 0"),
        ({"do_sample": "yes"}, "do_sample must be True or False"),
        ({"top_k": -1}, "top_k must be zero or more, got -1"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample"),
        ({"num_beams": 2, "num_return_sequences": 3}, "at most num_beams=2"),
        ({"do_sample": True, "seed": [1, 2]}, "seed has 2 values for 1 rows"),
        ({"output_attentions": True}, "output_attentions=True is not supported: "),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not supported: "),
        ({"early_stopping": "soon"}, "early_stopping must be True, False or 'never'"),
        ({"eos_token_id": "x"}, "eos_token_id must be an integer, got 'x'"),
    ],
)
def test_knobs(model, knobs, words):
    length = {} if "max_length" in knobs else {"max_new_tokens": 3}
    with pytest.raises(ValueError, match=words):
        model.generate([5, 6, 7], **length | knobs)


def test_keywords_that_change_nothing_are_taken(model):
    plain = model.generate([5, 6, 7], max_new_tokens=4)
    for knobs in (
        {"use_cache": True},
        {"decoder_start_token_id": None},
        {"cache_implementation": "static"},
        {"output_attentions": False},
    ):
        assert model.generate([5, 6, 7], max_new_tokens=4, **knobs) == plain


def test_a_row_padded_on_the_right_warns_and_continues_after_its_text(model):
    plain = model.generate([5, 6, 7], max_new_tokens=4)[0]
    with pytest.warns(UserWarning, match="padded on the right"):
        out = model.generate([5, 6, 7, 0], attention_mask=[1, 1, 1, 0], max_new_tokens=4)[0]
    assert out[4:] == plain[3:]


@pytest.mark.parametrize(
    "door",
    [
        lambda model, ids, mask: model.generate(ids, attention_mask=mask, max_new_tokens=2),
        lambda model, ids, mask: list(model.stream(ids, attention_mask=mask, max_new_tokens=2)),
        lambda model, ids, mask: model.call(ids, attention_mask=mask, max_new_tokens=2),
        lambda model, ids, mask: model.score(ids, attention_mask=mask),
        lambda model, ids, mask: fastgen.generate(
            ids, model=model.directory, attention_mask=mask, max_new_tokens=2
        ),
    ],
)
def test_a_warning_names_the_line_of_the_caller(model, door):
    with pytest.warns(UserWarning, match="padded on the right") as caught:
        door(model, [5, 6, 7, 0], [1, 1, 1, 0])
    assert {warning.filename for warning in caught} == {__file__}


@pytest.fixture
def directory(model, tmp_path):
    return shutil.copytree(model.directory, tmp_path / "model")


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(fastgen.ModelError, match="is not a directory"):
        fastgen.load(tmp_path / "nothing")


def test_a_foreign_directory(tmp_path):
    with pytest.raises(fastgen.ModelError, match="not a fastgen model directory"):
        fastgen.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(fastgen.ModelError, match="is not a transformers model: Unrecognized model"):
        fastgen.load(tmp_path)


def test_a_missing_and_a_truncated_file(directory):
    data = directory / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:-10])
    with pytest.raises(fastgen.ModelError, match=r"model\.onnx\.data has .* truncated"):
        fastgen.load(directory)
    data.unlink()
    with pytest.raises(fastgen.ModelError, match=r"lacks model\.onnx\.data"):
        fastgen.load(directory)


def test_another_format_and_a_damaged_description(directory):
    path = directory / "fastgen.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(fastgen.ModelError, match="format 99, this fastgen reads format 1"):
        fastgen.load(directory)
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(fastgen.ModelError, match="damaged"):
        fastgen.load(directory)
    path.write_text("{")
    with pytest.raises(fastgen.ModelError, match="damaged"):
        fastgen.load(directory)


def test_a_graph_that_does_not_match(directory):
    path = directory / "fastgen.json"
    content = json.loads(path.read_text())
    content["layers"] = content["layers"][:1]
    path.write_text(json.dumps(content))
    with pytest.raises(fastgen.ModelError, match=r"inputs, expected .*past_key_values\.1\.key"):
        fastgen.load(directory)


def test_a_graph_that_is_no_graph(directory):
    path = directory / "model.onnx"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(fastgen.ModelError, match=r"model\.onnx has not the .* bytes that were"):
        fastgen.load(directory)
    bundle.seal(directory, ModelInfo.parse(directory))  # no digests
    with pytest.raises(fastgen.ModelError, match="onnxruntime cannot load"):
        fastgen.load(directory)


def test_a_model_without_tokenizer_takes_ids_only(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    content = json.loads((directory / "fastgen.json").read_text())
    content["files"] = {k: v for k, v in content["files"].items() if "tokenizer" not in k}
    (directory / "fastgen.json").write_text(json.dumps(content))
    model = fastgen.load(directory)
    assert [token.text for token in model.stream([5, 6], max_new_tokens=2)] == ["", ""]
    with pytest.raises(ValueError, match="for ids only"):
        model.complete("text")


def test_threads_must_be_positive(directory):
    with pytest.raises(ValueError, match="threads must be positive, got 0"):
        fastgen.load(directory, threads=0)
