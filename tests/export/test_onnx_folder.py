"""Folders that others exported: rewritten once, and equal to what they were."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign_graphs
import numpy as np
import onnx
import pytest
import torch
from fake_hub import Hub, blocked, serving
from foreign_graphs import STYLES, write
from onnx import helper

import fastgen
from fastgen import commands
from fastgen.export import UnsupportedModel, export, pipeline
from fastgen.export.prove.check import Mismatch
from fastgen.export.source.origin import Tolerance

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21, 22], [30]]
NEW = 12
# How far a logit may be off, as a share of the largest, where that is more than 1e-5.
BOUNDS = {
    "genai int4": 1e-3, "genai int8": 1e-3, "genai fp16": 0.1, "optimum fp16": 0.1,
    "transformers.js q4f16": 0.1, "optimum quantized": 0.5,
}  # fmt: skip
# Where the arithmetic is float32's, and nothing is left out: transformers' own tokens.
EXACT = ("genai", "transformers.js", "optimum", "optimum without positions", "merged", "with past")
GRAPHS = {"merged": "decoder_model_merged.onnx", "with past": "decoder_with_past_model.onnx"}


@pytest.fixture(scope="module")
def llama(pair) -> Any:
    """transformers' model, whose weights are in all folders."""
    return pair("llama")[0]


@pytest.fixture(scope="module")
def opened(llama, tmp_path_factory) -> Callable[[str], tuple[Path, fastgen.CausalLM]]:
    """`opened(style)`: the folder's graph, and the folder opened."""

    @functools.cache
    def make(style: str) -> tuple[Path, fastgen.CausalLM]:
        place = tmp_path_factory.mktemp("folders") / "model"
        name = GRAPHS.get(style, "model.onnx")
        external = {"optimum": "several", "genai": "one"}.get(style, "")
        write(llama, STYLES[style], place, f"onnx/{name}", external)
        if style == "with past":  # the other of the pair, which reads prompts, is not needed
            (place / "onnx" / "decoder_model.onnx").write_bytes(b"not to be read")
        out = export(place, place.with_name("ours"), progress=None)
        return place / "onnx" / name, fastgen.load(out)

    return make


def report_of(model: fastgen.CausalLM) -> dict[str, Any]:
    return json.loads((model.directory / "report.json").read_text())


@pytest.fixture(scope="module")
def padded() -> dict[str, torch.Tensor]:
    longest = max(map(len, ROWS))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ROWS])
    return {"input_ids": ids, "attention_mask": mask}


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "top_p": 0.9, "top_k": 20},
}


@pytest.fixture(scope="module")
def expected(llama, padded) -> dict[str, Any]:
    """transformers' own logits of the rows."""
    said = {}
    for name, knobs in SEARCHES.items():
        torch.manual_seed(7)
        said[name] = llama.generate(**padded, max_new_tokens=NEW, eos_token_id=None, **knobs)
    return said


@pytest.mark.parametrize("style", EXACT)
def test_a_folder_says_what_transformers_says(opened, padded, expected, style):
    _, ours = opened(style)
    for name, knobs in SEARCHES.items():
        torch.manual_seed(7)
        found = ours.generate(**padded, max_new_tokens=NEW, eos_token_id=None, **knobs)
        assert found.tolist() == expected[name].tolist(), name


@pytest.mark.parametrize("style", STYLES)
def test_a_folder_says_what_its_own_graph_says(opened, style):
    """Rows of different lengths together; the graph alone, a row at a time."""
    path, ours = opened(style)
    told = report_of(ours)
    said, bound = told["logits"], told["folder"]["tolerance"]
    assert told["mismatch"] == [] and said["positions"] > 200
    assert said["max_difference"] <= bound["max_difference"] <= BOUNDS.get(style, 1e-5)
    assert said["kl"] <= bound["kl"]
    if bound["greedy"]:
        assert told["greedy"]["same"] == told["greedy"]["tokens"] == 72
    if style in ("optimum quantized", "transformers.js q4f16"):
        return  # whose own rounding decides between tokens of a random model
    found = ours.generate(ROWS, max_new_tokens=NEW, eos_token_id=None)
    for given, row in zip(ROWS, found, strict=True):
        alone = foreign_graphs.greedy(path, given, NEW, STYLES[style].single)
        assert list(row[-NEW:]) == alone


