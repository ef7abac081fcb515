"""Adapters are merged, and the export says what the merged model says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from tiny import ragged
from transformers import AutoModelForCausalLM

import fastgen
from fastgen.commands import run
from fastgen.errors import UnsupportedModel
from fastgen.export import export
from fastgen.export.torch_model import source

# peft asks transformers for what has a new name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny Llama in `base`, and an adapter of it in `adapter`, as peft saves it."""
    place = tmp_path_factory.mktemp("adapters")
    tiny.build("llama").save_pretrained(place / "base")
    tiny.tokenizer().save_pretrained(place / "base")
    model = AutoModelForCausalLM.from_pretrained(place / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    peft.get_peft_model(model, config).save_pretrained(place / "adapter")
    return place


@pytest.fixture(scope="module")
def expected(place) -> list[list[int]]:
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    theirs = peft.PeftModel.from_pretrained(base, str(place / "adapter"))
    rows = ragged(1)
    found = [
        theirs.generate(input_ids=torch.tensor([row]), do_sample=False, pad_token_id=0, **GREEDY)
        for row in rows
    ]
    plain = AutoModelForCausalLM.from_pretrained(place / "base")
    other = plain.generate(torch.tensor(rows[:1]), do_sample=False, pad_token_id=0, **GREEDY)
    assert other.tolist() != found[0].tolist()  # it does something
    return [one[0, len(row) :].tolist() for one, row in zip(found, rows, strict=True)]


@pytest.mark.parametrize("how", ["directory", "argument", "command", "from_pretrained"])
def test_an_adapter_says_what_it_says_there(place, expected, how, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if how == "directory":
        export(place / "adapter", out, precision="fp32", progress=None)
    elif how == "argument":
        export(place / "base", out, adapter=place / "adapter", precision="fp32", progress=None)
    elif how == "command":
        words = ["export", place / "base", out, "--adapter", place / "adapter"]
        assert run([*map(str, words), "--precision", "fp32"]) == 0
    else:
        monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
        out = fastgen.CausalLM.from_pretrained(place / "adapter", precision="fp32").directory
    model = fastgen.load(out)
    rows = ragged(1)
    assert [row[-12:] for row in model.generate(rows, **GREEDY)] == expected
    assert model.complete("The quick", max_new_tokens=3)  # with the base's tokenizer
    assert json.loads((out / "fastgen.json").read_text())["name"] == "adapter"


def test_what_cannot_be_merged_is_said(place, tmp_path, monkeypatch):
    def refused(words: str, model: Path, **more: Any) -> None:
        with pytest.raises(fastgen.ModelError, match=words):
            export(model, tmp_path / "out", progress=None, **more)
        assert not (tmp_path / "out").exists()

    refused("is no adapter: it has no adapter_config.json", place / "base", adapter=place / "base")
    refused("is an adapter itself", place / "adapter", adapter=place / "adapter")
    tiny.build("llama", hidden_size=32).save_pretrained(tmp_path / "other")
    refused("the adapter .* cannot be merged", tmp_path / "other", adapter=place / "adapter")
    damaged = shutil.copytree(place / "adapter", tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text("{}")
    refused("adapter_config.json is damaged .*base_model_name_or_path", damaged)
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(r"merging it needs peft: pip install 'fastgen-onnx\[adapter\]'", place / "adapter")
    with pytest.raises(ValueError, match="adapter goes with a model's name"):
        export(tiny.build("llama"), tmp_path / "out", adapter=place / "adapter", progress=None)


def trained(
    place: Path, to: Path, config: peft.PeftConfig, tokens: int = tiny.VOCAB, **base: Any
) -> Any:
    """An adapter with random weights, saved with its tokenizer, of a model with so many tokens."""
    tiny.build("llama", **base).save_pretrained(place / "other")
    tiny.tokenizer().save_pretrained(place / "other")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(place / "other")
    if tokens != tiny.VOCAB:
        model.resize_token_embeddings(tokens)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(to)
    tokenizer = tiny.tokenizer.__wrapped__()
    tokenizer.add_tokens([f"<new {n}>" for n in range(tokens - len(tokenizer))])
    tokenizer.save_pretrained(to)
    return adapted.eval()


ON_THEM = ["embed_tokens", "lm_head"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, as the adapters are made
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        (105, {"modules_to_save": ON_THEM}),
        (105, {"modules_to_save": ON_THEM[:1]}),
        (98, {"modules_to_save": ON_THEM}),
        (99, {"modules_to_save": ON_THEM}),
        (105, {"target_modules": ["q_proj", *ON_THEM]}),
        (105, {"trainable_token_indices": [99, 104]}),
        (105, {}),
    ],
)
def test_adapters_with_added_tokens(tmp_path, tied, tokens, changes):
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes
    )
    theirs = trained(tmp_path, tmp_path / "it", config, tokens, tie_word_embeddings=tied)
    found = source.load(tmp_path / "it")
    ids = torch.tensor([[5, tokens - 1, 7, tokens - 2, 9]])
    with torch.no_grad():
        said, expected = found.model(input_ids=ids).logits, theirs(input_ids=ids).logits
    assert said.shape == (1, 5, tokens) and torch.allclose(said, expected, atol=1e-4)
    assert found.tokenizer is not None
    assert len(found.tokenizer) == tokens


def test_an_adapter_of_other_sizes_is_told_with_them(place, tmp_path):
    tiny.build("llama", hidden_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(
        fastgen.ModelError, match=r"torch.Size\(\[4, 64\]\).*torch.Size\(\[4, 32\]\)"
    ):
        source.load(tmp_path / "other", adapted=place / "adapter")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=4), "PROMPT_TUNING .* stands before each"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4), "PREFIX_TUNING .* stands before each"),
        (peft.PromptEncoderConfig(num_virtual_tokens=4), "P_TUNING .* stands before each"),
        (peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2), "ADAPTION_PROMPT .* beside"),
        (peft.PolyConfig(target_modules=["q_proj"]), "POLY .* task_ids"),
        (
            peft.LoraConfig(
                task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]
            ),
            "LORA .* only after certain tokens",
        ),
    ],
    ids=lambda value: getattr(value, "peft_type", None),
)
def test_adapters_that_cannot_become_weights_are_named(tmp_path, config, words):
    config.task_type = "CAUSAL_LM"
    trained(tmp_path, tmp_path / "it", config)
    words = f"an adapter of the kind {words}"
    with pytest.raises(UnsupportedModel, match=words):
        export(tmp_path / "it", tmp_path / "out", progress=None)
    assert not (tmp_path / "out").exists()
