"""The export: from where, what is refused, what it leaves behind, and what it says."""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import safetensors.torch
import sentencepiece
import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fastgen
from fastgen import __main__
from fastgen.export import Mismatch, UnsupportedModel, bundle, pipeline
from fastgen.export.prove import check
from fastgen.export.source.origin import NOTHING
from fastgen.export.torch_model import source
from fastgen.export.trace import graph
from fastgen.store import files, hub

ROOT = Path(__file__).parents[2]
# What this file asks is asked of the precision that says what the original says.
export = functools.partial(pipeline.export, precision="fp32")

HERE = (str(ROOT), str(Path.home()) + "/", tempfile.gettempdir())  # paths of this machine


@pytest.fixture
def gpt2(pair) -> PreTrainedModel:
    """A model object whose export is quick."""
    return pair("gpt2")[0]


@pytest.fixture
def llama(pair) -> tuple[PreTrainedModel, fastgen.CausalLM]:
    """Another model and its export; test_cli runs it too."""
    return pair("llama", max_position_embeddings=1 << 15)


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


# --- where a model comes from ------------------------------------------------------------------


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "dtypes": [p.dtype for p in model.parameters()],
        "grads": [p.requires_grad for p in model.parameters()],
        "weights": [p.detach().clone() for p in model.parameters()],
        "places": [p.data_ptr() for p in model.parameters()],
    }


def assert_same_state(one: dict[str, Any], two: dict[str, Any]) -> None:
    for name, value in one.items():
        if name == "weights":
            assert all(torch.equal(a, b) for a, b in zip(value, two[name], strict=True))
        else:
            assert value == two[name], name


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """bf16, tied, while it trains, with eager attention, heads wider than hidden/heads, no text."""
    model = tiny.build("llama", head_dim=16, tie_word_embeddings=True, attn_implementation="eager")
    model = model.to(torch.bfloat16).train()
    model.model.layers[1].eval()  # partly frozen
    model.generation_config.max_new_tokens = 7
    before = state_of(model)
    directory = tmp_path_factory.mktemp("half") / "model"
    shown = io.StringIO()
    export(model, directory, progress=shown)
    return model, before, directory, shown.getvalue()


def test_a_model_object_is_left_as_it_was(half):
    model, before, _, _ = half
    assert before["attention"] == "eager" and len(set(before["training"])) == 2
    assert_same_state(before, state_of(model))


def test_a_model_object_is_left_as_it_was_when_the_export_fails(gpt2, tmp_path, monkeypatch):
    gpt2.train()
    before = state_of(gpt2)
    monkeypatch.setattr(check, "compare_export", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(gpt2, tmp_path / "out", progress=None)
    assert_same_state(before, state_of(gpt2))
    gpt2.eval()


def test_a_half_precision_model_says_what_its_weights_say_in_float32(half):
    model, _, directory, _ = half
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = copy.deepcopy(model).float().eval()(ids).logits[0].detach().numpy()
    ours = fastgen.load(directory).model
    found = ours.forward(
        [ids[0].numpy()], ours.new_cache(1, 8), logits_positions=np.arange(5)[None]
    )
    assert np.abs(found[0] - expected).max() <= 2e-5 * np.abs(expected).max()
    assert ours.info.layers == ((2, 16), (2, 16))  # 4 heads of 16 on a hidden size of 32


def test_without_a_tokenizer_it_is_exported_for_ids_only_and_says_so(half):
    _, _, directory, shown = half
    assert "for ids only: no tokenizer was given" in shown
    assert not list(directory.glob("tokenizer*"))
    assert json.loads((directory / "report.json").read_text())["tokenizer"].startswith("no ")
    with pytest.raises(ValueError, match="exported for ids only"):
        fastgen.load(directory).complete("text")


def tables(model: PreTrainedModel, directory: Path) -> list[str]:
    """The weights of an export that have the shape of the model's embedding."""
    size = model.get_input_embeddings().weight.numel()
    stored = onnx.load(directory / "model.onnx").graph.initializer
    return [one.name for one in stored if math.prod(one.dims) == size]


def test_a_tied_embedding_is_stored_once(half):
    model, _, directory, _ = half
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tables(model, directory)) == 1
    distinct = 4 * sum(p.numel() for p in model.parameters())  # counts a shared one once
    embedding = 4 * model.get_input_embeddings().weight.numel()
    rotations = 4 * 128 * 16  # of every position: cos and sin of half a head
    size = (directory / "model.onnx.data").stat().st_size
    assert distinct - embedding / 2 < size < distinct + rotations + embedding / 2


