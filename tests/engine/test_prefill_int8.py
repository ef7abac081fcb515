"""Many tokens in int8: the second form of the matrices, when it is taken, and who has none."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from fastgen.engine import session as sessions
from fastgen.engine.cache import Cache
from fastgen.engine.model import Model
from fastgen.engine.prefill import prefill
from fastgen.engine.session import UNPACKED
from fastgen.export import bundle, export, many_tokens
from fastgen.export.prove import quality
from fastgen.export.quantize import prefill_int8
from fastgen.export.quantize.kernels import Choice, Kernel, Product, codes_values, quantize
from fastgen.export.quantize.prefill_int8 import Form, Kind
from fastgen.export.rewrite import onnx_file
from fastgen.export.rewrite.edit import add_initializer, constant, insert, take_place
from fastgen.store import model_info, tuning
from fastgen.store.model_info import ModelInfo
from fastgen.store.tuning import Tuning
from fastgen.timing import tune
from fastgen.timing.tune import Candidate, Workload

LIMIT = 512
FILES = ("many_tokens.onnx", "many_tokens.uint8.onnx", "unpack.onnx")
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


FROM = 16  # tokens from which the second form is taken here; a tiny model is no measure
MANY = Tuning(prefill_precision="int8", many_from=FROM)


@pytest.fixture(scope="module")
def two(made) -> tuple[Model, Model]:
    """The model with one form of its matrices, and with both."""
    return Model(made(), prefill_precision="same"), Model(made(), tuning=MANY)


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


def held_scales(node: ir.Node) -> ir.Value:
    """Scales as they are stored: they become float32 on loading."""
    cast = node.inputs[2].producer()
    assert cast.op_type == "Cast"
    return cast.inputs[0]


def grid(node: ir.Node) -> np.ndarray:
    """float32 [in, out]: what the codes of a product stand for."""
    kernel = Kernel(4, node.attributes["block_size"].as_int())
    codes, packed = constant(node.inputs[1]), constant(node.inputs[3])
    scales = constant(held_scales(node)).astype(np.float32)
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
        if f"{n.inputs[1].name}.0_of_1.second.int8" in found
    ]
    assert len(layers) == len(names) / 2 == 2 * 5  # all but lm_head
    blocks = []
    for node in layers:
        name = node.inputs[1].name
        codes, channels = (found[f"{name}.0_of_1{end}"] for end in prefill_int8.GIVEN)
        assert codes.dtype == np.int8 and codes.shape == grid(node).shape
        difference = np.abs(codes * channels - grid(node))
        assert (difference <= 0.5001 * channels).all()
        assert (np.abs(codes).max(axis=0) == 127).all()  # no finer grid holds them
        blocks.append(constant(held_scales(node)).shape[1])
    assert max(blocks) > 1


def test_no_weight_is_stored_again(made):
    told = json.loads((made() / "fastgen.json").read_text())["files"]
    assert set(FILES) <= set(told)
    for name in FILES:
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


def test_few_tokens_go_as_without_it_to_the_bit(two, ids):
    own, both = two
    row, prompt = ids(FROM - 1), ids(9)
    assert np.array_equal(read(own, row)[0], read(both, row)[0])
    assert np.array_equal(*(stepped(model, FROM - 1, prompt) for model in two))


def test_so_many_tokens_of_all_rows_that_it_pays_take_the_second_form(two, ids):
    """Of rows that step, and of a text that is read or verified; or as the caller says."""
    prompt, row = ids(9), ids(FROM)
    one, other = (stepped(model, FROM, prompt) for model in two)
    assert not np.array_equal(one, other) and near(one, other)
    for new in ([row], [row[:4]] * 4):
        (own, as_many), (few, many, usual) = (
            [all_logits(model, new, one) for one in choices]
            for model, choices in zip(two, ((None, True), (False, True, None)), strict=True)
        )
        assert np.array_equal(own, few) and np.array_equal(own, as_many)  # which has one form
        assert np.array_equal(usual, many) and not np.array_equal(few, many)
        assert near(few, many, 0.08)  # both are off; codes differ a little from machine to machine


def all_logits(model: Model, new: list[np.ndarray], many: bool | None) -> np.ndarray:
    places = np.arange(len(new[0]))[None].repeat(len(new), axis=0)
    return model.forward(new, model.new_cache(len(new), 64), 0, places, many).copy()


def stepped(model: Model, rows: int, prompt: np.ndarray) -> np.ndarray:
    """float32 [rows, 1, vocab]: what a step of as many rows says, after the same prompt."""
    cache = model.new_cache(rows, 64)
    model.forward([prompt] * rows, cache, many=False)
    return model.forward([prompt[-1:]] * rows, cache).copy()


@pytest.mark.parametrize(
    ("faster_from", "expected"),
    [(1, 2), (3, 4), (8, 8), (9, 16), (33, 64), (65, reading.NEVER)],
)
def test_where_it_pays_is_measured(faster_from, expected):
    asked = []

    def seconds(tokens: int, many: bool) -> float:
        asked.append(tokens)
        busy = 5.0 if len(asked) % 7 == 0 else 0.0  # a busy moment says nothing
        return busy + (1.0 if many == (tokens >= faster_from) else 1.1)

    assert reading.pays_from(seconds) == expected
    assert len(set(asked)) <= 5


def test_a_model_measures_it_on_loading_and_takes_what_was_tuned(made, monkeypatch):
    monkeypatch.setattr(models, "pays_from", lambda seconds: 4 if seconds(4, True) > 0 else None)
    assert Model(made(), prefill_precision="int8").many_from == 4
    assert Model(made(), tuning=MANY).many_from == FROM
    assert Model(made()).many_from is None


def test_it_is_never_taken_where_it_does_not_pay(made, two, ids):
    never = Model(made(), tuning=Tuning(prefill_precision="int8", many_from=reading.NEVER))
    row = ids(300)
    assert np.array_equal(read(two[0], row)[0], read(never, row)[0])


def test_a_row_does_not_feel_its_neighbours(two, ids):
    """Keys and values are the same bits, alone and among ragged rows, in one chunk or two."""
    rows = [ids(n) for n in (1, 2, 66, 130, 257, 300)]
    together, cache = read(two[1], *rows)
    assert near(together, read(two[0], *rows)[0], 0.1)
    for slot, row in enumerate(rows):
        alone, mine = read(two[1], row)
        assert near(together[slot], alone[0])
        for part, whole in zip(
            mine.read(0, 0, len(row)), cache.read(slot, 0, len(row)), strict=True
        ):
            assert near(part, whole, 0.02)  # a sum's last bit may round an activation otherwise
            assert np.median(np.abs(part - whole)) < 1e-6


def test_a_prompt_that_is_too_short_for_it_has_nothing_to_keep():
    assert models.LONG <= prefix_cache.BLOCK


@pytest.mark.parametrize("length", [64, 66, 98, 257, 290, 400])
def test_what_a_prefix_cache_knows_is_a_fresh_prefill(two, length, ids):
    row, kept = ids(length), fastgen.PrefixCache()
    fresh = read(two[1], row)[0]
    for _ in range(2):
        assert np.array_equal(read(two[1], row, prefix_cache=kept)[0], fresh)
    assert kept.hits == 1


def test_with_keys_in_int8_too(made, ids):
    own, int8 = Model(made("int8")), Model(made("int8"), tuning=MANY)
    rows = [ids(n) for n in (1, 90, 300)]
    assert near(read(int8, *rows)[0], read(own, *rows)[0], 0.1)


def test_generation_with_beams_rows_and_guesses(made, two, ids):
    rows = [ids(n).tolist() for n in (90, 150)]
    model = fastgen.CausalLM(made(), tuning=MANY)
    logits = read(two[0], *map(np.array, rows))[0]
    for knobs, each in (
        ({}, 1),
        ({"num_beams": 9, "num_return_sequences": 2}, 2),  # 18 beams step in the second form
        ({"prompt_lookup_num_tokens": 9}, 1),  # and 20 tokens are verified in it
    ):
        found = model.generate(rows, max_new_tokens=8, min_new_tokens=8, **knobs)
        assert np.shape(found) == (2 * each, 158)
        if not knobs:  # the likeliest token, or one that is nearly as likely
            firsts = logits[[0, 1], np.array(found)[:, 150]]
            assert near(firsts, logits.max(axis=1))


def test_matrices_live_as_long_as_they_are_read(made, two, ids):
    """A session that packs no copies keeps them."""
    row = ids(150)
    expected = read(two[1], row)[1].read(0, 0, 149)
    unpacked = Model(made(), tuning=replace(MANY, entries=UNPACKED))
    found = read(unpacked, row)[1].read(0, 0, 149)
    assert all(near(*pair, 1e-5) for pair in zip(found, expected, strict=True))


def in_16_bits(codes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Sums of uint8 by int8 as x86 without VNNI makes them: pairs in 16 bits, which saturate."""
    pairs = codes.astype(np.int64)[:, :, None] * matrix
    pairs = pairs.reshape(len(codes), -1, 2, matrix.shape[1]).sum(axis=2)
    return pairs.clip(-(2**15), 2**15 - 1).sum(axis=1)


