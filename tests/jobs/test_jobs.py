"""`fastgen batch` and `fastgen score`: files in, files out, whatever happens in between."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from click.testing import CliRunner
from pyarrow import parquet

import fastgen
from fastgen import commands
from fastgen.commands import rows as rows_of_commands
from fastgen.jobs import journal
from fastgen.jobs.generation import GenerationWork
from fastgen.jobs.journal import Entry, Journal
from fastgen.jobs.request import RowReader
from fastgen.jobs.row import InputRow, seed_of
from fastgen.jobs.scoring import ScoringWork
from fastgen.jobs.window import Window

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
NEW = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(pair, tmp_path_factory) -> fastgen.CausalLM:
    """A tiny model with a chat template."""
    place = tmp_path_factory.mktemp("jobs") / "model"
    shutil.copytree(pair("llama")[1].directory, place)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return fastgen.CausalLM(place)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: str | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
    """Exit code, standard output and standard error of a command line, in this process."""
    with CliRunner().isolation(input=stdin) as (out, err, _):
        code = commands.run([str(arg) for arg in args])
        return code, out.getvalue(), err.getvalue().decode()


def write(path: Path, rows: Sequence[Any]) -> Path:
    """A file of lines: objects as JSON, bytes as they are."""
    lines = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def batch(model: fastgen.CausalLM, rows: Sequence[Any], *flags: str) -> list[dict[str, Any]]:
    """Run `fastgen batch` on lines, in the directory that we are in."""
    write(Path("in.jsonl"), rows)
    code, _, said = run(
        "batch", "in.jsonl", "out.jsonl", "-m", model.directory, "--restart", *flags
    )
    found = read(Path("out.jsonl"))
    assert code == any(one.get("error") for one in found), said
    assert sorted(os.listdir()) == ["in.jsonl", "out.jsonl"]
    return found


# --- what rows ask for ---------------------------------------------------------------------------


def test_each_row_has_the_text_that_it_gets_alone_and_knobs_of_its_own(model, here):
    """Greedy, sampled, beams, guesses, stops, several sequences: one file, in its order."""
    asked: list[dict[str, Any]] = [
        {"prompt": "The quick", **NEW},
        {"prompt": "import numpy", "do_sample": True, "seed": 3, "temperature": 0.7, **NEW},
        {"prompt": "The quick brown", "num_beams": 3, **NEW},
        {"prompt": "one by one", "prompt_lookup_num_tokens": 3, "max_new_tokens": 20},
        {"prompt": "value", "num_return_sequences": 2, "do_sample": True, "seed": [1, 2], **NEW},
        {"prompt": "Every good", "stop_strings": ["e"], "max_new_tokens": 30},
        {"prompt": "dog", "repetition_penalty": 1.5, "max_length": 9},
        {"prompt": "The", "logit_bias": {"40": 100.0}, "max_new_tokens": 2},
    ]
    found = batch(model, [one | {"id": f"n{i}"} for i, one in enumerate(asked)])
    for place, (one, got) in enumerate(zip(asked, found, strict=True)):
        knobs = {name: value for name, value in one.items() if name != "prompt"}
        alone = model.complete([one["prompt"]], **knobs)
        assert got["text"] == (alone if len(alone) > 1 else alone[0]), one
        assert got["row"] == place and got["id"] == f"n{place}" and "error" not in got
        assert got["prompt_tokens"] == len(model.tokenizer.encode(one["prompt"]))
    assert found[4]["finish_reason"] == ["length", "length"] and found[4]["new_tokens"] == 12
    assert found[5]["finish_reason"] in ("stop_string", "length")
    assert found[6]["prompt_tokens"] + found[6]["new_tokens"] == 9


def test_messages_ids_and_what_is_given_out(model, here):
    talk = [{"role": "user", "content": "Hi"}]
    ids = [5, 6, 7]
    found = batch(
        model,
        [
            {"messages": talk, "metadata": {"a": 1}, "mine": 2, "his": 3, **NEW},
            {"input_ids": ids, "top_logprobs": 2, **NEW},
            {"prompt": ids, "mine": "x", **NEW},
        ],
        "--ids",
        "--keep",
        "mine",
        "--keep",
        "his",
    )
    assert found[0]["text"] == model.chat(talk, **NEW)
    assert (found[0]["mine"], found[0]["his"], found[0]["metadata"]) == (2, 3, {"a": 1})
    expected = model.generate([ids], **NEW)[0][3:]
    assert found[1]["ids"] == expected == found[2]["ids"]
    assert [len(step) for step in found[1]["top_logprobs"]] == [2] * len(found[1]["ids"])
    assert "top_logprobs" not in found[2] and "his" not in found[2]
    every = batch(model, [{"prompt": "The", "mine": 2, "b": [1], **NEW}], "--keep", "*")
    assert (every[0]["mine"], every[0]["b"]) == (2, [1]) and "prompt" not in every[0]


def test_flags_are_for_rows_that_say_nothing_else(model, here):
    rows = [{"prompt": "The quick"}, {"prompt": "The quick", **NEW},
            {"prompt": "The quick", "max_length": 9}]  # fmt: skip
    flags = ["--max-new-tokens", "3", "--suppress-tokens", "[9]"]
    found = batch(model, rows, *flags)
    alone = [
        model.complete("The quick", suppress_tokens=[9], **length)
        for length in ({"max_new_tokens": 3}, NEW, {"max_length": 9})
    ]
    assert [one["text"] for one in found] == alone


def test_a_job_has_a_seed_and_each_row_one_made_of_it(model, here):
    rows = [{"prompt": "The quick", "do_sample": True, "max_new_tokens": 12}] * 4
    one = batch(model, rows, "--seed", "5")
    assert one == batch(model, rows, "--seed", "5")
    assert len({row["text"] for row in one}) > 1
    for place, row in enumerate(one):
        seed = seed_of(5, str(place))
        assert row["text"] == model.complete(
            "The quick", do_sample=True, max_new_tokens=12, seed=seed
        )
    assert one != batch(model, rows, "--seed", "6")
    assert batch(model, rows) != batch(model, rows)  # a seed of the job's own


def line(custom: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom, "method": "POST", "url": url, "body": {"model": "any", **body}}


def test_lines_of_openai(model, here):
    talk = [{"role": "user", "content": "Hi"}]
    chat = "/v1/chat/completions"
    greedy = {"temperature": 0, "max_tokens": 6}
    found = batch(
        model,
        [
            line("a", prompt="The quick", **greedy),
            line("b", chat, messages=talk, logprobs=True, top_logprobs=2, **greedy),
            line("c", prompt=["The quick", "value"], n=2, seed=4, max_tokens=6),
            line("c", prompt="The quick", max_tokens=0, echo=True, logprobs=1),
            line("d", prompt=["The", "The"], max_tokens=20),
            line("e", prompt="The quick", num_beams=3, max_new_tokens=6),
        ],
        "--seed",
        "1",
    )
    assert [one["custom_id"] for one in found] == ["a", "b", "c", "c", "d", "e"]
    assert all(set(one) == {"id", "custom_id", "response", "error"} for one in found)
    ids = [one["id"] for one in found] + [one["response"]["request_id"] for one in found]
    bodies = [one["response"]["body"] for one in found]
    assert len({*ids, *(body["id"] for body in bodies)}) == 18
    assert {one["response"]["status_code"] for one in found} == {200}
    assert bodies[0]["choices"][0]["text"] == model.complete("The quick", max_new_tokens=6)
    assert bodies[0]["object"] == "text_completion" and bodies[0]["usage"]["completion_tokens"] == 6
    reply = bodies[1]["choices"][0]
    assert reply["message"]["content"] == model.chat(talk, max_new_tokens=6)
    assert len(reply["logprobs"]["content"]) == 6
    assert [one["index"] for one in bodies[2]["choices"]] == [0, 1, 2, 3]
    drawn = {"do_sample": True, "top_k": 0, "num_return_sequences": 2, "seed": 4}
    assert [one["text"] for one in bodies[2]["choices"][:2]] == model.complete(
        "The quick", max_new_tokens=6, **drawn
    )
    assert bodies[3]["choices"][0]["text"] == "The quick"
    assert len({one["text"] for one in bodies[4]["choices"]}) == 2  # each drawn for itself
    beams = model.complete("The quick", num_beams=3, max_new_tokens=6)
    assert bodies[5]["choices"][0]["text"] == beams


def test_lines_of_openai_that_are_refused_say_so_as_openai_does(model, here):
    wrong = [
        (line("a", prompt="The", tempura=1), "tempura: Extra inputs are not permitted"),
        (line("b", "/v1/embeddings", input="x"), "url must be /v1/completions or"),
        (line("c", prompt="The", stream=True), "stream must be false"),
        (line("d", prompt="The", max_tokens=1000), "the context is 128 tokens"),
        (line("e", prompt="The", num_beams=0), "num_beams must be"),
        (line("f", prompt="The") | {"method": "GET"}, "method must be POST, got 'GET'"),
        (line("g", prompt="The") | {"body": [1]}, "body must be an object"),
        (line("h", prompt="The") | {"what": 1}, "what is no field of a line"),
        (line("i"), "prompt: Field required"),
        (line("k", prompt=["The", [5]]), "prompt: Input should be"),
    ]
    write(Path("in.jsonl"), [one for one, _ in wrong] + [line("j", prompt="The", max_tokens=2)])
    code, out, _ = run("batch", "in.jsonl", "-", "-m", model.directory)
    found = [json.loads(one) for one in out.splitlines()]
    assert code == 1 and [one["custom_id"] for one in found] == list("abcdefghikj")
    for (_, why), one in zip(wrong, found, strict=False):
        answer = one["response"]
        assert answer["status_code"] == 400 and one["error"] is None
        assert answer["body"]["error"]["message"].startswith(why), answer
    assert found[-1]["response"]["status_code"] == 200


def test_text_lines_are_prompts(model, here):
    Path("in.txt").write_bytes(
        b"\xef\xbb\xbfThe quick\r\n\n  \nimport numpy\nna\xc3\xafve \xe2\x80\xa8cut"
    )
    assert (
        run("batch", "in.txt", "out.jsonl", "-m", model.directory, "--max-new-tokens", "6")[0] == 0
    )
    found = read(Path("out.jsonl"))
    texts = ["The quick", "import numpy", "naïve \u2028cut"]
    assert [one["row"] for one in found] == [0, 3, 4]
    assert [one["text"] for one in found] == [model.complete(text, **NEW) for text in texts]


def test_standard_input_to_standard_output(model, here):
    rows = [{"prompt": "The quick brown fox", "max_new_tokens": n} for n in (2, 30, 1)]
    lines = b"".join(json.dumps(one).encode() + b"\n" for one in rows)
    code, out, said = run("batch", "-", "-", "-m", model.directory, stdin=lines)
    found = [json.loads(one) for one in out.splitlines()]
    assert code == 0 and [one["new_tokens"] for one in found] == [2, 30, 1]
    assert "3 rows, 0 bad; 33 tokens" in said and os.listdir() == []
    assert run("batch", "-", "-", "-m", model.directory, "--quiet", stdin=lines) == (0, out, "")


def test_parquet_in_and_out(model, here):
    """A null says that the row has no such field; columns become what rows have."""
    parquet.write_table(
        pyarrow.table(
            {
                "prompt": ["The quick", None, "value", "The"],
                "messages": [None, [{"role": "user", "content": "Hi"}], None, None],
                "max_new_tokens": pyarrow.array([6, 3, None, 2], pyarrow.int32()),
                "num_beams": [None, None, None, 0],
                "id": ["a", "b", "c", "d"],
            }
        ),
        "in.parquet",
    )
    code, _, said = run(
        "batch", "in.parquet", "out.parquet", "-m", model.directory, "--max-new-tokens", "4"
    )
    found = parquet.read_table("out.parquet").to_pylist()
    assert code == 1 and "4 rows, 1 bad" in said and "first bad row: 3: num_beams" in said
    assert [one["text"] for one in found] == [
        model.complete("The quick", max_new_tokens=6),
        model.chat([{"role": "user", "content": "Hi"}], max_new_tokens=3),
        model.complete("value", max_new_tokens=4),
        None,
    ]
    assert [one["id"] for one in found] == list("abcd")
    assert [bool(one["error"]) for one in found] == [False, False, False, True]
    assert sorted(os.listdir()) == ["in.parquet", "out.parquet"]
    # Columns are checked before the work: a misspelt one would be a bad row a million times.
    parquet.write_table(pyarrow.table({"prompt": ["x"], "temprature": [1.0]}), "odd.parquet")
    code, _, said = run("batch", "odd.parquet", "o.jsonl", "-m", model.directory)
    assert code == 2 and "temprature" in said and "--keep temprature" in said
    Path("torn.parquet").write_bytes(Path("in.parquet").read_bytes()[:-30])
    code, _, said = run("batch", "torn.parquet", "o.jsonl", "-m", model.directory)
    assert code == 2 and "torn.parquet is no Parquet file" in said


# --- rows that are no good -----------------------------------------------------------------------


def test_a_bad_row_is_reported_in_its_place_and_is_not_fatal(model, here):
    wrong: list[tuple[Any, str]] = [
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b'"x"', "must be a JSON object, got str"),
        (b'{"prompt": "a\xff"}', "not UTF-8"),
        (b'{"prompt": "a", "prompt": "b"}', "has 'prompt' twice"),
        (b'{"prompt": "\\ud800"}', "half a character"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number of JSON"),
        (b"[" * 100_000, "nested too deep"),
        ({}, "needs one of prompt, messages, input_ids, prompt_ids; got none"),
        ({"prompt": "a", "input_ids": [5]}, "got prompt and input_ids"),
        ({"prompt": 3}, "prompt must be a text, got 3"),
        ({"prompt": "a", "tools": []}, "tools needs messages"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
        ({"prompt": "a", "num_beams": 0}, "num_beams must be positive, got 0"),
        ({"prompt": "a", "num_beams": 99, **NEW}, "this has 99 rows or beams, 64 may run"),
        ({"input_ids": [5, 98765]}, "98765"),
        ({"input_ids": []}, ""),
        ({"messages": "Hi"}, "messages must be a list of objects"),
        ({"prompt": "a b " * 500_000}, "128"),
        ({"prompt": "The", "max_new_tokens": 500}, "128"),
        ({"prompt": "a", "suppress_tokens": list(range(99)), "do_sample": True}, ""),
    ]
    rows: list[Any] = [{"prompt": "The quick", **NEW}]
    for one, _ in wrong:
        rows += [one, {"prompt": "The quick", "id": 1, **NEW}]
    found = batch(model, rows, "--seed", "1")
    expected = model.complete("The quick", **NEW)
    assert [one["row"] for one in found] == list(range(len(rows)))
    assert {one["text"] for one in found[::2]} == {expected}
    for (one, why), got in zip(wrong, found[1::2], strict=True):
        assert why in got.get("error", {}).get("message", "?") and set(got) == {"row", "error"}, (
            str(one)[:80],
            got,
        )


def test_equal_rows_and_equal_ids_are_rows_of_their_own(model, here):
    rows = [{"prompt": "The quick", "id": 7, "n": 1, **NEW}] * 3
    found = batch(model, [{**one, "id": 7} for one in rows], "--keep", "n")
    assert [(one["row"], one["id"], one["n"]) for one in found] == [(i, 7, 1) for i in range(3)]
    assert len({one["text"] for one in found}) == 1


def test_what_is_warned_of_a_row_stands_in_it(model, here):
    """A model whose positions are computed goes on beyond those that it was made for."""
    soft = Path("soft")
    shutil.copytree(model.directory, soft)
    info = json.loads((soft / "fastgen.json").read_text())
    (soft / "fastgen.json").write_text(json.dumps(info | {"hard_limit": False}))
    rows = [{"prompt": "The", "max_new_tokens": n, "stop_strings": ["e"]} for n in (128, 6)]
    write(Path("in.jsonl"), rows)
    assert run("batch", "in.jsonl", "-", "-m", soft)[0] == 0
    code, out, _ = run("batch", "in.jsonl", "-", "-m", soft)
    found = [json.loads(one) for one in out.splitlines()]
    assert code == 0 and "exceed the 128 positions" in found[0]["warnings"][0]
    assert "warnings" not in found[1]


# --- what cannot be done at all ------------------------------------------------------------------


def test_a_job_that_cannot_be_says_so_in_a_line(model, here):
    write(Path("in.jsonl"), [{"prompt": "The", **NEW}])
    Path("there.jsonl").write_text("precious")
    Path("place.jsonl").mkdir()
    Path("odd.jsonl.part").write_text("precious")
    for args, why in (
        (("gone.jsonl", "o.jsonl"), "gone.jsonl is not there"),
        (("place.jsonl", "o.jsonl"), "place.jsonl is a directory, expected a file"),
        (("in.jsonl", "there.jsonl"), "there.jsonl is there: name another, or replace it"),
        (("in.jsonl", "place.jsonl"), "place.jsonl is not a file"),
        (("in.jsonl", "in.jsonl"), "in.jsonl is the input too"),
        (("in.jsonl", "o.txt"), "name the output .jsonl or .parquet"),
        (("in.jsonl", "o.csv"), "o.csv must end in .jsonl"),
        (("in.jsonl", "no/o.jsonl"), "no is not a directory"),
        (("in.jsonl", "/proc/o.jsonl"), "/proc/o.jsonl.part: "),
        (("in.jsonl", "odd.jsonl"), "odd.jsonl.part is no journal of a job: move it away"),
        (("in.jsonl", "odd.jsonl", "--restart"), "odd.jsonl.part is no journal of a job"),
        (("in.jsonl", "o.jsonl", "--keep", "text"), "text cannot be kept"),
        (("in.jsonl", "o.jsonl", "--num-beams", "0"), "num_beams must be"),
        (("in.jsonl", "o.jsonl", "--max-rows", "0"), "0 is not in the range x>=1"),
        (("in.jsonl", "o.jsonl", "--actors", "2"), "--actors needs --ray"),
        (("-", "o.jsonl", "--format", "parquet"), "Parquet cannot be read from standard input"),
    ):
        code, out, said = run("batch", *args, "-m", model.directory)
        assert (code, out) == (2, b"") and why in said and said.count("\n") == 1, (args, said)
    names = ["in.jsonl", "odd.jsonl.part", "place.jsonl", "there.jsonl"]
    assert sorted(os.listdir()) == names
    assert Path("there.jsonl").read_text() == "precious" == Path("odd.jsonl.part").read_text()
    assert run("batch", "in.jsonl", "there.jsonl", "-m", model.directory, "--restart")[0] == 0
    assert read(Path("there.jsonl"))[0]["text"] == model.complete("The", **NEW)


@pytest.mark.parametrize("missing, row, extra", [
    ("fastgen.serve.wire", line("a", prompt="x"), "serve"), ("pyarrow", None, "batch"),
])  # fmt: skip
def test_a_missing_extra_is_named_and_nothing_is_written_down(
    model, here, monkeypatch, missing, row, extra
):
    for name in [name for name in sys.modules if name == "fastgen.jobs.openai"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    source = Path("in.parquet") if row is None else write(Path("in.jsonl"), [row, row])
    source.touch()
    code, _, said = run("batch", source, "o.jsonl", "-m", model.directory)
    assert code == 2 and f"[{extra}]" in said
    assert not Path("o.jsonl").exists()
    if row is not None:
        assert len(Path("o.jsonl.part").read_bytes().splitlines()) == 1


# --- killed, and started again -------------------------------------------------------------------


def entries(path: Path) -> list[bytes]:
    """The whole lines of a journal, after its first."""
    return path.read_bytes().splitlines(keepends=True)[1:]


def many(count: int) -> list[dict[str, Any]]:
    """Rows whose lengths differ, some of which are drawn, bad, or OpenAI's."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        new = 4 + 7 * n % 40
        if n % 10 == 3:
            rows.append({"prompt": "The", "max_new_tokens": -n})
        elif n % 10 == 6:
            rows.append(line(f"c{n}", prompt="The quick", max_tokens=new))
        else:
            rows.append(
                {
                    "prompt": "The quick " * (n % 5 + 1),
                    "do_sample": n % 2 == 0,
                    "max_new_tokens": new,
                }
            )
    return rows


