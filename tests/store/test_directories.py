"""Model directories come from strangers: whatever is in one, it works or is one clear error."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from scripts import run

import fastgen
from fastgen import commands
from fastgen.export import bundle
from fastgen.store import jsonfile, model_info, tuning
from fastgen.store.hub import DEMO
from fastgen.store.model_info import INFO, TUNING, ModelInfo
from fastgen.store.tuning import Tuning

EXAMPLES = int(os.environ.get("FASTGEN_EXAMPLES", "250"))
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
VALUES: list[Any] = [
    None, True, 0, -1, 2**70, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "../x", [], [1],
    {}, {"a": 1}, [[]], "1", 3.5, 10**6,
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory) -> Path:
    """A directory with everything that one can hold."""
    place = tmp_path_factory.mktemp("whole") / "model"
    shutil.copytree(pair("gpt2")[1].directory, place)
    config = place / "tokenizer_config.json"
    told = json.loads(config.read_text()) | {"chat_template": TEMPLATE}
    config.write_text(json.dumps(told))
    bundle.seal(place, ModelInfo.parse(place))
    bundle.sign(place)
    tuning.write(place, Tuning(threads=1))
    return place


@pytest.fixture
def directory(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def rewritten(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def resealed(directory: Path, digests: bool = True) -> None:
    """As an export would leave what is there now; without digests, as one of older versions."""
    (directory / TUNING).unlink(missing_ok=True)
    bundle.seal(directory, ModelInfo.parse(directory))
    if digests:
        bundle.sign(directory)


def info(directory: Path) -> None:
    commands.cli.main(["info", str(directory)], standalone_mode=False)


# --- one law ------------------------------------------------------------------------------------


def use(directory: Path) -> None:
    """Everything that reads a directory."""
    info(directory)
    loaded = fastgen.load(directory)
    loaded.generate([[5, 6, 7], [8]], max_new_tokens=2)
    loaded.complete("The quick", max_new_tokens=2)
    loaded.chat([{"role": "user", "content": "Hi"}], max_new_tokens=2)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The content of a file, damaged in one of the ways that happen, or that somebody thinks of."""
    way = chance.choice(["flip", "cut", "bytes", "type", "type", "type", "drop", "deep", "deeper"])
    at = chance.randrange(len(content))
    if way == "flip":
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
    if way == "cut":
        return content[:at]
    if way == "bytes":
        return content[:at] + chance.randbytes(3) + content[at:]
    told = json.loads(content)
    path = chance.choice(list(places(told))[: 1 + chance.randrange(200)])
    if way == "drop" and path and isinstance(path[-1], str):
        mark = f"dropped {chance.random()}"
        kept = json.dumps(replaced(told, path, mark))
        pairs = json.loads(kept, object_pairs_hook=lambda p: {k: v for k, v in p if v != mark})
        return json.dumps(pairs).encode()
    if way in ("deep", "deeper"):
        mark, depth = "the place", 300 if way == "deep" else 100_000
        text = json.dumps(replaced(told, path, mark))
        return text.replace(f'"{mark}"', "[" * depth + "]" * depth).encode()
    return json.dumps(replaced(told, path, chance.choice(VALUES))).encode()


