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
from fastgen.export import export, graph
from test_parity import ragged
from transformers import AutoModelForCausalLM

import fastgen
from fastgen.commands import run

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
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
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
def test_an_adapter_says_what_it_says_there(
    place, expected, how, tmp_path, monkeypatch, convert_once
):
    monkeypatch.setattr(graph, "convert", convert_once)
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
