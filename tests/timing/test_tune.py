"""`fastgen tune`: what is measured, what is chosen, and that it is used on this machine only."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from scripts import run

import fastgen
from fastgen.store import tuning
from fastgen.store.model_info import TUNING
from fastgen.store.tuning import Tuning
from fastgen.timing import tune
from fastgen.timing.tune import Candidate, Workload


@pytest.fixture
def directory(pair, tmp_path) -> Path:
    return shutil.copytree(pair("llama")[1].directory, tmp_path / "model")


def test_a_model_runs_as_it_was_tuned(directory, pair):
    assert fastgen.load(directory).model.tuning == Tuning()
    tuning.write(directory, Tuning(threads=1, spinning=False))
    model = fastgen.load(directory)
    options = model.model.session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.get_session_config_entry("session.prepack.enable_parallel") == "1"
    assert fastgen.load(directory, threads=2).model.tuning == Tuning(threads=2, spinning=False)
    ids = [[5, 6, 7]]
    assert model.generate(ids, max_new_tokens=5) == pair("llama")[1].generate(ids, max_new_tokens=5)
    assert [p.name for p in directory.iterdir() if p.name.startswith(".")] == []


def test_what_another_machine_measured_is_not_used(directory):
    tuning.write(directory, Tuning(threads=1))
    path = directory / TUNING
    told = json.loads(path.read_text())
    told["here"]["cpus"] = 512
    path.write_text(json.dumps(told))
    assert tuning.read(directory) is None
    assert fastgen.load(directory).model.tuning == Tuning()


@pytest.mark.parametrize("content", ["{", "{}", '{"tuning": {"thread": 1}, "here": {}}', "[]"])
def test_a_damaged_file_is_one_clear_error(directory, content):
    (directory / TUNING).write_text(content)
    with pytest.raises(fastgen.ModelError, match=r"tuned.json is damaged .*`fastgen tune"):
        fastgen.load(directory)


def timed(threads: int, decode: float, **more) -> Candidate:
    spinning = more.pop("spinning", True)
    settings = Tuning(threads=threads, spinning=spinning)
    return Candidate(Path("m"), settings, decode=[decode] * 3, prefill=[1.0] * 3, **more)


def test_the_fastest_wins_and_of_two_alike_the_modest_one():
    assert tune.best([timed(1, 2.0), timed(2, 1.0), timed(4, 1.5)], 10).tuning.threads == 2
    assert tune.best([timed(2, 1.01), timed(4, 1.0)], 10).tuning.threads == 2
    alike = [timed(2, 1.0), timed(2, 1.01, spinning=False)]
    assert not tune.best(alike, 10).tuning.spinning
    # Kernels that change what the model says are not taken, however fast.
    assert tune.best([timed(2, 1.0), timed(1, 0.1, divergence=0.5)], 10).tuning.threads == 2


def test_every_candidate_is_timed_in_every_round(directory, monkeypatch):
    monkeypatch.setattr(tune, "physical_cores", lambda: 4)
    monkeypatch.setattr(tune, "usable_cpus", lambda: range(8))
    found = tune.candidates(directory)
    said = [str(one.tuning) for one in found]
    assert len(set(said)) == len(said)
    for threads in (1, 2, 4, 8):
        assert f"{threads} thread{'s' * (threads > 1)}" in said
    assert "4 threads, sleeping" in said
    ticks: list[int] = []
    tune.measure(found, Workload(rows=2, prompt=8, new=3), 2, lambda: ticks.append(1))
    assert len(ticks) == 2 * len(found)
    for one in found:
        assert len(one.decode) == len(one.prefill) == 2
        assert min(one.decode) > 0 and one.divergence < 1e-6


def test_the_command_measures_says_and_saves(directory, pair, tmp_path):
    other = shutil.copytree(pair("gpt2")[1].directory, tmp_path / "other")
    flags = ["--rounds", "1", "--new", "4", "--prompt", "8"]
    code, out, _ = run("tune", directory, other, *flags)
    assert code == 0
    assert len(re.findall(r"^\* (model|other) ", out, re.M)) == 2
    assert re.search(r"^fastest within the budget: \S+(model|other) \(\d thread", out, re.M)
    for place in (directory, other):
        assert str(tuning.read(place)) in run("info", place)[1]


def test_the_budget_is_kept(directory, pair, tmp_path):
    """A model whose report says too much was lost is timed, but not named."""
    other = shutil.copytree(directory, tmp_path / "other")
    report = json.loads((other / "report.json").read_text())
    report["logits"]["kl"] = 0.5
    text = json.dumps(report)
    (other / "report.json").write_text(text)
    told = json.loads((other / "fastgen.json").read_text())
    told["files"]["report.json"] = len(text)
    (other / "fastgen.json").write_text(json.dumps(told))
    flags = ["--rounds", "1", "--new", "2", "--prompt", "4"]
    _, out, _ = run("tune", directory, other, *flags)
    assert re.search(rf"budget: {directory} ", out)
    code, _, err = run("tune", other, other.with_name("other"), *flags, "--max-kl", "0.1")
    assert code == 0  # one model: there is nothing to choose between
    third = shutil.copytree(other, tmp_path / "third")
    code, _, err = run("tune", other, third, *flags, "--max-kl", "0.1")
    assert code == 2 and "no model has a KL divergence within 0.1" in err


def test_what_cannot_be_tuned_is_said(tmp_path, directory):
    code, _, err = run("tune", tmp_path / "nothing")
    assert code == 2 and "nothing" in err and len(err.splitlines()) == 1
    code, _, err = run("tune", directory, "--rounds", "0")
    assert code == 2 and "--rounds must be positive, got 0" in err
    code, _, err = run("tune", directory, "--new", "500")
    assert code == 2 and "tune with fewer new tokens" in err
