"""Every example of the README runs, and what it says of files, flags and numbers is so.

    python tests/test_readme.py     # writes the table of knobs into the README again

Python runs as it stands, block after block, on tiny models under the names that the README uses, or
on the demo model; so do the commands of `fastgen`. What cannot run here (pip, benchmarks) is
checked in another way, and what this file does not know is an error. A block of `text` is what the
block before it prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign_graphs
import pytest
import tiny
import torch
from click.testing import CliRunner
from fastgen.export import export
from serving import served

import fastgen
from fastgen import params
from fastgen.commands import cli

ROOT = Path(fastgen.__file__).parents[1]
README = ROOT / "README.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MEASURED = [ROOT / "bench" / name for name in ("README.md", "peers.md")]

TEMPLATE = """{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"""


@dataclass
class Block:
    """A fenced block.

    Attributes:
        kind: what stands behind the fence.
        line: where its content begins, from 1.
        section: the heading that it stands under.
        output: the block of `text` that follows it.
    """

    kind: str
    text: str
    line: int
    section: str
    output: str | None = None

    def __str__(self) -> str:
        return f"README.md:{self.line}"


def text() -> str:
    return README.read_text(encoding="utf-8")


def blocks() -> list[Block]:
    found: list[Block] = []
    section, inside = "", None
    for number, line in enumerate(text().splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                inside = Block(line[3:], "", number + 1, section)
            else:
                if inside.kind == "text":
                    assert found and found[-1].output is None, f"{inside} is the output of nothing"
                    found[-1].output = inside.text
                else:
                    found.append(inside)
                inside = None
        elif inside is not None:
            inside.text += line + "\n"
        elif line.startswith("## "):
            section = line[3:]
    assert inside is None, f"{inside} has no end"
    return found


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text(), re.DOTALL | re.MULTILINE)
    assert found, f"there is no section {title}"
    return found[1]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments."""
    for line in block.text.replace("\\\n", "").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            place = words.index("&&")
            yield words[:place]
            words = words[place + 1 :]
        if words:
            yield words


def spans() -> list[str]:
    """What stands in backquotes within lines, outside of blocks and tables."""
    prose = re.sub(r"^```.*?^```$", "", text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", re.sub(r"^\|.*$", "", prose, flags=re.MULTILINE))


# --- examples -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny GPT-2, as `save_pretrained` writes it, that is as good in 8 bits."""
    home = tmp_path_factory.mktemp("readme")
    model = tiny.build("gpt2", n_positions=1024)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "c_proj" in name:  # the likeliest token is clear, so that rounding does not matter
                weight.mul_(0.1)
    model.save_pretrained(home / "distilgpt2")
    words = type(tiny.tokenizer())(
        tokenizer_object=tiny.tokenizer().backend_tokenizer, pad_token="<pad>", bos_token="<s>",
        eos_token="</s>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    words.save_pretrained(home / "distilgpt2")
    folder = home / "onnx-community" / "Qwen3-0.6B-ONNX"
    for style, name in (("genai int4", "model_q4"), ("optimum", "model")):
        foreign_graphs.write(
            tiny.build("llama"), foreign_graphs.STYLES[style], folder, f"onnx/{name}.onnx"
        )
    return home


SERVED = "http://127.0.0.1:8000"  # where `fastgen serve` listens


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """The address of what `fastgen serve` starts, in a thread and at a free port."""
    with served(fastgen.load(), max_rows=32) as address:
        yield address


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That directory as the working directory; the cache of exports is in it too."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("FASTGEN_CACHE", str(home / "cache"))
    return home


def run(block: Block, code: str, names: dict[str, Any]) -> str:
    """Run Python; a traceback names the README's line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (block.line - 1) + code, "<README.md>", "exec"), names)
    return out.getvalue()


def shown(output: str) -> list[str]:
    """The lines of an output, without what depends on the machine."""
    lines = re.sub(r"\b\d+ threads?\b", "N threads", output).strip().splitlines()
    return [line.rstrip() for line in lines]


def test_every_python_block_runs(here: Path, service: str) -> None:
    export("distilgpt2", here / "distilgpt2-int8", progress=None)
    shutil.copytree("distilgpt2-int8", "SmolLM2-135M-Instruct-int8")
    (here / "SmolLM2-135M-Instruct-int8" / "chat_template.jinja").write_text(TEMPLATE)
    names: dict[str, Any] = {"__name__": "readme"}
    some = [block for block in blocks() if block.kind == "python"]
    assert len(some) > 3
    for block in some:
        found = run(block, block.text.replace(SERVED, service), names)
        if block.output is not None:
            assert shown(found) == shown(block.output), f"{block} prints\n{found}"


def test_two_lines_change_for_users_of_transformers(here: Path) -> None:
    some = [block for block in blocks() if block.kind == "python" and "transf" in block.section]
    outputs = []
    for theirs in (False, True):
        names: dict[str, Any] = {}
        outputs.append("")
        for block in some:
            code = block.text
            if theirs:
                code = re.sub(r"^# was: (.*)\n.*\n", r"\1\n", code, flags=re.MULTILINE)
            outputs[-1] += run(block, code, names)
    assert sum(block.text.count("# was: ") for block in some) == 2
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) > 3


def test_every_command_runs_or_is_checked(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    for name in ("distilgpt2", "onnx-community"):
        shutil.copytree(name, tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The os module", "id": "a"}\n')
    monkeypatch.chdir(tmp_path)
    runner, some = CliRunner(), [block for block in blocks() if block.kind == "sh"]
    assert len(some) > 5
    for block in some:
        found = ""
        for words in commands(block):
            if words[:2] == ["fastgen", "serve"]:  # it does not end: `service` is it
                cli.commands["serve"].make_context("serve", words[2:])
            elif words[0] == "curl":
                asked(words, service)
            elif words[0] == "fastgen":
                done = runner.invoke(cli, words[1:])
                assert done.exit_code == 0, f"{block}: {shlex.join(words)}\n{done.output}"
                found += done.stdout
            else:
                check(words, str(block))
        if block.output is not None:
            assert shown(found) == shown(block.output), f"{block} prints\n{found}"


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.kind for block in blocks()} == {"python", "sh"}


def test_the_two_commands_of_a_checkout_are_there() -> None:
    lines = [line for block in blocks() for line in block.text.splitlines()]
    assert 'pip install . && fastgen generate "The os module"' in lines
    assert 'pip install -e ".[dev]" && python -m pytest' in lines


def asked(words: list[str], service: str) -> None:
    """Run curl; the answer is one that OpenAI's clients can read."""
    if shutil.which("curl"):
        there = [word.replace(SERVED, service) for word in words]
        done = subprocess.run(there, capture_output=True, text=True, timeout=60)
        assert json.loads(done.stdout)["choices"], f"{shlex.join(words)}\n{done}"


# --- what cannot run here -----------------------------------------------------------------------


def check(words: list[str], where: str) -> None:
    """Whether a command that is not run here is right; an error for a kind that is not known."""
    if words[:2] == ["pip", "install"]:
        check_install(words[2:], where)
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / "tests").is_dir()
    elif words[0] == "python" and not words[1].startswith("-"):
        check_script(words[1:], where)
    else:
        raise AssertionError(f"{where}: this test does not know how to run {shlex.join(words)}")


def check_install(words: list[str], where: str) -> None:
    (what,) = (word for word in words if word != "-e")
    found = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?", what)
    assert found, f"{where}: {what}"
    assert found[1] in (".", PROJECT["name"]), f"{where}: {found[1]} is not this distribution"
    for extra in (found[2] or "").split(","):
        assert not extra or extra in PROJECT["optional-dependencies"], f"{where}: {extra}"


def check_script(words: list[str], where: str) -> None:
    place = ROOT / words[0]
    assert place.is_file() or (place / "__main__.py").is_file(), f"{where}: no {words[0]}"
    near = place.parent if place.is_file() else place
    known = "".join(path.read_text(encoding="utf-8") for path in near.glob("*.py"))
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag}"' in known, f"{where}: {words[0]} has no {flag}"


@pytest.mark.parametrize(
    "words",
    [
        ["pip", "install", "another[export]"],
        ["pip", "install", ".[exports]"],
        ["python", "bench/nothing.py"],
        ["python", "bench/step.py", "--nothing"],
        ["python", "-c", "1"],
        ["curl", "x"],
    ],
)
def test_a_wrong_command_is_found(words: list[str]) -> None:
    with pytest.raises(AssertionError):
        check(words, "")


# --- what is said between the examples ----------------------------------------------------------


def test_flags_and_commands_in_the_text_exist() -> None:
    flags = {name: {o for p in one.params for o in p.opts} for name, one in cli.commands.items()}
    every = set().union(*flags.values())
    for span in spans():
        words = shlex.split(span) if span.startswith(("fastgen ", "pip ", "python ", "--")) else []
        if words and words[0] == "fastgen":
            known = flags[words[1]]
            assert {word for word in words[2:] if word.startswith("--")} <= known, span
        elif words and words[0].startswith("--"):
            assert words[0] in every, span
        elif words:
            check(words, span)


def test_files_and_headings_that_are_named_exist() -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text()):
        if target.startswith("#"):
            titles = re.findall(r"^#+ (.*)$", text(), re.MULTILINE)
            assert target[1:] in {title.lower().replace(" ", "-") for title in titles}, target
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
    for span in spans():
        if re.fullmatch(r"(bench|tests|fastgen|export)/[\w./-]+", span):
            assert (ROOT / span).exists(), span


