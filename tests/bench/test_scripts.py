"""Each script of bench/ runs: once, on a tiny model; those that need peers say what they take."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny

from fastgen.store.hub import DEMO

BENCH = Path(__file__).resolve().parents[2] / "bench"
ONCE = ["--threads", "1", "--rounds", "1"]
TINY = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 600}

Run = Callable[..., str]


@pytest.fixture(scope="module")
def keep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the tiny models of all scripts are exported to, once each."""
    # It shows its steps where standard error was when it was imported: not where a test looks.
    importlib.import_module("fastgen.export.pipeline")
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def run(keep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(script, *arguments, **given)`: what a script prints whose `main` is given that.

    distilgpt2's shape is a tiny one.
    """
    monkeypatch.setitem(shapes.SHAPES, "distilgpt2", ("gpt2", TINY))

    def main(script: str, *arguments: str | Path, **given: Any) -> str:
        monkeypatch.setattr(sys, "argv", [f"bench/{script}.py", *map(str, arguments)])
        importlib.import_module(script).main(**given)
        return capsys.readouterr().out

    return main


@pytest.fixture
def directory(run: Run, keep: Path) -> Path:
    """A model directory."""
    with shapes.exported("distilgpt2", ["fp32"], keep) as paths:
        return paths["fp32"]


def lines(said: str) -> list[list[str]]:
    """The cells of each line of a table; all that are numbers are finite."""
    found = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert found and not re.search(r"\b(nan|inf)\b", said), said
    return found


SHAPED = {  # scripts that export a shape, with few tokens of everything
    "generate": ["--rows", "1", "2", "--beams", "2", "--prefill", "8", "--new", "3"],
    "step": ["--rows", "1", "2", "--new", "3"],
    "context": ["--past", "40", "--new", "2", "--cache-precision", "fp32", "--every-token"],
    "lookup": ["--new", "4"],
    "prefix": ["--prompt", "70", "--kept", "64"],
    "prompts": ["--prompt", "8"],
    "bandwidth": ["--precision", "fp32", "--new", "2"],
}


@pytest.mark.parametrize("script", SHAPED)
def test_a_shape_is_measured(run, keep, script):
    given = {"floats": 1 << 20} if script == "bandwidth" else {}
    assert len(lines(run(script, *SHAPED[script], *ONCE, "--keep", keep, **given))) >= 2


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("ratio", ["--threads", "1", "--rounds", "1", "--steps", "1"]),
        ("loading", ["--rounds", "1"]),
        ("memory", ["--rounds", "1"]),
        ("nodes", ["--threads", "1", "--steps", "2", "--past", "4"]),
    ],
)
def test_a_directory_is_measured(run, directory, script, arguments):
    assert len(lines(run(script, directory, *arguments))) >= 2


def test_the_demo_model_is_measured(run, tmp_path):
    assert len(lines(run("startup", "--rounds", "1"))) >= 3
    assert len(lines(run("structured", *ONCE))) >= 2
    roots = [BENCH.parent] * 2
    assert len(lines(run("versions", *roots, "--new", "2", *ONCE))) >= 7
    text = tmp_path / "text"
    text.write_text("The os module reads files.<|endoftext|>A list holds items.", encoding="utf-8")
    said = run("held_out", DEMO, "--write", text=text)
    assert "2 documents" in said and len(lines(said)) == 2
    with pytest.raises(SystemExit) as ended:  # it tells whether memory grew
        run("flat", "--calls", "80", "--longest", "9", "--allowed", "1e6")
    assert not ended.value.code


def test_a_service_is_measured(run, tmp_path):
    said = run("serve", "--home", tmp_path, "--requests", "1", "--alone", "1", *ONCE)
    assert [line[1] for line in lines(said)[1:]].count("service") == 2
    said = run("soak", "--warm", "150", "--requests", "30", "--clients", "4", "--growth", "200")
    assert "none lost" in said


def test_latents_are_measured(run):
    small = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "max_position_embeddings": 512,
    }  # fmt: skip
    sizes = importlib.import_module("latent").SIZES | small
    said = lines(run("latent", "--past", "20", "--rows", "1", *ONCE, sizes=sizes))
    assert [line[2] for line in said[1:]] == ["latents", "keys and values"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory with a tokenizer."""
    out = tmp_path_factory.mktemp("bench") / "llama"
    tiny.build("llama").save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    return out


def test_what_precisions_cost_is_measured(run, trained):
    said = lines(run("quality", trained, "--precision", "int8"))
    assert [line[0] for line in said[1:]] == ["llama", "llama, twin"]
    assert len(lines(run("rungs", trained, "--precision", "int8"))) >= 2
    said = lines(run("ablation", trained, "--tokens", "300", "--only", "text", "rung"))
    assert {"all", "own"} <= {line[1] for line in said} and said[-1][1] == "float32"


def test_directories_are_compared_on_text_that_no_export_has_seen(run):
    said = lines(run("beside", DEMO, DEMO, "--tokens", "300"))
    assert float(said[-1][1].split()[0]) == 0 and said[-1][2] == "100.0%"


def test_calls_of_tools_are_read(run, tmp_path):
    family = tmp_path / "qwen"
    family.mkdir()
    models = [{"repo": "Qwen3-8B", "default_generation_prompt": ""}]
    (family / "family.json").write_text(json.dumps({"reference_models": models}))
    called = {"name": "look", "arguments": {"city": "Paris"}}
    case: dict[str, Any] = {
        "id": "one",
        "family": "qwen",
        "models": ["Qwen3-8B"],
        "tags": [],
        "tools": [{"name": "look", "parameters": {}}],
        "raw_output": f"<tool_call>\n{json.dumps(called)}\n</tool_call>",
        "expected": {"tool_calls": [called]},
    }
    (family / "cases.jsonl").write_text(json.dumps(case))
    tools = importlib.import_module("tools")
    tools.main([str(tmp_path), "--model", str(DEMO), "--show"])
    assert run("tools", tmp_path).split()[-4:] == ["all", "1", "of", "1"]


# Scripts that need what others made, an hour, or both; most have tests of their own besides.
HELP = ("architectures", "built", "cluster", "export", "folders", "fresh", "ids", "opened", "peers",
        "real", "serve", "soak", "texts")  # fmt: skip
MODULES = {"shapes", "shrink", "serve_worker"}  # which the others import or start


@pytest.mark.parametrize("script", HELP)
def test_a_script_says_what_it_takes(monkeypatch, capsys, script):
    path = BENCH / script / "__main__.py"
    if not path.is_file():
        path = BENCH / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert not ended.value.code and "usage" in capsys.readouterr().out.lower()


def test_no_script_is_left_out():
    scripts = {path.stem for path in BENCH.glob("*.py")}
    scripts |= {path.parent.name for path in BENCH.glob("*/__main__.py")}
    alone = {"ratio", "versions", "loading", "memory", "startup", "structured", "held_out"}
    alone |= {"flat", "latent", "nodes", "quality", "rungs", "ablation", "tools", "beside"}
    assert scripts == {*SHAPED, *alone, *HELP, *MODULES}