def killed_and_done(command: list[str], out: Path, at: Sequence[int], timeout: float = 120) -> str:
    """Run a command, killed whenever so many rows are written down; at last let it end.

    Returns the last one's standard error. What was written down stays as it was.
    """
    part = out.with_name(out.name + ".part")
    before: list[bytes] = []
    until = time.monotonic() + timeout
    for rows in at:
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while not part.exists() or part.read_bytes().count(b"\n") <= rows:
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.001)
        child.kill()
        assert child.wait(20) == -signal.SIGKILL
        found = [one for one in entries(part) if one.endswith(b"\n")]
        assert len(found) >= rows and found[: len(before)] == before
        before = found
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert f"({len(before):,} of them before)" in done.stderr, done.stderr
    return done.stderr


def test_killed_at_any_moment_and_started_again_nothing_is_lost_or_repeated(model, here):
    rows = many(150)
    write(Path("in.jsonl"), rows)
    command = [sys.executable, "-m", "fastgen", "batch", "in.jsonl", "out.jsonl", "-m",
               str(model.directory), "--max-rows", "3", "--threads", "1"]  # fmt: skip
    kept: list[bytes] = []

    # The first line has the seed that was drawn: with it another job is the same, undisturbed.
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part = Path("out.jsonl.part")
    until = time.monotonic() + 60
    while not part.exists() or part.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < until
        time.sleep(0.001)
    child.kill()
    child.wait(20)
    kept = part.read_bytes().splitlines(keepends=True)
    Path("calm.jsonl.part").write_bytes(kept[0])

    said = killed_and_done(command, Path("out.jsonl"), (20, 100))
    assert "150 rows" in said and "15 bad" in said
    assert run("batch", "in.jsonl", "calm.jsonl", "-m", model.directory)[0] == 1
    assert Path("out.jsonl").read_bytes() == Path("calm.jsonl").read_bytes()
    assert sorted(os.listdir()) == ["calm.jsonl", "in.jsonl", "out.jsonl"]
    found = read(Path("out.jsonl"))
    assert [one.get("row", n) for n, one in enumerate(found)] == list(range(150))
    for row, got in list(zip(rows, found, strict=True))[1::20]:  # some, alone
        if "text" in got:
            assert got["text"] == model.complete(
                row["prompt"], max_new_tokens=row["max_new_tokens"]
            )


