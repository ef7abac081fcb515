"""Layers with a window are shown what they see: the same numbers, from fewer keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny
from calls import generate
from click.testing import CliRunner
from tiny import left_padded, ragged

import fastgen
from fastgen import PrefixCache, commands
from fastgen.engine.cache import Cache
from fastgen.engine.model import BoundStep
from fastgen.engine.prefill import WHOLE, Chunks
from fastgen.export import export
from fastgen.export.rewrite import window
from fastgen.export.source.origin import Tolerance
from fastgen.store.graph_io import GRAIN, first_shown, window_start
from fastgen.store.model_info import GRAPH, ModelInfo
from fastgen.system.memory import give_back, lazy_zeros

WINDOW = 8
LOOSE = Tolerance(max_difference=1.0, kl=1.0, top1=0.0, greedy=False)
ROWS = ragged(3, (90, 17, 60))
KNOBS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "seed": 5},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "lookup": {"prompt_lookup_num_tokens": 4},
    "guidance": {"guidance_scale": 1.5, "negative_prompt_ids": [[5, 6, 7]]},
}


@pytest.fixture
def shown(monkeypatch) -> list[int]:
    """The first tokens that were shown, as they moved."""
    real, starts = BoundStep.show, []

    def show(call: BoundStep, window: int, start: int) -> None:
        starts.append(start)
        real(call, window, start)

    monkeypatch.setattr(BoundStep, "show", show)
    return starts


@pytest.fixture(params=["mistral", "gemma2", "gemma3_text"])
def windowed(pair, request) -> Iterator[fastgen.CausalLM]:
    """A model with windows of eight tokens, which is shown them eight by eight."""
    _, model = pair(request.param)
    grain, model.model.grain = model.model.grain, WINDOW
    yield model
    model.model.grain = grain


def outputs(model: fastgen.CausalLM, rows: Any, chunks: Chunks = WHOLE, **knobs: Any) -> Any:
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True, "output_logits": True}
    return generate(model, rows, chunks, **settings, eos_token_id=None, **knobs)


def everything(model: fastgen.CausalLM, rows: Any, **knobs: Any) -> Any:
    """The logits of a model each of whose layers is shown every token."""
    grain, model.model.grain = model.model.grain, 1 << 20
    try:
        return outputs(model, rows, **knobs)
    finally:
        model.model.grain = grain


@pytest.mark.parametrize("name", KNOBS)
def test_every_search_says_what_it_says_if_all_is_shown(windowed, name, shown):
    expected = everything(windowed, ROWS, **KNOBS[name])
    assert max(shown) == 0
    found = outputs(windowed, ROWS, **KNOBS[name])
    assert max(shown) >= 17 + 20 - 3 * WINDOW  # the shortest row tells
    assert found.sequences == expected.sequences
    for one, other in zip(found.logits, expected.logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_it_says_what_transformers_says(pair, windowed):
    model, _ = pair(windowed.model.info.model_type)
    knobs = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    found = windowed.generate(ROWS, **knobs)
    ids, mask = left_padded(ROWS)
    expected = model.generate(ids, attention_mask=mask, pad_token_id=0, **knobs)
    assert [row[-20:] for row in found] == expected[:, -20:].tolist()


def test_only_layers_with_a_window_count_otherwise(pair):
    for kind, windows in {
        "llama": (),
        "mistral": (WINDOW, WINDOW),
        "gemma2": (WINDOW, None, WINDOW, None),
        "gemma3_text": (WINDOW, WINDOW, None, WINDOW, WINDOW, None),
    }.items():
        _, model = pair(kind)
        assert model.model.info.windows == windows
        graph = ir.load(model.directory / GRAPH).graph
        names = {value.name for value in graph.inputs}
        assert (window_start(WINDOW).name in names) is bool(windows)
        starts = [one for one in graph.inputs if one.name == window_start(WINDOW).name]
        counted = {user.outputs[0] for value in starts for user, _ in value.uses()}
        nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
        assert [bool(counted & set(node.inputs)) for node in nodes] == [
            bool(window) for window in windows or (None, None)
        ]


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_keys_in_8_bits_have_windows_too(kind, tmp_path, shown):
    export(
        tiny.build(kind),
        tmp_path / kind,
        precision="fp32",
        cache_precision="int8",
        tolerance=LOOSE,
        progress=None,
    )
    assert max(shown) > 0  # as it was proved
    model = fastgen.load(tmp_path / kind)
    expected = everything(model, ROWS)
    model.model.grain = WINDOW
    found = outputs(model, ROWS)
    for one, other in zip(found.logits, expected.logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


def test_the_proof_comes_to_a_layer_that_is_not_shown_all(tmp_path, shown):
    export(tiny.build("mistral"), tmp_path / "model", precision="fp32", progress=None)
    assert max(shown) > 0


def test_a_wrong_count_is_found_by_the_proof(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fastgen.engine.model.first_shown", lambda held, window, grain: max(0, held - window // 2)
    )
    with pytest.raises(ValueError, match="disagrees with the original"):
        export(tiny.build("mistral"), tmp_path / "model", precision="fp32", progress=None)


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> fastgen.CausalLM:
    """A model with windows and room for several chunks."""
    model = tiny.build("gemma3_text", max_position_embeddings=1500, sliding_window=40)
    out = tmp_path_factory.mktemp("long") / "model"
    return fastgen.load(export(model, out, precision="fp32", progress=None))


@pytest.mark.parametrize("chunk", [64, 256, 384, 512])
def test_a_hit_of_the_prefix_cache_is_a_fresh_prefill_bit_for_bit(long, chunk, shown):
    chunks = Chunks(row=chunk)
    (row,) = ragged(7, (1100,))
    fresh = outputs(long, [row], chunks)
    for shared in (600, 800, 1050):
        cache = PrefixCache()
        generate(long, [row[:shared]], chunks, max_new_tokens=1, prefix_cache=cache)
        found = outputs(long, [row], chunks, prefix_cache=cache)
        assert cache.tokens_reused >= shared // chunk * chunk
        assert found.sequences == fresh.sequences
        for one, other in zip(found.logits, fresh.logits, strict=True):
            assert np.array_equal(one, other)
    assert max(shown) == 1100 // 256 * 256 - 256


def test_what_is_scored_is_the_same(long, monkeypatch):
    rows = ragged(8, (900, 700))
    found = long.score(rows)
    monkeypatch.setattr(long.model, "grain", 1 << 20)
    for one, other in zip(found, long.score(rows), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_an_older_export_shows_everything(pair, tmp_path, monkeypatch, shown):
    monkeypatch.setattr(window, "bound", lambda model: [])
    original, new = pair("mistral")
    path = export(original, tmp_path / "old", precision="fp32", progress=None)
    info = json.loads((path / "fastgen.json").read_text())
    del info["windows"]
    (path / "fastgen.json").write_text(json.dumps(info))
    old = fastgen.load(path)
    old.model.grain = WINDOW
    assert outputs(old, ROWS).sequences == outputs(new, ROWS).sequences
    assert not any(shown)


@pytest.mark.parametrize("wrong", [[WINDOW], [0, 8], "8", [True, None], None])
def test_windows_of_a_damaged_description_are_refused(pair, tmp_path, wrong):
    info = json.loads((pair("mistral")[1].directory / "fastgen.json").read_text())
    assert info["windows"] == [WINDOW, WINDOW]
    (tmp_path / "fastgen.json").write_text(json.dumps(info | {"windows": wrong}))
    with pytest.raises(fastgen.ModelError, match="windows"):
        ModelInfo.read(tmp_path)


def test_info_says_what_a_row_takes(long, pair):
    info = long.model.info
    assert info.cache_bytes == 6 * 2 * 2 * 16 * 4
    assert info.row_bytes(1500) == (2 * 1500 + 4 * (1500 - 1024)) * 2 * 2 * 16 * 4
    assert info.row_bytes(300) == 300 * info.cache_bytes
    shown = CliRunner().invoke(commands.info, [str(long.directory)]).output
    assert "6 with keys and values, 4 of them with a window of 40 tokens" in shown
    assert f"{info.row_bytes(1500) / 1e6:.1f} MB a row of 1,500" in shown
    plain = pair("llama")[1].model.info
    assert plain.row_bytes(99) == 99 * plain.cache_bytes


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")


@pytest.fixture
def caches(monkeypatch) -> list[Cache]:
    """Those that were made."""
    real, made = Cache.__init__, []

    def init(self: Cache, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Cache, "__init__", init)
    return made


@on_linux
@pytest.mark.parametrize("name", ["greedy", "beams", "lookup"])
def test_what_is_not_shown_takes_no_memory(long, name, caches, monkeypatch):
    rows = ragged(9, (1100, 620))
    found = outputs(fastgen.load(long.directory), rows, **KNOBS[name])
    cache = max(caches, key=lambda one: one.size)
    caches.clear()
    monkeypatch.setattr(Cache, "forget", lambda *_: None)
    kept = outputs(fastgen.load(long.directory), rows, **KNOBS[name])
    assert kept.sequences == found.sequences
    for one, other in zip(kept.logits, found.logits, strict=True):
        assert np.array_equal(one, other)
    assert {first_shown(620, 40), first_shown(1100, 40)} == {256, 768}
    whole = max(caches, key=lambda one: one.size)
    used = len(rows) * KNOBS[name].get("num_beams", 1)
    for place, (forgot, remembered) in enumerate(
        zip(cache.slots(0, used), whole.slots(0, used), strict=True)
    ):
        gone = [0] if cache.windows[place // 2] is None else [256, 768]
        for mine, all_of_it in zip(forgot, remembered, strict=True):
            first = next(at for at in gone if mine[:, at : at + 64].any())
            assert not mine[:, 64 : max(64, first - 64)].any()  # whole pages of 64 tokens
            assert all_of_it[:, :620].any(axis=2).all()


@on_linux
def test_only_whole_pages_are_given_back():
    array = lazy_zeros((1000, 16), np.float32)  # 64 bytes a row
    array[:] = 1
    give_back(array, 3, 130)
    zero = np.flatnonzero(~array.any(axis=1))
    assert zero.tolist() == list(range(64, 128))
    give_back(array, 130, 190)
    assert (~array.any(axis=1)).sum() == 64


@on_linux
def test_a_slot_is_looked_at_when_it_has_gone_on_or_holds_another_row(monkeypatch):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "fastgen.engine.cache.give_back", lambda head, start, end: asked.append((start, end))
    )
    cache = Cache([(1, 4), (1, 4)], rows=3, capacity=9 * GRAIN, windows=(None, 8))

    def forgotten(*lengths: int) -> list[tuple[int, int]]:
        asked.clear()
        cache.lengths[:] = lengths
        cache.forget(0, 3)
        return asked[::2]  # of keys; those of values are the same

    assert forgotten(10, 600, 0) == [(0, 256)]
    assert forgotten(11, 601, 0) == []
    assert forgotten(300, 767, 0) == [(0, 0)]
    assert forgotten(300, 768, 0) == [(0, 512)]
    cache.take([1, 0, 1])
    assert forgotten(768, 300, 768) == [(0, 512), (0, 0), (0, 512)]
    cache.take([0, 1, 0], start=768)  # what lies before stays where it is
    assert forgotten(768, 300, 768) == []
    cache.reserve(3, 20 * GRAIN)
    assert forgotten(768, 300, 768) == [(0, 512), (0, 0), (0, 512)]
    cache.begin(0)
    assert forgotten(800, 300, 768) == [(0, 512)]
