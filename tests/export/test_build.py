"""Graphs that are built of a checkpoint: those that traces give, from every kind of file."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import safetensors.torch
import tiny
import torch
from fake_hub import World, blocked, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import fastgen
from fastgen.errors import ModelError
from fastgen.export import UnsupportedModel, export
from fastgen.export.build import configuration, families, rotary, weights
from fastgen.export.build import graph as writer
from fastgen.export.build import origin as build_origin
from fastgen.export.prove.check import Mismatch
from fastgen.export.torch_model import original
from fastgen.store.report import table

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import built as bench  # noqa: E402
import shrink  # noqa: E402

# One for each mechanism, the quickest to trace; all of every family are in bench/built.py.
QUICK = {"llama", "qwen3", "gpt2", "gemma3_text", "phi3", "cohere", "qwen2_moe", "gpt_oss"}
LIKE_A_TRACE = {
    "exaone4", "gemma", "gemma2", "gemma3_text", "gpt2", "granite", "granitemoe",
    "hunyuan_v1_dense", "llama", "mistral", "mixtral", "olmo2", "olmoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "smollm3", "starcoder2",
}  # fmt: skip
NO_TORCH = blocked("torch", "transformers", "onnxscript", "peft", "safetensors")
MAIN = "from fastgen.__main__ import main; main()"
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [30, 40], list(range(20, 60))]


def of(kind: str) -> PreTrainedModel:
    """The model that other tests trace too, where they do."""
    shrunk = {"gemma3_text", "qwen2_moe", "gpt_oss"}
    return tiny.build(kind) if kind in QUICK - shrunk else shrink.build(kind)


@pytest.mark.parametrize("kind", tiny.some(sorted(families.FAMILIES), QUICK))
def test_it_is_the_graph_that_a_trace_gives(kind: str, tmp_path: Path) -> None:
    """Node by node; or, in fewer nodes, the same logits."""
    outcome, difference, (traced, made) = bench.compare(of(kind), tmp_path)
    if kind in LIKE_A_TRACE:
        assert outcome == bench.SAME
    else:
        assert outcome == bench.CLOSE_LOGITS and made < traced, (difference, traced, made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(families.FAMILIES))
def test_so_it_is_in_every_configuration(kind: str, tmp_path: Path) -> None:
    for number, (what, config) in enumerate(bench.configurations(kind)):
        found = bench.examine(kind, what, config, tmp_path / str(number))
        assert not found.outcome.startswith(bench.WRONG), found


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24},
        ),
        ("phi", {"hidden_size": 128, "num_attention_heads": 2}),  # a part of a head, in the kernel
    ],
)
def test_what_a_configuration_turns_on(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    outcome, *_ = bench.compare(tiny.build(kind, **changes), tmp_path)
    assert outcome == (bench.SAME if kind == "llama" else bench.CLOSE_LOGITS)


def test_a_graph_that_is_not_the_same_is_told(tmp_path: Path) -> None:
    """The comparison of these tests sees one number, one attribute and one exchanged input."""
    model = tiny.build("llama")
    model.save_pretrained(tmp_path)

    def made(change: Callable[[onnx_ir.Model], None]) -> list[str]:
        found, _ = bench.of_checkpoint(tmp_path)
        change(found)
        return bench.prints(found)

    def weight(found: onnx_ir.Model) -> None:
        value = found.graph.initializers["model.norm.weight"]
        array = value.const_value.numpy().copy()
        array[3] *= 1.0001
        value.const_value = onnx_ir.tensor(array)

    def attribute(found: onnx_ir.Model) -> None:
        node = next(one for one in found.graph if one.op_type == "GroupQueryAttention")
        node.attributes["scale"] = onnx_ir.AttrFloat32("scale", 0.3)

    def wiring(found: onnx_ir.Model) -> None:
        node = next(one for one in found.graph if one.op_type == "Split")
        one, other = node.outputs
        silu = next(use.node for use in one.uses() if use.node.op_type == "Sigmoid")
        silu.replace_input_with(0, other)

    same = made(lambda _: None)
    assert same == made(lambda _: None)
    assert all(made(change) != same for change in (weight, attribute, wiring))


@pytest.mark.parametrize("kind", sorted(bench.ROTATIONS))
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_frequencies_are_transformers(kind: str, part: float) -> None:
    config = tiny.config_of("llama", head_dim=32, max_position_embeddings=4096)
    factors = [1 + 0.5 * i for i in range(int(16 * part))]
    said = {"rope_theta": 5e5, "partial_rotary_factor": part, "rope_type": kind,
            **bench.ROTATIONS[kind]}  # fmt: skip
    said |= {"short_factor": factors, "long_factor": factors} if kind == "longrope" else {}
    config.rope_parameters = said
    theirs, scale = ROPE_INIT_FUNCTIONS[kind](config)
    ours = rotary.turning(said, 32, 4096).rotary
    np.testing.assert_allclose(ours.inverse, theirs.numpy(), rtol=2e-6)
    assert ours.scale == pytest.approx(scale)


# --- what a checkpoint is -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny.build("llama")


@pytest.fixture(scope="module")
def saved(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer."""
    place = tmp_path_factory.mktemp("saved") / "little"
    llama.save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "little")


