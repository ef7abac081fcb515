"""Scripts written for transformers, or for fastgpt, run with nothing but their import changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scripts import output_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

import fastgen
from fastgen import CausalLM, CausalLMModelForOnnxGeneration

TEXTS = ["The quick brown fox", "import numpy as np; return"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working directory with a tiny GPT-2, as `save_pretrained` writes it."""
    home = tmp_path_factory.mktemp("dropin")
    tiny.build("gpt2", n_positions=256).save_pretrained(home / "distilgpt2")
    tiny.tokenizer().save_pretrained(home / "distilgpt2")
    return home


@pytest.fixture
def there(home, monkeypatch) -> Path:
    """The folder of the scripts: the model is a neighbour, the cache of exports is the test's."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("FASTGEN_CACHE", str(home / "cache"))
    return home


SCRIPT = """
import torch
from transformers import AutoTokenizer
{the_import}
tokenizer = AutoTokenizer.from_pretrained("distilgpt2", padding_side="left")
model = {the_class}.from_pretrained("distilgpt2"{precision})
model.to("cpu").eval()
print(model.config.n_layer, model.config.vocab_size, model.generation_config.eos_token_id)
inputs = tokenizer(
    ["The quick brown fox", "import"], return_tensors="pt", padding=True,
    return_token_type_ids=False,
).to(model.device)
torch.manual_seed(0)
{seed}
with torch.no_grad():
    outputs = model.generate(**inputs, max_new_tokens=20{more})
    print(outputs[:, inputs.input_ids.shape[-1]:])
    print(tokenizer.batch_decode(outputs, skip_special_tokens=True))
    out = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=True, top_p=0.9,
        temperature=0.7, max_new_tokens=12, return_dict_in_generate=True, output_scores=True,
        pad_token_id=tokenizer.pad_token_id, repetition_penalty=1.1{seeded}
    )
print(out.sequences.tolist())
scores = model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
for tok, score in zip(out.sequences[0, inputs.input_ids.shape[1]:], scores[0]):
    print(f"| {{tok:5d}} | {{tokenizer.decode(tok)!r:8s}} | {{score.numpy():.2f}}")