class Count:
    """Work that notes which rows it does."""

    def __init__(self, work: Any) -> None:
        self.work, self.rows = work, Counter[int]()

    def run(self, rows: Any) -> Any:
        for done in self.work.run(rows):
            self.rows[done.row.number] += 1
            yield done


@pytest.fixture
def counted(monkeypatch) -> list[Counter[int]]:
    """The rows that each command does from now on."""
    found: list[Counter[int]] = []

    def do(job: Any, work: Any, quiet: bool) -> None:
        work = Count(work)
        found.append(work.rows)
        kept(job, work, quiet)

    kept = rows_of_commands.do
    for module in (commands.batch, commands.score):  # the commands, which hide their modules
        monkeypatch.setitem(inspect.unwrap(module.callback).__globals__, "do", do)
    return found


def test_a_journal_that_is_torn_anywhere_goes_on_from_its_last_whole_row(model, here, counted):
    write(Path("in.jsonl"), [{"prompt": "The", "do_sample": True, **NEW} for _ in range(5)])
    command = ("batch", "in.jsonl", "out.jsonl", "-m", model.directory)
    part, out = Path("out.jsonl.part"), Path("out.jsonl")
    finish = Journal.finish
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self, write: self.close())
        assert run(*command)[0] == 0
    whole = part.read_bytes()
    assert finish is Journal.finish
    run(*command)
    expected, starts = out.read_bytes(), [i + 1 for i, c in enumerate(whole) if c == 10]
    for cut in sorted({*starts, *(s + 1 for s in starts[:-1]), *range(starts[3], starts[4], 7)}):
        out.unlink(missing_ok=True)
        part.write_bytes(whole[:cut])
        left = sum(start > cut for start in starts)
        assert run(*command)[0] == 0
        assert out.read_bytes() == expected, cut
        assert counted[-1].total() == left and max(counted[-1].values(), default=1) == 1
    for damage in (b"\0" * 40, b"1\tx\t0\t0\t{}\n", whole[starts[4] : -9] + b"?" * 9):
        out.unlink()
        part.write_bytes(whole[: starts[2]] + damage)
        assert run(*command)[0] == 0 and out.read_bytes() == expected
        assert counted[-1].total() == 3