def test_every_measured_row_stands_where_the_measurements_are() -> None:
    rows = {line for path in MEASURED for line in path.read_text(encoding="utf-8").splitlines()}
    some = [line for line in section("Speed").splitlines() if line.startswith("|")]
    assert len(some) > 15
    for line in some:
        assert line in rows, f"bench/README.md says otherwise: {line}"


def test_the_tested_types_are_the_tested_types() -> None:
    (line,) = re.findall(r"^cohere, .*?\.$", section("Which models"), re.DOTALL | re.MULTILINE)
    assert re.split(r",\s+", line.rstrip(".")) == sorted(tiny.ARCHITECTURES)


def test_the_table_of_features_has_a_cell_for_each() -> None:
    lines = section("Beside the others, feature by feature").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {rows[0].count("|")}
    used = {int(n) for line in rows for n in re.findall(r"\((\d+)\)", line)}
    notes = {int(n) for line in lines for n in re.findall(r"^(\d+)\. ", line)}
    assert used == notes == set(range(1, len(notes) + 1))


def test_the_map_names_every_module() -> None:
    words = set(re.findall(r"\w+", section("How it is built")))
    modules = {path.stem for path in (ROOT / "fastgen").glob("*.py")} - {"__init__"}
    assert modules <= words, f"add {sorted(modules - words)}"


def test_the_policy_is_about_this_version() -> None:
    policy = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert f"{fastgen.__version__.rpartition('.')[0]}.x" in policy


# --- the table of knobs (compared with the code in test_generate.py) -----------------------------


def refreshed(content: str) -> str:
    """The README with the table of knobs as the code has it."""
    table = f"<!-- knobs -->\n{params.table()}\n<!-- /knobs -->"
    return re.sub(r"<!-- knobs -->\n.*\n<!-- /knobs -->", lambda _: table, content, flags=re.DOTALL)


def test_the_knobs_are_folded_and_can_be_refreshed() -> None:
    assert re.search(r"<details>.*<!-- knobs -->.*<!-- /knobs -->.*</details>", text(), re.DOTALL)
    damaged = text().replace("| `top_k` |", "| `top_kk` |")
    assert damaged != text() and refreshed(damaged) == refreshed(text())


if __name__ == "__main__":
    README.write_text(refreshed(text()), encoding="utf-8")
