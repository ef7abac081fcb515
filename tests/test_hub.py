"""The hub for real: huggingface_hub in processes of their own, against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import tiny
import torch

import fastgen

IDS = [[5, 6, 7], [8]]


class Hub(ThreadingHTTPServer):
    """What `snapshot_download` asks of the hub, for folders of `root`: "org/name" is a model.

    Attributes:
        asked: the requests so far, such as "GET /org/name/resolve/<commit>/config.json".
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str) -> str:
        """A commit's name: that of the content's names and sizes."""
        files = sorted((p.name, p.stat().st_size) for p in (self.root / repository).rglob("*"))
        return hashlib.sha1(repr(files).encode()).hexdigest()


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "api":  # api/models/org/name/(revision|tree)/main
            self.api("/".join(parts[2:4]), *parts[4:6])
        else:  # org/name/resolve/commit/file
            self.file("/".join(parts[:2]), "/".join(parts[4:]))

    def api(self, repository: str, what: str, revision: str) -> None:
        place = self.server.root / repository
        if not place.is_dir():
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.server.commit(repository)
        if revision not in ("main", commit):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = [p for p in sorted(place.rglob("*")) if p.is_file()]
        names = [p.relative_to(place).as_posix() for p in files]
        found: object = {"id": repository, "sha": commit,
                         "siblings": [{"rfilename": name} for name in names]}  # fmt: skip
        if what == "tree":
            found = [
                {"type": "file", "path": name, "size": p.stat().st_size, "oid": self.etag(p)}
                for name, p in zip(names, files, strict=True)
            ]
        return self.answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def file(self, repository: str, name: str) -> None:
        path = self.server.root / repository / name
        if not path.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{self.etag(path)}"', "X-Repo-Commit": self.server.commit(repository),
            "Accept-Ranges": "bytes",
        }  # fmt: skip
        return self.answer(200, path.read_bytes(), headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def etag(self, path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def log_message(self, *_: object) -> None:
        """pytest shows nothing of it; `asked` has it."""


class World:
    """A hub, and a home directory of somebody who uses it."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home

    @cached_property
    def cache(self) -> Path:
        return self.home / "exports"

    def environment(self, **changes: str) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "FASTGEN_"))}
        return keep | {
            "HF_ENDPOINT": self.hub.address, "HF_HOME": str(self.home / "hf"),
            "FASTGEN_CACHE": str(self.cache), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        } | changes  # fmt: skip

    def start(self, program: str, *args: str, **changes: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", program, *args], env=self.environment(**changes),
            cwd=self.home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, program: str, *args: str, **changes: str) -> tuple[int, str, str]:
        process = self.start(program, *args, **changes)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def command(self, *args: str, **changes: str) -> tuple[int, str, str]:
        return self.run("from fastgen.__main__ import main; main()", *args, **changes)


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
    server = Hub(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def world(hub, tmp_path) -> World:
    hub.asked.clear()
    return World(hub, tmp_path)


NO_TORCH = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnx", "onnxscript"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""
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
    code, out, err = world.command("generate", "The quick", "-m", "org/ready",
                                   "--max-new-tokens", "4")  # fmt: skip
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


def test_without_torch_a_transformers_repository_says_what_to_install(world):
    code, _, err = world.run(NO_TORCH + FROM_PRETRAINED, "org/source")
    assert code == 1
    assert "pip install 'fastgen-onnx[export]'" in err.splitlines()[-1]
    assert not list(world.cache.glob("org*-fp32-*/"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "-m", "org/nothing"], "org/nothing is neither .* no such repository"),
        (["info", "org/nothing"], "no such repository, or it is private"),
        (["generate", "x", "-m", "org/source"],
         "org/source holds no fastgen model .* CausalLM.from_pretrained"),
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
    code, _, err = world.command("generate", "x", "-m", "org/ready",
                                 HF_ENDPOINT="http://127.0.0.1:9")  # fmt: skip
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
    from fastgen import hub

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