def test_an_untied_embedding_and_head_are_both_stored(llama):
    model, ours = llama
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert len(tables(model, ours.directory)) == 2


@pytest.fixture(scope="module")
def from_directory(tmp_path_factory):
    """A `save_pretrained` directory in fp16 whose tokenizer is an old `tokenizer.model` alone."""
    place = tmp_path_factory.mktemp("some") / "my-llama"
    spm = llama_tokenizer(place)
    tiny.build("llama", vocab_size=VOCAB).to(torch.float16).save_pretrained(place)
    shown = io.StringIO()
    out = export(place, tmp_path_factory.mktemp("out") / "exported", progress=shown)
    return place, spm, out, shown.getvalue()


def test_a_directory_in_fp16_is_exported(from_directory):
    place, _, out, _ = from_directory
    assert next(iter(safetensors.torch.load_file(place / "model.safetensors").values())).dtype == (
        torch.float16
    )
    theirs = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    ids = [5, 6, 7, 8]
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert fastgen.load(out).generate([ids], max_new_tokens=12) == expected.tolist()


def test_nothing_of_this_machine_is_in_an_exported_directory(from_directory, half, pair):
    for directory in (from_directory[2], half[2], pair("gpt2")[1].directory):
        for name, data in content(directory).items():
            for place in HERE:
                assert place.encode() not in data, f"{name} holds {place}"


def test_a_directory_is_called_by_its_own_name(from_directory):
    out = from_directory[2]
    for name, key in (("fastgen.json", "name"), ("report.json", "model")):
        assert json.loads((out / name).read_text())[key] == "my-llama"
    assert "_name_or_path" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("some/where/my-model", "my-model"),
        ("hub/models--org--small/snapshots/0123abcd", "org/small"),
        ("hub/models--small/snapshots/0123abcd", "small"),
    ],
)
def test_names_of_places(path, name):
    assert source.name_of(Path("/") / path) == name


def test_what_is_no_model(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for what, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "is not a transformers model"),
        (None, "got NoneType"),
        (torch.nn.Linear(1, 1), "got Linear"),
    ):
        with pytest.raises(ValueError, match=words):
            export(what, tmp_path / "out", progress=None)
    with pytest.raises(ValueError, match=r"tokenizer must be .*got str"):
        export(tiny.build("gpt2"), tmp_path / "out", tokenizer="gpt2", progress=None)


def test_a_fastgen_directory_is_not_exported_again(pair, tmp_path):
    with pytest.raises(fastgen.ModelError, match="fastgen model already"):
        export(pair("gpt2")[1].directory, tmp_path / "out", progress=None)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """transformers makes up what is missing, and both sides would agree on it."""
    place = tmp_path / "model"
    tiny.build("llama").save_pretrained(place)
    weights = safetensors.torch.load_file(place / "model.safetensors")
    del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(fastgen.ModelError, match=r"lacks lm_head\.weight"):
        export(place, tmp_path / "out", progress=None)
    assert not (tmp_path / "out").exists()


# --- tokenizers --------------------------------------------------------------------------------

VOCAB = 128