def test_what_is_made_is_what_our_own_export_makes(opened, pair):
    """So it is as fast: attention turns its queries and keys, and packs their products."""
    ours = operators(pair("llama")[1].directory)
    for style in ("optimum", "merged", "transformers.js"):
        found = operators(opened(style)[1].directory)
        for kind in ("GroupQueryAttention", "MatMul", "RotaryEmbedding", "Neg", "Transpose"):
            assert found.get(kind) == ours.get(kind), (style, kind)


def operators(directory: Path) -> dict[str, int]:
    kinds = [
        n.op_type for n in onnx.load(directory / "model.onnx", load_external_data=False).graph.node
    ]
    return {kind: kinds.count(kind) for kind in kinds}


def test_the_report_tells_what_a_folder_lacks(opened, llama, tmp_path, capsys):
    assert report_of(opened("optimum")[1])["folder"]["notes"] == []
    assert report_of(opened("genai fp16")[1])["folder"]["half_precision_became_single"]
    (note,) = report_of(opened("optimum quantized")[1])["folder"]["notes"]
    assert "depends on its neighbours" in note
    commands.run(["info", str(opened("optimum quantized")[1].directory)])
    assert f"note: {note}" in capsys.readouterr().out
    place = write(llama, STYLES["genai"], tmp_path / "model")
    config = json.loads((place / "config.json").read_text())
    config |= {"sliding_window": 16, "attn_logit_softcapping": 30.0}
    (place / "config.json").write_text(json.dumps(config))
    notes = report_of(fastgen.load(export(place, tmp_path / "out", progress=None)))["folder"]
    assert notes["notes"] == [
        "config.json has a window of 16 tokens, the folder's graph none",
        "config.json caps scores at 30.0, the folder's graph does not",
    ]
    assert report_of(opened("optimum window")[1])["folder"]["windows"] == [8, 8]


def test_what_genai_says_is_what_counts_where_there_is_no_config(llama, tmp_path):
    """Ends of text, the limit, and the search: its max_length is the limit, and no wish."""
    place = write(llama, STYLES["genai int4"], tmp_path / "model", "model.onnx")
    foreign_graphs.genai(place, llama, do_sample=True, temperature=0.5, repetition_penalty=1.2)
    ours = fastgen.load(export(place, tmp_path / "out", progress=None))
    info = ours.model.info
    assert (info.max_length, info.precision, info.model_type) == (96, "int4", "llama")
    assert ours.generation_config.to_dict() == {
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.2,
    }
    allowed = {"suppress_tokens": [i for i in range(99) if i != 5], "max_new_tokens": 3}
    assert ours.generate([7, 8], **allowed) == [[7, 8, 5]]  # which is an end of text
    odd = {"model": {"decoder": [1], "context_length": "9"}, "search": 5}
    (place / "genai_config.json").write_text(json.dumps(odd))
    assert fastgen.load(export(place, tmp_path / "odd", progress=None)).model.info.max_length == 128


def test_a_capped_score_is_found_out(llama, tmp_path):
    style = replace(STYLES["optimum"], cap=1.5)
    place = write(llama, style, tmp_path / "model")
    ours = fastgen.load(export(place, tmp_path / "out", progress=None))
    assert report_of(ours)["greedy"]["same"] == 72
    nodes = onnx.load(ours.directory / "model.onnx", load_external_data=False).graph.node
    caps = [a.f for n in nodes for a in n.attribute if a.name == "softcap"]
    assert caps == pytest.approx([1.5, 1.5])


# --- precisions ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def precisions(llama, tmp_path_factory) -> Path:
    """A folder as transformers.js has them, with a graph a precision."""
    place = tmp_path_factory.mktemp("folders") / "several"
    write(llama, STYLES["optimum"], place, external="several")
    write(
        llama, replace(STYLES["transformers.js"], linear="q4"), place, "onnx/model_q4.onnx", "one"
    )
    write(llama, STYLES["optimum quantized"], place, "onnx/model_quantized.onnx")
    write(llama, STYLES["optimum fp16"], place, "onnx/model_fp16.onnx")
    return place