def test_a_kill_while_the_output_takes_its_place_costs_nothing(model, here, monkeypatch, counted):
    write(Path("in.jsonl"), [{"prompt": "The", **NEW}] * 3)
    command = ("batch", "in.jsonl", "out.jsonl", "-m", model.directory, "--seed", "1")
    assert run(*command)[0] == 0
    expected = Path("out.jsonl").read_bytes()
    for name in ("write_lines", "_sync_directory"):
        Path("out.jsonl").unlink()

        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            for module in (journal, sys.modules["fastgen.jobs.job"]):
                patch.setattr(module, name, stop, raising=False)
            code, _, said = run(*command)
        assert code == 130 and "out.jsonl.part has what is done: the same command goes on" in said
        assert run(*command)[0] == 0 and counted[-1].total() == 0
        assert Path("out.jsonl").read_bytes() == expected
        assert sorted(os.listdir()) == ["in.jsonl", "out.jsonl"]


def test_another_job_does_not_go_on_with_what_is_not_its_own(model, pair, here):
    rows = [{"prompt": f"The {n}", **NEW} for n in range(4)]
    write(Path("in.jsonl"), rows)
    command = ["batch", "in.jsonl", "out.jsonl", "-m", str(model.directory)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self, write: self.close())
        run(*command)
    part = Path("out.jsonl.part")
    whole = part.read_bytes()
    part.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    before = part.read_bytes()
    other = str(pair("gpt2")[1].directory)
    for changed, why in (
        (command[:-1] + [other], "another model"),
        ([*command, "--top-k", "3"], "another knobs"),
        ([*command, "--seed", "3"], "another seed"),
        ([*command, "--ids"], "another ids"),
        (["score", *command[1:]], "another command"),
    ):
        code, _, said = run(*changed)
        assert code == 2 and why in said and "--restart" in said, said
        assert part.read_bytes() == before
    write(Path("in.jsonl"), [{"prompt": "another", **NEW}, *rows[1:]])
    code, _, said = run(*command)
    assert code == 2 and "row 0 of the input was another" in said and "--restart" in said
    write(Path("in.jsonl"), rows[:1])
    code, _, said = run(*command)
    assert code == 2 and "1 rows that are done are not in it" in said
    assert part.read_bytes() == before
    write(Path("in.jsonl"), [*rows, rows[0]])  # more rows at the end: that is the same job
    assert run(*command)[0] == 0 and len(read(Path("out.jsonl"))) == 5


