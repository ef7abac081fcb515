"""Directories that others wrote: whatever is wrong with one, the error names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

import fastgen
from fastgen.commands import run
from fastgen.errors import UnsupportedModel
from fastgen.export import export
from fastgen.export.onnx_folder import folder
from fastgen.export.source import checkpoint
from fastgen.export.torch_model import source
from fastgen.export.torch_model.original import Original
from fastgen.inputs.keywords import BY_DEFAULT, UNSUPPORTED
from fastgen.inputs.params import resolve
from fastgen.jobs.source import RowSource
from fastgen.store import hub, jsonfile

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9876\n"
SAID = "is a Git-LFS pointer, not the content itself: run `git lfs pull` there"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny Llama in `whole`, and the same in many files in `sharded`."""
    place = tmp_path_factory.mktemp("checkpoints")
    for name, size in (("whole", "1GB"), ("sharded", "50KB")):
        tiny.build("llama").save_pretrained(place / name, max_shard_size=size)
        tiny.tokenizer().save_pretrained(place / name)
    return place


@pytest.fixture
def whole(place, tmp_path) -> Path:
    return shutil.copytree(place / "whole", tmp_path / "model")


@pytest.fixture
def sharded(place, tmp_path) -> Path:
    return shutil.copytree(place / "sharded", tmp_path / "model")


def refused(directory: Path, words: str) -> None:
    with pytest.raises(fastgen.ModelError, match=words):
        source.load(directory)


def configured(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


READ = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


@pytest.mark.parametrize("name", READ)
def test_a_pointer_is_called_so_in_a_checkpoint(whole, name):
    (whole / name).write_bytes(POINTER)
    refused(whole, f"{name} in .*model {SAID}")


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "merges.txt", "spiece.model"])
def test_a_pointer_in_place_of_a_vocabulary_is_one_where_it_is_read(whole, name):
    (whole / name).write_bytes(POINTER)
    checkpoint.check(whole)  # tokenizer.json has it
    (whole / "tokenizer.json").unlink()
    refused(whole, f"{name} in .* {SAID}")


def test_pointers_that_nobody_reads_are_nobodys_business(whole):
    for name in ("pytorch_model.bin", "README.md", "training_args.bin", "picture.png"):
        (whole / name).write_bytes(POINTER)
    assert source.load(whole).tokenizer is not None


def test_pointers_in_place_of_weights_are_all_counted(sharded, tmp_path, capsys):
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 3
    for name in shards:
        (sharded / name).write_bytes(POINTER)
    words = f"{shards[0]}, {shards[1]}, {shards[2]} and {len(shards) - 3} more in .* are Git-LFS"
    refused(sharded, words)
    assert run(["export", str(sharded), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "run `git lfs pull` there" in said and "weights_only" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_pickled_weights(whole):
    (whole / "model.safetensors").unlink()
    weights = whole / "pytorch_model.bin"
    weights.write_bytes(POINTER)
    refused(whole, f"pytorch_model.bin in .* {SAID}")
    weights.write_bytes(b"no weights at all" * 9)
    with pytest.raises(fastgen.ModelError, match="damaged, or hold more than weights") as error:
        source.load(whole)
    assert "weights_only" not in str(error.value)
    torch.save({"lm_head.weight": torch.ones(3)}, weights)
    weights.write_bytes(weights.read_bytes()[:-30])
    with pytest.raises(ValueError, match="cannot load it: "):
        source.load(whole)


@pytest.mark.parametrize(
    "name", ["fastgen.json", "model.onnx", "model.onnx.data", "tokenizer.json"]
)
def test_a_pointer_in_a_model_directory(tmp_path, name):
    model = shutil.copytree(hub.DEMO, tmp_path / "model")
    (model / name).write_bytes(POINTER)
    for look in (fastgen.load, fastgen.verify, fastgen.CausalLM, fastgen.CausalLM.from_pretrained):
        with pytest.raises(fastgen.ModelError, match=f"{name} in .*model {SAID}"):
            look(model)


@pytest.fixture
def onnx_folder(tmp_path) -> Path:
    """An ONNX folder: its graph, weights beside it, and what is said of them."""
    place = tmp_path / "folder"
    (place / "onnx").mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(hub.DEMO / name, place / "onnx" / name)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(hub.DEMO / name, place / name)
    return place


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "onnx/model.onnx",
        "onnx/model.onnx.data",
    ],
)
def test_a_pointer_in_an_onnx_folder(onnx_folder, name, tmp_path):
    assert [path.name for path in folder.choose(onnx_folder, None).files] == ["model.onnx.data"]
    (onnx_folder / name).write_bytes(POINTER)
    with pytest.raises(fastgen.ModelError, match=f"{Path(name).name} in .* {SAID}"):
        export(onnx_folder, tmp_path / "out", progress=None)
    assert not (tmp_path / "out").exists()


def test_a_graph_that_is_not_chosen_may_be_a_pointer(onnx_folder):
    (onnx_folder / "onnx/model_q4.onnx").write_bytes((onnx_folder / "onnx/model.onnx").read_bytes())
    (onnx_folder / "onnx/model.onnx").write_bytes(POINTER)
    assert folder.choose(onnx_folder, "q4").graph.name == "model_q4.onnx"


