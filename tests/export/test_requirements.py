"""An export in bounds: memory, disk and time, what cannot fit, and weights in their own type."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import mmap
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fastgen
from fastgen import __main__
from fastgen.export import pipeline, progress, requirements
from fastgen.export.prove import check
from fastgen.export.rewrite import edit, onnx_file
from fastgen.export.trace import stored
from fastgen.store.report import _notes, table

SETTINGS: dict[str, Any] = {"progress": None, "allow_mismatch": True}
# Its table and the matrices of its feed-forward part are large, those of attention are not.
WIDE = {"hidden_size": 128, "intermediate_size": 544, "vocab_size": 999}


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A tied model whose checkpoint is in bf16."""
    place = tmp_path_factory.mktemp("checkpoint") / "half"
    tiny.build("llama", tie_word_embeddings=True, **WIDE).to(torch.bfloat16).save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def whole(half, tmp_path_factory) -> Path:
    """Its export, by way of float32 weights in a file."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return pipeline.export(half, out, precision="int8", **SETTINGS)


def content(directory: Path) -> dict[str, Any]:
    """Of all files but the report, which tells times, and its digest."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in directory.iterdir()}
    described = json.loads(found.pop("fastgen.json"))
    del found["report.json"], described["files"]["report.json"]
    return found | {"fastgen.json": described}


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


# --- weights in their own type ------------------------------------------------------------------


def test_weights_in_their_own_type_give_the_same_files(half, whole, tmp_path, monkeypatch):
    """A checkpoint may become float32 as a whole or a matrix at a time."""
    monkeypatch.setattr(requirements, "AT_HAND", 0)
    cast: list[int] = []
    real = stored.cast
    monkeypatch.setattr(stored, "cast", lambda weight: cast.append(1) or real(weight))
    own = pipeline.export(half, tmp_path / "own", precision="int8", **SETTINGS)
    assert content(whole) == content(own)
    assert "weights stay in their own type" in report_of(own)["steps"][0]["found"] and cast
    assert "own type" not in report_of(whole)["steps"][0]["found"]
    assert not report_of(own)["fp32"]["mismatch"]


def in_bf16(**changes: Any) -> torch.nn.Module:
    """With its buffers in float32, as transformers loads it."""
    model = tiny.build("llama", tie_word_embeddings=True, **changes)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("vocab_size", [999, 9999], ids=["at once", "some outputs at a time"])
def test_a_stored_weight_computes_as_its_cast(vocab_size):
    ids, shape = torch.arange(7)[None], WIDE | {"vocab_size": vocab_size}
    model = in_bf16(**shape)
    assert stored.keep(model)
    for weight in (model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight):
        assert isinstance(weight, stored.Stored)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied as before
    by_parts = model.lm_head.weight.numel() > stored.PART
    assert by_parts == (vocab_size == 9999)
    with torch.no_grad():
        logits, expected = model(ids).logits, in_bf16(**shape).float()(ids).logits
        torch.testing.assert_close(logits, expected)
        assert by_parts or torch.equal(logits, expected)
        with pytest.raises(RuntimeError, match="only read"):
            model.lm_head.weight.add_(1)