def test_a_job_runs_once_at_a_time(model, here):
    write(Path("in.jsonl"), [{"prompt": "The", **NEW}])
    with Path("out.jsonl.part").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, said = run("batch", "in.jsonl", "out.jsonl", "-m", model.directory)
    assert code == 2 and "out.jsonl.part is in use: another process runs this job" in said


def test_a_full_disk_loses_nothing(model, here):
    """The system refuses to let files grow, as a full disk does; with room again it goes on."""
    write(Path("in.jsonl"), [{"prompt": "The quick", "id": "x" * 100, **NEW}] * 40)
    command = [sys.executable, "-m", "fastgen", "batch", "in.jsonl", "out.jsonl", "-m",
               str(model.directory), "--seed", "1", "--threads", "1"]  # fmt: skip

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=little, timeout=60)
    assert done.returncode == 2 and done.stderr.count("File too large") == 1, done.stderr
    assert "Traceback" not in done.stderr and not Path("out.jsonl").exists()
    whole = sum(line.endswith(b"\n") for line in entries(Path("out.jsonl.part")))
    assert whole
    code, _, said = run(*command[3:-2])
    assert code == 0 and f"({whole} of them before)" in said
    assert len(read(Path("out.jsonl"))) == 40


# --- how the rows are run ------------------------------------------------------------------------


