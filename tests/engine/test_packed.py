"""Packed weights that are kept: the same bits, one machine, and nothing damaged is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import run

import fastgen
from fastgen.engine import session
from fastgen.engine.model import Model
from fastgen.store import files, packed
from fastgen.store.hub import DEMO
from fastgen.store.model_info import GRAPH, INFO, WEIGHTS, ModelInfo
from fastgen.store.tuning import Tuning

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "demo")


@pytest.fixture
def kept(directory) -> Callable[[], Path]:
    """The one directory that is kept of the demo; its model is made on the first call."""
    return lambda: next(iter(packed.kept(ModelInfo.read(directory))))


def logits(model: Model) -> np.ndarray:
    """Of a prompt, of a step after it, and of three rows of them."""
    ids = np.random.default_rng(0).integers(0, model.info.vocab_size, 40)
    cache = model.new_cache(3, 64)
    found = [model.forward([ids], cache).copy(), model.forward([ids[:1]], cache).copy()]
    return np.concatenate([*found, model.forward([ids[:5]] * 3, model.new_cache(3, 8)).copy()])


def test_the_same_bits_from_a_file_that_processes_share(directory, kept):
    expected = logits(Model(directory))
    for _ in range(2):  # made, and found
        model = Model(directory, packed=True)
        assert model.is_packed and model.cautions == []
        assert np.array_equal(logits(model), expected)
    assert {path.name for path in kept().iterdir()} == {GRAPH, WEIGHTS, packed.KEY}
    maps = Path("/proc/self/maps")
    if maps.is_file():
        assert str(kept() / WEIGHTS) in maps.read_text()
    assert not Model(directory).is_packed  # without being asked


def test_the_model_directory_may_be_read_only_and_elsewhere(directory, tmp_path, kept):
    Model(directory, packed=True)
    written = (kept() / packed.KEY).stat().st_mtime_ns
    other = shutil.copytree(directory, tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    other.chmod(0o555)
    assert Model(other, packed=True).is_packed
    other.chmod(0o755)
    assert before == {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    assert (kept() / packed.KEY).stat().st_mtime_ns == written  # it was the same model's


@pytest.mark.parametrize("name", ["onnxruntime", "processor", "layout"])
def test_what_is_kept_for_another_machine_is_not_run(directory, kept, monkeypatch, name):
    here = packed.here()
    monkeypatch.setattr(packed, "here", lambda: here | {name: "another"})
    Model(directory, packed=True)
    foreign = kept()
    monkeypatch.setattr(packed, "here", lambda: here)
    assert f"is for {name} another, not {here[name]}" in str(packed.fault(foreign))
    model = Model(directory, packed=True)
    assert model.is_packed and model.cautions == []
    mine = [path for path in packed.kept(model.info) if packed.fault(path) is None]
    assert len(mine) == 1 and mine[0] != foreign
    assert foreign.exists() == (name == "processor")  # which may share the home of this one
    # And under the name of what is looked for it is seen for what it is.
    shutil.rmtree(mine[0])
    monkeypatch.setattr(packed, "here", lambda: here | {name: "another"})
    Model(directory, packed=True)
    (foreign,) = packed.kept(model.info)
    monkeypatch.setattr(packed, "here", lambda: here)
    foreign.rename(mine[0])
    model = Model(directory, packed=True)
    (caution,) = model.cautions
    assert f"made again: {mine[0]} is for {name} another" in caution
    assert packed.fault(mine[0]) is None


def truncated(directory: Path) -> None:
    with (directory / WEIGHTS).open("rb+") as file:
        file.truncate(1000)


def other_graph(directory: Path) -> None:
    content = bytearray((directory / GRAPH).read_bytes())
    content[1000] ^= 1
    (directory / GRAPH).write_bytes(content)


def other_weights(directory: Path) -> None:
    content = np.fromfile(directory / WEIGHTS, np.uint8)
    content[len(content) // 2 :] ^= 1
    content.tofile(directory / WEIGHTS)


def rotten_matrix(directory: Path) -> None:
    """A packed matrix that no time tells of: onnxruntime compares it with what it packs."""
    there = re.search(rb"\|(\d+);(\d+);0", (directory / GRAPH).read_bytes())
    start, size = map(int, there.groups())
    rot(directory, slice(start, start + size))


def rot(directory: Path, part: slice) -> None:
    """Change a part of the weights, with the times of the file as they were."""
    path = directory / WEIGHTS
    before, content = path.stat(), np.fromfile(path, np.uint8)
    content[part] ^= 1
    content.tofile(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def no_json(directory: Path) -> None:
    (directory / packed.KEY).write_text("{")


def a_file_less(directory: Path) -> None:
    (directory / GRAPH).unlink()


def no_key(directory: Path) -> None:
    (directory / packed.KEY).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncated, "model.onnx.data was changed"),
        (other_graph, "model.onnx was changed"),
        (other_weights, "model.onnx.data was changed"),
        (rotten_matrix, "do not match the buffers generated by the current kernel"),
        (no_json, "packed.json is damaged"),
        (a_file_less, "model.onnx is not there"),
        (no_key, "has no packed.json"),
    ],
)
def test_what_is_damaged_is_made_again_and_said(directory, kept, damage, said):
    expected = logits(fastgen.load(directory, packed=True).model)
    damage(kept())
    with pytest.warns(UserWarning, match=f"packed weights are made again: .*{said}") as warned:
        model = fastgen.load(directory, packed=True)
    assert [one.filename for one in warned] == [__file__]
    assert model.model.is_packed and np.array_equal(logits(model.model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastgen.load(directory, packed=True).model.is_packed


def test_rotten_weights_are_found_by_info(directory, kept, cache):
    fastgen.load(directory, packed=True)
    rot(kept(), slice(5000, 6000))
    assert packed.fault(kept()) is None
    code, said, _ = run("info", directory, "--verify")
    assert code == 0 and f"{kept() / WEIGHTS} was changed" in said


def test_damaged_weights_are_not_packed(directory, cache):
    other_weights(directory)
    model = Model(directory, packed=True)
    assert not model.is_packed and packed.kept(model.info) == []
    (caution,) = model.cautions
    assert caution.startswith(f"{directory} runs without packed weights: {directory / WEIGHTS} has")


def test_where_nothing_can_be_kept_the_model_runs_without(directory, cache, monkeypatch):
    expected = logits(Model(directory))
    cache.write_text("a file")
    model = Model(directory, packed=True)
    assert not model.is_packed and "runs without packed weights" in model.cautions[0]
    assert np.array_equal(logits(model), expected)
    cache.unlink()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    model = Model(directory, packed=True)
    assert not model.is_packed and "has 0 MB left" in model.cautions[0]


def test_each_choice_of_kernels_has_a_place(directory, monkeypatch):
    """The graph is as it was optimised: with other fusions it would be another one."""
    entries = {"mlas.enable_gemm_fastmath_arm64_bfloat16": "1"}
    settings = [Tuning(), Tuning(threads=1), Tuning(entries=entries)]
    info = ModelInfo.read(directory)
    first, threads, others = (session.place(directory / GRAPH, info, one) for one in settings)
    monkeypatch.setattr(session, "NOT_FUSED", [])
    fused = session.place(directory / GRAPH, info, Tuning())
    assert first.directory == threads.directory
    assert len({one.directory for one in (first, others, fused)}) == 3
    assert len({one.home for one in (first, others, fused)}) == 1


def test_an_export_without_digests_is_not_packed(directory):
    told = json.loads((directory / INFO).read_text())
    told["files"] = {name: said["bytes"] for name, said in told["files"].items()}
    (directory / INFO).write_text(json.dumps(told))
    model = Model(directory, packed=True)
    assert not model.is_packed and "without digests: export it again" in model.cautions[0]


def test_two_processes_make_it_once(directory, kept, tmp_path):
    code = (
        "import sys; from pathlib import Path; from fastgen.engine.model import Model; "
        "from fastgen.engine import session; made = []; keep = session.open_session\n"
        "def opened(path, options):\n"
        "    made.append(path); return keep(path, options)\n"
        "session.open_session = opened\n"
        "model = Model(Path(sys.argv[1]), packed=True)\n"
        "assert model.is_packed and not model.cautions, model.cautions\n"
        "print(len(made))"
    )
    command = [sys.executable, "-c", code, str(directory)]
    with files.locked(kept_lock(directory)):  # both wait for it
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        for process in both:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
    sessions = sorted(int(process.communicate()[0]) for process in both)
    assert sessions == [1, 2]  # one of them opened the model's own graph as well
    assert packed.fault(kept()) is None
    assert [path for path in kept().parent.iterdir() if path.name.startswith(".")] == []


def kept_lock(directory: Path) -> Path:
    return session.place(directory / GRAPH, ModelInfo.read(directory), Tuning()).lock


def test_info_shows_what_is_kept_and_removes_it(directory, kept):
    code, said, _ = run("generate", "--model", directory, "--packed", "def", "--max-new-tokens=2")
    assert code == 0
    code, said, _ = run("info", directory)
    size = sum(path.stat().st_size for path in kept().iterdir()) / 1e6
    assert code == 0 and f"packed       {size:,.1f} MB in {kept()}\n" in said
    model = Model(directory, packed=True)
    code, said, _ = run("info", directory, "--remove-packed")
    assert code == 0 and said == f"removed {size:,.1f} MB of packed weights\n"
    assert packed.kept(model.info) == []
    assert np.array_equal(logits(model), logits(Model(directory)))  # it is held as long as it runs
    code, said, _ = run("info", directory)
    assert code == 0 and "packed " not in said
