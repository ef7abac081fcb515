"""Every example of README.md and docs/ runs; what they say of files, flags and numbers is so.

    python tests/house/test_docs.py     # writes the table of knobs into docs/knobs.md again

Python runs as it stands, page by page and block after block, on tiny models under the names that
the pages use, or on the demo model; so do the commands of `fastgen`, each once. What cannot run
here (pip, benchmarks, Ray) is checked in another way, and what this file does not know is an error.
A block of `text` is what the block before it prints.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import foreign_graphs
import pytest
import tiny
import torch
from click.testing import CliRunner
from serving import served

import fastgen
from fastgen.commands import cli
from fastgen.commands.chat import COMMANDS
from fastgen.engine import prefill_int8, prefix_cache, schedule
from fastgen.export import export
from fastgen.export.options import TOLERANCES
from fastgen.export.quantize.prefill_int8 import GROUP
from fastgen.inputs import params
from fastgen.jobs import Generate
from fastgen.sampling import trial, trial_process
from fastgen.serve.engine import QUEUE
from fastgen.serve.front import MOST_GRAMMARS
from fastgen.serve.limits import RequestLimits
from fastgen.serve.routes import GRACE

ROOT = Path(fastgen.__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
MEASURED = sorted((ROOT / "bench").glob("*.md"))
LINKED = [*PAGES, *MEASURED, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

FRONT_DOOR = 8192  # bytes of the README, at most
COLUMNS = 100  # of prose

TEMPLATE = """{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"""


@dataclass
class Block:
    """A fenced block.

    Attributes:
        page: the file that it stands in.
        kind: what stands behind the fence.
        line: where its content begins, from 1.
        output: the block of `text` that follows it.
    """

    page: Path
    kind: str
    text: str
    line: int
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(kind: str = "", pages: list[Path] = PAGES) -> list[Block]:
    """The fenced blocks of some pages, of one kind or of all."""
    return [block for page in pages for block in blocks_of(page) if kind in ("", block.kind)]


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    inside = None
    for number, line in enumerate(text(page).splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                inside = Block(page, line[3:], "", number + 1)
            else:
                if inside.kind == "text":
                    assert found and found[-1].output is None, f"{inside} is the output of nothing"
                    found[-1].output = inside.text
                else:
                    found.append(inside)
                inside = None
        elif inside is not None:
            inside.text += line + "\n"
    assert inside is None, f"{inside} has no end"
    return found


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


def prose(page: Path) -> str:
    """A page without its blocks and tables."""
    content = re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^\|.*$", "", content, flags=re.MULTILINE)


def spans(page: Path) -> list[str]:
    """The texts in backquotes within lines, outside of blocks and tables."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def each(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=[page.stem for page in pages])


# --- examples -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny GPT-2, as `save_pretrained` writes it, that is as good in 8 bits."""
    home = tmp_path_factory.mktemp("docs")
    model = tiny.build("gpt2", n_positions=1024)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "c_proj" in name:  # the likeliest token is clear, so that rounding does not matter
                weight.mul_(0.1)
    model.save_pretrained(home / "distilgpt2")
    words = type(tiny.tokenizer())(
        tokenizer_object=tiny.tokenizer().backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    words.save_pretrained(home / "distilgpt2")
    folder = home / "onnx-community" / "Qwen3-0.6B-ONNX"
    for style, name in (("genai int4", "model_q4"), ("optimum", "model")):
        foreign_graphs.write(
            tiny.build("llama"), foreign_graphs.STYLES[style], folder, f"onnx/{name}.onnx"
        )
    return home


CHATS = "SmolLM2-135M-Instruct-int8"  # the name of a model with a chat template


@pytest.fixture(scope="module")
def exported(home: Path) -> Path:
    """The directory `distilgpt2-int8` beside it, and one that chats."""
    made = export(home / "distilgpt2", home / "distilgpt2-int8", progress=None)
    shutil.copytree(made, home / CHATS)
    (home / CHATS / "chat_template.jinja").write_text(TEMPLATE)
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
    """Run Python; a traceback names the page's line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * (block.line - 1) + code, f"<{block.page.name}>", "exec"), names)
    return out.getvalue()


def shown(output: str) -> list[str]:
    """The lines of an output, without what depends on the machine."""
    lines = re.sub(r"\b\d+ threads?\b", "N threads", output).strip().splitlines()
    return [line.rstrip() for line in lines]


def on_ray(block: Block) -> bool:
    return bool(re.search(r"^(import|from) ray\b", block.text, re.MULTILINE))


RUN = [block for block in blocks("python") if not on_ray(block)]


@each(sorted({block.page for block in RUN}))
def test_every_python_block_runs(page: Path, here: Path, exported: Path, service: str) -> None:
    """A page's blocks one after the other, and by themselves: a page can be read alone."""
    names: dict[str, Any] = {"__name__": "docs"}
    for block in (one for one in RUN if one.page == page):
        found = run(block, block.text.replace(SERVED, service), names)
        if block.output is not None:
            assert shown(found) == shown(block.output), f"{block} prints\n{found}"


def test_python_stands_on_many_pages() -> None:
    assert len({block.page for block in RUN}) > 4 and len(RUN) > 6


def test_two_lines_change_for_users_of_transformers(here: Path) -> None:
    some = blocks("python", [DOCS / "transformers.md"])
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
    (short,) = [one for one in blocks("python", [README]) if "# was: " in one.text]
    assert set(short.text.splitlines()) <= set(some[0].text.splitlines())


def test_every_command_runs_or_is_checked(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    """In one directory, from the README to the last page; what stands on two pages runs once."""
    for name in ("distilgpt2", "onnx-community"):
        shutil.copytree(name, tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The os module", "id": "a"}\n')
    monkeypatch.chdir(tmp_path)
    some = blocks("sh")
    said: dict[str, str] = {}  # what each command printed
    assert len(some) > 5
    for block in some:
        found = ""
        for words in commands(block):
            command = shlex.join(words)
            if command not in said:
                said[command] = carried_out(words, service, str(block))
            found += said[command]
        if block.output is not None:
            assert shown(found) == shown(block.output), f"{block} prints\n{found}"


def carried_out(words: list[str], service: str, where: str) -> str:
    """Run a command that can run here; gives what it prints."""
    if words[0] == "curl":
        asked(words, service)
    elif words[0] != "fastgen":
        check(words, where)
    elif words[1] == "serve" or "--ray" in words:  # it does not end, or wants a cluster
        cli.commands[words[1]].make_context(words[1], words[2:])
    else:
        done = CliRunner().invoke(cli, words[1:])
        assert done.exit_code == 0, f"{where}: {shlex.join(words)}\n{done.output}"
        return done.stdout
    return ""


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.kind for block in blocks()} == {"python", "sh", "json"}


def test_the_two_commands_of_a_checkout_are_there() -> None:
    lines = [line for block in blocks("sh", [README]) for line in block.text.splitlines()]
    assert 'pip install . && fastgen generate "The os module"' in lines
    assert 'pip install -e ".[dev]" && python -m pytest' in lines


def asked(words: list[str], service: str) -> None:
    """Run curl; the answer is one that OpenAI's clients can read."""
    if shutil.which("curl"):
        there = [word.replace(SERVED, service) for word in words]
        done = subprocess.run(there, capture_output=True, text=True, timeout=60)
        answer = json.loads(done.stdout)
        assert answer.get("choices") or answer["data"], f"{shlex.join(words)}\n{done}"


def test_the_rows_of_a_job_are_answered(exported: Path, tmp_path: Path) -> None:
    (block,) = blocks("json")
    (tmp_path / "rows.jsonl").write_text(block.text)
    words = ["batch", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl"), "--model",
             str(exported / CHATS), "--max-new-tokens", "2"]  # fmt: skip
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(made) == len(block.text.splitlines()) > 2
    assert made[0]["id"] == "a" and made[-1]["response"]["body"]["choices"]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Something that notes what Ray is asked for: tests/jobs/test_cluster.py has a real one."""
    ray = MagicMock()
    ray.is_initialized.return_value = False
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


def test_what_runs_on_ray_asks_for_what_is_there(here: Path, exported: Path, ray: Any) -> None:
    some = [block for block in blocks("python") if on_ray(block)]
    assert len(some) == 2
    for block in some:
        run(block, block.text, {})
    (mapped,) = ray.data.read_parquet.return_value.map_batches.call_args_list
    assert mapped.args == (Generate,)
    made = Generate(**mapped.kwargs["fn_constructor_kwargs"])({"prompt": ["The os", "class "]})
    (columns,) = re.findall(r"adds the columns ([^.]*)\.", prose(DOCS / "jobs.md"))
    assert set(re.findall(r"`(\w+)`", columns)) == set(made)
    ray.serve.run.assert_called_once()
    assert ray.serve.deployment.call_args.kwargs["num_replicas"] == 4


def test_the_commands_of_a_conversation_are_those_of_chat() -> None:
    listed = re.findall(r"^    (/.*?)(?:   |$)", text(DOCS / "cli.md"), re.MULTILINE)
    known = {word for line in listed for word in re.findall(r"/\w+", line)}
    assert known | {"/unset"} == set(COMMANDS)


# --- what cannot run here -----------------------------------------------------------------------


def check(words: list[str], where: str) -> None:
    """Check a command that is not run here; an unknown kind of command is an error."""
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


@each(PAGES)
def test_flags_and_commands_in_the_text_exist(page: Path) -> None:
    flags = {name: {o for p in one.params for o in p.opts} for name, one in cli.commands.items()}
    every = {"--help"}.union(*flags.values())
    for span in spans(page):
        words = shlex.split(span) if span.startswith(("fastgen ", "pip ", "python ", "--")) else []
        if words and words[0] == "fastgen":
            known = flags[words[1]]
            assert {word for word in words[2:] if word.startswith("--")} <= known, span
        elif words and words[0].startswith("--"):
            assert words[0] in every, span
        elif words:
            check(words, span)


def anchors(page: Path) -> set[str]:
    """The anchors of this page's headings, as GitHub makes them."""
    found: list[str] = []
    content = re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    for title in re.findall(r"^#+ (.*)$", content, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


@each(LINKED)
def test_files_and_headings_that_are_named_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        place, _, heading = target.partition("#")
        if re.match(r"https?:", target):
            continue
        named = (page.parent / place).resolve() if place else page
        assert named.is_file() and named.is_relative_to(ROOT), f"{page.name}: {target}"
        assert not heading or heading in anchors(named), f"{page.name}: {target}"
    for span in spans(page):
        if re.fullmatch(r"(bench|tests|fastgen|export|docs)/[\w./-]+", span):
            assert (ROOT / span).exists(), f"{page.name}: {span}"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert README.stat().st_size <= FRONT_DOOR
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in text(README), f"no link to {page.name}"


@each([*PAGES, ROOT / "CONTRIBUTING.md"])
def test_prose_is_a_hundred_columns_wide_at_most(page: Path) -> None:
    for line in prose(page).splitlines():
        assert len(line) <= COLUMNS or " " not in line.strip("-.0123456789 "), (
            f"{page.name}: {line}"
        )


def rows_of_tables(page: Path) -> list[str]:
    """The rows that hold numbers."""
    lines = [line for line in text(page).splitlines() if line.startswith("|")]
    return [line for line in lines if len(re.findall(r"\d+[.,]\d", line)) > 1]


def test_a_measured_table_stands_in_one_place() -> None:
    places: dict[str, set[str]] = {}
    for page in (*PAGES, *MEASURED):
        for row in rows_of_tables(page):
            places.setdefault(row, set()).add(str(page.relative_to(ROOT)))
    assert len(places) > 200 and rows_of_tables(DOCS / "speed.md")
    assert {row: where for row, where in places.items() if len(where) > 1} == {}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_comparison_with_the_peers_is_what_was_measured() -> None:
    """Its rows are those of bench/peers.md, which `bench/peers` writes: two shapes side by side."""
    report = text(ROOT / "bench" / "peers.md").split("How many times faster fastgen is")[1:]
    measured = [
        {cells(line)[0]: cells(line)[1:] for line in part.splitlines() if line.startswith("|")}
        for part in report
    ]
    content = text(DOCS / "speed.md")
    table = content[content.index("|  | distilgpt2 fp32 |") :].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) > 5 and len(measured) == 2
    for row in rows:
        case, *numbers = cells(row)
        assert numbers == measured[0][case] + measured[1][case], (
            f"bench/peers.md says otherwise: {case}"
        )


def test_what_is_touched_to_add_something_is_there() -> None:
    """Every file of the recipes, and in it every name that its row gives."""
    recipes = text(DOCS / "architecture.md").split("\n## To add ")[1:]
    assert len(recipes) == 6
    rows = [line for part in recipes for line in part.partition("\n## ")[0].splitlines()]
    touched = [cells(line) for line in rows if line.startswith("| `")]
    assert len(touched) > 20
    for file, what in touched:
        content = text(ROOT / file.strip("`"))
        for name in re.findall(r"`(?:--)?([\w-]+)`", what):
            assert re.search(rf"(?<!\w){name}\b", content), f"{file} has no {name}"


LIMITS, GRAMMARS, KL = (
    RequestLimits(),
    trial.Limits(),
    {k: v.kl for k, v in TOLERANCES.items()},
)
SAID = {  # numbers that pages say in passing, as the code has them
    "cli.md": [f"at temperature {params.SANE['temperature']} and top_p {params.SANE['top_p']} if"],
    "precisions.md": [
        f"a KL divergence of {KL['int8']} for int8 and {KL['int4']} for int4",
        f"From how many tokens it pays ({prefill_int8.TRIED[0]} to {prefill_int8.TRIED[-1]})",
        f"rounded by groups of {GROUP} inputs",
    ],
    "python.md": [f"in blocks of {prefix_cache.BLOCK} tokens"],
    "service.md": [
        "A chunk has {} tokens, or {} or {} where".format(*schedule.CHUNKS),
        f"or into {schedule.MAX_ROWS} rows (`--rows`)",
        f"up to {QUEUE} requests (`--queue`)",
        f"have {GRACE:.0f} seconds to finish",
        f"of the body ({LIMITS.body >> 20} MB), of the headers ({LIMITS.head >> 10} kB)",
        f"of a text ({LIMITS.text >> 20} MB)",
        f"values in the JSON besides the prompt ({LIMITS.values:,}), prompts ({LIMITS.prompts})",
        f"answers to each ({LIMITS.copies})",
        f"stop texts ({LIMITS.stops} of {LIMITS.stop_text:,} characters)",
        f"alternatives of a token ({LIMITS.alternatives})",
        f"log-probabilities in all ({LIMITS.logprobs:,})",
    ],
    "structured.md": [
        f"within {GRAMMARS.seconds:.0f} seconds of processor time, {GRAMMARS.bytes >> 20} MB and "
        f"{trial_process.STACK >> 20} MB of stack",
        f"one after the other and {MOST_GRAMMARS} may wait",
    ],
    "../SECURITY.md": [f"**Bodies** end at {LIMITS.body >> 20} MB (`--max-body`)"],
}


@pytest.mark.parametrize("page", SAID)
def test_numbers_in_the_text_are_those_of_the_code(page: str) -> None:
    content = " ".join(text(DOCS / page).split())
    for words in SAID[page]:
        assert words in content, f"{page} says something else than {words!r}"


def test_the_tested_types_are_the_tested_types() -> None:
    (line,) = re.findall(r"^cohere, .*?\.$", text(DOCS / "models.md"), re.DOTALL | re.MULTILINE)
    assert re.split(r",\s+", line.rstrip(".")) == sorted(tiny.ARCHITECTURES)


def test_the_table_of_features_has_a_cell_for_each() -> None:
    lines = text(DOCS / "features.md").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {rows[0].count("|")}
    used = {int(n) for line in rows for n in re.findall(r"\((\d+)\)", line)}
    notes = {int(n) for line in lines for n in re.findall(r"^(\d+)\. ", line)}
    assert used == notes == set(range(1, len(notes) + 1))


def test_the_policy_is_about_this_version() -> None:
    policy = text(ROOT / "SECURITY.md")
    assert f"{fastgen.__version__.rpartition('.')[0]}.x" in policy


# --- the table of knobs (compared with the code in test_generate.py) -----------------------------

KNOBS = DOCS / "knobs.md"


def refreshed(content: str) -> str:
    """The page of knobs with its table as the code has it."""
    table = f"<!-- knobs -->\n{params.table()}\n<!-- /knobs -->"
    return re.sub(r"<!-- knobs -->\n.*\n<!-- /knobs -->", lambda _: table, content, flags=re.DOTALL)


def test_the_knobs_can_be_refreshed() -> None:
    assert refreshed(text(KNOBS)) == text(KNOBS)
    damaged = text(KNOBS).replace("| `top_k` |", "| `top_kk` |")
    assert damaged != text(KNOBS) == refreshed(damaged)


if __name__ == "__main__":
    KNOBS.write_text(refreshed(text(KNOBS)), encoding="utf-8")
