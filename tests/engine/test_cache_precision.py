"""Keys and values in int8: near float32, on every search, at every position, and told of."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import tiny
import tokenizers
import torch

import fastgen
from fastgen import commands
from fastgen.engine import memory_estimate
from fastgen.engine.cache import Cache
from fastgen.engine.kv_int8 import Codes
from fastgen.engine.model import Model
from fastgen.engine.prefill import CHUNK, Chunks, Prefill
from fastgen.engine.prompt_reader import PromptReader
from fastgen.export import Mismatch, bundle, export, options, pipeline
from fastgen.export.prove.reader import Reader
from fastgen.export.quantize import calibrate, kv_int8
from fastgen.export.rewrite import edit, onnx_file
from fastgen.export.source.origin import Tolerance
from fastgen.sampling.softmax import log_softmax
from fastgen.store import hub
from fastgen.store.model_info import GRAPH, INFO, SCALES, ModelInfo

LOOSE = Tolerance(max_difference=1.0, kl=0.02, top1=0.9, greedy=False)


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    """`exported(kind)`: a tiny model's export with float32 keys and values, and one with int8."""
    made: dict[str, tuple[fastgen.CausalLM, fastgen.CausalLM]] = {}

    def make(kind: str) -> tuple[fastgen.CausalLM, fastgen.CausalLM]:
        if kind not in made:
            reference, plain = pair(kind)
            path = tmp_path_factory.mktemp("int8") / kind
            # For ids only, it is calibrated on what it writes: a random model has no likely text.
            export(
                reference,
                path,
                precision="fp32",
                cache_precision="int8",
                tolerance=LOOSE,
                progress=None,
            )
            made[kind] = plain, fastgen.load(path)
        return made[kind]

    return make


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
def both(request, exported):
    """Learned positions; a rotation and shared heads; softcap and windows."""
    return exported(request.param)


def rows_of(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(lengths)
    return [random.integers(3, tiny.VOCAB, length) for length in lengths]


def logits(model: Model, rows: list[np.ndarray], chunk: int = 1000) -> list[np.ndarray]:
    """float32 [length, vocab] of each of ragged rows, fed by `chunk` tokens."""
    held = model.new_cache(len(rows), 2 * max(len(row) for row in rows))
    parts: list[list[np.ndarray]] = [[] for _ in rows]
    for at in range(0, max(len(row) for row in rows), chunk):
        new = [row[at : at + chunk] for row in rows]
        positions = np.broadcast_to(np.arange(max(map(len, new))), (len(rows), max(map(len, new))))
        positions = np.minimum(positions, np.maximum([[len(ids) - 1] for ids in new], 0))
        out = model.forward(new, held, logits_positions=positions)
        for part, ids, mine in zip(parts, new, out, strict=True):
            part.append(mine[: len(ids)].copy())
    return [np.concatenate(part) for part in parts]


def apart(one: list[np.ndarray], two: list[np.ndarray]) -> float:
    """The largest difference, as a share of the largest logit."""
    scale = max(float(np.abs(array).max()) for array in one)
    return max(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True)) / scale


def test_keys_and_values_take_a_quarter(both):
    plain, model = both
    assert model.model.info.cache_dtype == "int8"
    assert 4 * model.model.info.cache_bytes == plain.model.info.cache_bytes
    assert {view.dtype for view in model.model.new_cache(2, 8).slots(0, 2)} == {np.dtype("int8")}
    assert {view.dtype for view in plain.model.new_cache(2, 8).slots(0, 2)} == {np.dtype("f4")}


def test_logits_are_near_those_of_float32_keys_and_values(both):
    plain, model = both
    rows = rows_of(90, 17, 41)
    assert 0 < apart(logits(plain.model, rows), logits(model.model, rows)) < 0.05


def test_a_row_does_not_feel_its_neighbours_nor_its_chunks(both):
    """Products of several rows round otherwise, and a code may fall on its other side: no more."""
    _, model = both
    rows = rows_of(90, 17, 41)
    together = logits(model.model, rows)
    assert apart(together, [logits(model.model, [row])[0] for row in rows]) < 0.01
    assert apart(together, logits(model.model, rows, chunk=7)) < 0.01
    assert apart(together[1:2], [logits(model.model, rows[1:2], chunk=1)[0]]) < 0.01