def test_a_precision_is_picked_and_opened_once(precisions, tmp_path, monkeypatch, llama):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    made: list[str] = []
    real = pipeline.export

    def counted(source: Path, out: Path, **wishes: Any) -> Path:
        made.append(out.name)
        return real(source, out, progress=None, **wishes)

    monkeypatch.setattr(pipeline, "export", counted)
    first = fastgen.load(precisions)
    assert report_of(first)["folder"]["graph"] == "model_q4.onnx"
    assert first.model.info.precision == "int4" and "several-q4-" in made[0]
    ids = first.generate(ROWS, max_new_tokens=4)
    assert np.array_equal(fastgen.generate(ROWS, model=precisions, max_new_tokens=4), ids)
    again = fastgen.CausalLM.from_pretrained(precisions, precision="q4")
    assert again.directory == first.directory and len(made) == 1
    plain = fastgen.CausalLM.from_pretrained(precisions, precision="fp32")
    assert report_of(plain)["folder"]["graph"] == "model.onnx" and len(made) == 2
    asked = "it has no precision 'bnb4', but fp16, fp32, q4, quantized"
    with pytest.raises(fastgen.ModelError, match=f"{precisions} cannot be opened: {asked}"):
        fastgen.CausalLM.from_pretrained(precisions, precision="bnb4")
    times = precisions / "onnx" / "model_q4.onnx"
    times.touch()  # a folder that was changed is another one
    fastgen.load(precisions)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("wishes", "kl", "top1"),
    [
        ({"precision": "int4"}, 0.2, 0.5),  # whose top-1 a random model decides by near ties
        ({"precision": "fp32", "cache_precision": "int8"}, 0.02, 0.95),
    ],
    ids=["int4", "int8 keys and values"],
)
def test_what_is_made_smaller_of_a_folder_stays_near(opened, wishes, kl, top1, tmp_path):
    """By its report, and by what each token of the text that float32 writes is worth to it."""
    path, plain = opened("optimum")
    bound = Tolerance(max_difference=1.0, kl=kl, top1=top1, greedy=False)
    out = export(path.parents[1], tmp_path / "out", progress=None, tolerance=bound, **wishes)
    ours = fastgen.load(out)
    told = report_of(ours)
    assert told["mismatch"] == [] and 0 < told["quality"]["kl"] < kl
    assert told["quality"]["top1"] >= top1 and told["fp32"]["logits"]["max_difference"] < 1e-5
    assert ours.model.info.precision == wishes["precision"]
    kept = json.loads((out / "fastgen.json").read_text())["cache_dtype"]
    assert kept == wishes.get("cache_precision", "float32")
    texts = plain.generate(ROWS, max_new_tokens=NEW, eos_token_id=None)
    for one, two in zip(ours.score(texts), plain.score(texts), strict=True):
        np.testing.assert_allclose(one[1:], two[1:], atol=1.0 if kl > 0.1 else 0.15)


# --- what is refused -----------------------------------------------------------------------------


def refused(place: Path, words: str, kind: type[Exception] = UnsupportedModel) -> None:
    """An error of one line, and nothing is left behind."""
    out = place.with_name("out")
    before = sorted(place.parent.iterdir())
    with pytest.raises(kind, match=words) as caught:
        export(place, out, precision=None, progress=None)
    assert "\n" not in str(caught.value)
    assert sorted(place.parent.iterdir()) == before