def test_sums_of_uint8_are_exact_where_those_of_int8_overflow():
    codes = np.array([[255, 255, 0, 0], [255, 0, 255, 0], [128, 128, 1, 255]], np.uint8)
    matrix = np.array([[127, -127], [127, -127], [127, 127], [-127, 127]], np.int8)
    exact = (codes.astype(np.int64) - 128) @ matrix.astype(np.int64)
    by_int8 = in_16_bits(codes, matrix) - 128 * matrix.sum(axis=0, dtype=np.int64)
    assert not np.array_equal(by_int8, exact)
    other = reading.from_128(matrix.copy())
    pairs = codes.astype(np.int64) @ other.astype(np.int64)  # each two in 32 bits
    corrected = pairs - 128 * codes.sum(axis=1, dtype=np.int64)[:, None]
    corrected -= 128 * (other.astype(np.int64) - 128).sum(axis=0)
    assert np.array_equal(corrected, exact)


@pytest.fixture
def overflows(monkeypatch):
    """A processor whose products of uint8 and int8 overflow."""
    for module in (model_info, sessions):
        monkeypatch.setattr(module, "int8_overflows", lambda: True)


def integers(graph: ir.Graph, outside: dict[str, ir.DataType]) -> list[ir.DataType]:
    """The types of the matrices of all products of integers, also in branches."""
    known = outside | {str(name): value.dtype for name, value in graph.initializers.items()}
    found = []
    for node in graph:
        if node.op_type.startswith("MatMulInteger"):
            found.append(known[str(node.inputs[1].name)])
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                found += integers(attribute.as_graph(), known)
    return found


