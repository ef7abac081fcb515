"""GGUF files: what they say, what they hold, and what becomes of damaged ones."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import onnx_ir
import pytest
import tiny
import tokenizers_made
import torch
from fake_hub import Hub, World, blocked, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedModel

import fastgen
from fastgen.errors import ModelError, UnsupportedModel
from fastgen.export import export
from fastgen.export.build import graph
from fastgen.export.gguf import architectures, file, tensors, vocabulary
from fastgen.export.prove import check
from fastgen.export.quantize import grid
from fastgen.export.quantize.kernels import Kernel, codes_values
from fastgen.export.rewrite import trim
from fastgen.store import resolve
from fastgen.store.report import table

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import built

KINDS = {
    "cohere": {},
    "ernie4_5": {},
    "exaone4": {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window_pattern": 6},
    "glm4": {},
    "gpt2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "granite": {},
    "hunyuan_v1_dense": {"head_dim": 16},
    "llama": {},
    "olmo2": {},
    "phi": {},
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 4},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHERS = {  # what a checkpoint holds otherwise, or calls otherwise
    "mistral": {"sliding_window": None},
    "gpt_oss": {**FEW, "head_dim": 16, "sliding_window": 8},
    "granitemoe": {**FEW, "logits_scaling": 3.0},
    "mixtral": FEW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_moe": {**FEW, "head_dim": 16, "moe_intermediate_size": 32, "norm_topk_prob": True},
}
TYPES = gguf.GGMLQuantizationType
MADE = (TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q5_1)


def opened(path: Path) -> file.File:
    return file.read(path, tensors.block_sizes())


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny.build("llama")


@pytest.mark.parametrize("kind", KINDS)
def test_its_configuration_and_its_tensors_are_those_of_the_model(kind: str, tmp_path: Path):
    model = tiny.build(kind, **KINDS[kind])
    found = opened(gguf_files.write(model, tmp_path / "model.gguf"))
    config = architectures.configuration(found)
    said = model.config.to_dict()
    differing = {k: v for k, v in config.items() if k in said and said[k] not in (v, None)}
    assert differing == {}
    held = architectures.weights(found, architectures.described(found, config))
    state = model.state_dict()
    assert held.keys() <= state.keys()
    for name, tensor in held.items():
        expected = state[name].numpy()
        expected = (
            expected.T if kind == "gpt2" and expected.ndim == 2 and ".h." in name else expected
        )
        assert tensor.shape == expected.shape
        np.testing.assert_allclose(tensor.read(slice(None)), expected, atol=1e-6)
        part = slice(3, 9)
        np.testing.assert_array_equal(tensor.read(part), tensor.read(slice(None))[part])


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_its_graph_is_that_of_the_checkpoint(kind: str, tmp_path: Path):
    """Operators, wiring and every constant to the bit."""
    model = tiny.build(kind, **(KINDS | OTHERS)[kind])
    model.save_pretrained(tmp_path / "saved")
    expected, limit = built.of_checkpoint(tmp_path / "saved")
    found = opened(gguf_files.write(model, tmp_path / "model.gguf"))
    decoder = architectures.described(found, architectures.configuration(found))
    made = graph.write(decoder, architectures.weights(found, decoder))
    trim.trim(made, decoder.limit)
    assert decoder.limit == limit
    assert built.prints(made) == built.prints(expected)


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.name)
def test_each_type_becomes_what_the_library_makes_of_it(kind, llama, tmp_path):
    found = opened(gguf_files.write(llama, tmp_path / "model.gguf", kind))
    read = tensors.Stored(found.tensors["blk.1.ffn_up.weight"])
    expected = llama.model.layers[1].mlp.up_proj.weight.detach().numpy()
    largest = {TYPES.Q4_0: 0.08, TYPES.Q4_1: 0.08, TYPES.Q5_0: 0.04, TYPES.Q5_1: 0.04}
    bound = largest.get(kind, 0.01) * np.abs(expected).max()
    assert np.abs(read.read(slice(None)) - expected).max() <= bound
    assert tensors.type_name(found.tensors["blk.1.ffn_up.weight"].kind) == kind.name


def test_the_factors_of_llama_3_slow_its_rotation(llama, tmp_path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = gguf_files.write(llama, tmp_path / "a.gguf", extra={"rope_freqs.weight": factors})
    plain = opened(gguf_files.write(llama, tmp_path / "b.gguf"))
    config = architectures.configuration(plain)
    rotaries = [
        architectures.described(one, config).layers[0].attention.rotary
        for one in (plain, opened(path))
    ]
    np.testing.assert_allclose(rotaries[1].inverse * factors, rotaries[0].inverse, rtol=1e-6)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            {"attention.clamp_kqv": 3.0},
            "attention.clamp_kqv = 3.0, which the builder does not know",
        ),
        ({"expert_count": 8}, r"it has blk\.0\.ffn_down\.weight"),  # of no expert
        ({"blk.0.attn_gate.weight": np.ones((2, 2), np.float32)}, "blk.0.attn_gate.weight"),
        ({"rope_freqs.weight": np.ones(3, np.float32)}, r"rope_freqs.weight has the shape \(3,\)"),
    ],
)
def test_what_is_not_known_is_refused(extra, words, llama, tmp_path):
    found = opened(gguf_files.write(llama, tmp_path / "model.gguf", extra=extra))
    with pytest.raises(UnsupportedModel, match=words):
        config = architectures.configuration(found)
        architectures.weights(found, architectures.described(found, config))


def test_experts_where_there_should_be_none_are_refused(tmp_path):
    model = tiny.build("qwen2")
    found = opened(gguf_files.write(model, tmp_path / "model.gguf", extra={"expert_count": 8}))
    with pytest.raises(UnsupportedModel, match="it says expert_count = 8"):
        architectures.configuration(found)


def test_an_architecture_that_is_not_known_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"architecture is 'mamba', not one of .*llama"):
        architectures.configuration(opened(tmp_path / "model.gguf"))


# --- files of strangers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return gguf_files.write(llama, place, tokenizer=tokenizers_made.byte_level())


def lying(content: bytes, at: int, kind: str, value: int) -> bytes:
    return content[:at] + struct.pack(f"<{kind}", value) + content[at + struct.calcsize(kind) :]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: b"PK" + c[2:], ModelError, "is not a GGUF file"),
        (lambda c: c[:4], ModelError, "is damaged"),
        (lambda c: c[:100], ModelError, "it ends at byte 100"),
        (lambda c: c[:-50], ModelError, "would end at byte"),
        (lambda c: lying(c, 4, "I", 9), UnsupportedModel, "GGUF of version 9"),
        (lambda c: lying(c, 4, "I", 3 << 24), UnsupportedModel, "big-endian"),
        (lambda c: lying(c, 8, "Q", 2**60), ModelError, "tells of 1,152,921,504,606,846,976 tens"),
        (lambda c: lying(c, 16, "Q", 2**40), ModelError, "values"),
        (lambda c: lying(c, 24, "Q", 2**62), ModelError, "more are told of"),
    ],
)
def test_a_damaged_file_is_one_clear_error(change, error, words, whole, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(change(whole.read_bytes()))
    with pytest.raises(error, match=words):
        opened(path)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(4, 3000), value=st.binary(min_size=1, max_size=8))
def test_no_byte_of_the_header_makes_anything_else_than_an_error_of_ours(
    whole: Path, tmp_path_factory: Any, at: int, value: bytes
) -> None:
    path, content = tmp_path_factory.getbasetemp() / "changed.gguf", whole.read_bytes()
    path.write_bytes(content[:at] + value + content[at + len(value) :])
    try:
        found = opened(path)
        config = architectures.configuration(found)
        architectures.weights(found, architectures.described(found, config))
        vocabulary.read(found)
    except (ModelError, UnsupportedModel):
        pass  # that is the law: no other error, and no memory or time without end


def test_a_part_of_a_split_model_says_what_to_do(llama, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"is one of 2 parts of a model: .*--merge"):
        opened(tmp_path / "model-00001-of-00002.gguf")


# --- tokenizers -----------------------------------------------------------------------------------

TEXTS = [
    "the quick brown fox",
    '{"name": "Ann", "age": 7}',
    "  two  spaces ",
    "a\n\n\tb\r\n",
    "naïve café 你好 🙂",
    "12345 + 6.78",
    "<s>special</s>",
    "don't I'LL",
    "",
]


def test_a_byte_level_vocabulary_is_the_original(llama, tmp_path):
    made = tokenizers_made.byte_level()
    path = gguf_files.write(llama, tmp_path / "model.gguf", tokenizer=made)
    read, config, note = vocabulary.read(opened(path))
    assert note == "" and config["bos_token"] == "<s>" and read is not None
    for text in TEXTS:
        assert read.encode(text).ids == made.encode(text).ids
        assert read.decode(read.encode(text).ids) == made.decode(made.encode(text).ids)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab  123 d's\n\n x", ["ab", "Ġ", "Ġ123", "Ġd", "'s", "ĊĊ", "Ġx"]),
        ("smollm", "ab  12 x", ["ab", "ĠĠ", "1", "2", "Ġx"]),
        ("llama-bpe", "ab  1234 D'S\n\n x", ["ab", "Ġ", "Ġ", "123", "4", "ĠD", "'S", "ĊĊ", "Ġx"]),
        ("qwen2", "ab  12 x\r\n", ["ab", "Ġ", "Ġ", "1", "2", "Ġx", "čĊ"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", "Ġ", "1", "2"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", "Ġ", "123", "4"]),
        ("deepseek-v3", "ab漢字12 x", ["ab", "æ¼¢åŃĹ", "12", "Ġx"]),
    ],
)
def test_a_pre_tokenizer_splits_as_its_model_does(pre, text, pieces, llama, tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    gguf_files.vocabulary(writer, tokenizers_made.byte_level(), pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read, _, _ = vocabulary.read(opened(path))
    assert read is not None and read.pre_tokenizer is not None
    assert [piece for piece, _ in read.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_a_pre_tokenizer_that_is_not_known_leaves_ids_only(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    gguf_files.vocabulary(writer, tokenizers_made.byte_level(), "of-tomorrow")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read, _, note = vocabulary.read(opened(path))
    assert read is None and note == "its pre-tokenizer is 'of-tomorrow', which is not known"


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentence_pieces_are_joined_as_sentencepiece_joins_them(prefixed, tmp_path):
    path, theirs = gguf_files.sentence_pieces(tmp_path / "model.gguf", prefixed)
    read, _, _ = vocabulary.read(opened(path))
    assert isinstance(read, Tokenizer)
    # After a token that was added a space is put again: so does llama.cpp, and so do the
    # tokenizer.json of such models.
    tagged = [] if prefixed else ["the [tag] brown"]
    for text in [*TEXTS[:-3], *tagged, "a▁b", "éé the the"]:
        assert read.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
        assert read.encode(text).ids == [1, *theirs.encode(text)]
        assert read.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


# --- nothing is quantised twice -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TYPES.Q4_0, TYPES.Q5_0, TYPES.Q8_0], ids=lambda kind: kind.name)
def test_a_type_without_a_minimum_is_held_exactly(kind):
    rows = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    held = gguf.dequantize(gguf.quantize(rows, kind), kind)
    found = grid.choice_of(np.ascontiguousarray(held.T))
    assert found.kernel.bits == (4 if kind == TYPES.Q4_0 else 8)
    np.testing.assert_array_equal(codes_values(found.codes, found.kernel, found.scales, 64).T, held)


def test_rows_of_several_types_are_held_exactly_in_8_bits():
    rows = np.random.default_rng(1).standard_normal((32, 64)).astype(np.float32)
    kinds = (TYPES.Q4_0, TYPES.Q5_0, TYPES.Q8_0)
    held = np.concatenate([gguf.dequantize(gguf.quantize(rows, kind), kind) for kind in kinds])
    found = grid.choice_of(np.ascontiguousarray(held.T))
    assert found.kernel == grid.EIGHT
    np.testing.assert_array_equal(codes_values(found.codes, found.kernel, found.scales, 64).T, held)


@pytest.mark.parametrize("kind", [TYPES.Q4_1, TYPES.Q5_1], ids=lambda kind: kind.name)
def test_the_levels_of_a_type_with_a_minimum_are_off_by_less_than_the_nearest_codes(kind):
    rows = np.random.default_rng(3).standard_normal((96, 64)).astype(np.float32)
    rows[:, 32:] += 10 * (np.arange(96) % 4 == 1)[:, None]  # far from zero: none of the kernel's
    held = gguf.dequantize(gguf.quantize(rows, kind), kind)
    found = grid.choice_of(np.ascontiguousarray(held.T))
    assert found.kernel == grid.EIGHT_FROM_LOWEST and found.zeros is not None
    error = codes_values(found.codes, found.kernel, found.scales, 64, found.zeros).T - held
    nearest = np.abs(held).reshape(96, 2, 32).max(axis=-1) / 127 / np.sqrt(12)
    off = np.sqrt(np.square(error).reshape(96, 2, 32).mean(axis=-1))
    assert np.sqrt(np.square(off / nearest).mean()) < 0.7 and (off < 2 * nearest).all()
    levels = found.zeros != grid.EIGHT.middle
    assert levels.mean() > 0.7
    spread = np.ptp(error.reshape(96, 2, 32), axis=-1)[levels]
    assert (spread < 1e-5).all()  # all weights of a block by the same


def test_an_embedding_whose_levels_have_a_lowest_one_is_read_as_it_is_multiplied(tmp_path):
    model = tiny.build("llama", tie_word_embeddings=True)
    path = gguf_files.write(model, tmp_path / "model.gguf", TYPES.Q4_1)
    out = export(path, tmp_path / "out", quick=True, progress=None)
    assert json.loads((out / "report.json").read_text())["kernels"].keys() == {
        "int8, blocks of 32 with zero points"
    }
    held = onnx_ir.load(out / "model.onnx").graph.initializers
    (codes,) = (name for name in held if "embed" in name and name.endswith(".codes"))
    assert codes.replace(".codes", ".zeros") in held
    exact = export(path, tmp_path / "exact", precision="fp32", progress=None)
    row = np.array(tiny.ragged(1)[0])
    expected, found = (
        check.exported_logits(fastgen.load(one).model, [row])[0] for one in (exact, out)
    )
    assert np.abs(found - expected).max() < 0.04 * np.abs(expected).max()  # 0.026 of activations


def test_other_numbers_get_the_nearest_codes_of_8_bits():
    rows = np.random.default_rng(2).standard_normal((32, 64)).astype(np.float32)
    rows[5] = 0
    found = grid.choice_of(np.ascontiguousarray(rows.T))
    error = np.abs(codes_values(found.codes, found.kernel, found.scales, 64).T - rows)
    assert found.kernel == grid.EIGHT and error.max() <= np.abs(rows).max() / 254 + 1e-6


# --- from a file to text --------------------------------------------------------------------------

QUICK = {"gemma3_text", "gpt2", "llama"}
NO_TORCH = blocked("torch", "transformers", "onnxscript", "peft", "safetensors")
MAIN = "from fastgen.__main__ import main; main()"


@pytest.mark.parametrize("kind", tiny.some([*KINDS, *OTHERS], QUICK))
def test_a_file_says_what_the_model_says_that_it_was_made_of(kind: str, tmp_path: Path):
    model = tiny.build(kind, **(KINDS | OTHERS)[kind])
    path = gguf_files.write(model, tmp_path / "model.gguf")
    ours = fastgen.CausalLM(export(path, tmp_path / "out", precision="fp32", progress=None))
    rows = [np.array(row) for row in tiny.ragged(1)]
    for row, found in zip(rows, check.exported_logits(ours.model, rows), strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(row)[None]).logits[0].numpy()
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("kind", "precision"), [(TYPES.Q8_0, "int8"), (TYPES.Q4_0, "int4"), (TYPES.Q4_1, "int8")]
)
def test_it_stays_in_its_own_numbers(kind, precision, llama, tmp_path):
    """The matrices are those of the file, where the kernel has them exactly."""
    path = gguf_files.write(llama, tmp_path / "model.gguf", kind)
    out = export(path, tmp_path / "out", quick=True, progress=None)
    assert fastgen.load(out).model.info.precision == precision
    report = json.loads((out / "report.json").read_text())
    bits = 4 if precision == "int4" else 8
    levels = " with zero points" if kind == TYPES.Q4_1 else ""
    assert report["kernels"].keys() == {f"int{bits}, blocks of 32{levels}"}
    exact = export(path, tmp_path / "exact", precision="fp32", progress=None)
    held = onnx_ir.load(out / "model.onnx").graph.initializers
    for name, value in onnx_ir.load(exact / "model.onnx").graph.initializers.items():
        codes, scales = held.get(f"{name}.codes"), held.get(f"{name}.scales")
        if codes is None or kind == TYPES.Q4_1:
            continue
        expected = value.const_value.numpy()
        size = llama.config.hidden_size if expected.shape[0] != 96 else 96
        found = codes_values(
            codes.const_value.numpy(), Kernel(bits, 32), scales.const_value.numpy(), size
        )
        np.testing.assert_array_equal(
            found, expected if found.shape == expected.shape else expected.T
        )


def test_what_is_asked_for_is_made_of_it(llama, tmp_path):
    path = gguf_files.write(llama, tmp_path / "model.gguf", TYPES.Q8_0)
    out = export(path, tmp_path / "out", precision="int4", quick=True, progress=None)
    assert fastgen.load(out).model.info.precision == "int4"
    with pytest.raises(UnsupportedModel, match=r"adapter is for transformers models: .*a GGUF fi"):
        export(path, tmp_path / "other", adapter="x", progress=None)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("precision", [None, "int4"])
def test_what_it_costs_is_judged_beside_its_own_numbers(precision, llama, tmp_path):
    """All steps of an export, without an original that could be asked once its graph is away."""
    path = gguf_files.write(llama, tmp_path / "model.gguf", TYPES.Q8_0)
    wishes = {"precision": precision, "max_kl": 1e-6, "allow_mismatch": True}
    out = export(path, tmp_path / "out", progress=None, **wishes)
    report = json.loads((out / "report.json").read_text())
    assert report["quality"]["tokens"] > 200
    told = next(step for step in report["steps"] if step["step"] == "form for many tokens")
    said = (
        "it would cost a KL divergence of " if precision is None else "none of its layers' matrices"
    )
    assert told["found"].startswith(f"none: {said}")  # 4 bits have gone up to float32
    assert fastgen.load(out).generate([5, 6, 7], max_new_tokens=4)


def test_it_is_proved_by_transformers_own_reading(llama, tmp_path, capsys, monkeypatch):
    path = gguf_files.write(llama, tmp_path / "model.gguf", TYPES.Q8_0)
    proofs = {}
    for name, wishes in {"alone": {}, "proved": {"prove": True}}.items():
        made = export(path, tmp_path / name, quick=True, progress=sys.stderr, **wishes)
        assert ("proved by torch" in capsys.readouterr().err) == (name == "proved")
        report = json.loads((made / "report.json").read_text())
        assert f"proof: {report['proof']}" in table(report)
        proofs[name] = report["proof"]
    assert proofs["alone"] == "family llama (transformers 5.24)"
    assert proofs["proved"].startswith("transformers read the same file and ran (transformers 5.24")
    wrong = dataclasses.replace(architectures.ARCHITECTURES["llama"], permuted=False)
    monkeypatch.setitem(architectures.ARCHITECTURES, "llama", wrong)
    with pytest.raises(fastgen.export.Mismatch, match="disagrees with the original"):
        export(path, tmp_path / "wrong", prove=True, progress=None)


@pytest.mark.parametrize(
    ("kind", "extra", "words"),
    [
        ("llama", {"rope_freqs.weight": np.ones(8, np.float32)}, r"read its rope_freqs\.weight"),
        ("granite", {}, "transformers does not read it: .*granite"),
    ],
)
def test_what_transformers_reads_otherwise_is_not_proved_by_it(kind, extra, words, tmp_path):
    path = gguf_files.write(tiny.build(kind), tmp_path / "model.gguf", extra=extra)
    with pytest.raises(UnsupportedModel, match=f"model cannot be proved: .*{words}"):
        export(path, tmp_path / "out", prove=True, progress=None)
    assert not (tmp_path / "out").exists()


def test_a_proof_by_transformers_needs_torch(llama, tmp_path, monkeypatch):
    path = gguf_files.write(llama, tmp_path / "model.gguf")
    monkeypatch.setattr(resolve, "has_torch", lambda: False)
    with pytest.raises(ModelError, match=r"\[export\]'.*--prove"):
        export(path, tmp_path / "out", prove=True, progress=None)


def test_a_directory_stands_for_its_only_file(llama, tmp_path):
    gguf_files.write(llama, tmp_path / "a.gguf")
    found = resolve.resolve(tmp_path)
    assert (found.kind, found.file) == (resolve.GGUF, "a.gguf")
    gguf_files.write(llama, tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"has 2 GGUF files: name one of a\.gguf, b\.gguf"):
        resolve.resolve(tmp_path)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    llama = tiny.build("llama", vocab_size=400)
    root = tmp_path_factory.mktemp("hub")
    (root / "org" / "files").mkdir(parents=True)
    for kind in (TYPES.F32, TYPES.Q8_0):
        place = root / "org" / "files" / f"little-{kind.name}.gguf"
        gguf_files.write(llama, place, kind, tokenizers_made.byte_level())
    with serving(root) as server:
        yield server


def test_a_file_of_the_hub_becomes_text_without_torch(world: World):
    """Exported on first use, and no other file of the repository is fetched."""
    flags = ("--max-new-tokens", "3", "--threads", "1")
    name = "org/files:little-Q8_0.gguf"
    code, out, err = world.run(NO_TORCH + MAIN, "generate", "the quick", "--model", name, *flags)
    assert code == 0 and out.startswith("the quick"), err
    fetched = {one.rpartition("/")[2] for one in world.hub.asked if "/resolve/" in one}
    assert fetched == {"little-Q8_0.gguf"}
    code, again, err = world.run(NO_TORCH + MAIN, "generate", "the quick", "--model", name, *flags)
    assert (code, again) == (0, out), err
    code, _, err = world.run(NO_TORCH + MAIN, "info", "org/files:other.gguf")
    assert code != 0 and "org/files:other.gguf is not there" in err and "little-F32.gguf" in err


def test_without_onnx_it_says_what_to_install(world: World):
    program = blocked("onnx", "onnx_ir", "torch", "transformers") + MAIN
    code, _, err = world.run(program, "generate", "a", "--model", "org/files:little-Q8_0.gguf")
    assert code != 0 and "little-Q8_0.gguf is a GGUF file; opening it needs onnx" in err
    assert "pip install 'fastgen-onnx[gguf]'" in err and "torch" not in err


def test_without_the_library_it_says_what_to_install(world: World):
    program = blocked("gguf", "torch", "transformers") + MAIN
    code, _, err = world.run(program, "export", "org/files:little-Q8_0.gguf", "out")
    assert code != 0 and "pip install 'fastgen-onnx[gguf]'" in err and err.count("\n") == 1


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_real_file_says_what_transformers_reads_of_it(
    name: str, real_gguf: Callable[[str], Path], tmp_path: Path
):
    """SmolLM2 in Q4_1 and Gemma 3 in Q4_K_M: logits to 1e-4."""
    out = export(real_gguf(name), tmp_path / "out", precision="fp32", prove=True, progress=None)
    report = json.loads((out / "report.json").read_text())
    assert report["proof"].startswith("transformers read the same file and ran")
    assert report["logits"]["max_difference"] <= 1e-4 and report["mismatch"] == []
    assert report["greedy"]["same"] == report["greedy"]["tokens"]