def test_what_is_generated_is_likeliest_with_float32_too_but_for_near_ties(both):
    plain, model = both
    prompts = [row.tolist() for row in rows_of(30, 5, 12)]
    knobs = {"max_new_tokens": 8, "eos_token_id": None}
    for prompt in prompts:
        row = np.array(model.generate([prompt], **knobs)[0])
        (expected,) = logits(plain.model, [row])
        steps = np.arange(len(prompt) - 1, len(row) - 1)
        missed = expected[steps].max(axis=1) - expected[steps, row[1:][steps]]
        assert missed.max() <= 0.05 * np.abs(expected).max()


def test_beams_are_as_likely_as_those_with_float32(both):
    plain, _ = both
    for prompt in (row.tolist() for row in rows_of(30, 5)):
        knobs = {"max_new_tokens": 8, "num_beams": 3, "eos_token_id": None}
        rows = [one.generate([prompt], **knobs)[0] for one in both]
        best, found = (float(np.sum(scores[1:])) for scores in plain.score(rows))
        assert found > best - 0.5


def test_rows_beams_and_guesses_agree_with_each_other(exported):
    _, model = exported("llama")
    prompts = [row.tolist() for row in rows_of(30, 5, 12)]
    knobs = {"max_new_tokens": 12, "eos_token_id": None}
    together = model.generate(prompts, **knobs)
    for prompt, row in zip(prompts, together, strict=True):
        assert model.generate([prompt], **knobs)[0] == row[-len(prompt) - 12 :]
    assert model.generate(prompts, prompt_lookup_num_tokens=3, **knobs) == together
    assert model.generate(prompts, assistant_model=model, **knobs) == together
    beams = {"num_beams": 3, **knobs}
    alone = [model.generate([prompt], **beams)[0] for prompt in prompts]
    for prompt, row, one in zip(prompts, model.generate(prompts, **beams), alone, strict=True):
        assert row[-len(prompt) - 12 :] == one


def test_scores_are_near_those_of_float32(both):
    plain, model = both
    rows = [row.tolist() for row in rows_of(60, 20)]
    for one, two in zip(plain.score(rows), model.score(rows), strict=True):
        np.testing.assert_allclose(one[1:], two[1:], atol=0.15)


def test_moving_rows_keeps_the_codes():
    held = Cache([(2, 3), (1, 4)], rows=3, capacity=4, dtype="int8")
    for number, view in enumerate(held.slots(0, 3)):
        view[:] = np.arange(view.size).reshape(view.shape) % 100 - 50 + number
    held.lengths[:] = 4, 3, 2
    before = [view.copy() for view in held.slots(0, 3)]
    held.take([2, 0, 0])
    held.reserve(5, 9)
    assert held.lengths.tolist() == [2, 4, 4, 0, 0]
    for view, old in zip(held.slots(0, 3), before, strict=True):
        assert view.dtype == np.int8
        assert np.array_equal(view[0, :, :2], old[2, :, :2])
        assert np.array_equal(view[2, :, :4], old[0])


# --- prompts -----------------------------------------------------------------------------------


def kept(model: Model, rows: list[np.ndarray], **knobs) -> tuple[np.ndarray, list[np.ndarray]]:
    """The logits after prompts that were read a chunk at a time, and what is kept of them."""
    held = model.new_cache(len(rows), max(len(row) for row in rows) + CHUNK)
    reading = Prefill(model, held, rows, 0, **knobs)
    while not reading.done:
        reading.read()
    lengths = held.lengths.tolist()
    return reading.logits, [part for i, n in enumerate(lengths) for part in held.read(i, 0, n)]


def test_a_prompt_of_one_chunk_is_read_as_with_float32_keys(both):
    plain, model = both
    rows = rows_of(5, 17, 90)
    expected, _ = kept(plain.model, rows)
    found, parts = kept(model.model, rows)
    assert {part.dtype for part in parts} == {np.dtype("int8")}
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_what_is_kept_of_a_prompt_is_what_the_kernel_would_keep(both):
    _, model = both
    (row,) = rows_of(60)
    held = model.model.new_cache(1, 64)
    for at in range(60):
        model.model.forward([row[at : at + 1]], held)
    _, found = kept(model.model, [row])
    for part, expected in zip(found, held.read(0, 0, 60), strict=True):
        apart = np.abs(part.astype(int) - expected)[:2]  # later layers see other keys
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01


