"""The scripts about opening checkpoints and files, and loops in rounds: small, without a peer."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import pytest
import tiny
from fake_hub import blocked

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import fresh
import ids
import opened
import serve
from folders import speed
from peers import cases
from peers.workers import Failed


def cells(line: str) -> list[str]:
    return line.strip("| \n").split(" | ")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tiny model in floats and in 8 bits, with a tokenizer."""
    place, model = tmp_path_factory.mktemp("files"), tiny.build("llama")
    kinds = gguf.GGMLQuantizationType
    tokenizer = tiny.tokenizer().backend_tokenizer
    return [
        gguf_files.write(model, place / f"{kind.name}.gguf", kind, tokenizer)
        for kind in (kinds.F32, kinds.Q8_0)
    ]


# --- opened.py ------------------------------------------------------------------------------------


def test_files_are_opened_as_they_are(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """8 bits are held, and what their activations cost is told; floats stay exact."""
    opened.types(files[1:])
    said = capsys.readouterr().out.splitlines()[-1]
    name, megabytes, directory, kernels, kl, text, difference = cells(said)
    assert (name, kernels) == ("Q8_0", "int8, blocks of 32")
    assert float(megabytes) <= float(directory) and 0 <= float(kl) < 0.01
    perplexity, own = map(float, text.split(", "))
    assert perplexity == pytest.approx(own, rel=0.05) and float(difference) < 1e-5
    assert [opened.usual(file) for file in files] == [{"precision": "fp32"}, {}]
    exact = cells(opened.line(files[0], {"logits": {"max_difference": 1e-7}}, 1.0))
    assert exact[3:] == ["float32", "0", "the same", "1.0e-07"]


def test_the_seconds_of_an_export_and_of_loading_it(
    files: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    opened.seconds(files[:1])
    name, exported, loaded = cells(capsys.readouterr().out.splitlines()[-1])
    assert name == "F32" and float(exported) > float(loaded) >= 0


def test_a_worker_times_a_prompt_and_what_follows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.store.hub import DEMO

    monkeypatch.setattr(opened, "NEW", 4)
    opened.work("ours", DEMO, 1)
    first, rest = json.loads(capsys.readouterr().out)
    assert first > 0 and rest > 0


def test_speeds_are_medians_by_engine(
    files: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    took = {"ours": [(0.5, 1.0), (9.0, 9.0), (0.25, 0.5)], "llama": [(1.0, 2.0)] * 3}

    def timed(python: str, engine: str, directory: Path, threads: int) -> tuple[float, float]:
        asked.append((python, engine))
        place = "model.gguf" if engine == "llama" else "fastgen.json"
        assert (directory / place).exists() and threads == 2
        return took[engine].pop()

    def exported(file: Path, out: Path, **wishes: Any) -> None:
        out.mkdir()
        (out / "fastgen.json").touch()

    monkeypatch.setattr(opened, "timed", timed)
    monkeypatch.setattr(opened, "exported", exported)
    opened.speed(files[1:], "theirs", 2, rounds=3)
    assert asked == [(sys.executable, "ours"), ("theirs", "llama")] * 3
    ours, theirs = map(cells, capsys.readouterr().out.splitlines()[-2:])
    assert ours == ["Q8_0", "fastgen", "512", "63.0"]
    assert theirs == ["Q8_0", "llama.cpp", "256", "31.5"]


# --- ids.py ---------------------------------------------------------------------------------------


def test_texts_are_the_same_each_time_and_none_twice() -> None:
    found = ids.texts(300, ["<s>"])
    assert found == ids.texts(300, ["<s>"]) and len({*found}) == 300
    assert 5 < sum("<s>" in text for text in found) < 100
    assert any("\n" in text for text in found) and any(not text.isascii() for text in found)
    assert not any("<s>" in text for text in ids.texts(100, []))


def test_the_ids_of_a_file_are_the_original_tokenizers(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "little")
    ids.compare(files[0], 200, None, tmp_path / "little")
    assert "| tokenizer.json of little | 200 | 200 |" in capsys.readouterr().out


@pytest.mark.parametrize("prefixed", [True, False])
def test_the_ids_of_pieces_are_sentencepieces(
    prefixed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, theirs = gguf_files.sentence_pieces(tmp_path / "pieces.gguf", prefixed)
    said = ids.file.read(path, ids.tensors.block_sizes())
    texts = ["the quick brown", "  a12 é", "你好"]
    assert ids.by_sentencepiece(said, texts) == [theirs.encode(text) for text in texts]
    ids.compare(path, 60, None, None)
    _, count, same = cells(capsys.readouterr().out.splitlines()[-1])
    assert count == same and 0 < int(count) <= 60


def test_texts_whose_ids_differ_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    ids.told("others", [[1], [2, 3], [4]], [[1], [2], [4]], ["a", "b", "c"])
    line, *shown = capsys.readouterr().out.splitlines()
    assert cells(line) == ["others", "3", "2"]
    assert [one.strip() for one in shown] == ["'b'", "[2]", "[2, 3]"]


# --- fresh.py -------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A package that holds a megabyte."""
    path = tmp_path / "little-1.0-py3-none-any.whl"
    said = "Metadata-Version: 2.1\nName: little\nVersion: 1.0\n"
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("little.py", "#" * 1_000_000)
        out.writestr("little-1.0.dist-info/METADATA", said)
        out.writestr("little-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        out.writestr("little-1.0.dist-info/RECORD", "")
    return path


def test_a_way_has_an_environment_of_its_own(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made once; each of its programs gets the model and a place, and is timed."""
    programs = (
        "import sys, time, little\ntime.sleep(0.2)\nopen(sys.argv[2], 'w').write(sys.argv[1])",
        "import sys\nheld = b'x' * 50_000_000\n"
        "assert open(sys.argv[2]).read() == sys.argv[1] and PROMPT",
    )
    way = fresh.Way("a way", "little", ("--no-index", str(wheel)), "checkpoint", programs)
    monkeypatch.setitem(fresh.WAYS, "little", way)
    (tmp_path / "model").mkdir()

    def line() -> list[str]:
        asked = ["fresh", str(tmp_path / "home"), "--only", "little"]
        monkeypatch.setattr(sys, "argv", [*asked, "--checkpoint", str(tmp_path / "model")])
        fresh.main()
        return cells(capsys.readouterr().out.splitlines()[-1])

    title, kind, megabytes, packages, _, seconds, memory = line()
    assert (title, kind, megabytes, packages) == ("a way", "safetensors", "1", "1")
    assert float(seconds) >= 0.2 and float(memory.replace(",", "")) > 50
    wheel.unlink()
    assert line()[:4] == [title, kind, megabytes, packages]


def test_a_way_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    way = fresh.Way("a way", "little", (), "checkpoint", ("raise SystemExit('no such thing')",))
    with pytest.raises(fresh.Failed, match=r"^no such thing$"):
        fresh.measure(way, Path(sys.executable), tmp_path)


@pytest.mark.parametrize("name", ["fp32", "gguf", "transformers"])
def test_the_programs_come_to_a_token(
    name: str, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fastgen's without torch, as in their environment."""
    tiny.build("llama").save_pretrained(tmp_path / "little")
    tiny.tokenizer().save_pretrained(tmp_path / "little")
    monkeypatch.setattr(fresh, "PROMPT", [5, 6, 7])
    way = fresh.WAYS[name]
    programs = way.programs
    if name != "transformers":
        programs = tuple(blocked("torch", "transformers") + one for one in programs)
    way = fresh.Way(way.title, way.environment, way.installs, way.model, programs)
    model = files[0] if way.model == "gguf" else tmp_path / "little"
    seconds, megabytes = fresh.measure(way, Path(sys.executable), model)
    assert seconds > 0 and megabytes > 50


def test_what_is_installed_is_counted_without_compiled_python(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    place = next(tmp_path.glob("lib/python*/site-packages"))
    (place / "one").mkdir()
    (place / "one" / "code.py").write_bytes(b"x" * 2_000_000)
    (place / "one" / "__pycache__").mkdir()
    (place / "one" / "__pycache__" / "code.pyc").write_bytes(b"x" * 9_000_000)
    for name in ("one-1.0.dist-info", "two-2.0.dist-info", "pip-1.0.dist-info"):
        (place / name).mkdir()
    assert fresh.installed(tmp_path / "bin" / "python") == (2.0, 2)


# --- loops in rounds ------------------------------------------------------------------------------


def test_the_sides_of_a_service_take_turns_with_the_same_requests(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def side(name: str, seconds: float) -> serve.Side:
        def answer(**request: Any) -> dict[str, Any]:
            asked.append((name, request))
            times = dict.fromkeys(("usual", "longest", "first", "first_of_long"), seconds)
            return {"tokens": 100, "seconds": seconds, **times}

        return answer

    args = argparse.Namespace(rounds=2, alone=2, requests=1)
    both = {"one": side("one", 1.0), "other": side("other", 2.0)}
    serve.throughput(args, "distilgpt2", both)
    one, other = map(cells, capsys.readouterr().out.splitlines())
    assert one == ["distilgpt2", "one", "100", "100 (1.00)", "100 (1.00)"]
    assert other[2:] == ["50", "50 (1.00)", "50 (1.00)"]
    _alternate(asked, rounds=3, calls=1 + len(serve.CLIENTS))
    asked.clear()
    serve.stalls(args, "distilgpt2", both)
    one, other = map(cells, capsys.readouterr().out.splitlines())
    assert one[2:] == ["1,000"] * 4 and other[2:] == ["2,000"] * 4
    _alternate(asked, rounds=3, calls=1)


def _alternate(asked: Sequence[tuple[str, dict[str, Any]]], rounds: int, calls: int) -> None:
    """Two sides were asked the same in turn, and each time something else."""
    assert [name for name, _ in asked] == ["one", "other"] * rounds * calls
    first, second = asked[::2], asked[1::2]
    assert [request for _, request in first] == [request for _, request in second]
    assert len({str(request) for _, request in first}) == rounds * calls


class Worker:
    """An engine that takes so many seconds, and fails after some calls."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.left = list(seconds)

    def generate(self, case: cases.Case, prompts: list[list[int]]) -> dict[str, Any]:
        if not self.left:
            raise Failed("no more")
        return {"seconds": self.left.pop(0)}


def test_folders_are_timed_in_turn_and_the_first_round_is_left_out() -> None:
    case = cases.CASES["greedy-16"]
    pair: Any = argparse.Namespace(
        theirs=Worker([9, 2, 4]), ours=Worker([9, 1, 2]), seconds={}, failed={}
    )
    speed._time(pair, case, 2048, rounds=2)
    assert pair.seconds == {case.name: [(2, 1), (4, 2)]} and not pair.failed
    speed._time(pair, case, 2048, rounds=2)
    assert pair.failed == {case.name: "no more"}