@pytest.mark.parametrize("digests", [True, False])
def test_a_damaged_directory_works_or_is_one_error_that_names_a_file(
    whole, tmp_path, digests, capsys
):
    chance = random.Random(os.environ.get("FASTGEN_SEED", "7"))
    place = shutil.copytree(whole, tmp_path / "model")
    if not digests:
        resealed(place, digests=False)
        tuning.write(place, Tuning(threads=1))
    files = {path.name: path.read_bytes() for path in place.glob("*.json")}
    outcomes = {"works": 0, "is an error": 0}
    for number in range(EXAMPLES // 2):
        name = chance.choice(sorted(files))
        content = mutated(files[name], chance)
        (place / name).write_bytes(content)
        if not digests and name != INFO and name != TUNING:
            told = json.loads(files[INFO])
            told["files"][name] = len(content)
            (place / INFO).write_text(json.dumps(told))
        if os.environ.get("FASTGEN_SHOW"):
            Path(os.environ["FASTGEN_SHOW"]).write_bytes(name.encode() + b"\n" + content)
        try:
            use(place)
            outcomes["works"] += 1
        except (ValueError, click.UsageError) as error:
            outcomes["is an error"] += 1
            known = [*files, "model.onnx", f"{place} lacks", "chat template", "of the prompt"]
            of_knobs = name == "generation_config.json"  # named as generate names its keywords
            assert of_knobs or any(one in str(error) for one in known), (number, name, content)
        except BaseException as error:
            raise AssertionError((number, name, content[:2000])) from error
        (place / name).write_bytes(files[name])
        (place / INFO).write_bytes(files[INFO])
    assert min(outcomes.values()) > 0, outcomes


# --- what a directory says of itself ------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": "1"}, "format must be a number"),
        ({"format": True}, "format must be a number"),
        ({"precision": "fp33"}, "precision must be fp32 or int8 or int4, got 'fp33'"),
        ({"precision": ["fp32"]}, "precision must be"),
        ({"model_type": 5}, "model_type must be text"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"vocab_size": 2**40}, "vocab_size must be"),
        ({"vocab_size": 98}, r"logits of shape .*99\]"),
        ({"max_length": "128"}, "max_length must be a positive integer or null, got '128'"),
        ({"hard_limit": 1}, "hard_limit must be true or false, got 1"),
        ({"layers": []}, r"it has neither layers nor states"),
        ({"layers": [[4, 8, 1], [4, 8]]}, "layers must be"),
        ({"layers": [[4, 8.0], [4, 8]]}, "layers must be"),
        ({"layers": [[4, 9], [4, 8]]}, r"past_key_values\.0\.key of shape"),
        ({"layers": {"0": 1}}, "layers must be"),
        ({"cache_dtype": []}, "cache_dtype must be"),
        ({"parameters": "many"}, "parameters must be an integer"),
        ({"name": ["x"]}, "name must be text"),
        ({"files": []}, "files must be"),
        ({"files": {}}, "files must be"),
        ({"files": {"model.onnx": -1}}, "files must be"),
        ({"files": {"model.onnx": {"bytes": "9"}}}, "files must be"),
        ({"files": {"model.onnx": {"bytes": 9, "sha256": 9}}}, "files must be"),
        *(
            ({"files": {"model.onnx": 1, name: 1}}, "files must be")
            for name in (
                "../x",
                "/etc/passwd",
                "a/b",
                "a\\b",
                "..",
                ".",
                "",
                "C:x",
                "a\0",
                "a" * 300,
            )
        ),
    ],
)
def test_the_description_is_checked_by_type_and_range(directory, fields, words):
    rewritten(directory / INFO, **fields)
    with pytest.raises(fastgen.ModelError, match=words) as caught:
        fastgen.load(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "fastgen.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", r"expected an object, got \[\]"),
        (b"nan", "Expecting value"),
        (b"\xff{}", "codec can't decode"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "nested deeper than 64"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
)
def test_what_is_no_object_in_json_is_said_of_every_file(directory, name, content, words):
    (directory / name).write_bytes(content)
    if name != INFO:
        resealed(directory)
    with pytest.raises(fastgen.ModelError, match=rf"{name} is damaged \(.*{words}.*copy or export"):
        fastgen.load(directory)


def test_a_configuration_with_names_of_methods_shadows_none(directory):
    rewritten(directory / "generation_config.json", to_dict=1, max_new_tokens=3)
    resealed(directory)
    assert len(fastgen.load(directory).generate([5, 6])[0]) <= 5


@pytest.mark.parametrize("fields", [{"logits": {}}, {"greedy": 5}, {"time": [1]}, {"mismatch": 1},
                                    {"precision": None, "quality": [1]}])  # fmt: skip
