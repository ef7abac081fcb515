"""The kind of model that a name stands for, decided by the names of its files alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fastgen
from fastgen import first_use
from fastgen.store import hub, resolve
from fastgen.store.resolve import CHECKPOINT, FASTGEN, ONNX_FOLDER

KINDS = [
    (["fastgen.json", "model.onnx", "config.json"], None, FASTGEN),
    (["config.json", "model.safetensors"], None, CHECKPOINT),
    (["adapter_config.json", "adapter_model.safetensors"], None, CHECKPOINT),
    (["config.json", "onnx/model.onnx"], None, ONNX_FOLDER),
    (["config.json", "model.safetensors", "onnx/model_q4.onnx"], None, CHECKPOINT),
    (["config.json", "model.safetensors", "onnx/model_q4.onnx"], "q4", ONNX_FOLDER),
]


@pytest.mark.parametrize(("names", "precision", "kind"), KINDS)
def test_a_name_here_and_on_the_hub(tmp_path, monkeypatch, names, precision, kind):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    here = resolve.resolve(tmp_path, precision)
    assert (here.kind, sorted(here.files)) == (kind, sorted(names))
    assert here.fetch() == here.described() == tmp_path

    monkeypatch.setattr(hub, "listed", lambda repository, revision: names)
    there = resolve.resolve("org/some", precision, "v1")
    assert (there.kind, there.directory, there.revision) == (kind, None, "v1")


def test_an_adapter_goes_with_weights_for_torch_alone(tmp_path):
    for name in ("config.json", "model.onnx"):
        (tmp_path / name).write_text("")
    assert resolve.resolve(tmp_path).kind == ONNX_FOLDER
    assert resolve.resolve(tmp_path, adapted=True).kind == CHECKPOINT


def test_each_kind_is_fetched_in_its_own_way(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "snapshot", lambda name, revision, **_: asked.append("all") or Path())
    monkeypatch.setattr(
        hub, "transformers_snapshot", lambda name, revision: asked.append("torch") or Path()
    )
    monkeypatch.setattr(
        hub, "onnx_snapshot", lambda name, needed, revision: asked.append(needed) or Path()
    )
    for names, precision, _ in KINDS[:4]:
        monkeypatch.setattr(hub, "listed", lambda *_, names=names: names)
        resolve.resolve("org/some", precision).fetch()
    assert asked == ["all", "torch", "torch", ["config.json", "onnx/model.onnx"]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file", "is not a directory, it is a file"),
        ("nothing", "is not a directory: there is no directory, nor a hub id, of that name"),
        ("empty", "is not a fastgen model directory: it has no fastgen.json; nor an ONNX folder; "),
    ],
)
def test_what_is_no_model_is_one_error(tmp_path, name, words):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(fastgen.ModelError, match=words):
        resolve.resolve(tmp_path / name)


def test_an_edited_model_is_another_one(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    first = resolve.resolve(tmp_path).version
    assert resolve.resolve(tmp_path).version == first
    os.utime(path, (1, 1))
    assert resolve.resolve(tmp_path).version != first


def test_the_export_gets_what_was_resolved_and_resolves_nothing(pair, tmp_path, monkeypatch):
    from fastgen.export import pipeline

    source = tmp_path / "model"
    pair("gpt2")[0].save_pretrained(source)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    real, decided = resolve._kind, []
    monkeypatch.setattr(resolve, "_kind", lambda *given: decided.append(1) or real(*given))
    monkeypatch.setattr(pipeline, "steps", lambda work: [])
    first_use.exported(source, None, None, None)
    assert decided == [1]