def sentencepiece_model(path: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
    """Train one on the spot and write it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*check.TEXTS, tiny.TEXT]),
        model_writer=written,
        minloglevel=2,
        hard_vocab_limit=False,
        vocab_size=VOCAB,
        **settings,
    )
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def llama_tokenizer(place: Path) -> sentencepiece.SentencePieceProcessor:
    """The files of an old Llama tokenizer: `tokenizer.model` and a few settings."""
    spm = sentencepiece_model(place / "tokenizer.model", model_type="bpe", character_coverage=1.0)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>", "add_bos_token": True}  # fmt: skip
    write(place, "tokenizer_config.json", settings)
    return spm


def write(place: Path, name: str, content: Any) -> None:
    place.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (place / name).write_text(text, encoding="utf-8")


def test_a_sentencepiece_model_becomes_a_tokenizer_json(from_directory):
    _, spm, out, shown = from_directory
    assert "ids only" not in shown
    ours = fastgen.load(out)
    for text in ("The quick brown fox", "every good boy, lazy", "numbers"):
        assert ours.tokenizer.encode(text) == [1, *spm.encode(text)]
        assert ours.tokenizer.decode(spm.encode(text)) == text
    assert ours.complete("The quick", max_new_tokens=3)


def read_back(fast: Any, place: Path) -> fastgen.Tokenizer:
    fast.save_pretrained(place)
    return fastgen.Tokenizer(place)


def test_vocab_and_merges_become_a_tokenizer_json(tmp_path):
    expected = tiny.tokenizer()
    model = json.loads(expected.backend_tokenizer.to_str())["model"]
    write(tmp_path, "config.json", {"model_type": "gpt2"})
    write(tmp_path, "vocab.json", model["vocab"])
    write(tmp_path, "merges.txt", "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    fast, note = source._tokenizer(tmp_path)
    assert note == ""
    ours = read_back(fast, tmp_path / "saved")
    for text in check.TEXTS:
        assert ours.encode(text) == expected(text)["input_ids"]


def test_a_slow_tokenizer_without_a_converter_is_converted_by_its_model(tmp_path):
    spm = sentencepiece_model(tmp_path / "spiece.model", model_type="unigram")
    write(tmp_path, "config.json", {"model_type": "bert-generation"})
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "BertGenerationTokenizer"})
    fast, note = source._tokenizer(tmp_path)
    assert note == ""
    ours = read_back(fast, tmp_path / "saved")
    assert ours.encode("The quick brown fox") == spm.encode("The quick brown fox")
    assert ours.index("<pad>") == fast.pad_token_id


def test_a_tokenizer_without_a_fast_form_is_left_out_and_it_says_why(tmp_path):
    write(tmp_path, "config.json", {"model_type": "ctrl"})
    write(tmp_path, "vocab.json", {"<unk>": 0, "a</w>": 1, "b</w>": 2, "T@@": 3, "h@@": 4})
    write(tmp_path, "merges.txt", "#version: 0.2\na b</w>\n")
    fast, note = source._tokenizer(tmp_path)
    assert fast is None and re.match("its CTRLTokenizer has no fast form", note)


def test_a_directory_without_a_tokenizer_has_none(tmp_path):
    """transformers makes an empty one of it, which turns every text into nothing."""
    write(tmp_path, "config.json", {"model_type": "gpt2"})
    assert source._tokenizer(tmp_path) == (None, "its GPT2Tokenizer has no vocabulary")


def test_a_tokenizer_whose_file_says_something_else_is_left_out():
    class Shouting(type(tiny.tokenizer())):
        def __call__(self, text, **kwargs):
            return super().__call__(text.upper(), **kwargs)

    shouting = Shouting(tokenizer_object=tiny.tokenizer().backend_tokenizer)
    fast, note = source._fast(shouting)
    assert fast is None and "gives other ids than the tokenizer.json" in note


def test_a_vocabulary_larger_than_the_tokenizer(pair):
    theirs, ours = pair("gpt2")
    assert ours.tokenizer.vocab_size < ours.model.info.vocab_size == theirs.config.vocab_size
    beyond = ours.model.info.vocab_size - 1
    assert ours.tokenizer.token(beyond) is None
    assert ours.generate([[5, beyond]], max_new_tokens=2)
    assert isinstance(ours.complete("The", max_new_tokens=8, do_sample=True, seed=1), str)


# --- what is refused ---------------------------------------------------------------------------

_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "roberta": ("roberta", {}, "mask is not causal"),
    "gemma3's rotations": ("gemma3_text", {"head_dim": 16, "rope_parameters": {
        "full_attention": _ROPE, "sliding_attention": _ROPE}}, "'dynamic'"),
    "positions of rows": ("cpmant", {"dim_head": 16, "dim_ff": 96, "prompt_types": 2},
        "takes no position_ids, and rows of different lengths need them"),
    "attention of its own": ("xlm", {"emb_dim": 64, "n_heads": 4, "n_layers": 2},
        "does not go through transformers' AttentionInterface"),
    "keys that are compressed": ("deepseek_v4", {
        "head_dim": 16, "qk_rope_head_dim": 8, "n_routed_experts": 4, "moe_intermediate_size": 32,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"]},
        r"sparse \(layers of the kind compressed_sparse_attention"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name_before_anything_is_written(
    case, tmp_path, monkeypatch
):
    kind, settings, reason = REFUSED[case]
    monkeypatch.setattr(bundle, "directory", lambda *_: pytest.fail("something is written"))
    model = tiny.build(kind, **settings)
    before = state_of(model)
    with pytest.raises(UnsupportedModel, match=f"^{kind} cannot be exported: .*{reason}"):
        export(model, tmp_path / "out", progress=None)
    assert not list(tmp_path.iterdir())
    assert_same_state(before, state_of(model))


_SEQ2SEQ = {"d_model": 16, "vocab_size": 50, "decoder_start_token_id": 0, "pad_token_id": 0}


@pytest.mark.parametrize(
    "model",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(**_SEQ2SEQ, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        lambda: BartForConditionalGeneration(
            BartConfig(**_SEQ2SEQ, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                       decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
        ),
    ],
    ids=["t5", "bart"],
)  # fmt: skip
def test_encoder_decoder_models_are_refused(model, tmp_path):
    built = model()
    built.save_pretrained(tmp_path / "model")
    for given in (built, tmp_path / "model"):
        with pytest.raises(UnsupportedModel, match=r"cannot be exported: .*encoder-decoder"):
            export(given, tmp_path / "out", progress=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "vit"}, "vit cannot be exported: .*no causal language model"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
         "cannot be exported: its weights are quantised already .gptq."),
        ({"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config"}},
         "brings Python code of its own"),
    ],
)  # fmt: skip
def test_what_the_configuration_tells_is_refused_before_weights_are_read(config, reason, tmp_path):
    write(tmp_path / "model", "config.json", config)
    with pytest.raises(UnsupportedModel, match=reason):
        export(tmp_path / "model", tmp_path / "out", progress=None)


# --- what is shown, compared and left behind ---------------------------------------------------

STEPS = [
    "load",
    "convert",
    "ONNX greedy text",
    "original asked",
    "ONNX compared",
    "bundle",
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_steps_are_shown_with_their_times(gpt2, tmp_path):
    plain, live = io.StringIO(), Terminal()
    export(gpt2, tmp_path / "one", progress=plain)
    lines = plain.getvalue().splitlines()
    shown = [re.fullmatch(r"\[(\d)/(\d)\] (.*?) +\d+\.\d s  (.*)", line) for line in lines]
    assert all(shown), lines
    assert [match[3] for match in shown] == STEPS
    assert {match[2] for match in shown} == {str(len(STEPS))}
    assert [match[1] for match in shown] == [str(i + 1) for i in range(len(STEPS))]
    assert "\r" not in plain.getvalue() and "\x1b" not in plain.getvalue()

    export(gpt2, tmp_path / "two", progress=live)
    for step in STEPS:  # what runs is shown at once, then overwritten by the finished line
        left = "" if step == STEPS[0] else r" about \d+ s left"
        assert re.search(re.escape(f"{step} ...") + left + re.escape("\r\x1b[K"), live.getvalue())


def test_a_step_is_shown_as_it_runs(gpt2, tmp_path, monkeypatch):
    shown = io.StringIO()
    seen: list[str] = []
    real = check.compare_export

    def look(*args: Any) -> Any:
        seen.append(shown.getvalue())
        return real(*args)

    monkeypatch.setattr(check, "compare_export", look)
    export(gpt2, tmp_path / "out", progress=shown)
    assert "asked" in seen[0] and "compared" not in seen[0]


def test_the_report_says_what_was_compared_and_found(pair):
    directory = pair("gpt2")[1].directory
    report = json.loads((directory / "report.json").read_text())
    assert report["mismatch"] == [] and report["precision"] == "fp32"
    continued = check.DECODED * len(report["probe_tokens"])  # a step each
    assert report["logits"]["positions"] == sum(report["probe_tokens"]) + continued > 100
    assert 0 < report["logits"]["max_difference"] < 1e-5 and report["logits"]["top1"] == 1
    assert (
        report["greedy"]["same"] == report["greedy"]["tokens"] == 24 * len(report["probe_tokens"])
    )
    assert {"torch", "transformers", "onnxruntime", "fastgen"} <= set(report["versions"])
    assert [step["step"] for step in report["steps"]] == STEPS[:-1]
    weights = sum((directory / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert report["bytes"] == weights
    for shares in report["time"].values():
        assert shares["GroupQueryAttention"] > 0 and abs(sum(shares.values()) - 1) < 0.01
    assert set(report["tolerance"]) == {"max_difference", "kl", "top1", "greedy"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_time_is_told_apart_by_kind_of_step(gpt2, tmp_path, precision):
    """Products take their share, and every operator of the last graph is there."""
    directory = export(gpt2, tmp_path / "out", precision=precision, progress=None)
    spent = json.loads((directory / "report.json").read_text())["time"]
    assert list(spent) == ["prefill", "decode"]
    operators = {node.op_type for node in onnx.load(directory / "model.onnx").graph.node}
    for shares in spent.values():
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        # Some are folded or fused as the session is made.
        assert len(operators & set(shares)) > 4
        assert ("MatMulNBits" in shares) == (precision == "int8")


def test_int8_is_the_precision_where_none_is_asked_for(gpt2, tmp_path):
    out = pipeline.export(gpt2, tmp_path / "out", progress=None)
    assert fastgen.load(out).model.info.precision == "int8"


def test_the_probes_are_ids_that_a_model_both_reads_and_says():
    model = tiny.build("llama")
    model.model.embed_tokens = torch.nn.Embedding(tiny.VOCAB + 900, 64)  # images', say
    assert max(row.max() for row in check.probes(model, None, [])) < tiny.VOCAB
    model.lm_head = torch.nn.Linear(64, tiny.VOCAB + 9000)
    assert max(row.max() for row in check.probes(model, None, [])) < tiny.VOCAB + 900


@pytest.fixture
def wrong(gpt2, convert_once, monkeypatch) -> PreTrainedModel:
    """A model whose conversion goes wrong: one weight of the graph is another."""

    def spoiled(model: PreTrainedModel, layers: list[Any], whole: bool) -> Any:
        converted = convert_once(model, layers, whole)
        initializers = converted.graph.initializers.values()
        one = max(initializers, key=lambda value: value.const_value.size)
        one.const_value = onnx_ir.tensor(one.const_value.numpy() * np.float32(1.05))
        return converted

    monkeypatch.setattr(graph, "convert", spoiled)
    return gpt2


def test_a_mismatch_is_an_error_and_leaves_nothing(wrong, tmp_path):
    with pytest.raises(Mismatch, match=r"disagrees with the original: a logit differs by"):
        export(wrong, tmp_path / "new" / "out", progress=None)
    assert not list(tmp_path.iterdir())


def test_a_mismatch_leaves_what_was_there(llama, wrong, tmp_path):
    out = shutil.copytree(llama[1].directory, tmp_path / "out")
    before = content(out)
    with pytest.raises(Mismatch):
        export(wrong, out, force=True, progress=None)
    assert content(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_mismatch_can_be_allowed_and_is_reported(wrong, tmp_path):
    out = export(wrong, tmp_path / "out", allow_mismatch=True, progress=None)
    report = json.loads((out / "report.json").read_text())
    assert re.match(r"a logit differs by .* is allowed", report["mismatch"][0])
    assert fastgen.load(out).generate([5, 6], max_new_tokens=2)


def command(monkeypatch, *args: str | Path) -> int:
    """The exit code of `fastgen ARGS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["fastgen", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def gpt2_directory(pair, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("source") / "tiny-gpt2"
    pair("gpt2")[0].save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


def test_the_command_fails_with_a_mismatch_unless_it_is_allowed(
    wrong, tmp_path_factory, tmp_path, monkeypatch, capfd
):
    out, traced = tmp_path / "out", tmp_path_factory.mktemp("source") / "of-no-known-family"
    tiny.build("gpt_bigcode").save_pretrained(traced)
    tiny.tokenizer().save_pretrained(traced)
    assert command(monkeypatch, "export", "--precision=fp32", traced, out) == 2
    shown = capfd.readouterr()
    last = shown.err.splitlines()[-1]
    assert last.startswith("fastgen: the export disagrees with the original: a logit differs")
    assert shown.out == "" and not list(tmp_path.iterdir())
    again = ("export", "--precision=fp32", traced, out, "--allow-mismatch")
    assert command(monkeypatch, *again) == 0
    assert out.is_dir()


def test_the_command_refuses_by_name(gpt2_directory, tmp_path, monkeypatch, capfd):
    write(tmp_path / "model", "config.json", {"model_type": "t5"})
    assert command(monkeypatch, "export", tmp_path / "model", tmp_path / "out") == 2
    assert capfd.readouterr().err == (
        "fastgen: t5 cannot be exported: it is an encoder-decoder model; "
        "fastgen runs decoder-only ones\n"
    )


def test_the_command_replaces_by_force(gpt2, gpt2_directory, llama, tmp_path, monkeypatch, capfd):
    out = shutil.copytree(llama[1].directory, tmp_path / "out")
    assert command(monkeypatch, "export", "--precision=fp32", gpt2_directory, out) == 2
    assert capfd.readouterr().err.endswith("replace it with --force\n")
    assert fastgen.load(out).config.model_type == "llama"
    assert command(monkeypatch, "export", "--precision=fp32", gpt2_directory, out, "--force") == 0
    assert fastgen.load(out).config.model_type == "gpt2"


def test_an_existing_directory_is_replaced_only_by_force_and_when_the_new_one_is_complete(
    gpt2, llama, tmp_path, monkeypatch
):
    out = shutil.copytree(llama[1].directory, tmp_path / "out")
    before = content(out)
    with pytest.raises(fastgen.ModelError, match=r"exists: .* --force"):
        export(gpt2, out, progress=None)
    real = check.compare_continuation
    for failure in (KeyboardInterrupt, RuntimeError("boom"), OSError(28, "No space left")):

        def fail(*_: Any, failure: Any = failure) -> Any:
            assert content(out) == before  # still whole while the new one is made
            raise failure

        monkeypatch.setattr(check, "compare_continuation", fail)
        with pytest.raises((KeyboardInterrupt, RuntimeError, OSError)):
            export(gpt2, out, force=True, progress=None)
        assert content(out) == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(check, "compare_continuation", real)
    export(gpt2, out, force=True, progress=None)
    assert fastgen.load(out).config.model_type == "gpt2"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_nothing_that_is_not_a_model(gpt2, tmp_path):
    write(tmp_path / "precious", "thesis.txt", "words")
    write(tmp_path, "file", "words")
    with pytest.raises(fastgen.ModelError, match="not a fastgen model directory"):
        export(gpt2, tmp_path / "precious", force=True, progress=None)
    with pytest.raises(fastgen.ModelError, match="not a directory"):
        export(gpt2, tmp_path / "file", force=True, progress=None)
    (tmp_path / "empty").mkdir()
    export(gpt2, tmp_path / "empty", progress=None)
    assert (tmp_path / "empty" / "fastgen.json").is_file()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import tiny
from fastgen.export import export; from fastgen.export.trace import graph
graph.convert = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
export(tiny.build("gpt2"), sys.argv[1], precision="fp32", force=True)
"""


def test_a_killed_export_leaves_no_model_and_the_next_one_cleans_up(gpt2, tmp_path):
    out = tmp_path / "out"
    program = KILLED.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.new.")
    os.utime(left, (1, 1))
    export(gpt2, out, progress=None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("wrong", [None, (0, 0), (1, 0), (0, 5), (1, 23)])
def test_the_originals_greedy_text_is_what_it_generates_whatever_was_guessed(gpt2, wrong):
    rows = [np.arange(3, 22), np.arange(5, 14)]
    asked = []

    def generate(ids: Any, count: int) -> Any:
        asked.append((len(ids), count))
        return check.reference_continuation(gpt2, [ids], count)[0]

    def logits(ids: Any, then: Any) -> Any:
        return check.reference_logits(gpt2, [np.concatenate([ids, then])])[0]

    truth = check.reference_continuation(gpt2, rows)
    guesses = [ids.copy() for ids in truth]
    if wrong is not None:
        guesses[wrong[0]][wrong[1]] += 1
    found = check.Reference(rows)
    check.ask(found, logits, generate, guesses)
    assert [ids.tolist() for ids in found.continuation] == [ids.tolist() for ids in truth]
    for row, said in zip(rows, found.logits, strict=True):
        np.testing.assert_allclose(said[: len(row)], logits(row, NOTHING), atol=1e-5)
    whole = {None: [], (1, 0): [19, 9]}.get(wrong, [len(rows[wrong[0]])] if wrong else [])
    assert asked == [(9, check.FIRST), *((length, check.NEW_TOKENS) for length in whole)]


def test_a_model_that_generates_something_else_than_it_says_is_asked_to_generate(gpt2):
    rows = [np.arange(3, 12), np.arange(3, 22)]
    said = check.reference_continuation(gpt2, rows)
    found = check.Reference(rows)
    check.ask(
        found,
        lambda *ids: check.reference_logits(gpt2, [np.concatenate(ids)])[0],
        lambda ids, count: said[len(ids) == 19][:count] + 1,
        said,
    )
    assert [ids.tolist() for ids in found.continuation] == [(ids + 1).tolist() for ids in said]


def test_the_steps_that_were_written_are_compared_where_the_original_goes_on_so(pair):
    reference, ours = pair("gpt2")
    rows = [np.arange(3, 22), np.arange(5, 14)]
    written = check.continued(ours, rows, 6)
    known = check.Reference(rows)
    check.ask(
        known,
        lambda *ids: check.reference_logits(reference, [np.concatenate(ids)])[0],
        lambda ids, count: check.reference_continuation(reference, [ids], count)[0],
        check.guessed(written, 6),
    )
    found = check.compare_export(known, ours.model, written)
    assert found.positions == 19 + 9 + 2 * 5 and found.max_difference < 1e-5
    written.logits[3][1, 7] += 100  # in one step of one row
    assert check.compare_export(known, ours.model, written).max_difference > 0.1
    written.sequences[1][-5] += 1  # it goes on otherwise from there on: what follows says nothing
    found = check.compare_export(known, ours.model, written)
    assert found.positions == 19 + 9 + 5 + 1 and found.max_difference < 1e-5


@pytest.fixture
def demo(tmp_path) -> Path:
    """A model directory that may be replaced."""
    return shutil.copytree(hub.DEMO, tmp_path / "demo")


def refused(out: Path, words: str, force: bool = True) -> None:
    """An export to `out` ends before anything of the model is looked at."""
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(fastgen.ModelError, match=words):
        export("/no/such/model", out, force=force, progress=None)
    assert before == (sorted(out.parent.iterdir()) if out.parent.is_dir() else None)


def test_a_link_to_a_model_stays_and_what_it_leads_to_is_replaced(demo, tmp_path):
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(demo)
    refused(link, "exists: choose another name", force=False)
    with bundle.directory(link, force=True) as made:
        assert made.parent == tmp_path  # beside what it replaces: one file system
        (made / "fastgen.json").write_text("new")
    assert link.is_symlink() and content(demo) == {"fastgen.json": b"new"}
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []


def test_a_link_to_an_empty_directory_is_followed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with bundle.directory(tmp_path / "link", force=False) as made:
        (made / "fastgen.json").write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "fastgen.json").is_file()


def test_links_that_lead_nowhere_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "link", "link is a link to .*nothing, which does not exist")
    refused(tmp_path / "loop", "loop is a link to .*, which does not exist")
    refused(tmp_path / "link" / "out", "out cannot be written, .*link: No such file")


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("words")
    refused(tmp_path / "file" / "out", "out cannot be written, .*file: Not a directory")
    refused(tmp_path / "file" / "a" / "out", "out cannot be written, .*file: Not a directory")
    refused(tmp_path / ("x" * 250), "File name too long")
    if sys.platform == "linux":  # where not even root can write, and what has no other place
        refused(Path("/proc/out"), "/proc/out cannot be written, /proc: ")
        refused(Path("/proc"), "/proc is a mount point")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    refused(tmp_path / "out", "out cannot be written, .*: Permission denied")
    refused(tmp_path / "a" / "b" / "out", "out cannot be written, .*: Permission denied")


def test_what_a_kill_took_away_is_there_before_the_next_export_begins(demo):
    """As it is left between two renames; what the processes do is in test_files."""
    old = files.temporary_neighbour(demo, "old")
    demo.rename(old / "model")
    refused_only = content(old / "model")
    with pytest.raises(fastgen.ModelError, match="exists: choose another name, or replace it"):
        export("/no/such/model", demo, progress=None)
    assert content(demo) == refused_only and not old.exists()
    demo.rename(files.temporary_neighbour(demo, "old") / "model")
    with bundle.directory(demo, force=True) as made:
        assert content(demo) == refused_only
        (made / "fastgen.json").write_text("new")
    assert [p.name for p in demo.parent.iterdir()] == ["demo"]
    assert content(demo) == {"fastgen.json": b"new"}


@pytest.mark.slow
def test_weights_beyond_2_gb(tmp_path):
    config = GPT2Config(vocab_size=140_000, n_embd=4096, n_layer=1, n_head=32, n_positions=128)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    distinct = 4 * sum(p.numel() for p in model.parameters())
    assert distinct > 2 << 30
    out = export(model, tmp_path / "large", progress=None)
    assert abs((out / "model.onnx.data").stat().st_size - distinct) < 1 << 20
    ids = torch.tensor([[5, 6, 139_999]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    found = fastgen.load(out).generate(ids.tolist(), max_new_tokens=4, eos_token_id=None)
    assert found == expected.tolist()