def test_a_report_that_lacks_something_is_one_error_of_info(directory, fields):
    rewritten(directory / "report.json", **fields)
    resealed(directory)
    code, out, err = run("info", directory)
    assert (code, out) == (2, "") and err.startswith("fastgen: report.json is damaged (")
    assert err.count("\n") == 1
    (directory / "report.json").write_text("{}")
    resealed(directory)
    code, _, err = run("tune", directory)
    assert code == 2 and "report.json is damaged (it lacks logits" in err


# As fastgen 0.1.0 wrote it: a loose object, dumped with an indent of 2.
WRITTEN: dict[str, Any] = {
    "format": 1,
    "fastgen": "0.1.0",
    "precision": "int4",
    "model_type": "gemma3_text",
    "name": "org/größe",
    "parameters": 7,
    "vocab_size": 99,
    "max_length": None,
    "hard_limit": False,
    "layers": [[4, 8], [2, 16]],
    "states": [[3, 4]],
    "cache_dtype": "int8",
    "windows": [None, 512],
    "no_prompts": "its layers are not of that kind",
    "many_tokens_bytes": 123,
    "files": {"config.json": 4, "model.onnx": {"bytes": 9, "sha256": "ab"}},
}


@pytest.mark.parametrize("left_out", [(), ("no_prompts",)])
def test_the_description_is_written_as_it_always_was(tmp_path, left_out):
    content = {name: value for name, value in WRITTEN.items() if name not in left_out}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (tmp_path / INFO).write_text(text, encoding="utf-8")
    ModelInfo.parse(tmp_path).write(tmp_path)
    assert (tmp_path / INFO).read_bytes() == text.encode()


def test_the_description_of_an_export_is_written_as_it_always_was(tmp_path):
    ModelInfo.parse(DEMO).write(tmp_path)
    assert (tmp_path / INFO).read_bytes() == (DEMO / INFO).read_bytes()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"model_type": 5}, "model_type must be text, got 5"),
        ({"cache_dtype": "float16"}, "cache_dtype must be float32 or int8, got 'float16'"),
        ({"layers": ()}, "it has neither layers nor states"),
        ({"windows": (4,)}, "windows must be a list with a .* for each layer, got 1 of them for 4"),
        ({"files": {}}, "files must be"),
        ({"files": {"model.onnx": 1, "../x": 1}}, "files must be"),
    ],
)
def test_the_description_is_checked_when_it_is_written_too(tmp_path, fields, words):
    info = dataclasses.replace(ModelInfo.parse(DEMO), **fields)
    with pytest.raises(fastgen.ModelError, match=rf"fastgen\.json cannot be written: {words}"):
        info.write(tmp_path)
    assert not (tmp_path / INFO).exists()


# --- digests ------------------------------------------------------------------------------------


def flipped(path: Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_in_every_file(directory):
    fastgen.verify(directory)
    files = ModelInfo.read(directory).files
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "report.json"} <= set(files)
    for name in files:
        flipped(directory / name)
        with pytest.raises(fastgen.ModelError, match=rf"{name} has not the .* bytes that were exp"):
            fastgen.verify(directory)
        if name == model_info.WEIGHTS:  # only on request: they can be many gigabytes
            fastgen.load(directory)
        else:
            with pytest.raises(fastgen.ModelError, match=f"{name} has not"):
                fastgen.load(directory)
        flipped(directory / name)
    for name in ("model.onnx.data", "config.json"):
        flipped(directory / name)
    with pytest.raises(fastgen.ModelError, match=r"config\.json has not.*; .*onnx\.data has not"):
        fastgen.verify(directory)
    code, out, err = run("info", directory, "--verify")
    assert (code, out) == (2, "") and "config.json has not" in err and "onnx.data has not" in err


def test_a_directory_of_an_older_version_loads_and_verify_says_that_it_has_no_digests(directory):
    assert "every file has the bytes" in run("info", directory, "--verify")[1]
    resealed(directory, digests=False)
    old = fastgen.load(directory)
    assert old.generate([5, 6], max_new_tokens=2)
    assert len(old.model.fingerprint) == 64
    with pytest.raises(
        fastgen.ModelError, match=r"has no digest of config\.json, .*export the model"
    ):
        fastgen.verify(directory)
    assert "no digest" in run("info", directory, "--verify")[2]