@pytest.mark.parametrize("form", [Form.CHANNELS, Form.GROUPS])
def test_where_products_overflow_all_matrices_are_uint8_and_nothing_else_changes(
    ours, form, ids, monkeypatch, tmp_path, request
):
    """Matrices in blocks and others per channel, which are int8 in both branches of the file."""
    monkeypatch.setattr(prefill_int8, "GROUP", 32)
    kinds = itertools.cycle([Kernel(8, 32), Kernel(8)])
    directory = in_other_kernels(ours, tmp_path / "mixed", lambda product: Choice(next(kinds)))
    forms = {name: form for kind in prefill_int8.kinds(directory) for name in kind.members}
    assert prefill_int8.write(directory, forms) == ""
    prompt, rows = ids(60), list(ids(40).reshape(20, 2))
    usual = Model(sealed(directory), tuning=MANY)
    expected = read(usual, prompt)[0], all_logits(usual, rows, True), all_logits(usual, rows, False)
    request.getfixturevalue("overflows")
    opened, optimised = sessions.open_session, tmp_path / "optimised.onnx"

    def kept(path: Path, options) -> onnxruntime.InferenceSession:
        options.optimized_model_filepath = str(optimised)
        return opened(path, options)

    monkeypatch.setattr(sessions, "open_session", kept)
    model = Model(directory, tuning=MANY)
    found = read(model, prompt)[0], all_logits(model, rows, True), all_logits(model, rows, False)
    for mine, theirs in zip(found, expected, strict=True):
        assert np.array_equal(mine, theirs)
    assert {*integers(ir.load(optimised).graph, {})} == {ir.DataType.UINT8}


