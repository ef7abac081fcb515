"""Prompts in int8 of a model in int4: the same weights, whom they serve, and who has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
from scripts import run

import fastgen
from fastgen.engine import model as models
from fastgen.engine import prefill_int8 as reading
from fastgen.engine import prefix_cache
from fastgen.engine.cache import Cache
from fastgen.engine.model import UNPACKED, Model
from fastgen.engine.prefill import prefill
from fastgen.export import export
from fastgen.export.quantize import prefill_int8
from fastgen.export.quantize.kernels import Kernel, codes_values
from fastgen.export.rewrite.edit import add_initializer, constant, insert, take_place
from fastgen.store import tuning
from fastgen.store.tuning import Tuning
from fastgen.timing import tune
from fastgen.timing.tune import Candidate, Workload

LIMIT = 512
# The second matrix of a feed-forward part has two blocks, and the last one is not full.
SHAPE = {"intermediate_size": 252, "max_position_embeddings": LIMIT, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories of one tiny llama in int4, by the precision of its keys and values."""
    home = tmp_path_factory.mktemp("prompts")
    found: dict[str, Path] = {}

    def make(cache: str = "fp32") -> Path:
        if cache not in found:
            found[cache] = export(
                tiny.build("llama", **SHAPE),
                home / cache,
                tokenizer=tiny.tokenizer(),
                precision="int4",
                cache_precision=cache,
                quick=True,
                allow_mismatch=True,
                progress=None,
            )
        return found[cache]

    return make


@pytest.fixture(scope="module")
def two(made) -> tuple[Model, Model]:
    """The model with its own prompts, and with those in int8."""
    return Model(made(), prefill_precision="same"), Model(made(), prefill_precision="int8")


@pytest.fixture
def ids() -> Callable[[int], np.ndarray]:
    """`ids(count)`: each test draws the same ones, whichever tests run before it."""
    draws = np.random.default_rng(0)
    return lambda count: draws.integers(3, tiny.VOCAB, count)


def read(model: Model, *rows: np.ndarray, **more) -> tuple[np.ndarray, Cache]:
    cache = model.new_cache(len(rows), max(map(len, rows)) + 8)
    return prefill(model, cache, rows, 0, **more).copy(), cache


def near(found: np.ndarray, expected: np.ndarray, share: float = 0.05) -> bool:
    return bool(np.abs(found - expected).max() < share * np.abs(expected).max())


def nodes_in_4_bits(model: ir.Model) -> list[ir.Node]:
    found = [node for node in model.graph if node.op_type == "MatMulNBits"]
    return [node for node in found if node.attributes["bits"].as_int() == 4]


def grid(node: ir.Node) -> np.ndarray:
    """float32 [in, out]: what the codes of a product stand for."""
    kernel = Kernel(4, node.attributes["block_size"].as_int())
    codes, scales, packed = map(constant, node.inputs[1:4])
    zeros = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    return codes_values(
        codes, kernel, scales, node.attributes["K"].as_int(), zeros[:, : scales.shape[1]]
    )


def test_the_matrices_are_those_of_4_bits_to_the_nearest_of_8(made):
    session = onnxruntime.InferenceSession(str(made() / "unpack.onnx"))
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(names, {}), strict=True))
    layers = [
        n
        for n in nodes_in_4_bits(ir.load(made() / "model.onnx"))
        if f"{n.inputs[1].name}.int8" in found
    ]
    assert len(layers) == len(names) / 2 == 2 * 4 - 3  # without most of the last layer
    blocks = []
    for node in layers:
        name = node.inputs[1].name
        codes, channels = found[f"{name}.int8"], found[f"{name}.channels"]
        assert codes.dtype == np.int8 and codes.shape == grid(node).shape
        difference = np.abs(codes * channels - grid(node))
        assert (difference <= 0.5001 * channels).all()
        assert (np.abs(codes).max(axis=0) == 127).all()  # no finer grid holds them
        blocks.append(constant(node.inputs[2]).shape[1])
    assert max(blocks) > 1


def test_no_weight_is_stored_again(made):
    told = json.loads((made() / "fastgen.json").read_text())["files"]
    assert {"prompts.onnx", "unpack.onnx"} <= set(told)
    for name in ("prompts.onnx", "unpack.onnx"):
        found = ir.load(made() / name).graph.initializers.values()
        assert (
            sum(
                v.const_value.nbytes
                for v in found
                if not isinstance(v.const_value, ir.ExternalTensor)
            )
            < 2_000
        )
    assert not list(made().glob("*.onnx.data.*")) and len(list(made().glob("*.data"))) == 1