def as_rows(rows: Sequence[dict[str, Any]]) -> list[InputRow]:
    return [InputRow(n, json.dumps(one).encode()) for n, one in enumerate(rows)]


def test_rows_are_cut_by_tokens_and_the_longest_run_first(model, monkeypatch):
    """So no step has few rows because one long row is left; and windows are read as needed."""
    lengths = [2, 2, 2, 60, 2, 2, 60, 2] * 4
    work = GenerationWork(RowReader(model, {}), max_rows=4)
    taken: list[int] = []

    def rows() -> Any:
        for row in as_rows(
            [{"input_ids": [5, 6], "max_new_tokens": n, "eos_token_id": None} for n in lengths]
        ):
            taken.append(row.number)
            yield row

    running = []
    step = work.scheduler.step

    def watched() -> Any:
        found = step()
        running.append(work.scheduler.rows)
        return found

    monkeypatch.setattr(work.scheduler, "step", watched)
    done = [one.row.number for one in work.run(rows())]
    assert sorted(done) == list(range(32))
    first = [number for number in done if lengths[number] == 60]
    assert done.index(first[-1]) - done.index(first[0]) < 16  # not the last of all
    tokens = sum(lengths)
    assert len(running) < tokens / 4 * 1.3  # nearly always four rows a step

    taken.clear()
    work.window = Window(tokens=200, rows=4096)
    begun = work.run(rows())
    next(begun)
    assert len(taken) == 23  # 200 tokens and, since all of those wait or run, 200 more
    begun.close()
    assert work.scheduler.idle  # and what was not read to its end is gone
    assert len(list(work.run(as_rows([{"input_ids": [5], "max_new_tokens": 2}])))) == 1