def test_a_processor_whose_products_overflow_has_it_too(made, overflows, tmp_path):
    assert Model(made(), tuning=MANY).many_from == FROM
    found = tune.candidates(made(), "int8")
    assert {one.tuning.prefill_precision for one in found} == {"same", "int8"}
    copy = shutil.copytree(made(), tmp_path / "copy")
    told = json.loads((copy / "fastgen.json").read_text())
    del told["files"]["many_tokens.uint8.onnx"]
    (copy / "fastgen.json").write_text(json.dumps(told))
    with pytest.raises(fastgen.ModelError, match="an older fastgen exported it"):
        fastgen.load(copy, prefill_precision="int8")


def test_results_of_one_kind_are_not_taken_for_the_other(two):
    own, int8 = two
    assert own.fingerprint != int8.fingerprint
    assert str(int8.tuning).endswith(", many tokens in int8")


def test_what_cannot_read_prompts_in_int8_says_why(made, ours, tmp_path):
    with pytest.raises(
        fastgen.ModelError, match="for models in int8 and int4, this one is in fp32"
    ):
        fastgen.load(ours.directory, prefill_precision="int8")
    with pytest.raises(ValueError, match="prefill_precision must be same or int8, got 'fp16'"):
        fastgen.load(made(), prefill_precision="fp16")
    copy = shutil.copytree(made(), tmp_path / "copy")
    told = json.loads((copy / "fastgen.json").read_text())
    for name in FILES:
        del told["files"][name]
    (copy / "fastgen.json").write_text(json.dumps(told))
    with pytest.raises(fastgen.ModelError, match="an older fastgen exported it"):
        fastgen.load(copy, prefill_precision="int8")
    (copy / "fastgen.json").write_text(json.dumps(told | {"no_prompts": "its experts"}))
    with pytest.raises(fastgen.ModelError, match=r"prefill_precision=\"int8\": its experts"):
        fastgen.load(copy, prefill_precision="int8")


def test_graphs_that_have_no_such_form_are_left_alone(made, ours, tmp_path):
    plain = Path(shutil.copytree(ours.directory, tmp_path / "fp32"))
    assert prefill_int8.write(plain).startswith("none")
    every = {n: Form.BLOCKS for kind in prefill_int8.kinds(made()) for n in kind.members}
    blocks = Path(shutil.copytree(made(), tmp_path / "blocks"))
    assert prefill_int8.write(blocks, every).startswith("none")
    for name, change, expected in (
        ("experts", lambda node: setattr(node, "op_type", "QMoE"), "its experts"),
        ("foreign", other_scales, "its matrices in blocks are not stored as"),
    ):
        copy = shutil.copytree(made(), tmp_path / name)
        model = ir.load(made() / "model.onnx")
        change(nodes_in_4_bits(model)[0])
        ir.save(model, copy / "model.onnx")
        assert prefill_int8.write(copy).startswith(expected)


def other_scales(node: ir.Node) -> None:
    held = held_scales(node)
    held.const_value = ir.tensor(constant(held).astype(np.float16), name=held.name)
    held.dtype = ir.DataType.FLOAT16