def test_a_model_whose_buffers_lost_bits_does_not_keep_its_types():
    model = in_bf16().to(torch.bfloat16)
    assert not stored.keep(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# --- bounds -------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize("precision", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("whole")  # what stays loaded is loaded
def test_an_export_is_within_its_bound(precision, tmp_path):
    """At most 1.3 times the float32 weights that no file holds, beside what was there before."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=16000,
        hidden_size=768,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    source = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    gc.collect()
    before = progress.memory().anonymous
    out = pipeline.export(source, tmp_path / "out", precision=precision, **SETTINGS)
    peaks = report_of(out)["peaks"]
    floats = peaks["float32_weights"]
    assert floats > 100e6
    assert peaks["anonymous"] - before < 1.3 * floats
    assert peaks["resident"] > peaks["anonymous"]
    assert peaks["disk"] > floats  # the graph that is proved, while it is there


def test_what_cannot_fit_is_refused_at_the_start_with_its_bytes(half, tmp_path, monkeypatch):
    size = requirements.of_checkpoint(half)
    assert size is not None and not size.is_float32
    needs = requirements.needs(size, "int8", 1)
    monkeypatch.setattr(requirements, "memory_bytes", lambda: 1 << 20)
    memory = sum(requirements.needs(size, "int8", 1).memory.values())
    with pytest.raises(fastgen.ModelError, match=rf"needs up to {memory:,} bytes .*of memory"):
        pipeline.export(half, tmp_path / "out", progress=None)
    monkeypatch.undo()
    disk = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    wanted = rf"needs up to {sum(needs.disk.values()):,} bytes .*of disk.*choose another place"
    with pytest.raises(fastgen.ModelError, match=wanted):
        pipeline.export(half, tmp_path / "out", progress=None)
    assert not list(tmp_path.iterdir())


def test_what_a_checkpoint_needs():
    """3.2 billion weights in bf16 keep their type on 24 GiB; half a billion become float32."""
    large = requirements.Size(3_213_000_000, 8192 * 3072, 8192, 10**6, 128256, is_float32=False)
    small = requirements.Size(494_000_000, 4864 * 896, 4864, 10**5, 151936, is_float32=False)
    there = 24 << 30
    assert requirements.needs(large, "int4", 1, machine=there).own_types
    assert not requirements.needs(small, "int4", 1, machine=there).own_types
    for size in (large, small):
        assert sum(requirements.needs(size, "int4", 1, machine=there).memory.values()) < there
    assert requirements.needs(large, "fp32", 0, machine=there).disk["the graph in float32"] == 0


def test_a_file_that_is_no_safetensors_tells_nothing(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0junk!")
    assert requirements.of_checkpoint(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(b"PK")
    assert requirements.of_checkpoint(tmp_path) is None
    assert requirements.of_checkpoint(tmp_path / "nothing") is None


# --- what is left out, and what is shown --------------------------------------------------------


def test_a_quick_export_leaves_out_the_text_and_never_the_proof(half, tmp_path, monkeypatch):
    args = ["export", str(half), str(tmp_path / "out"), "--quick"]
    monkeypatch.setattr(sys, "argv", ["fastgen", *args])
    with contextlib.suppress(SystemExit):
        __main__.main()
    report = report_of(tmp_path / "out")
    steps = [step["step"] for step in report["steps"]]
    assert "int8 text compared" not in steps and "int8 compared" in steps
    assert report["quick"] and "quality" not in report
    proof = report["fp32"]
    assert proof["greedy"]["same"] == proof["greedy"]["tokens"] and not proof["mismatch"]
    assert "text: not compared" in table(report)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("pace", [1, 3], ids=["as expected", "three times as long"])
def test_the_time_left_follows_what_was_expected(pace):
    costs = [progress.Cost(*one) for one in ((4, 0.5), (0.5, 1.6), (5, 2), (0.2, 0.3))]
    *_, convert, bundled = times = [one.seconds + one.more * 2 for one in costs]
    now, terminal = [0.0], Terminal()

    def take(seconds: float) -> list[str]:
        now[0] += pace * seconds
        return []

    shown = progress.Progress(terminal, clock=lambda: now[0])
    shown.weights = 2_000_000_000
    shown.run(
        [
            progress.Step(f"step {n}", cost, partial(take, seconds))
            for n, (cost, seconds) in enumerate(zip(costs, times, strict=True))
        ]
    )
    left = re.findall(r"\.\.\.(.*)\r", terminal.getvalue())
    assert len(left) == 4 and left[0] == ""
    for found, rest in ((left[2], convert + bundled), (left[3], bundled)):
        assert found == f" about {pace * rest:.0f} s left"
    assert [one["seconds"] for one in shown.taken] == pytest.approx([pace * t for t in times])


def test_the_peaks_of_a_step_are_its_own():
    watch = progress.Watch()
    watch.step()
    # What an allocator keeps for itself does not count: the system's own pages.
    held = mmap.mmap(-1, 120 << 20)
    np.frombuffer(held, np.uint8)[:] = 1
    first = watch.step()
    held.close()
    second = watch.step()
    if first.anonymous is not None:
        assert first.anonymous - second.anonymous > 100e6
        assert watch.peaks.anonymous == first.anonymous


def test_a_graph_reads_its_weights_from_the_file_it_was_written_to(pair, tmp_path):
    graph = onnx_ir.load(pair("llama")[1].directory / "model.onnx")
    array = np.arange(2000, dtype=np.float32).reshape(50, 40)
    made: list[int] = []
    lazy = edit.add_lazily(
        graph.graph, "lazy", lambda: made.append(1) or array.T, (40, 50), onnx_ir.DataType.FLOAT
    )
    assert not made and edit.is_constant(lazy) and edit.shape_of(lazy) == [40, 50]
    onnx_file.save(graph, tmp_path / "model.onnx")
    large = [v.const_value for v in graph.graph.initializers.values() if v.const_value.nbytes > 256]
    assert {Path(tensor.path) for tensor in large} == {tmp_path / "model.onnx.data"}
    assert len(made) == 1 and np.array_equal(lazy.const_value.numpy(), array.T)


def test_logits_asked_by_parts_are_the_same(ours):
    rows = [np.random.default_rng(n).integers(0, tiny.VOCAB, n) for n in (11, 90, 3, 1)]
    whole = check.exported_logits(ours.model, rows)
    parts = check.exported_logits(ours.model, rows, at_once=1)
    for one, other in zip(whole, parts, strict=True):
        assert np.allclose(one, other, atol=1e-5)


def test_a_directory_that_goes_while_it_is_looked_at_takes_nothing(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "below" / "file").write_bytes(b"123")
    assert progress.on_disk(tmp_path) == 8
    shutil.rmtree(tmp_path)
    assert progress.on_disk(tmp_path) == 0


@pytest.mark.parametrize(
    "floats, told", [(0, ""), (100, ""), (400, ", 2.50 times the float32 weights")]
)
def test_memory_is_set_beside_the_weights_where_they_say_something(floats, told):
    peaks = {"float32_weights": floats, "anonymous": 1000, "resident": 2000, "disk": 0}
    report = {"fp32": {}, "mismatch": [], "peaks": peaks}
    (line,) = [line for line in _notes(report) if line.startswith("the export took")]
    assert line == f"the export took: 0 MB of memory{told}, 0 MB with mapped files, 0 MB of disk"