def test_a_pointer_at_the_other_doors(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(POINTER)
    doors: list[Callable[[], Any]] = [
        lambda: export("nobody/nothing", tmp_path / "out", text=path, progress=None),
        lambda: RowSource.of(str(path)),
        lambda: fastgen.PrefixCache.load(path),
        lambda: jsonfile.read(path),
    ]
    for door in doors:
        with pytest.raises(fastgen.ModelError, match=f"file.jsonl in .* {SAID}"):
            door()
    assert run(["generate", "--file", str(path)]) == 2


def test_what_an_index_says_is_looked_at(sharded):
    index = sharded / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    one = sorted(set(said["weight_map"].values()))[1]
    (sharded / one).rename(sharded / "elsewhere")
    refused(sharded, f"lacks {one}, which model.safetensors.index.json names")
    for wrong in (
        {},
        [],
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": "../whole/model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
    ):
        index.write_text(json.dumps(wrong))
        refused(sharded, "model.safetensors.index.json is damaged .*: download the model again")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_weights_that_end_too_early_or_are_something_else(place, tmp_path_factory, data):
    content = (place / "whole" / "model.safetensors").read_bytes()
    wrong = data.draw(
        st.one_of(
            st.integers(0, len(content) - 1).map(lambda end: content[:end]),
            st.binary(max_size=64),
            st.binary(min_size=1, max_size=9).map(lambda more: content + more),
        ).filter(lambda other: not other.startswith(jsonfile.POINTER))
    )
    directory = tmp_path_factory.mktemp("wrong")
    (directory / "model.safetensors").write_bytes(wrong)
    with pytest.raises(fastgen.ModelError, match=r"model.safetensors is damaged .*: download"):
        checkpoint.check(directory)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["auto", "torch.bfloat16", "fp16", "nonsense", None, 5, ["x"]])
def test_a_type_that_torch_has_not_says_nothing(whole, name, value):
    path = whole / "config.json"
    said = json.loads(path.read_text())
    said.pop("dtype")
    path.write_text(json.dumps(said | {name: value}))
    found = source.load(whole)
    assert found.model.dtype == torch.float32 and found.model.name_or_path == str(whole)
    assert found.tokenizer is not None
    plain = tiny.build("llama")
    ids = torch.arange(5, 12)[None]
    assert torch.equal(found.model(ids).logits, plain(ids).logits)


def test_embeddings_of_another_size_than_the_configuration_has(whole):
    for size in (50, 200):
        refused(
            configured(whole, vocab_size=size),
            rf"lm_head.weight is \[99, 64\] where config.json makes it \[{size}, 64\], "
            r"model.embed_tokens.weight is \[99, 64\]",
        )


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.just(10**6),
    st.just(0.5),
    st.just("nonsense"),
    st.just([]),
    st.just({}),
    st.just(["nonsense"]),
)
FIELDS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "dtype",
          "vocab_size", "hidden_act", "rope_parameters", "rope_scaling", "layer_types", "head_dim",
          "model_type", "architectures", "eos_token_id", "pad_token_id", "rms_norm_eps", "id2label",
          "tie_word_embeddings", "quantization_config", "auto_map", "text_config", "return_dict",
          "attn_implementation", "max_position_embeddings", "intermediate_size")  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(FIELDS), value=ODD)
def test_whatever_a_configuration_says_is_loaded_or_refused(place, tmp_path_factory, name, value):
    if name in ("hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers"):
        value = 7 if value == 10**6 else value  # no model of terabytes
    directory = shutil.copytree(place / "whole", tmp_path_factory.mktemp("odd") / "model")
    try:
        source.load(configured(directory, **{name: value}))
    except (fastgen.ModelError, UnsupportedModel) as error:
        assert str(error).strip() and "\n" not in str(error) and "above report" not in str(error)


def test_defaults_that_change_no_token():
    """For whatever name: where it changes nothing in transformers, it does not here."""
    model = tiny.build("llama", num_hidden_layers=1)
    ids, usual = torch.tensor([[5, 6, 7, 8]]), model.generation_config.to_dict()
    plain = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
    taken = set()
    for name in {*UNSUPPORTED} - {"assistant_ensemble_weight"}:  # which waits for an assistant
        try:
            model.generation_config = GenerationConfig.from_dict({**usual, name: True})
            said = model.generate(ids, max_new_tokens=5, do_sample=False).tolist()
        except Exception:  # of any kind: it cannot be used there
            model = tiny.build("llama", num_hidden_layers=1)  # some change it before they fail
            continue
        assert said == plain
        taken.add(name)
        assert resolve({**usual, name: True}, None, {}) == resolve(usual, None, {})
        with pytest.raises(ValueError, match=f"{name}=True is not supported"):
            resolve({**usual, name: True}, None, {name: True})
    assert {"output_attentions", "output_hidden_states", "low_memory", "trust_remote_code"} <= taken
    assert not taken & BY_DEFAULT
    for name in BY_DEFAULT:
        with pytest.raises(ValueError, match=rf"{name}=0.5 \(the model's own default\) is not"):
            resolve({**usual, name: 0.5}, None, {})


def test_outputs_that_a_model_asks_for_by_default(tmp_path):
    model = fastgen.load(shutil.copytree(hub.DEMO, tmp_path / "model"))
    plain = model.complete("The", max_new_tokens=4)
    for name in ("output_attentions", "return_dict_in_generate", "output_scores", "output_logits"):
        setattr(model.generation_config, name, True)
        assert model.complete("The", max_new_tokens=4) == plain
    out = model.generate([[5, 6]], max_new_tokens=3)  # as there: the last three say what is given
    assert np.shape(out.sequences) == (1, 5) and len(out.logits) == len(out.scores) == 3


def test_a_description_runs_nothing(whole, monkeypatch):
    """The facts that only a run can tell were recorded when the original was run."""
    origin = Original(source.load(whole))
    with origin.evaluating():
        rows = origin.probes()
        monkeypatch.setattr(type(origin.model), "forward", lambda *_, **__: 1 / 0)
        info = origin.describe()
        with pytest.raises(ZeroDivisionError):
            origin.logits(rows[0])
    assert (info.precision, info.vocab_size, info.files) == ("fp32", 99, {})
    assert info.layers and info.parameters == origin.parameters