def changed(place: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    (path,) = place.glob("**/*.onnx")
    made = onnx.load(path, load_external_data=False)
    change(made)
    onnx.save(made, path)
    return place


def test_what_attention_cannot_say_is_refused_by_layer(llama, tmp_path):
    place = write(llama, replace(STYLES["optimum"], slopes=True), tmp_path / "model")
    refused(place, r"model cannot be exported: layer 0: .*depends on places \(ALiBi, say\)")


def another_attention(made: onnx.ModelProto) -> None:
    """Layer 1's keys come from an operator that is not known as attention."""
    for node in made.graph.node:
        if "present.1.value" in node.output:
            node.output[list(node.output).index("present.1.value")] = "kept"
    node = helper.make_node("Relu", ["kept"], ["present.1.value"], "/odd")
    made.graph.node.append(node)


def test_an_operator_that_is_not_known_is_named(llama, tmp_path):
    place = changed(write(llama, STYLES["genai"], tmp_path / "model"), another_attention)
    refused(place, r"layer 1: its attention is Relu \(/odd\): only GroupQueryAttention and joined")


def renamed(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    """An input under another name."""

    def change(made: onnx.ModelProto) -> None:
        for value in made.graph.input:
            value.name = value.name.replace(old, new)
        for node in made.graph.node:
            for at, name in enumerate(node.input):
                node.input[at] = name.replace(old, new)

    return change


def without_past(made: onnx.ModelProto) -> None:
    kept = [value for value in made.graph.input if not value.name.startswith("past")]
    del made.graph.input[:]
    made.graph.input.extend(kept)


def of_a_stranger(made: onnx.ModelProto) -> None:
    made.graph.node[-1].domain = "somebody"
    made.opset_import.append(helper.make_opsetid("somebody", 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("input_ids", "inputs_embeds"), "takes inputs_embeds: .*pictures or sounds"),
        (renamed("attention_mask", "encoder_attention_mask"), "part of an encoder-decoder"),
        (renamed("past_key_values.0.", "past_key_values.0.encoder."), "part of an encoder-dec"),
        (renamed("past_key_values.0.key", "past_conv.0"), r"states besides .*past_conv\.0"),
        (renamed("past_key_values.1.value", "past_recurrent.1"), "states besides .*past_recurr"),
        (renamed("position_ids", "cache_position"), "its graph takes cache_position"),
        (without_past, "keeps no keys and values.*text-generation-with-past"),
        (of_a_stranger, "onnxruntime cannot run model.onnx on a CPU"),
    ],
)
def test_what_is_no_decoder_is_refused_by_name(llama, tmp_path, change, words):
    refused(changed(write(llama, STYLES["optimum"], tmp_path / "model"), change), words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encoder_model.onnx", "is an encoder-decoder"),
        ("vision_encoder_q4.onnx", "of pictures or sounds"),
        ("embed_tokens.onnx", "of pictures or sounds"),
    ],
)
def test_a_folder_with_other_parts_is_refused_by_name(tmp_path, name, words):
    place = tmp_path / "model" / "onnx"
    place.mkdir(parents=True)
    for one in (name, "decoder_model_merged.onnx"):
        (place / one).write_bytes(b"")
    refused(place.parent, f"model cannot be opened: it .*{words}.*{name}|{name}.*{words}|{words}")


@pytest.mark.parametrize(
    "where", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret", "C:x"]
)
def test_weights_outside_the_folder_are_not_read(llama, tmp_path, where):
    place = write(llama, STYLES["optimum"], tmp_path / "model", external="one")
    (tmp_path / "secret").write_bytes(b"s" * 100_000)

    def change(made: onnx.ModelProto) -> None:
        for tensor in made.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = where

    refused(changed(place, change), "wants weights from .*only files beside it are read")


def test_weights_behind_links_and_in_places_of_their_own(llama, tmp_path):
    """The result has all of it, and needs none of these."""
    place = write(llama, STYLES["optimum"], tmp_path / "model", external="several")
    (place / "onnx" / "weights").mkdir()
    for name, to in (
        ("model.onnx_data", tmp_path / "elsewhere"),
        ("model.onnx_data_1", place / "onnx" / "weights" / "more"),
    ):
        (place / "onnx" / name).rename(to)
    (place / "onnx" / "model.onnx_data").symlink_to(tmp_path / "elsewhere")

    def change(made: onnx.ModelProto) -> None:
        for tensor in made.graph.initializer:
            for entry in tensor.external_data:
                entry.value = entry.value.replace("model.onnx_data_1", "weights/more")

    out = export(changed(place, change), tmp_path / "out", precision="fp32", progress=None)
    shutil.rmtree(place)
    (tmp_path / "elsewhere").unlink()
    ours = fastgen.load(out)
    assert report_of(ours)["greedy"]["same"] == 72 and ours.generate([5, 6], max_new_tokens=2)