def reference(directory: Path, tmp_path: Path) -> Model:
    """The model whose products are float32 ones of the 4-bit weights."""
    copy = shutil.copytree(directory, tmp_path / "reference")
    model = ir.load(directory / "model.onnx")
    for node in nodes_in_4_bits(model):
        weight = add_initializer(model.graph, f"{node.inputs[1].name}.float", grid(node))
        take_place(node, insert(node, "MatMul", [node.inputs[0], weight])[0])
    (copy / "model.onnx").unlink()
    ir.save(model, copy / "model.onnx", external_data="reference.data")
    told = json.loads((copy / "fastgen.json").read_text())
    told["files"] = {"model.onnx": (copy / "model.onnx").stat().st_size}
    (copy / "fastgen.json").write_text(json.dumps(told))
    return Model(copy)


def test_a_long_prompt_is_as_near_to_exact_products_as_without(made, two, tmp_path, ids):
    exact = reference(made(), tmp_path)
    rows = [ids(n) for n in (100, 200, 300)]
    expected, own, int8 = (read(model, *rows)[0] for model in (exact, *two))
    assert not np.array_equal(own, int8)
    error = np.linalg.norm(own - expected)
    assert np.linalg.norm(int8 - expected) < 2 * error < 0.1 * np.linalg.norm(expected)


def test_short_prompts_and_what_is_scored_go_as_before(two, ids):
    own, int8 = two
    row = ids(reading.APART - 1)
    assert np.array_equal(read(own, row)[0], read(int8, row)[0])
    row, places = ids(200), np.arange(200)[None]
    scored = [m.forward([row], m.new_cache(1, 256), 0, places).copy() for m in two]
    assert np.array_equal(*scored)


def test_a_row_does_not_feel_its_neighbours(two, ids):
    """Keys and values are the same bits, alone and among ragged rows, in one chunk or two."""
    rows = [ids(n) for n in (1, 2, 66, 130, 257, 300)]
    together, cache = read(two[1], *rows)
    assert near(together, read(two[0], *rows)[0])
    for slot, row in enumerate(rows):
        alone, mine = read(two[1], row)
        assert near(together[slot], alone[0])
        if len(row) - 1 >= reading.APART:  # else it is not read apart when it is alone
            for part, whole in zip(
                mine.read(0, 0, len(row) - 1), cache.read(slot, 0, len(row) - 1), strict=True
            ):
                assert near(part, whole, 1e-5)


def test_a_prompt_that_is_not_read_apart_has_nothing_to_keep():
    assert reading.APART <= prefix_cache.BLOCK


@pytest.mark.parametrize("length", [64, 65, 97, 257, 289, 400])
def test_what_a_prefix_cache_knows_is_a_fresh_prefill(two, length, ids):
    row, kept = ids(length), fastgen.PrefixCache()
    fresh = read(two[1], row)[0]
    for _ in range(2):
        assert np.array_equal(read(two[1], row, prefix_cache=kept)[0], fresh)
    assert kept.hits == 1


def test_with_keys_in_int8_too(made, ids):
    own, int8 = (Model(made("int8"), prefill_precision=one) for one in ("same", "int8"))
    rows = [ids(n) for n in (1, 90, 300)]
    assert near(read(int8, *rows)[0], read(own, *rows)[0], 0.1)


def test_generation_with_beams_and_rows(made, two, ids):
    rows = [ids(n).tolist() for n in (90, 150)]
    model = fastgen.load(made(), prefill_precision="int8")
    logits = read(two[0], *map(np.array, rows))[0]
    for knobs, each in (({}, 1), ({"num_beams": 3, "num_return_sequences": 2}, 2)):
        found = model.generate(rows, max_new_tokens=8, min_new_tokens=8, **knobs)
        assert np.shape(found) == (2 * each, 158)
        if not knobs:  # the likeliest token, or one that is nearly as likely
            firsts = logits[[0, 1], np.array(found)[:, 150]]
            assert near(firsts, logits.max(axis=1))


def test_matrices_live_as_long_as_they_are_read(made, two, monkeypatch, ids):
    """A session that packs no copies keeps them; one that makes them uint8 is given them early."""
    row = ids(150)
    expected = read(two[1], row)[1].read(0, 0, 149)

    def same(model: Model) -> bool:
        found = read(model, row)[1].read(0, 0, 149)
        return all(near(*pair, 1e-5) for pair in zip(found, expected, strict=True))

    assert same(Model(made(), tuning=Tuning(entries=UNPACKED, prefill_precision="int8")))
    for module in (models, reading):
        monkeypatch.setattr(module, "int8_overflows", lambda: True)
    assert same(Model(made(), prefill_precision="int8"))


def test_results_of_one_kind_are_not_taken_for_the_other(two):
    own, int8 = two
    assert own.fingerprint != int8.fingerprint
    assert str(int8.tuning).endswith(", prompts in int8")


