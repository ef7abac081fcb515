"""The hub for real: huggingface_hub in processes of their own, against a server on this machine."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from fake_hub import Hub, blocked, serving

import fastgen

IDS = [[5, 6, 7], [8]]


@pytest.fixture(scope="module")
def hub(pair, tmp_path_factory) -> Iterator[Hub]:
    """A hub of two models: "org/ready" holds a fastgen one, "org/source" a transformers one."""
    root = tmp_path_factory.mktemp("hub")
    theirs, ours = pair("gpt2")
    shutil.copytree(ours.directory, root / "org" / "ready")
    source = root / "org" / "source"
    theirs.save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    for name in ("tf_model.h5", "pytorch_model.bin", "onnx/model.onnx"):  # the weights once more
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"not to be downloaded")
    shutil.copytree(source, root / "org" / "torch", ignore=shutil.ignore_patterns("onnx", "*.bin"))
    (root / "org" / "empty").mkdir()
    (root / "org" / "empty" / "README.md").write_text("nothing")
    with serving(root) as server:
        yield server


NO_TORCH = blocked("torch", "transformers", "onnx", "onnxscript")
LOAD = f"""
import sys, fastgen
print(fastgen.load(sys.argv[1]).generate({IDS}, max_new_tokens=5))
"""
FROM_PRETRAINED = f"""
import sys, fastgen
model = fastgen.CausalLM.from_pretrained(sys.argv[1], precision='fp32')
print(model.generate({IDS}, max_new_tokens=5))
"""


@pytest.fixture
def expected(pair) -> str:
    return f"{pair('gpt2')[1].generate(IDS, max_new_tokens=5)}\n"


@pytest.mark.parametrize("program", [LOAD, FROM_PRETRAINED])
def test_a_repository_that_holds_a_fastgen_model_needs_no_torch(world, expected, program):
    code, out, err = world.run(NO_TORCH + program, "org/ready")
    assert (code, out) == (0, expected), err
    assert "model.onnx.data" in " ".join(world.hub.asked)
    assert "Fetching" in err  # huggingface_hub's own progress bars

    world.hub.asked.clear()
    code, out, err = world.run(NO_TORCH + program, "org/ready", HF_HUB_OFFLINE="1")
    assert (code, out) == (0, expected), err
    assert world.hub.asked == []


def test_the_command_line_takes_a_hub_id(world, pair):
    code, out, err = world.command(
        "generate", "The quick", "-m", "org/ready", "--max-new-tokens", "4"
    )
    assert code == 0, err
    assert out == "The quick" + pair("gpt2")[1].complete("The quick", max_new_tokens=4) + "\n"


def test_two_processes_that_start_together_export_once(world, expected, pair):
    """And then: from the cache, offline, without torch."""
    both = [world.start(FROM_PRETRAINED, "org/source") for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    for process, (out, err) in zip(both, said, strict=True):
        assert (process.returncode, out) == (0, expected), err
    assert sum(err.count("] convert") for _, err in said) == 1
    (directory,) = [p for p in world.cache.iterdir() if p.is_dir()]
    assert not directory.name.startswith(".")
    assert json.loads((directory / "fastgen.json").read_text())["name"] == "org/source"
    for data in (p.read_bytes() for p in directory.iterdir()):
        assert str(world.home).encode() not in data
    asked = " ".join(world.hub.asked)
    assert "model.safetensors" in asked
    assert not any(name in asked for name in (".h5", ".bin", "onnx/"))

    world.hub.asked.clear()
    code, out, err = world.run(NO_TORCH + FROM_PRETRAINED, "org/source", HF_HUB_OFFLINE="1")
    assert (code, out, err) == (0, expected, "")
    assert world.hub.asked == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/torch", r"is a transformers model.*pip install 'fastgen-onnx\[export\]'"),
        ("org/source", r"is an ONNX folder.*pip install 'fastgen-onnx\[onnx\]'"),
    ],
)
def test_what_to_install_is_said_before_weights_are_fetched(world, name, words):
    code, _, err = world.run(NO_TORCH + FROM_PRETRAINED, name)
    assert code == 1 and re.search(f"{name} {words}", err.splitlines()[-1]), err
    assert not list(world.cache.glob("org*-fp32-*/"))
    fetched = {one.rpartition("/")[2] for one in world.hub.asked if "/resolve/" in one}
    assert fetched == {"config.json"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "-m", "org/nothing"], "org/nothing is neither .* no such repository"),
        (["info", "org/nothing"], "no such repository, or it is private"),
        (["tune", "org/nothing"], "no such repository, or it is private"),
        (["info", "org/empty"], "org/empty is not a fastgen model .* nor an ONNX folder"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_have_is_one_clear_line(world, arguments, words):
    code, out, err = world.command(*arguments, HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("fastgen: ")
    assert re.search(words, line), line
    assert not any(name.endswith((".safetensors", ".data")) for name in world.hub.asked)


def test_a_revision_that_is_not_there(world):
    ask = "import fastgen; fastgen.CausalLM.from_pretrained('org/source', revision='v9')"
    code, _, err = world.run(NO_TORCH + ask)
    assert code == 1 and err.splitlines()[-1].endswith("it has no revision 'v9'")


def test_a_hub_that_cannot_be_reached(world):
    code, _, err = world.command(
        "generate", "x", "-m", "org/ready", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert code == 2
    assert err.splitlines()[-1].endswith("the hub cannot be reached, and it is not in the cache")


# --- local directories and the cache, without a hub ----------------------------------------------


def test_a_local_directory_is_exported_once_and_again_when_it_changes(
    pair, tmp_path, monkeypatch, capsys
):
    """The cache's key is what the directory holds."""
    from fastgen.export import pipeline

    made: list[tuple[Path, Path]] = []

    def export(source: Path, out: Path, **wishes: str) -> None:
        assert sorted(wishes) == ["cache_precision", "precision"]
        made.append((source, out))
        shutil.copytree(pair("gpt2")[1].directory, out)

    monkeypatch.setattr(pipeline, "export", export)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "model"
    pair("gpt2")[0].save_pretrained(source)
    for _ in range(2):
        assert fastgen.CausalLM.from_pretrained(source).generate(IDS, max_new_tokens=2)
    assert len(made) == 1
    (source / "generation_config.json").write_text("{}")
    fastgen.CausalLM.from_pretrained(source)
    assert len(made) == 2 and made[0][1] != made[1][1]
    fastgen.CausalLM.from_pretrained(source, cache_precision="fp32")
    assert len(made) == 2  # the same in other words
    fastgen.CausalLM.from_pretrained(source, cache_precision="int8")
    assert len(made) == 3 and "-int8-kv-int8-" in made[2][1].name