def test_what_prompts_have_in_common_is_read_once(pair):
    model = pair("llama", max_position_embeddings=1 << 15)[1]
    common = [5 + n % 80 for n in range(600)]
    rows = as_rows([{"input_ids": [*common, 7 + n], "max_new_tokens": 2} for n in range(12)])
    work = GenerationWork(RowReader(model, {}), max_rows=2)
    assert len(list(work.run(rows))) == 12
    assert work.scheduler.prefix_cache.hits >= 9
    scoring = ScoringWork(model)
    asked = [{"ids": [7 + n, 9], "prefix": common} for n in range(20)]
    assert len(list(scoring.run(as_rows(asked)))) == 20
    assert scoring.cache.hits >= 1


# --- the bar -------------------------------------------------------------------------------------


def on_a_terminal(command: Sequence[str]) -> tuple[int, str]:
    """Exit code and standard error of a command whose standard error is a terminal."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, stderr=theirs, env={**os.environ, "COLUMNS": "100"})
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        said += piece
    os.close(ours)
    return child.wait(60), said.decode()


def test_a_bar_is_for_who_looks(model, here):
    write(Path("in.jsonl"), [{"prompt": "The quick", "max_new_tokens": 40}] * 30)
    command = [sys.executable, "-m", "fastgen", "batch", "in.jsonl", "o.jsonl", "-m",
               str(model.directory), "--max-rows", "2", "--threads", "1"]  # fmt: skip
    code, said = on_a_terminal(command)
    assert code == 0 and "30/30" in said and "tokens a second" in said
    assert "30 rows, 0 bad" in said
    code, said = on_a_terminal([*command, "--restart", "--quiet"])
    assert (code, said) == (0, "")
    code, _, said = run(*command[3:], "--restart")
    assert code == 0 and said.count("\n") == 1 and "/30" not in said


# --- scoring -------------------------------------------------------------------------------------


def test_scores_are_those_of_the_model(model, here, counted):
    texts = ["The quick brown fox", "import numpy as np", "value"]
    rows: list[Any] = [{"text": text, "id": n} for n, text in enumerate(texts)]
    rows += [
        {"ids": [5, 6, 7]},
        {"text": " fox", "prefix": "The quick brown"},
        {"text": 3},
        b"{",
        {"text": " fox", "prefix": [5, 6]},
        {"text": ""},
        {"texts": "x"},
    ]
    write(Path("in.jsonl"), rows)
    command = ("score", "in.jsonl", "out.jsonl", "-m", model.directory, "--tokens")
    code, _, said = run(*command)
    found = read(Path("out.jsonl"))
    assert code == 1 and "10 rows, 4 bad" in said and [one["row"] for one in found] == [*range(10)]
    assert ["error" in one for one in found] == [n in (5, 6, 8, 9) for n in range(10)]
    for text, one in zip(texts, found, strict=False):
        (expected,) = model.score([text])
        assert one["logprobs"][0] is None
        assert one["logprobs"][1:] == pytest.approx(expected[1:].tolist(), abs=1e-5)
        assert one["logprob"] == pytest.approx(float(expected[1:].sum()), abs=1e-4)
        assert one["tokens"] == len(expected)
        assert one["perplexity"] == pytest.approx(model.perplexity([text]), rel=1e-4)
    (expected,) = model.score([" fox"], prefix=["The quick brown"])
    assert found[4]["logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert found[4]["tokens"] == len(expected) and "logprobs" in found[7]

    Path("in.txt").write_text("\n".join(texts))
    assert run("score", "in.txt", "text.jsonl", "-m", model.directory)[0] == 0
    assert [one["logprob"] for one in read(Path("text.jsonl"))] == [
        pytest.approx(one["logprob"], abs=1e-5) for one in found[:3]
    ]
    parquet.write_table(pyarrow.table({"text": texts, "id": [7, 8, 9]}), "in.parquet")
    assert run("score", "in.parquet", "out.parquet", "-m", model.directory)[0] == 0
    table = parquet.read_table("out.parquet").to_pylist()
    assert [one["id"] for one in table] == [7, 8, 9]
    assert [one["logprob"] for one in table] == [
        pytest.approx(one["logprob"], abs=1e-5) for one in found[:3]
    ]


def test_rows_with_options_are_decisions(model, here):
    options = [" fox", " dog", " lazy dog"]
    rows: list[Any] = [
        {"prompt": "The quick", "options": options, "id": 7},
        {"ids": [5, 6], "options": [[7], [8, 9]]},
        {"text": "The quick"},
        {"text": "a", "options": ["x"]},
        {"text": "a", "options": "xy"},
        {"text": "a", "options": ["x", "y"], "prefix": "b"},
        {"text": "a", "options": ["x", 5]},
        {"ids": [5] * 200, "options": [[7], [8]]},
    ]
    write(Path("in.jsonl"), rows)
    code, _, said = run("score", "in.jsonl", "out.jsonl", "-m", model.directory)
    found = read(Path("out.jsonl"))
    assert code == 1 and "8 rows, 5 bad" in said, said
    assert ["error" in one for one in found] == [False] * 3 + [True] * 5
    for one, prompt, given in ((found[0], "The quick", options), (found[1], [5, 6], [[7], [8, 9]])):
        expected = model.choose(prompt, given)
        assert (one["choice"], one["choice_index"]) == (expected.option, expected.index)
        assert one["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
        assert one["option_logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
        assert "logprob" not in one
    assert found[0]["id"] == 7 and "logprob" in found[2]
    for one, words in zip(found[3:], ("two or more", "must be a list", "prefix", "", "takes 128"),
                          strict=True):  # fmt: skip
        assert words in one["error"]["message"]


def test_scoring_goes_on_after_a_kill(model, here, counted):
    write(Path("in.jsonl"), [{"text": "The quick " * (n % 9 + 1)} for n in range(40)])
    command = ("score", "in.jsonl", "out.jsonl", "-m", model.directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "finish", lambda self, write: self.close())
        run(*command)
    part = Path("out.jsonl.part")
    whole = part.read_bytes()
    run(*command)
    expected = Path("out.jsonl").read_bytes()
    Path("out.jsonl").unlink()
    part.write_bytes(whole[: len(whole) // 2])
    assert run(*command)[0] == 0
    assert 0 < counted[-1].total() < 40 and Path("out.jsonl").read_bytes() == expected


def test_an_entry_is_read_as_it_was_written():
    for content in (b"{}", b'{"a": "\\t"}', b"\t\t", "ü🙂".encode()):
        one = Entry(7, "00ff" * 4, True, content)
        assert Entry.read(one.written()) == one
        for cut in range(len(one.written())):
            assert Entry.read(one.written()[:cut]) is None


def test_help_shows_what_there_is():
    for command in ("batch", "score"):
        code, out, _ = run(command, "--help")
        text = " ".join(out.decode().split())
        assert code == 0 and "JSON lines" in text and "--restart" in text and "--ray" in text