def write(place: Path) -> onnx_ir.Model:
    found = build_origin.Built(build_origin.of_directory(place))
    return found.convert()[0]


def edit(place: Path, **changes: Any) -> None:
    path = place / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stored(place: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(place / "model.safetensors")


def store(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors, place / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_type_become_float32_exactly(copy: Path, dtype: torch.dtype) -> None:
    tensors = {name: one.to(dtype) for name, one in stored(copy).items()}
    store(copy, tensors)
    found = weights.of_safetensors(copy)
    assert found.keys() == tensors.keys()
    for name, one in tensors.items():
        np.testing.assert_array_equal(weights.whole(found[name]), one.float().numpy())
        if one.ndim == 2:
            np.testing.assert_array_equal(
                weights.transposed(found[name], None), one.float().numpy().T
            )


def test_rows_of_fused_matrices_are_taken_apart() -> None:
    array = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
    tensor = weights.Mapped(array, lambda held: held)
    for first, last, of in ((0, 2, 6), (2, 4, 6), (4, 6, 6), (7, 20, 24)):
        rows = array.reshape(-1, of, 5)[:, first:last].reshape(-1, 5)
        np.testing.assert_array_equal(weights.taken(tensor, (first, last, of)), rows)
        np.testing.assert_array_equal(weights.transposed(tensor, (first, last, of)), rows.T)


def test_a_checkpoint_in_several_files_is_the_same(
    llama: PreTrainedModel, saved: Path, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="100kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert bench.prints(write(tmp_path)) == bench.prints(write(saved))


def test_a_model_without_its_head_has_shorter_names(tmp_path: Path) -> None:
    model = tiny.build("gpt2")
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "base")
    names = safetensors.torch.load_file(tmp_path / "base" / "model.safetensors")
    assert "wte.weight" in names
    assert bench.prints(write(tmp_path / "base")) == bench.prints(write(tmp_path / "whole"))


def test_a_tied_head_that_is_stored_too_is_read_once(copy: Path) -> None:
    tensors = stored(copy)
    table = tensors["model.embed_tokens.weight"]
    edit(copy, tie_word_embeddings=True)
    store(copy, tensors | {"lm_head.weight": table.clone()})
    made = write(copy)
    assert [list(value.shape) for value in made.graph.initializers.values()].count([99, 64]) == 1
    assert "FusedMatMul" in {node.op_type for node in made.graph}
    store(copy, tensors | {"lm_head.weight": table + 1})
    with pytest.raises(UnsupportedModel, match=r"little cannot be built: its lm_head\.weight is"):
        build_origin.of_directory(copy)


def test_a_matrix_is_read_when_it_is_wanted(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a vector, which is small, at once."""
    read, whole = [], weights.Mapped.read

    def watched(self: weights.Mapped, rows: slice) -> Any:
        read.append(self.shape)
        return whole(self, rows)

    monkeypatch.setattr(weights.Mapped, "read", watched)
    made = write(saved)
    assert {len(shape) for shape in read} == {1}
    made.graph.initializers["model.layers.0.mlp.up_proj.weight.T"].const_value.numpy()
    assert {shape for shape in read if len(shape) == 2} == {(96, 64)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (lambda t: t.update(other=torch.ones(3)), "weights that its configuration does not: other"),
        (lambda t: t.update({"lm_head.weight": torch.ones(98, 64)}),
         r"lm_head\.weight is \[98, 64\] where config\.json makes it \[99, 64\]"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
         r"does not: model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)  # fmt: skip
def test_every_number_is_read_once_and_none_is_missing(
    copy: Path, change: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    tensors = stored(copy)
    change(tensors)
    store(copy, tensors)
    with pytest.raises(ModelError, match=f"little cannot be built: .*{words}"):
        write(copy)


def test_buffers_that_old_files_hold_mean_nothing(copy: Path, saved: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    store(copy, stored(copy) | {name: torch.ones(8), "seen": torch.ones(3, dtype=torch.int64)})
    assert bench.prints(write(copy)) == bench.prints(write(saved))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "xlnet"}, "its type 'xlnet' is none that can be built"),
        ({"attn_gate": True}, "says attn_gate = True, which the builder does not know"),
        ({"quantization_config": {"bits": 4}}, "quantised already .an unknown method"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"rope_parameters": {"rope_type": "su2", "rope_theta": 1.0}}, "of the type 'su2'"),
        ({"rope_parameters": {"rope_type": "default", "new": 1}}, r"have \['new'\]"),
        ({"partial_rotary_factor": 0.5}, "only a part of its heads turns"),
        ({"hidden_act": "mish"}, "its activation is 'mish'"),
        ({"hidden_size": "64"}, "hidden_size = '64', which is no size"),
        ({"hidden_size": None}, "hidden_size = None, which is no size"),
        ({"num_key_value_heads": 3}, "4 query heads over 3 key heads"),
        ({"num_hidden_layers": 10**12}, "which is no size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"rope_parameters": 5}, "contradicts itself"),
        ({"head_dim": 12}, "heads are of the size 12"),
    ],
)
def test_what_it_does_not_know_is_refused(copy: Path, changes: dict[str, Any], words: str) -> None:
    edit(copy, **changes)
    with pytest.raises(UnsupportedModel, match=f"little cannot be built: .*{words}"):
        write(copy)


NUMBERS = st.one_of(
    st.floats(), st.integers(-2, 2**70), st.sampled_from([0, 1, 1.0, 1e-300, 1e38, 1e300])
)
VALUES = NUMBERS | st.none() | st.booleans() | st.text(max_size=3) | st.lists(NUMBERS, max_size=4)
ROTATIONS = st.dictionaries(
    st.sampled_from(sorted(set().union(rotary.ANGLES, *rotary.KNOWN.values()) - {"rope_type"})),
    VALUES,
    max_size=8,
)
# Each decides how much is described, and a description of a thousand layers takes seconds.
LAYERS = {"num_hidden_layers", "n_layer", "num_layers"}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(families.FAMILIES)))
def test_no_value_of_a_field_makes_anything_else_than_an_error_of_ours(
    data: st.DataObject, kind: str
) -> None:
    """Numbers that overflow, vanish or are none; rotations that cannot be computed."""
    config = json.loads(shrink.config_of(kind).to_json_string())
    fields = sorted({*config} - LAYERS - {"model_type"})
    changes = data.draw(st.dictionaries(st.sampled_from(fields), VALUES, max_size=2))
    turns = data.draw(st.sampled_from(["default", *rotary.SCALINGS]))
    known = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    changes["rope_parameters"] = known | data.draw(ROTATIONS) | {"rope_type": turns}
    # That is the law: no other error, no warning, and no time without end.
    with contextlib.suppress(UnsupportedModel):
        assert families.describe(config | changes).layers


@pytest.mark.parametrize(
    ("theta", "words"),
    [(0.0, "contradicts itself: .*divide by zero"), (float("nan"), "angles that are not finite")],
)
def test_angles_that_cannot_be_computed_are_refused(theta: float, words: str) -> None:
    config = json.loads(shrink.config_of("llama").to_json_string())
    turns = {"rope_type": "default", "rope_theta": theta}
    with pytest.raises(UnsupportedModel, match=words):
        families.describe(config | {"rope_parameters": turns})


def test_what_says_nothing_is_not_refused(copy: Path, saved: Path) -> None:
    edit(
        copy,
        attn_gate=None,
        attention_dropout=0.5,
        unk_token_id=3,
        _name_or_path="/x/y",
        torch_dtype="bfloat16",
        rope_interleaved=False,
        is_llama_config=True,
    )
    assert bench.prints(write(copy)) == bench.prints(write(saved))


def test_an_older_configuration_says_the_same(copy: Path, saved: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    scaling = {"type": "linear", "factor": 2.0}
    (copy / "config.json").write_text(
        json.dumps(config | {"rope_theta": theta, "rope_scaling": scaling})
    )
    older = bench.prints(write(copy))
    edit(
        saved_copy := shutil.copytree(saved, copy.with_name("newer")),
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": theta},
    )
    assert older == bench.prints(write(saved_copy)) != bench.prints(write(saved))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "in safetensors"),
        (lambda p: (p / "tokenizer.json").rename(p / "tokenizer.model"), "is tokenizer.model"),
        (lambda p: (p / "adapter_config.json").write_text("{}"), "it is an adapter"),
        (lambda p: (p / "config.json").unlink(), "it has no config.json"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_built_are_told(
    copy: Path, change: Callable[[Path], object], words: str
) -> None:
    change(copy)
    why = build_origin.refused(copy, [path.name for path in copy.iterdir()])
    assert why is not None and words in why


def test_weights_that_are_not_finite_are_told(copy: Path, tmp_path: Path) -> None:
    tensors = stored(copy)
    tensors["model.norm.weight"][3] = torch.nan
    store(copy, tensors)
    with pytest.raises(ValueError, match="logits are not finite"):
        export(copy, tmp_path / "out", precision="fp32", build=True, progress=None)
    assert not (tmp_path / "out").exists()


def test_a_header_that_lies_is_told(copy: Path) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [1 << 40]
    told = json.dumps(header).encode()
    path.write_bytes(len(told).to_bytes(8, "little") + told + data[8 + length :])
    with pytest.raises(ModelError, match=r"model\.norm\.weight has 256 bytes for the shape"):
        build_origin.of_directory(copy)


# What well-known configurations of the hub hold besides.
SEEN: dict[str, dict[str, Any]] = {
    "gemma2": {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
    "gpt2": {"n_ctx": 1024, "task_specific_params": {"text-generation": {}}, "_num_labels": 1},
    "llama": {"pretraining_tp": 1, "rope_scaling": None, "transformers.js_config": {"dtype": {}}},
    "phi3": {"attention_bias": False, "lm_head_bias": False, "full_attn_mod": 1,
             "auto_map": {"AutoConfig": "x"}},
    "qwen2": {"use_mrope": False, "max_window_layers": 21},
    "smollm3": {"max_window_layers": 28},
    "starcoder2": {"activation_function": "gelu", "mlp_type": "default"},
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEN)
def test_what_is_known_to_mean_nothing(kind: str) -> None:
    config = json.loads(shrink.config_of(kind).to_json_string())
    assert families.describe(config | SEEN[kind]).layers
    with pytest.raises(UnsupportedModel, match="which the builder does not know"):
        families.describe(config | {"mlp_type": "gated", "use_mrope": True})


# --- which way is taken ---------------------------------------------------------------------------


def test_where_torch_is_the_original_proves_what_is_built_unless_told_otherwise(
    saved: Path, llama: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    ways: dict[str, Any] = {
        "traced": {"build": False},
        "built": {"build": True},
        "proved": {"prove": True},
        "usual": {},
    }
    for name, wishes in ways.items():
        made = export(saved, tmp_path / name, precision="fp32", progress=sys.stderr, **wishes)
        shown = capsys.readouterr().err
        report = json.loads((made / "report.json").read_text())
        found[name] = (shown, report, fastgen.load(made).generate(PROMPTS, max_new_tokens=8))
        assert f"proof: {report['proof']}" in table(report)
    assert "traced by torch" in found["traced"][0]
    assert "built of its tensors, without torch" in found["built"][0]
    for name in ("proved", "usual"):
        assert "built of its tensors, proved by torch" in found[name][0]
    assert found["built"][1]["proof"] == "family llama (transformers 5.24)"
    assert found["built"][1]["beside"].startswith("its own graph")
    for name in ("traced", "proved", "usual"):
        assert found[name][1]["proof"].startswith("the original ran (transformers 5.24")
    assert found["traced"][2] == found["built"][2] == found["proved"][2]
    told = [json.loads((tmp_path / name / "fastgen.json").read_text()) for name in found]
    for one in told:
        one.pop("files")
    assert told[0] == told[1] == told[2] == told[3]


def test_a_built_graph_that_is_not_the_original_is_traced_or_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = families.describe

    def wrong(config: dict[str, Any]) -> Any:
        decoder = describe(config)
        return replace(decoder, embedding=replace(decoder.embedding, times=2.0))

    monkeypatch.setattr(families, "describe", wrong)
    made = export(saved, tmp_path / "traced", precision="fp32", progress=None)
    report = json.loads((made / "report.json").read_text())
    assert [step["step"] for step in report["steps"]].count("convert") == 2
    assert not report["mismatch"]
    with pytest.raises(Mismatch, match="disagrees"):
        export(saved, tmp_path / "asked", precision="fp32", prove=True, progress=None)


def test_what_cannot_be_built_is_no_surprise(
    llama: PreTrainedModel, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy, attn_gate=True)
    with pytest.raises(UnsupportedModel, match=r"built: its config\.json says attn_gate"):
        export(copy, tmp_path / "out", build=True, progress=None)
    with pytest.raises(UnsupportedModel, match="cannot be built: it is no checkpoint"):
        export(llama, tmp_path / "out", build=True, progress=None)
    monkeypatch.setattr(fastgen.store.resolve, "has_torch", lambda: False)
    with pytest.raises(ModelError, match=r"\[export\]'.*attn_gate"):
        export(copy, tmp_path / "out", progress=None)
    with pytest.raises(ModelError, match="no directory, nor a hub id"):
        export(tmp_path / "nowhere", tmp_path / "out", progress=None)
    (copy / "fastgen.json").write_text("{}")
    with pytest.raises(ModelError, match="is a fastgen model already"):
        export(copy, tmp_path / "out", progress=None)
    with pytest.raises(ModelError, match=r"\[export\]'.*--prove"):
        export(copy, tmp_path / "out", prove=True, progress=None)


def test_a_graph_that_was_built_wrong_is_told_by_the_original(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = rotary.turning
    monkeypatch.setattr(
        configuration, "turning", lambda said, *more: wrong(said | {"rope_theta": 50.0}, *more)
    )
    with pytest.raises(fastgen.export.Mismatch, match="disagrees with the original"):
        export(saved, tmp_path / "out", precision="fp32", prove=True, progress=None)


def test_usual_ids_are_the_families() -> None:
    for kind, usual in families.USUAL_IDS.items():
        config = original.transformers.AutoConfig.for_model(kind)
        assert tuple(getattr(config, name) for name in families.IDS) == usual, kind
    assert families.USUAL_IDS.keys() == families.FAMILIES.keys()


def test_the_types_that_the_docs_name_are_the_families() -> None:
    page = (BENCH.parent / "docs" / "models.md").read_text(encoding="utf-8")
    named = page.partition("## Without torch")[2].partition("\n- ")[2].partition("\n\n")[0]
    assert re.findall(r"\w+", named) == sorted(families.FAMILIES)


# --- without torch --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ "org/little" can be built, "org/other" not."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(saved, root / "org" / "little")
    edit(shutil.copytree(saved, root / "org" / "other"), attn_gate=True)
    with serving(root) as server:
        yield server


@pytest.fixture(scope="module")
def expected(llama: PreTrainedModel) -> list[list[int]]:
    """transformers' own tokens."""
    rows = []
    for row in PROMPTS:
        ids = torch.tensor([row])
        out = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        rows.append(out[0, -8:].tolist())
    return rows


GENERATE = f"""
import fastgen, sys
assert not {{"torch", "transformers", "safetensors"}} & sys.modules.keys()
model = fastgen.CausalLM.from_pretrained(*sys.argv[1:2], precision=sys.argv[2])
rows = model.generate({PROMPTS}, max_new_tokens=8, eos_token_id=None)
print([row[-8:] for row in rows])
"""


def test_a_hub_id_becomes_text_without_torch(world: World, expected: list[list[int]]) -> None:
    code, out, err = world.run(NO_TORCH + GENERATE, "org/little", "fp32")
    assert code == 0, err
    assert out == f"{expected}\n" and "without torch" in err


def test_a_directory_becomes_int8_without_torch(
    world: World, saved: Path, expected: list[list[int]]
) -> None:
    asked = ("export", str(saved), "out", "--max-kl", "0.05")
    code, out, err = world.run(NO_TORCH + MAIN, *asked)
    assert code == 0 and "family llama (transformers 5.24)" in out, err
    code, said, err = world.run(NO_TORCH + MAIN, "info", "out")
    assert code == 0 and "beside its own graph in float32" in said, err
    assert "proof: family llama (transformers 5.24)" in said
    ours = fastgen.load(world.home / "out")
    assert ours.model.info.precision == "int8"
    report = json.loads((world.home / "out" / "report.json").read_text())
    assert report["fp32"]["logits"]["max_difference"] < 1e-5
    assert report["quality"]["kl"] < 0.05
    found = ours.generate(PROMPTS, max_new_tokens=8, eos_token_id=None)
    alike = [
        one == other
        for row, rows in zip(found, expected, strict=True)
        for one, other in zip(row[-8:], rows, strict=True)
    ]
    assert sum(alike) > len(alike) / 2


def test_a_mixture_becomes_int8_without_torch(world: World, tmp_path: Path) -> None:
    shrink.build("mixtral").save_pretrained(tmp_path / "little")
    asked = ("export", str(tmp_path / "little"), "out", "--quick")
    code, out, err = world.run(NO_TORCH + MAIN, *asked)
    assert code == 0 and "family mixtral (transformers 5.24)" in out, err
    made = onnx_ir.load(world.home / "out" / "model.onnx")
    assert "QMoE" in {node.op_type for node in made.graph}
    rows = fastgen.load(world.home / "out").generate(PROMPTS, max_new_tokens=4, eos_token_id=None)
    assert {len(row) for row in rows} == {len(PROMPTS[-1]) + 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 5}, "its tokens go to 5 of 4 experts"),
        ({"hidden_act": "gelu"}, "the activation of its experts is 'gelu'"),
        ({"num_local_experts": 3}, r"does not: model\.layers\.0\.block_sparse_moe\.experts\.3"),
    ],
)
def test_mixtures_that_it_does_not_know_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    shrink.build("mixtral").save_pretrained(tmp_path / "little")
    edit(tmp_path / "little", **changes)
    if "num_local_experts" in changes:  # the router's matrix is of as many
        tensors = stored(tmp_path / "little")
        gates = {n: t[:3].clone() for n, t in tensors.items() if n.endswith("moe.gate.weight")}
        store(tmp_path / "little", tensors | gates)
    with pytest.raises((ModelError, UnsupportedModel), match=f"little cannot be built: .*{words}"):
        write(tmp_path / "little")


def test_what_cannot_be_built_is_said_before_weights_are_fetched(world: World) -> None:
    code, _, err = world.run(NO_TORCH + GENERATE, "org/other", "fp32")
    assert code == 1 and "attn_gate = True, which the builder does not know" in err
    assert r"pip install 'fastgen-onnx[export]'" in err
    fetched = {one.rpartition("/")[2] for one in world.hub.asked if "/resolve/" in one}
    assert fetched == {"config.json"}


def test_the_writer_of_graphs_takes_tensors_from_anywhere(saved: Path) -> None:
    """A description, and a mapping of names to what can be read: no file is needed."""
    config = json.loads((saved / "config.json").read_text())
    held = {name: weights.Mapped(one.numpy(), lambda x: x) for name, one in stored(saved).items()}
    made = writer.write(families.describe(config), held)
    assert bench.prints(made) == bench.prints(write(saved))