COMMANDS = [
    ["generate", "The quick", "--max-new-tokens", "2", "--model", "org/some"],
    ["chat", "org/some"],
    ["serve", "org/some", "--port", "0"],
    ["batch", "rows.jsonl", "out.jsonl", "--quiet", "--model", "org/some"],
    ["score", "texts.jsonl", "out.jsonl", "--quiet", "--model", "org/some"],
    ["bench", "org/some", "--rounds", "1", "--prompt", "4", "--rows", "1", "--beams", "2",
     "--threads", "1", "--new", "2"],
    ["tune", "org/some", "--rounds", "1", "--prompt", "4", "--new", "2"],
    ["info", "org/some"],
]  # fmt: skip


async def _ends(server, sockets):
    """A server that does not stay."""


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda words: words[0])
def test_every_command_takes_every_name(pair, tmp_path, monkeypatch, arguments):
    """Through one door, which makes of it what can be run."""
    from fastgen import commands, first_use

    place = shutil.copytree(pair("gpt2")[1].directory, tmp_path / "made")
    asked = []
    monkeypatch.setattr(first_use, "exported", lambda *given: asked.append(given) or place)
    monkeypatch.setattr("uvicorn.Server.serve", _ends)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "The quick"}\n')
    Path("texts.jsonl").write_text('{"text": "The quick"}\n')
    assert commands.run(arguments) == 0
    assert asked[0] == ("org/some", None, None, None)
    assert {*asked[1:]} <= {(place, None, None, None)}  # which is there
    assert {one[0] for one in COMMANDS} == {*commands.cli.commands} - {"export"}


def test_load_and_generate_take_what_from_pretrained_takes(pair, monkeypatch):
    from fastgen import first_use

    place, asked = pair("gpt2")[1].directory, []
    monkeypatch.setattr(first_use, "exported", lambda *given: asked.append(given) or place)
    fastgen.load("org/some")
    fastgen.CausalLM.from_pretrained("org/some")
    fastgen.generate([[5, 6]], model="org/some", max_new_tokens=1)
    assert asked == 3 * [("org/some", None, None, None)]


def test_a_fastgen_directory_is_taken_as_it_is(pair):
    directory = pair("gpt2")[1].directory
    assert fastgen.CausalLM.from_pretrained(directory, precision="fp32").directory == directory
    with pytest.raises(fastgen.ModelError, match="exported as fp32, not int8"):
        fastgen.CausalLM.from_pretrained(directory, precision="int8")
    with pytest.raises(fastgen.ModelError, match="keys and values in fp32, not int8"):
        fastgen.CausalLM.from_pretrained(directory, cache_precision="int8")


def test_a_path_is_not_taken_for_a_hub_id(tmp_path):
    for name in (tmp_path / "nothing", "./nothing", "a/b/c"):
        with pytest.raises(fastgen.ModelError, match="is not a directory"):
            fastgen.load(name)
        with pytest.raises(fastgen.ModelError, match="is not a directory"):
            fastgen.CausalLM.from_pretrained(name)


def test_a_checkpoint_of_pickles_is_read_where_there_are_no_safetensors(monkeypatch, tmp_path):
    """The second look asks for what the first left out."""
    from fastgen.store import hub

    asked = []

    def snapshot(repository, revision=None, *, only=None, ignore=None):
        asked.append(ignore)
        return tmp_path

    monkeypatch.setattr(hub, "snapshot", snapshot)
    hub.transformers_snapshot("org/old")
    assert "*.bin" in asked[0] and "*.bin" not in asked[1]
    torch.save({}, tmp_path / "model.safetensors")
    hub.transformers_snapshot("org/new")
    assert len(asked) == 3