def test_chunks_see_what_was_kept_and_so_do_later_calls(exported):
    _, model = exported("llama")
    (row,) = rows_of(90)
    known = fastgen.PrefixCache()
    first, parts = kept(model.model, [row], prefix_cache=known, chunks=Chunks(32, 32))
    again, same = kept(model.model, [row], prefix_cache=known, chunks=Chunks(32, 32))
    assert known.hits == 1 and known.tokens_reused == 64
    np.testing.assert_array_equal(first, again)
    for one, two in zip(parts, same, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_row_is_read_as_it_is_alone(both):
    _, model = both
    rows = rows_of(5, 17, 90)
    together, _ = kept(model.model, rows)
    for row, mine in zip(rows, together, strict=True):
        alone, _ = kept(model.model, [row])
        np.testing.assert_allclose(mine, alone[0], atol=1e-4 * np.abs(mine).max())


def test_codes_stand_for_keys_and_values():
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / SCALES
        np.save(path, random.uniform(0.01, 0.1, 2 * (2 * 3 + 1 * 4 + 2 * 3)).astype(np.float32))
        codes = Codes(path, [(2, 3), (1, 4), (2, 3)])
        flat = np.load(path)
    parts = [random.integers(-128, 128, (4, 2, 7, 3)), random.integers(-128, 128, (2, 1, 7, 4))]
    floats = [np.empty(part.shape, np.float32) for part in parts]
    found = [np.empty(part.shape, np.int8) for part in parts]
    codes.decode([part.astype(np.int8) for part in parts], floats)
    codes.encode(floats, found)
    for expected, one in zip(parts, found, strict=True):
        np.testing.assert_array_equal(one, expected)
    # The third layer's keys are the second pair of the first shape.
    np.testing.assert_allclose(floats[0][2, 1, :, 2], parts[0][2, 1, :, 2] * flat[12 + 8 + 5])
    codes.encode([np.full(floats[0].shape, 1e9), np.full(floats[1].shape, -1e9)], found)
    assert (found[0] == 127).all() and (found[1] == -128).all()


def test_a_reader_of_float32_keys_is_the_cache_itself(pair):
    _, plain = pair("gpt2")
    held = plain.model.new_cache(2, 8)
    assert PromptReader(plain.model, held, 2, 8).floats is held


def test_scales_that_are_missing_or_damaged(exported, tmp_path):
    _, model = exported("gpt2")
    without = changed(model.directory, tmp_path / "without")
    said = json.loads((without / INFO).read_text())
    del said["files"][SCALES]
    (without / INFO).write_text(json.dumps(said))
    (without / SCALES).unlink()
    with pytest.raises(fastgen.ModelError, match="as exports of older versions: export the model"):
        fastgen.load(without)
    np.save(without / SCALES, np.zeros(3, np.float32))
    with pytest.raises(fastgen.ModelError, match=r"is damaged \(expected 128 positive float32"):
        fastgen.load(without)


# --- scales ------------------------------------------------------------------------------------


def test_scales_cover_what_was_seen_and_channels_that_were_silent():
    found = kv_int8.scales(np.array([[2.0, 0.0, 1.0], [0.5, 4.0, 0.1]], np.float32))
    assert found.dtype == np.float32 and found.shape == (1, 2, 1, 3)
    np.testing.assert_allclose(127 * found[0, :, 0] / kv_int8.MARGIN, [[2, 4, 1], [0.5, 4, 0.1]])
    assert (kv_int8.scales(np.zeros((1, 2), np.float32)) > 0).all()


def with_floats(loaded: onnx_ir.Model) -> None:
    """Let the products of a graph in int8 take activations as they are, in place.

    Where these are rounded, the least difference of a key becomes a step of some, and two graphs
    differ by what all that rounding costs, whatever is asked of the keys.
    """
    for node in list(loaded.graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", 1)
        if node.op_type != "MatMulIntegerToFloat":
            continue
        rounded, codes, scales = (node.inputs[place] for place in (0, 1, 3))
        weight = edit.constant(codes).astype(np.float32) * edit.constant(scales)
        floats = edit.add_initializer(loaded.graph, f"{codes.name}.floats", weight)
        ((scaled, _),) = node.outputs[0].uses()
        assert scaled.op_type == "Mul" and rounded.producer().op_type == "QuantizeLinear"
        (product,) = edit.insert(scaled, "MatMul", [rounded.producer().inputs[0], floats])
        edit.take_place(scaled, product)
    edit.clean_up(loaded)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The embedded demo model with float32 products, and rows of its own language to calibrate
    and to measure."""
    directory = tmp_path_factory.mktemp("demo") / "floats"
    shutil.copytree(hub.DEMO, directory)
    loaded = onnx_ir.load(directory / GRAPH)
    with_floats(loaded)
    assert not any(node.op_type == "QuantizeLinear" for node in loaded.graph)
    onnx_file.save(loaded, directory / GRAPH)
    bundle.seal(directory, ModelInfo.parse(directory))
    model = fastgen.load(directory)
    info = model.model.info
    text = Path(kv_int8.__file__).parents[1].joinpath("held_out.txt").read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_file(str(hub.DEMO / "tokenizer.json"))
    rows = Reader(tokenizer, info.vocab_size, calibrate.ROW).rows(text)
    return model.model, rows[0::2], rows[1::2]


def quantised_demo(demo, directory, limit: int) -> Model:
    model, calibration, _ = demo
    shutil.copytree(model.directory, directory)
    loaded = onnx_ir.load(model.directory / GRAPH)
    scales = kv_int8.quantize(loaded, kv_int8.reach(loaded, calibration, limit))
    onnx_file.save(loaded, directory / GRAPH)
    np.save(directory / SCALES, scales)
    bundle.seal(directory, dataclasses.replace(ModelInfo.parse(directory), cache_dtype="int8"))
    return Model(directory)


def test_a_trained_model_hardly_changes_in_long_contexts(demo, tmp_path):
    """Rows that calibrate from position 0 alone miss what rotations make of keys later on."""
    model, _, evaluation = demo
    limit = model.info.max_length
    rows = kv_int8.long_rows(evaluation, limit)[:3]
    assert {len(row) for row in rows} == {limit}
    expected = [log_softmax(one) for one in logits(model, rows, chunk=CHUNK)]

    def kl(other: Model) -> float:
        found = [log_softmax(one) for one in logits(other, rows, chunk=CHUNK)]
        pairs = zip(expected, found, strict=True)
        return float(np.mean([(np.exp(p) * (p - q)).sum(1).mean() for p, q in pairs]))

    everywhere = kl(quantised_demo(demo, tmp_path / "everywhere", limit))
    at_first = kl(quantised_demo(demo, tmp_path / "at first", calibrate.ROW))
    assert everywhere < 4e-4
    assert at_first > 5 * everywhere


def test_a_position_changes_a_rotated_key_and_no_value(demo):
    loaded = onnx_ir.load(demo[0].directory / GRAPH)
    row = demo[1][0]
    near = kv_int8.reach(loaded, [row], len(row))
    far = kv_int8.reach(loaded, [row, row], 512)  # at 0 and at 384
    for name in near:
        if name.endswith("value"):
            np.testing.assert_allclose(near[name], far[name], rtol=1e-2)
        else:
            assert (far[name] >= near[name]).all() and (far[name] > 1.05 * near[name]).any()


def test_long_rows_join_short_ones():
    rows = [np.arange(100) + 100 * i for i in range(25)]
    joined = kv_int8.long_rows(rows, None)
    assert [len(row) for row in joined] == [kv_int8.LONG] * 2
    assert np.array_equal(np.concatenate(joined), np.arange(2 * kv_int8.LONG))
    assert [len(row) for row in kv_int8.long_rows(rows[:3], 128)] == [128, 128]
    assert [len(row) for row in kv_int8.long_rows(rows[:1], 128)] == [100]


# --- export ------------------------------------------------------------------------------------


def test_the_report_says_what_the_cache_costs(both):
    _, model = both
    report = json.loads((model.directory / "report.json").read_text())
    assert (report["precision"], report["cache_precision"]) == ("fp32", "int8")
    assert report["fp32"]["greedy"]["same"] == report["fp32"]["greedy"]["tokens"]
    assert report["mismatch"] == report["fp32"]["mismatch"] == []
    quality = report["cache"]["quality"]
    assert quality == report["quality"]
    assert 0 < quality["kl"] < 0.02 and quality["top1"] > 0.9 and quality["tokens"] > 200
    assert [step["step"] for step in report["steps"]][5:] == [
        "quantise keys and values",
        "int8 cache greedy text",
        "int8 cache compared",
        "int8 cache text compared",
    ]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_with_quantised_weights(exported, pair, precision, tmp_path):
    reference, _ = pair("llama")
    loose = dataclasses.replace(LOOSE, kl=0.3, top1=0.5)
    path = export(
        reference,
        tmp_path / "out",
        precision=precision,
        cache_precision="int8",
        tolerance=loose,
        progress=None,
    )
    report = json.loads((path / "report.json").read_text())
    assert report["precision"] == precision and report["cache_precision"] == "int8"
    assert report["quality"] != report["cache"]["quality"]
    assert report["matrices"] and report["steps"][-2]["step"] == f"{precision} text compared"
    model = fastgen.load(path)
    assert model.model.info.cache_dtype == "int8"
    rows = rows_of(40, 9)
    share = {"int8": 0.1, "int4": 0.7}[precision]  # of weights, mostly
    expected = []
    with torch.no_grad():
        for row in rows:
            expected.append(reference(torch.from_numpy(row)[None]).logits[0].numpy())
    assert apart(expected, logits(model.model, rows)) < share


def test_a_cache_beyond_the_tolerance_is_refused(pair, tmp_path):
    strict = dataclasses.replace(LOOSE, kl=1e-12)
    with pytest.raises(Mismatch, match="KL divergence"):
        export(
            pair("gpt2")[0],
            tmp_path / "out",
            precision="fp32",
            cache_precision="int8",
            tolerance=strict,
            progress=None,
        )
    assert not list(tmp_path.iterdir())


def test_an_unknown_cache_precision_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="cache_precision must be one of fp32, int8, got 'int4'"):
        export(tiny.build("gpt2"), tmp_path / "out", cache_precision="int4", progress=None)


def test_the_tolerance_is_that_of_the_coarser():
    usual = options.TOLERANCES
    assert options.usual_tolerance("fp32", "fp32") == usual["fp32"]
    assert options.usual_tolerance("fp32", "int8") == usual["int8"]
    assert options.usual_tolerance("int4", "int8") == usual["int4"]
    bound = options.usual_tolerance("fp32", "int8", 0.5)
    assert bound == dataclasses.replace(usual["int8"], kl=0.5)


@pytest.mark.parametrize(
    ("flags", "name"), [([], "some-int8"), (["--cache-precision", "int8"], "some-int8-kv-int8")]
)
def test_the_flags_of_the_command_line(monkeypatch, pair, tmp_path, flags, name):
    seen = {}

    def made(work):
        seen.update(out=str(work.out), target=work.target)
        shutil.copytree(pair("gpt2")[1].directory, work.out)
        return []

    tiny.build("gpt2").save_pretrained(tmp_path / "some")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "steps", made)
    limits = ["--max-kl", "0.5", "--min-top1", "0.25"]
    commands.cli.main(["export", "some", *limits, *flags], standalone_mode=False)
    assert seen["out"] == name and seen["target"].cache_precision == (flags or ["", "fp32"])[1]
    assert (seen["target"].tolerance.kl, seen["target"].tolerance.top1) == (0.5, 0.25)


def test_info_says_how_keys_and_values_are_stored(exported, capsys):
    for model, words in zip(
        exported("gpt2"), ("float32, 512 bytes", "int8, 128 bytes"), strict=True
    ):
        commands.cli.main(["info", str(model.directory)], standalone_mode=False)
        assert f"{words} a token" in capsys.readouterr().out


# --- fastgen.json ------------------------------------------------------------------------------


def changed(directory, to, **said):
    shutil.copytree(directory, to)
    kept = json.loads((to / INFO).read_text()) | said
    (to / INFO).write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))
    return to


def test_a_directory_that_does_not_say_holds_float32(exported, tmp_path):
    plain, _ = exported("gpt2")
    old = fastgen.load(changed(plain.directory, tmp_path / "old", cache_dtype=None))
    assert old.model.info.cache_dtype == "float32"
    assert old.generate([5, 6], max_new_tokens=2) == plain.generate([5, 6], max_new_tokens=2)


def test_a_kind_of_cache_that_this_version_does_not_know(exported, tmp_path):
    plain, model = exported("gpt2")
    new = changed(plain.directory, tmp_path / "new", cache_dtype="int2")
    with pytest.raises(fastgen.ModelError, match="in int2, this fastgen stores float32 or int8"):
        fastgen.load(new)
    wrong = changed(model.directory, tmp_path / "wrong", cache_dtype="float32")
    with pytest.raises(fastgen.ModelError, match=r"difference: prompt_key_values\.0\.key"):
        fastgen.load(wrong)


def test_the_fewer_tokens_a_chunk_the_more_prompts_are_bounded_for(both):
    info, width = both[1].model.info, 1000
    params = fastgen.Params(max_new_tokens=8)

    def reading(chunk: int, prompts: int) -> int:
        parts = memory_estimate.of_call(info, params, prompts, width, width + 8, chunk=chunk)
        return parts["prompts being read"] // (info.reading_bytes * width)

    assert [reading(chunk, 20) for chunk in (1024, 256, 128, 64)] == [1, 2, 4, 8]
    assert [reading(64, prompts) for prompts in (1, 3, 9)] == [1, 3, 8]