def test_the_embedded_model_has_digests():
    fastgen.verify()
    assert set(ModelInfo.read(DEMO).digests) == {p.name for p in DEMO.iterdir()} - {INFO}


def test_weights_are_hashed_once_in_an_export(pair, tmp_path, monkeypatch):
    from fastgen.export import export

    hashed: list[str] = []
    real = bundle.digest
    monkeypatch.setattr(bundle, "digest", lambda path: hashed.append(path.name) or real(path))
    export(pair("gpt2")[0], tmp_path / "out", precision="fp32", progress=None)
    assert sorted(hashed) == sorted(ModelInfo.read(tmp_path / "out").files)


# --- tuned.json and threads ---------------------------------------------------------------------


def test_a_tuning_that_this_machine_cannot_have_is_not_used(directory):
    for fields, words in (
        ({"threads": 100_000}, "threads must be a number from 1 to"),
        ({"threads": True}, "threads must be a number"),
        ({"threads": "2"}, "threads must be a number"),
        ({"spinning": 1}, "spinning must be true or false"),
        ({"entries": {"session.disable_prepacking": "1"}}, "entries must be entries that"),
        ({"entries": []}, "entries must be"),
    ):
        tuning.write(directory, Tuning(threads=1))
        path = directory / TUNING
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"tuning": told["tuning"] | fields}))
        with pytest.raises(fastgen.ModelError, match=f"{words}.*delete it, or run `fastgen tune"):
            fastgen.load(directory)
    path.write_text(json.dumps({"here": {}, "tuning": told["tuning"] | {"threads": 64}}))
    assert fastgen.load(directory).model.tuning == Tuning()  # another machine's


@pytest.mark.parametrize("threads", ["2", True, 2.5, [1]])
def test_threads_that_are_no_number_are_refused(threads):
    with pytest.raises(ValueError, match="threads must be an integer, got"):
        fastgen.load(threads=threads)


def test_threads_are_bounded_by_the_machine(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with pytest.raises(ValueError, match="at most 24, 8 for each of this machine's 3 CPUs, got 25"):
        fastgen.load(threads=25)
    assert fastgen.load(threads=24).model.tuning.threads == 24


# --- a directory that goes away -----------------------------------------------------------------


def test_text_after_the_directory_is_gone_is_an_error_or_works(directory):
    used, unused = fastgen.load(directory), fastgen.load(directory)
    expected = used.complete("The quick", max_new_tokens=3)
    shutil.rmtree(directory)
    assert used.complete("The quick", max_new_tokens=3) == expected
    assert unused.generate([5, 6], max_new_tokens=2)
    for call in (
        lambda: unused.complete("The quick", max_new_tokens=3),
        lambda: list(unused.stream([[5, 6]], max_new_tokens=3)),
        lambda: unused.chat([{"role": "user", "content": "Hi"}]),
    ):
        with pytest.raises(fastgen.ModelError, match=r"lacks tokenizer\.json"):
            call()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_has_changed_since_the_model_was_loaded_is_refused(directory, name):
    loaded = fastgen.load(directory)
    flipped(directory / name)
    with pytest.raises(fastgen.ModelError, match=f"{name} has not the"):
        list(loaded.stream([[5, 6]], max_new_tokens=3))


def test_a_template_that_has_gone_is_not_replaced_by_another(directory):
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    resealed(directory)
    loaded = fastgen.load(directory)
    assert loaded.tokenizer
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(fastgen.ModelError, match=r"lacks chat_template\.jinja"):
        loaded.chat([{"role": "user", "content": "Hi"}])


def test_deep_files_are_told_from_flat_ones(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"a": [0] * 100_000}))
    assert len(jsonfile.read(path)["a"]) == 100_000
    deep: Any = 0
    for _ in range(jsonfile.DEEPEST - 1):
        deep = [deep]
    path.write_text(json.dumps({"a": deep}))
    assert jsonfile.read(path)["a"] == deep
    path.write_text(json.dumps({"a": [deep]}))
    with pytest.raises(fastgen.ModelError, match="nested deeper than 64"):
        jsonfile.read(path)