@pytest.mark.parametrize("unsigned", [False, True])
def test_both_forms_are_kept_packed(made, ids, unsigned, tmp_path, monkeypatch, request):
    """The same bits in either branch, where the second form is not made on loading any more."""
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    if unsigned:
        request.getfixturevalue("overflows")
    prompt, rows = ids(60), list(ids(6).reshape(3, 2))
    plain = Model(made(), tuning=MANY)
    expected = read(plain, prompt)[0], all_logits(plain, rows, True), all_logits(plain, rows, False)
    for offers in (1, 0):
        offered = []
        monkeypatch.setattr(
            sessions, "offer", lambda *a, o=offered: o.append(a) or reading.offer(*a)
        )
        model = Model(made(), tuning=MANY, packed=True)
        assert model.is_packed and model.cautions == [] and len(offered) == offers
        found = (
            read(model, prompt)[0],
            all_logits(model, rows, True),
            all_logits(model, rows, False),
        )
        for mine, theirs in zip(found, expected, strict=True):
            assert np.array_equal(mine, theirs)
    one = Model(made(), prefill_precision="same", packed=True)  # has a place of its own
    assert one.is_packed and one.many_from is None
    assert np.array_equal(read(one, prompt)[0], read(Model(made()), prompt)[0])


def test_the_commands_take_it(made):
    text = ["The quick brown fox " * 20, "--max-new-tokens", "3"]
    code, said, _ = run("generate", "--model", made(), "--prefill-precision", "int8", *text)
    assert code == 0 and said.startswith(text[0])
    code, _, err = run("generate", "--prefill-precision", "int8", *text)
    assert code == 2 and 'prefill_precision="int8": an older fastgen exported it' in err


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
    del written["many_from"]
    whole = json.loads((copy / "tuned.json").read_text()) | {"tuning": written}
    (copy / "tuned.json").write_text(json.dumps(whole))
    assert tuning.read(copy).many_from is None
    (copy / "tuned.json").write_text(json.dumps(whole | {"tuning": written | {"many_from": -1}}))
    with pytest.raises(fastgen.ModelError, match="many_from must be null or a number"):
        tuning.read(copy)


def test_tune_tries_it_only_where_the_memory_is_allowed(made, ours, tmp_path):
    copy = shutil.copytree(made(), tmp_path / "model")
    assert {one.tuning.prefill_precision for one in tune.candidates(copy)} == {"same"}
    info = ModelInfo.read(copy)
    tenth = sum(info.files.values()) // 10
    for more, tried in ((tenth, {"same", "int8"}), (tenth + 1, {"same"})):
        replace(info, many_tokens_bytes=more).write(copy)
        assert {one.tuning.prefill_precision for one in tune.candidates(copy)} == tried
    assert {one.tuning.prefill_precision for one in tune.candidates(copy, "same")} == {"same"}
    info.write(copy)
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
    *_, last = tune.table(few, few[1:], 2)
    assert last == "many tokens in int8 take 0.1 MB of memory more in model"
    assert few[0].measured == few[0].tuning
    few[1].many_from = [8, 4, 16]
    assert few[1].measured.many_from == 8
    tuning.write(copy, few[1].measured)
    assert tuning.read(copy).many_from == 8
    assert Model(copy).many_from is not None
    assert Model(copy, prefill_precision="same").many_from is None
    said = run("info", copy)[1]
    assert "many tokens in int8" in said and "rows faster, for 0.1 MB)" in said
    code, _, err = run("tune", ours.directory, "--prefill-precision", "int8")
    assert code == 2 and "for models in int8 and int4" in err


@pytest.fixture(scope="module")
def eight(made, ours, tmp_path_factory) -> Path:
    """A float32 directory whose matrices are in blocks of 8 bits, with the second form."""
    directory = tmp_path_factory.mktemp("eight") / "model"
    return in_other_kernels(ours, directory, lambda product: Choice(Kernel(8, 32)))


def in_other_kernels(ours, directory: Path, choose: Callable[[Product], Choice]) -> Path:
    """A copy of a float32 directory with matrices in the kernels that `choose` says."""
    shutil.copytree(ours.directory, directory)
    model = ir.load(ours.directory / "model.onnx")
    quantize(model, choose)
    for name in ("model.onnx", "model.onnx.data"):
        (directory / name).unlink()
    onnx_file.save(model, directory / "model.onnx")
    return directory


def sealed(directory: Path) -> Path:
    bundle.seal(directory, replace(ModelInfo.parse(directory), precision="int8"))
    return directory


