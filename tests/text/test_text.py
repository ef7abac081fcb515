"""Models that read more than text, exported for text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMultimodalLM

import fastgen
from fastgen.export import UnsupportedModel, export
from fastgen.export.torch_model import source, text

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import architectures  # noqa: E402
import shrink  # noqa: E402


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("llava", "llama"),  # it is no causal language model, but holds one
        pytest.param("gemma3", "gemma3_text", marks=pytest.mark.slow),
        pytest.param("mistral3", "mistral", marks=pytest.mark.slow),
        ("qwen2_vl", "qwen2_vl"),  # transformers has no class for its text part
    ],
)
def test_a_checkpoint_that_reads_images_is_exported_for_text(kind, inner, tmp_path):
    config = shrink.config_of(kind)
    if kind == "qwen2_vl":  # time, height and width of half a head
        config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    shrink.build(kind, config=config).save_pretrained(tmp_path / "model")
    out = export(tmp_path / "model", tmp_path / "out", precision="fp32", progress=None)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "model").eval()
    ours = fastgen.load(out)
    assert ours.config.model_type == json.loads((out / "fastgen.json").read_text())["model_type"]
    assert ours.config.model_type == inner
    for row in architectures.rows_of(model, (2, 30)):
        expected = architectures.original(model, row).sequences.tolist()
        assert ours.generate([row], max_new_tokens=architectures.NEW, eos_token_id=None) == expected


def test_a_model_object_is_left_as_it_was_and_its_text_part_shares_the_weights():
    model = shrink.build("gemma4").train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    loaded = source.of_object(model, None)
    assert loaded.model.config.model_type == "gemma4_text" and loaded.name == "gemma4"
    assert loaded.model.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == implementation


def test_a_whole_model_within_another_is_taken_as_it_is():
    model = shrink.build("blip-2")
    assert text.alone(model) is model.language_model


def test_where_the_inner_class_says_something_else_the_model_is_run_as_it_is():
    model = shrink.build("cohere2_vision")  # whose logits are not scaled as Cohere2's are
    assert text.alone(model) is model
    for kind in ("llama", "modernbert-decoder"):  # the second calls its head a decoder
        model = shrink.build(kind)
        assert text.alone(model) is model


def test_an_encoder_decoder_within_another_is_refused_by_name():
    model = shrink.build("llava")
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModel, match=r"^llava cannot be exported: .*encoder-decoder"):
        source.of_object(model, None)


def test_tied_weights_stay_so():
    model = shrink.build("gemma3")
    inner = text.alone(model)
    assert inner.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(p.device == torch.device("meta") for p in inner.parameters())
