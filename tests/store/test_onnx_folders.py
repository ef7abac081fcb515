"""Folders that other tools exported are told apart by the names of their files alone."""

from __future__ import annotations

import pytest

from fastgen.errors import ModelError
from fastgen.store import onnx_folders

SAID = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
# As transformers.js has them: a graph a precision, weights of large ones beside.
MANY = [
    "README.md", ".gitattributes", "tokenizer.model", "vocab.txt", *SAID, "onnx/model.onnx",
    "onnx/model.onnx_data", "onnx/model.onnx_data_1", "onnx/model_fp16.onnx",
    "onnx/model_fp16.onnx_data", "onnx/model_q4.onnx", "onnx/model_q4f16.onnx",
    "onnx/model_q4f16.onnx_data", "onnx/model_quantized.onnx", "onnx/model_bnb4.onnx",
]  # fmt: skip
GENAI = ["genai_config.json", "tokenizer.json", "model.onnx", "model.onnx.data", "LICENSE"]
MERGED = [
    "config.json",
    "model.safetensors",
    "onnx/decoder_model.onnx",
    "onnx/decoder_model_merged.onnx",
    "onnx/decoder_model_merged_quantized.onnx",
    "onnx/decoder_with_past_model.onnx",
]


@pytest.mark.parametrize(
    ("names", "precision", "graph"),
    [
        (MANY, None, "onnx/model_q4.onnx"),
        ([n for n in MANY if "q4" not in n], None, "onnx/model_quantized.onnx"),
        ([n for n in MANY if not {"q4", "quantized"} & {*n.replace(".", "_").split("_")}
          and "q4" not in n], None, "onnx/model.onnx"),
        (MANY, "q8", "onnx/model_quantized.onnx"),
        (MANY, "fp16", "onnx/model_fp16.onnx"),
        (MANY, "int8", "onnx/model.onnx"),  # which is made of the widest
        (MANY, "int4", "onnx/model.onnx"),
        (MANY, "fp32", "onnx/model.onnx"),
        (["onnx/model_fp16.onnx"], "fp32", "onnx/model_fp16.onnx"),
        (["onnx/model_int8.onnx"], "q8", "onnx/model_int8.onnx"),
        (MERGED, None, "onnx/decoder_model_merged_quantized.onnx"),
        (MERGED, "fp32", "onnx/decoder_model_merged.onnx"),
        (GENAI, None, "model.onnx"),
        (GENAI, "q4", "model.onnx"),  # whose own precision only the graph says
        (["cuda/a/model.onnx", "cpu/b/model.onnx", "config.json"], None, "cpu/b/model.onnx"),
    ],
)  # fmt: skip
def test_the_graph_of_a_precision(names, precision, graph):
    (found,) = (name for name in onnx_folders.wanted(names, precision) if name.endswith(".onnx"))
    assert found == graph


@pytest.mark.parametrize(
    ("names", "precision", "needed"),
    [
        (MANY, None, [*SAID, "onnx/model_q4.onnx"]),
        (MANY, "q4f16", [*SAID, "onnx/model_q4f16.onnx", "onnx/model_q4f16.onnx_data"]),
        (MANY, "int8", [*SAID, "onnx/model.onnx", "onnx/model.onnx_data",
                        "onnx/model.onnx_data_1"]),
        (GENAI, None, GENAI[:-1]),
        (MERGED, "fp32", ["config.json", "onnx/decoder_model_merged.onnx"]),
        (["a/cpu/model.onnx", "a/cpu/model.onnx.data", "a/cpu/genai_config.json", "b/x.json",
          "config.json"], None, ["a/cpu/model.onnx", "a/cpu/model.onnx.data",
                                 "a/cpu/genai_config.json", "config.json"]),
    ],
)  # fmt: skip
def test_what_a_precision_needs(names, precision, needed):
    assert sorted(onnx_folders.wanted(names, precision)) == sorted(needed)


@pytest.mark.parametrize(
    ("names", "precision", "words"),
    [
        (MANY, "int3", "no precision 'int3', but bnb4, fp16, fp32, q4, q4f16, quantized"),
        (["model_q4.onnx"], "fp32", "no precision 'fp32', but q4"),
        (["model_q4.onnx"], "int8", "no precision 'int8', but q4"),
        (["encoder_model.onnx", "decoder_model_merged.onnx"], None, "encoder-decoder"),
        (["encoder.onnx", "decoder.onnx"], None, "encoder-decoder"),
        (["some-tiny_decoder.onnx", "some-tiny_encoder_fp16.onnx"], None, "encoder-decoder"),
        (["onnx/vision_encoder.onnx", "onnx/decoder_model_merged.onnx"], None, "vision_encoder"),
        (["some-v-text.onnx", "some-v-vision.onnx"], None, "pictures or sounds .*-vision"),
        (["decoder_model_merged.onnx", "prepare_inputs_embeds.onnx"], None, "pictures or sounds"),
        (["onnx/embed_tokens_q4.onnx", "onnx/decoder_model_merged_q4.onnx"], None, "pictures"),
        (["onnx/unet.onnx"], None, r"none of unet\.onnx is a decoder: expected model\.onnx, "),
        (["cpu/int4-a/model.onnx", "cpu/int4-b/model.onnx"], None, "download one of these folders"),
    ],
)
def test_what_is_not_there_is_said_by_name(names, precision, words):
    with pytest.raises(ModelError, match=words):
        onnx_folders.wanted(names, precision)


def test_a_place_without_graphs_is_none():
    assert onnx_folders.place_of(["config.json", "model.safetensors"]) is None
    assert onnx_folders.place_of(["onnx/model.onnx", "model.onnx"]) == ""


def test_where_torch_weights_lie_beside_graphs_torch_decides(monkeypatch):
    from fastgen.store import resolve

    for torch in (True, False):
        monkeypatch.setattr(resolve, "has_torch", lambda torch=torch: torch)
        assert resolve.is_onnx(MANY, "int8") and resolve.is_onnx(GENAI, None)
        assert resolve.is_onnx(MERGED, None) is not torch
        assert resolve.is_onnx(MERGED, "int8") is not torch
        assert resolve.is_onnx(MERGED, "q8")  # which only the folder has
        assert resolve.is_onnx([*GENAI, "training_args.bin"], None)  # which has no weights
        assert not resolve.is_onnx(["config.json", "model.safetensors"], None)