@pytest.mark.slow
def test_weights_larger_than_a_graph_can_hold(llama, tmp_path):
    """2.3 GB beside the graph: a table of many words, most of which are holes in the file."""
    style = STYLES["genai"]
    place = write(llama, style, tmp_path / "model", external="one")
    rows, width = 9_000_000, llama.config.hidden_size
    size = rows * width * 4
    assert size > 1 << 31
    data = place / "onnx" / "model.onnx_data_1"
    with data.open("wb") as file:
        file.write(llama.get_input_embeddings().weight.detach().numpy().tobytes())
        file.truncate(size)

    def change(made: onnx.ModelProto) -> None:
        (table,) = (one for one in made.graph.initializer if one.name == "embed")
        del table.external_data[:], table.dims[:]
        table.ClearField("raw_data")
        table.dims.extend([rows, width])
        table.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": data.name, "offset": 0, "length": size}.items():
            table.external_data.add(key=key, value=str(value))

    (path,) = changed(place, change).glob("onnx/*.onnx")
    ours = fastgen.load(export(place, tmp_path / "out", progress=None))
    assert (ours.directory / "model.onnx.data").stat().st_size > size
    found = ours.generate(ROWS, max_new_tokens=NEW, eos_token_id=None)
    for given, row in zip(ROWS, found, strict=True):
        assert list(row[-NEW:]) == foreign_graphs.greedy(path, given, NEW)