@pytest.mark.parametrize("form", [Form.CHANNELS, Form.GROUPS])
def test_blocks_of_8_bits_have_it_too_whole_or_by_groups_of_inputs(
    eight, form, ids, monkeypatch, tmp_path
):
    monkeypatch.setattr(prefill_int8, "GROUP", 32)
    copy = Path(shutil.copytree(eight, tmp_path / "copy"))
    forms = {name: form for kind in prefill_int8.kinds(copy) for name in kind.members}
    assert prefill_int8.write(copy, forms) == ""
    made = [value.name for value in ir.load(copy / "unpack.onnx").graph.outputs]
    assert any("_of_2" in name for name in made) == (form is Form.GROUPS)
    own, both = Model(sealed(copy)), Model(copy, tuning=MANY)
    row = ids(60)
    expected, found = read(own, row)[0], read(both, row)[0]
    assert not np.array_equal(expected, found) and near(expected, found)
    assert np.array_equal(stepped(own, 2, row), stepped(both, 2, row))


def test_the_fastest_forms_within_a_divergence():
    """Kinds whose divergence is large for the time that they save go first, as far as needed."""
    few, lot = Kind("few", ("a",), 1_000), Kind("lot", ("b", "c"), 9_000)
    sensed = {
        "few": {Form.CHANNELS: 0.010, Form.GROUPS: 0.002, Form.BLOCKS: 0.0},
        "lot": {Form.CHANNELS: 0.003, Form.GROUPS: 0.001, Form.BLOCKS: 0.0},
    }

    def forms(allowed: float) -> list[Form]:
        return list(many_tokens.chosen([few, lot], sensed, allowed).values())

    assert forms(0.02) == [Form.CHANNELS, Form.CHANNELS]
    assert forms(0.006) == [Form.GROUPS, Form.CHANNELS]
    assert forms(0.001) == [Form.BLOCKS, Form.GROUPS]
    assert forms(0.0) == forms(-1.0) == [Form.BLOCKS, Form.BLOCKS]


class Exported:
    """The parts of an export that `Second` asks for: a graph, an original, a target and text."""

    def __init__(self, directory: Path, original: Model, kl: float, text: list[np.ndarray]) -> None:
        self.directory, self.info = directory, ModelInfo.parse(directory)
        self.original, self.text = original, text
        self.report = {"quality": {"kl": quality.measure(self.logits, Model(directory), text).kl}}
        self.target = SimpleNamespace(tolerance=SimpleNamespace(kl=kl), parts=["weights"])
        self.exact = quality.Exact(
            lambda: lambda row: iter([(0, self.logits(row))]), original.info.vocab_size, np.empty
        )
        self.corpus = SimpleNamespace(calibration=lambda tokens: text)
        self.shown = SimpleNamespace(part=lambda done, total: None)
        self.options = SimpleNamespace(quick=False)

    def judged_on(self, tokens: int) -> list[np.ndarray]:
        return self.text

    def logits(self, row: np.ndarray) -> np.ndarray:
        cache = self.original.new_cache(1, len(row))
        return self.original.forward([row], cache, 0, np.arange(len(row))[None])[0].copy()


def test_an_export_judges_it_and_keeps_its_target(eight, ours, ids, tmp_path):
    text = [ids(100)]

    def told(kl: float) -> tuple[list[str], Exported]:
        copy = Path(shutil.copytree(eight, tmp_path / f"{kl}"))
        work = Exported(sealed(copy), Model(ours.directory), kl, text)
        return many_tokens.Second(work).write(), work

    said, work = told(1.0)
    assert said[0].endswith("int8 per channel") and "KL" in said[1]
    cost = work.report["many_tokens"]["quality"]["kl"]
    assert cost > 0 and work.info.many_tokens_bytes == work.report["many_tokens"]["bytes"] > 0
    target = (work.report["quality"]["kl"] + cost) / 2
    said, work = told(target)
    assert said[0].startswith("none: ") or (
        "as with few" in said[0] and work.report["many_tokens"]["quality"]["kl"] <= target
    )
    said, work = told(1e-12)
    assert said[0].startswith("none: ") and work.info.no_prompts
    assert not any((work.directory / name).exists() for name in FILES)