print(scores.exp().max() <= 1)
"""


def test_a_script_for_transformers_prints_the_same(there):
    theirs = output_of(
        SCRIPT.format(
            the_import="from transformers import AutoModelForCausalLM",
            more="",
            seeded="",
            the_class="AutoModelForCausalLM",
            seed="",
            precision="",
        )
    )
    ours = output_of(
        SCRIPT.format(
            the_import="from fastgen import CausalLM",
            the_class="CausalLM",
            seed="",
            more="",
            precision=", precision='fp32'",
            seeded=", seed=0",
        )
    )
    assert ours == theirs
    assert len(theirs.splitlines()) > 12


def test_the_readme_of_fastgpt_runs(there, capsys):
    # Its own lines, but for the import.
    model = CausalLMModelForOnnxGeneration.from_pretrained("distilgpt2")
    tokenizer = AutoTokenizer.from_pretrained("distilgpt2")

    prompt_text = "The quick brown fox jumps over the lazy dog"
    input_ids = tokenizer(prompt_text, return_tensors="pt", add_special_tokens=False).input_ids

    generated_ids = model.generate(
        input_ids,
        max_length=64 + len(prompt_text),
        decoder_start_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        output_scores=True,
        temperature=1,
        repetition_penalty=1.0,
        top_k=50,
        top_p=0.9,
        do_sample=True,
        num_return_sequences=1,
        length_penalty=2.0,
        early_stopping=True,
    )
    print(tokenizer.decode(generated_ids[0], skip_special_tokens=True))
    assert isinstance(generated_ids, torch.Tensor) and generated_ids.dtype == torch.int64
    assert generated_ids.shape == (1, 64 + len(prompt_text))
    assert capsys.readouterr().out.startswith(prompt_text)


@pytest.mark.parametrize("num_beams", [1, 2, 3, 4])
def test_the_benchmark_of_fastgpt_runs(there, num_beams):
    model = CausalLMModelForOnnxGeneration.from_pretrained(
        "distilgpt2", precision="fp32", threads=1
    )
    tokenizer = AutoTokenizer.from_pretrained("distilgpt2")
    prompt_ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    knobs = {
        "max_length": prompt_ids.shape[1] + 16,
        "decoder_start_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "output_scores": True,
        "temperature": 1,
        "repetition_penalty": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "do_sample": True,
        "num_return_sequences": 1,
        "length_penalty": 2.0,
        "early_stopping": True,
        "num_beams": num_beams,
        "pad_token_id": tokenizer.pad_token_id,
    }
    found = model.generate(prompt_ids, seed=9, **knobs)
    torch.manual_seed(9)
    theirs = AutoModelForCausalLM.from_pretrained("distilgpt2")
    assert torch.equal(found, theirs.generate(prompt_ids, **knobs))


# What transformers takes: the keywords of one call each.
TAKEN: list[dict[str, Any]] = [
    {"temperature": 1, "top_p": 1, "do_sample": True},
    {"top_p": 1, "typical_p": 1, "do_sample": True},
    {"length_penalty": 2, "num_beams": 2},
    {"do_sample": 0},
    {"do_sample": None, "num_return_sequences": 1},
    {"temperature": 0.0},
    {"temperature": None, "top_k": None, "top_p": None},
    {"top_k": 0, "do_sample": True},
    {"eos_token_id": None},
    {"eos_token_id": torch.tensor([2, 3])},
    {"eos_token_id": torch.tensor(2)},
    {"eos_token_id": [2, 50]},
    {"pad_token_id": torch.tensor(0)},
    {"max_new_tokens": np.int64(4)},
    {"max_length": 30, "max_new_tokens": 4},
    {"min_length": 3, "min_new_tokens": 2},
    {"stop_strings": "zz"},
    {"stop_strings": ["zz", "qq"]},
    {"max_time": 100, "use_cache": True},
    {"use_cache": False},
    {"cache_implementation": "dynamic"},
    {"output_attentions": False, "output_hidden_states": None},
    {"logits_processor": [], "stopping_criteria": []},
    {"logits_processor": None, "stopping_criteria": None, "streamer": None},
    {"prefix_allowed_tokens_fn": None, "assistant_model": None, "negative_prompt_ids": None},
    {"generation_config": None, "synced_gpus": False, "custom_generate": None},
    {"bad_words_ids": [[5], [6, 7]], "sequence_bias": {(5,): 1.0}},
    {"sequence_bias": [[[5], 1.0]]},
    {"forced_eos_token_id": [2, 3], "suppress_tokens": [5], "begin_suppress_tokens": [6]},
    {"exponential_decay_length_penalty": (2, 1.1)},
    {"exponential_decay_length_penalty": [2, 1.1]},
    {"watermarking_config": {"bias": 2.0, "seeding_scheme": "lefthash"}},
    {"guidance_scale": 1.5, "remove_invalid_values": True, "renormalize_logits": True},
    {"guidance_scale": 1},
    {"early_stopping": None, "num_beams": 2},
    {"return_dict_in_generate": False, "output_scores": True},
    {"num_assistant_tokens": 5, "token_healing": False, "is_assistant": False},
    {"repetition_penalty": 1.2, "encoder_repetition_penalty": 1.2},
    {"position_ids": None, "cache": None, "inputs_embeds": None},
]


@pytest.mark.parametrize("knobs", TAKEN, ids=str)
def test_what_transformers_takes_is_taken(pair, knobs):
    theirs, ours = pair("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    tokenizer = {"tokenizer": tiny.tokenizer()} if "stop_strings" in knobs else {}
    knobs = {"max_new_tokens": 6, **knobs}
    torch.manual_seed(4)
    expected = theirs.generate(ids, **knobs, **tokenizer)
    assert torch.equal(ours.generate(ids, seed=4, **knobs), expected)


def test_inputs_by_every_name(pair):
    theirs, ours = pair("llama")
    tokenizer = tiny.tokenizer()
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    expected = theirs.generate(ids, max_new_tokens=6)
    encoded = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for found in (
        ours.generate(ids, max_new_tokens=6),
        ours.generate(inputs=ids, max_new_tokens=6),
        ours.generate(input_ids=ids, max_new_tokens=6),
        ours.generate(**encoded, max_new_tokens=6),
        ours.generate(ids.int(), max_new_tokens=6),
    ):
        assert isinstance(found, torch.Tensor) and torch.equal(found, expected)
    with pytest.raises(ValueError, match="two names of one thing"):
        ours.generate(ids, inputs=ids)
    with pytest.raises(ValueError, match=r"token_type_ids=.* is not supported: the graph takes no"):
        ours.generate(**tokenizer(TEXTS[0], return_tensors="pt", return_token_type_ids=True))
    begin = theirs.generate(max_new_tokens=5)
    assert ours.generate(max_new_tokens=5) == begin.tolist()


def test_settings_are_attributes(pair):
    theirs, ours = pair("llama")
    ours = fastgen.load(ours.directory)
    assert ours.config.vocab_size == theirs.config.vocab_size
    assert ours.config.model_type == "llama" and ours.config.something_else is None
    assert ours.generation_config.pad_token_id == 0
    assert ours.device == "cpu" and ours.device.type == "cpu"
    assert torch.ones(1).to(ours.device).device == torch.device("cpu")
    assert ours.to("cpu") is ours and ours.eval() is ours
    ids = torch.tensor([[5, 6, 7]])
    ours.generation_config.max_new_tokens = 3
    ours.generation_config.eos_token_id = None
    assert ours.generate(ids).shape == (1, 6)
    assert isinstance(ours, CausalLM) and CausalLM is CausalLMModelForOnnxGeneration