def test_damaged_folders_are_one_error(llama, tmp_path):
    place = write(llama, STYLES["optimum"], tmp_path / "model", external="several")
    data = place / "onnx" / "model.onnx_data_1"
    content = data.read_bytes()
    data.write_bytes(content[:-100])
    refused(place, "cannot run model.onnx|cannot be read")
    data.unlink()
    refused(place, r"model\.onnx lacks its weights: model\.onnx_data_1")
    data.write_bytes(content)
    graph = place / "onnx" / "model.onnx"
    whole = graph.read_bytes()
    for damage in (b"nothing of the kind", whole[: len(whole) // 2]):
        graph.write_bytes(damage)
        refused(place, r"model\.onnx (cannot be read as a graph|lacks)|cannot run")


def test_a_rewriting_that_is_wrong_is_found_out(llama, tmp_path, monkeypatch):
    """The comparison does not know what was done: here, a scale that is off by a tenth."""
    from fastgen.export.onnx_folder import attention

    real = attention.meaning
    monkeypatch.setattr(
        attention,
        "meaning",
        lambda *given: replace(found := real(*given), scale=1.1 * found.scale),
    )
    place = write(llama, STYLES["optimum"], tmp_path / "model")
    refused(place, "disagrees with the original: a logit differs", Mismatch)


# --- without torch, from a hub -------------------------------------------------------------------


TORCH = {"torch", "transformers", "onnxscript", "jinja2", "peft"}
MAIN = "from fastgen.__main__ import main; main()"


def without(*names: str) -> str:
    return blocked(*TORCH, *names)


@pytest.fixture(scope="module")
def hub(precisions, llama, tmp_path_factory) -> Iterator[Hub]:
    """ "org/folder" has graphs of four precisions, "org/both" a transformers model and a graph."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(precisions, root / "org" / "folder")
    (root / "org" / "folder" / "README.md").write_text("about")
    both = write(llama, STYLES["merged"], root / "org" / "both", "onnx/decoder_model_merged.onnx")
    llama.save_pretrained(both)
    genai = write(llama, STYLES["genai int4"], root / "org" / "genai", "cpu/int4/model.onnx", "one")
    foreign_graphs.genai(genai, llama)
    for path in genai.glob("*.json"):
        path.rename(genai / "cpu" / "int4" / path.name)
    with serving(root) as server:
        yield server


def fetched(hub: Hub) -> set[str]:
    """The files whose content was asked for."""
    found = (re.match(r"GET /org/\w+/resolve/\w+/(.*)", one) for one in hub.asked)
    return {match[1] for match in found if match}


def test_from_a_hub_id_to_text_without_torch_in_two_commands(world, opened):
    said = world.run(without() + MAIN, "export", "org/folder", "out", "--precision", "fp32")
    assert said[0] == 0, said
    assert fetched(world.hub) == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "onnx/model.onnx_data_1",
    }
    assert "Fetching" in said[2]  # huggingface_hub's own progress bars
    ask = ("generate", "The quick", "--max-new-tokens", "4", "--model")
    code, out, err = world.run(without("onnx", "onnx_ir") + MAIN, *ask, "out")
    assert code == 0, err
    assert out == "The quick" + opened("optimum")[1].complete("The quick", max_new_tokens=4) + "\n"


def test_our_own_int8_is_made_of_a_folder_without_torch(world, precisions, opened):
    """Into a directory with a name of its own; in float32 it equals the folder first."""
    asked = ("export", str(precisions), "--precision", "int8", "--min-top1", "0.9")
    code, out, err = world.run(without() + MAIN, *asked)
    assert code == 0 and "KL divergence" in out, err
    ours, plain = fastgen.load(world.home / "several-int8"), opened("optimum")[1]
    told = report_of(ours)
    assert told["folder"]["graph"] == "model.onnx" and told["mismatch"] == []
    assert told["fp32"]["logits"]["max_difference"] < 1e-5
    assert ours.model.info.precision == "int8" and told["quality"]["kl"] < 0.02
    texts = plain.generate(ROWS, max_new_tokens=NEW, eos_token_id=None)
    for one, two in zip(ours.score(texts), plain.score(texts), strict=True):
        np.testing.assert_allclose(one[1:], two[1:], atol=0.15)


def test_a_hub_id_is_opened_on_first_use_and_only_its_precision_is_fetched(world):
    ask = ("generate", "The quick", "--max-new-tokens", "4", "--model", "org/folder")
    code, first, err = world.run(without() + MAIN, *ask)
    assert code == 0, err
    assert {name for name in fetched(world.hub) if "onnx" in name} == {
        "onnx/model_q4.onnx",
        "onnx/model_q4.onnx_data",
    }
    (made,) = (p for p in world.cache.iterdir() if p.is_dir())
    assert json.loads((made / "fastgen.json").read_text())["name"] == "org/folder"
    for path in made.iterdir():
        assert not path.is_symlink() and str(world.home).encode() not in path.read_bytes()
    for path in (world.home / "hf").glob("**/blobs/*"):
        path.unlink()  # the original goes: what was made is whole
    world.hub.asked.clear()
    code, again, err = world.run(without("onnx", "onnx_ir") + MAIN, *ask)
    assert (code, again) == (0, first), err
    assert fetched(world.hub) <= {"config.json"}


def test_where_a_repository_has_both_torch_decides(world, opened):
    """With torch it is the transformers model; without, the graph."""
    program = (
        "import fastgen; print(fastgen.load('org/both').generate([[5, 6, 7]], max_new_tokens=9))"
    )
    code, out, err = world.run(without() + program)
    assert code == 0, err
    assert fetched(world.hub).isdisjoint({"model.safetensors"})
    assert out == f"{opened('merged')[1].generate([[5, 6, 7]], max_new_tokens=9)}\n"


def test_a_folder_of_genai_below_a_repository(world):
    program = "import fastgen; print(fastgen.CausalLM.from_pretrained('org/genai').model.info)"
    code, out, err = world.run(without() + program)
    assert code == 0 and "precision='int4'" in out and "name='org/genai'" in out, err


def test_without_onnx_it_says_what_to_install_before_it_fetches(world):
    code, _, err = world.run(without("onnx", "onnx_ir") + MAIN, "info", "org/folder")
    assert code == 2 and "pip install 'fastgen-onnx[onnx]'" in err
    assert fetched(world.hub) == {"config.json"}