def test_what_cannot_read_prompts_in_int8_says_why(made, ours, tmp_path):
    with pytest.raises(fastgen.ModelError, match="for models in int4, it is in fp32"):
        fastgen.load(ours.directory, prefill_precision="int8")
    with pytest.raises(ValueError, match="prefill_precision must be same or int8, got 'fp16'"):
        fastgen.load(made(), prefill_precision="fp16")
    copy = shutil.copytree(made(), tmp_path / "copy")
    told = json.loads((copy / "fastgen.json").read_text())
    for name in ("prompts.onnx", "unpack.onnx"):
        del told["files"][name]
    (copy / "fastgen.json").write_text(json.dumps(told))
    with pytest.raises(fastgen.ModelError, match="an older fastgen exported it"):
        fastgen.load(copy, prefill_precision="int8")
    (copy / "fastgen.json").write_text(json.dumps(told | {"no_prompts": "its experts"}))
    with pytest.raises(fastgen.ModelError, match=r"prefill_precision=\"int8\": its experts"):
        fastgen.load(copy, prefill_precision="int8")


def test_graphs_that_have_no_such_form_are_left_alone(made, ours, tmp_path):
    assert prefill_int8.write(Path(shutil.copytree(ours.directory, tmp_path / "fp32"))).startswith(
        "none"
    )
    for name, change, expected in (
        ("experts", lambda node: setattr(node, "op_type", "QMoE"), "its experts"),
        ("foreign", other_scales, "its matrices of 4 bits are not stored as"),
    ):
        copy = shutil.copytree(made(), tmp_path / name)
        model = ir.load(made() / "model.onnx")
        change(nodes_in_4_bits(model)[0])
        ir.save(model, copy / "model.onnx")
        assert prefill_int8.write(copy).startswith(expected)


def other_scales(node: ir.Node) -> None:
    scales = constant(node.inputs[2]).astype(np.float16)
    node.inputs[2].const_value = ir.tensor(scales, name=node.inputs[2].name)


def test_the_commands_take_it(made):
    text = ["The quick brown fox " * 20, "--max-new-tokens", "3"]
    code, said, _ = run("generate", "--model", made(), "--prefill-precision", "int8", *text)
    assert code == 0 and said.startswith(text[0])
    code, _, err = run("generate", "--prefill-precision", "int8", *text)
    assert code == 2 and 'prefill_precision="int8": they are for models in int4' in err


def test_the_old_names_go_on_working(made, tmp_path):
    for load in (fastgen.load, fastgen.CausalLM, fastgen.CausalLM.from_pretrained):
        with pytest.warns(DeprecationWarning, match="prompts is now named prefill_p") as warned:
            model = load(made(), prompts="int8")
        assert [one.filename for one in warned] == [__file__]
        assert model.model.tuning.prefill_precision == "int8"
    text = ["The quick brown fox " * 20, "--max-new-tokens", "3"]
    code, said, err = run("generate", "--model", made(), "--prompts", "int8", *text)
    assert (code, err) == (0, "fastgen: --prompts is now named --prefill-precision\n")
    assert said == run("generate", "--model", made(), "--prefill-precision", "int8", *text)[1]
    assert "--prompts" not in run("generate", "--help")[1]


def test_the_tuned_file_of_an_older_version_is_read(made, tmp_path):
    copy = shutil.copytree(made(), tmp_path / "model")
    tuning.write(copy, Tuning(prefill_precision="int8"))
    written = json.loads((copy / "tuned.json").read_text())["tuning"]
    assert written["prompts"] == "int8" and "prefill_precision" not in written
    assert tuning.read(copy).prefill_precision == "int8"


def test_tune_tries_it_only_where_the_memory_is_allowed(made, ours, tmp_path):
    copy = shutil.copytree(made(), tmp_path / "model")
    assert {one.tuning.prefill_precision for one in tune.candidates(copy)} == {"same"}
    found = tune.candidates(copy, "int8")
    assert {one.tuning.prefill_precision for one in found} == {"same", "int8"}
    assert {one.tuning.prefill_precision for one in tune.candidates(ours.directory, "int8")} == {
        "same"
    }
    few = [Candidate(copy, Tuning(prefill_precision=one)) for one in ("same", "int8")]
    tune.measure(few, Workload(prompt=100, new=2), 1, lambda: None)
    assert 0 < few[1].divergence < tune.ROUNDED
    few[0].prefill, few[1].prefill = [2.0], [1.0]
    few[0].decode = few[1].decode = [0.1]
    assert tune.best(few, 2) is few[1]
    tuning.write(copy, few[1].tuning)
    assert Model(copy).prefill_session is not None
    assert Model(copy, prefill_precision="same").prefill_session is None
    said = run("info", copy)[1]
    assert "prompts in int8" in said and 'int4 (prefill_precision="int8" reads' in said
    code, _, err = run("tune", ours.directory, "--prefill-precision", "int8")
    assert code == 2 and "for models in int4" in err
