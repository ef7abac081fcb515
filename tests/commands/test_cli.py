"""The command line, as a process: what it prints where, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner
from scripts import COMMAND, run

import fastgen
from fastgen import commands
from fastgen.inputs.params import Params
from fastgen.store.hub import DEMO

PROMPT = "The quick"


@pytest.fixture(scope="module")
def model(pair) -> fastgen.CausalLM:
    return pair("gpt2")[1]


@pytest.fixture(scope="module")
def directory(model) -> Path:
    return model.directory


@pytest.fixture(scope="module")
def expected(model) -> str:
    return PROMPT + model.complete(PROMPT, max_new_tokens=8) + "\n"


# --- generate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "file", "stdin", "dash"])
def test_a_prompt_comes_from_an_argument_a_file_or_stdin(directory, expected, how, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT)
    given = {
        "argument": [PROMPT],
        "file": ["--file", tmp_path / "prompt.txt"],
        "stdin": [],
        "dash": ["-"],
    }[how]
    stdin = f"{PROMPT}\n".encode() if how in ("stdin", "dash") else b""
    found = run("generate", *given, "-m", directory, "--max-new-tokens", "8", stdin=stdin)
    assert found == (0, expected, "")


def test_every_knob_is_a_flag(model, directory):
    flags = ["--do-sample", "--top-p", "0.9", "--temperature", "1.3", "--seed", "7",
             "--no-repeat-ngram-size", "3", "--eos-token-id", "[2, 3]", "--stop-strings", "zzz",
             "--max-new-tokens", "12"]  # fmt: skip
    text = model.complete(
        PROMPT,
        do_sample=True,
        top_p=0.9,
        temperature=1.3,
        seed=7,
        no_repeat_ngram_size=3,
        eos_token_id=[2, 3],
        stop_strings=["zzz"],
        max_new_tokens=12,
    )
    assert run("generate", PROMPT, "-m", directory, *flags) == (0, PROMPT + text + "\n", "")
    _, out, _ = run("generate", "--help")
    for name in ("--num-beams", "--do-sample / --no-do-sample", "--frequency-penalty"):
        assert name in out


def test_help_says_what_int8_keys_do_not_keep():
    """As docs/ has it: wherever a text is promised to be the same, these are the exception."""
    for command, words in (
        ("export", "what a prefix cache knew, and who else is served, may change a token"),
        ("generate", "its text the same (with int8 keys and values a token may change)"),
        ("serve", "to the token in fp32, up to rounding in int8, int4 and with int8 keys"),
    ):
        out = CliRunner().invoke(commands.cli, [command, "--help"]).output
        assert words in " ".join(out.split())


@pytest.mark.parametrize(
    "flags", [["--num-beams", "3"], ["--do-sample", "--num-return-sequences", "3", "--seed", "1"]]
)
def test_several_sequences_are_lines(model, directory, flags):
    knobs = {flag.strip("-").replace("-", "_"): 1 for flag in flags if flag.startswith("--")}
    code, out, err = run("generate", PROMPT, "-m", directory, "--max-new-tokens", "4", *flags)
    assert (code, err) == (0, "")
    assert out.startswith(PROMPT)
    assert out.count(PROMPT) == (3 if "num_return_sequences" in knobs else 1)


def test_json_is_one_object_a_sequence(model, directory):
    code, out, err = run(
        "generate",
        PROMPT,
        "-m",
        directory,
        "--json",
        "--max-new-tokens",
        "4",
        "--do-sample",
        "--num-return-sequences",
        "2",
        "--seed",
        "3",
        "--top-logprobs",
        "2",
    )
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in out.splitlines()]
    wanted = model.generate(
        [model.tokenizer.encode(PROMPT)],
        do_sample=True,
        num_return_sequences=2,
        seed=3,
        max_new_tokens=4,
    )
    assert [record["ids"] for record in records] == [row[-4:] for row in wanted]
    for record in records:
        assert record["prompt"] == PROMPT and record["finish_reason"] == "length"
        assert model.tokenizer.decode(record["ids"]) == record["text"]
        assert [len(step) for step in record["top_logprobs"]] == [2] * 4


def test_json_has_no_infinity_and_no_nan(directory):
    """Null stands for what is not a number: a token that was ruled out has no log-probability."""
    code, out, err = run(
        "generate",
        PROMPT,
        "-m",
        directory,
        "--json",
        "--max-new-tokens",
        "2",
        "--top-logprobs",
        "3",
        "--do-sample",
        "--top-k",
        "1",
    )
    assert (code, err) == (0, "")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    steps = json.loads(out, parse_constant=refuse)["top_logprobs"]
    assert all(first[1] == 0 and last[1] is None for first, *_, last in steps)


@pytest.fixture(scope="module")
def endless(pair) -> Path:
    """A model that can go on for a long time."""
    return pair("llama", max_position_embeddings=1 << 15)[1].directory


# Tokens without a text are left out: a random model may never leave them again.
ENDLESS = ["--max-new-tokens", "30000", "--eos-token-id", "null", "--do-sample",
           "--temperature", "3", "--suppress-tokens", "[0,1,2,97,98]"]  # fmt: skip


@contextlib.contextmanager
def interrupt(does: Any) -> Iterator[None]:
    """Ctrl-C reaches the processes that are started now, however the tests were started."""
    before = signal.signal(signal.SIGINT, does)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def started(*args: str | Path, **kwargs: object) -> subprocess.Popen[bytes]:
    with interrupt(kwargs.pop("ctrl_c", signal.SIG_DFL)):
        return subprocess.Popen(
            [*COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
        )


def test_text_comes_as_it_is_generated(endless):
    process = started("generate", PROMPT, "-m", endless, *ENDLESS)
    try:
        assert process.stdout.read(len(PROMPT) + 20).decode(errors="replace").startswith(PROMPT)
        assert process.poll() is None  # 30,000 tokens are far from done
    finally:
        process.kill()
        process.communicate()


def test_a_broken_pipe_ends_it_quietly(endless):
    process = started("generate", PROMPT, "-m", endless, *ENDLESS)
    assert process.stdout.read(5) == PROMPT[:5].encode()
    process.stdout.close()  # as `| head -c 5` does
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


def test_head_closes_the_pipe(endless):
    line = f"'{sys.executable}' -m fastgen generate '{PROMPT}' -m '{endless}' {' '.join(ENDLESS)}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{line} | head -c 5"], capture_output=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, PROMPT[:5].encode(), b"")


def test_ctrl_c_while_generating_ends_it_quietly(endless):
    process = started("generate", PROMPT, "-m", endless, *ENDLESS)
    process.stdout.read(len(PROMPT) + 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, b"")


def test_who_starts_it_with_ctrl_c_ignored_is_obeyed(directory, expected):
    """As nohup does, and a shell that runs it in the background."""
    reading, writing = os.pipe()
    process = started(
        "generate", "-m", directory, "--max-new-tokens", "8", stdin=reading, ctrl_c=signal.SIG_IGN
    )
    os.close(reading)
    for _ in range(20):  # while it imports, and while it waits for the prompt
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    os.write(writing, PROMPT.encode())
    os.close(writing)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.decode(), err) == (0, expected, b"")


@pytest.mark.parametrize("library", ["click", "numpy", "onnxruntime", "tokenizers", "torch"])
@pytest.mark.parametrize("entry", ["module", "script"])
def test_ctrl_c_while_libraries_are_imported_ends_it_quietly(
    library, entry, transformers_directory, tmp_path
):
    """As the first thing that the library does."""
    text = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / f"{library}.py").write_text(text)
    program = ["-c", "from fastgen.__main__ import main; main()"] if entry == "script" else []
    what = ["export", transformers_directory] if library == "torch" else ["generate", PROMPT]
    command = [sys.executable, *(program or COMMAND[1:]), *what]
    with interrupt(signal.SIG_DFL):
        process = subprocess.run(
            command, capture_output=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=60
        )
    named = b"fastgen: no --model given, using the embedded demo model"  # by when tokenizers come
    assert (process.returncode, process.stdout) == (130, b"")
    assert process.stderr.strip() == (named if library == "tokenizers" else b"")


@pytest.mark.parametrize(
    ("closed", "code"),
    [(">&-", 0), ("2>&-", 0), ("<&-", 0), (">&- 2>&-", 0), ("<&- >&- 2>&-", 0),
     (">/dev/full", 2), ("2>/dev/full", 0), (">/dev/full 2>&1", 2)],
)  # fmt: skip
def test_streams_that_are_closed_or_full(closed, code, expected, directory, tmp_path):
    """A file that is opened later never takes the number of a standard stream."""
    cache = tmp_path / "cache"
    line = (
        f"'{sys.executable}' -m fastgen generate '{PROMPT}' -m '{directory}' "
        f"--max-new-tokens 8 --prefix-cache '{cache}' {closed}"
    )
    done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60)
    assert done.returncode == code
    assert done.stdout.decode() == ("" if ">" in closed.replace("2>", "") else expected)
    no_space = closed == ">/dev/full"
    assert done.stderr == (b"fastgen: No space left on device\n" if no_space else b"")
    if code == 0:
        assert fastgen.PrefixCache.load(cache).hits == 0  # it is whole


@pytest.mark.parametrize("closed", ["<&-", ">&- <&-", "2>&-"])
def test_errors_with_streams_that_are_closed(closed, directory):
    line = f"'{sys.executable}' -m fastgen generate -m '{directory}' {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, input=b"", timeout=60)
    said = b"" if closed == "2>&-" else b"fastgen: the prompt is empty\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", said)


def test_the_demo_model_is_named_on_stderr(tmp_path):
    code, out, err = run("generate", "The os module", "--max-new-tokens", "4")
    assert err.splitlines()[0] == "fastgen: no --model given, using the embedded demo model"
    if (DEMO / "fastgen.json").is_file():
        assert code == 0 and out.startswith("The os module") and len(err.splitlines()) == 1


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", "x", "--frobnicate"], "No such option '--frobnicate'"),
        (["generate", "x", "--temprature", "1"], "--temperature"),
        (["generate", "x", "-m", "{model}", "--max-new-tokens", "many"], "not a valid integer"),
        (["generate", "x", "-m", "{model}", "--max-new-tokens", "-3"],
         "max_new_tokens must be positive, got -3"),
        (["generate", "x", "-m", "{model}", "--do-sample", "--temperature", "0"],
         "temperature must be"),
        (["generate", "x", "-m", "{model}", "--eos-token-id", "end"],
         "eos_token_id must be an integer, got 'end'"),
        (["generate", "x", "-m", "{model}", "--threads", "0"], "threads must be positive, got 0"),
        (["generate", "x", "-m", "{model}", "--threads", "-1"], "threads must be positive, got -1"),
        (["generate", "x", "-m", "{model}", "--threads", "99999999"],
         "threads must be at most"),
        (["generate", "x", "-m", "{model}", "--threads", "abc"], "not a valid integer"),
        (["generate", "x", "-m", "{tmp}/nothing"], "nothing is not a directory"),
        (["generate", "x", "-m", "{tmp}"], "not a fastgen model directory"),
        (["generate", "", "-m", "{model}"], "the prompt is empty"),
        (["generate", "-m", "{model}"], "the prompt is empty"),  # nothing on stdin
        (["generate", "x", "-f", "{tmp}/x", "-m", "{model}"], "not both"),
        (["generate", "-f", "{tmp}/x", "-m", "{model}"], "x: No such file or directory"),
        (["generate", "-f", "{tmp}", "-m", "{model}"], "Is a directory"),
        (["generate", "\udcff", "-m", "{model}"], "the prompt is not UTF-8"),
        (["generate", "x" * 100_000, "-m", "{model}"], "the model takes at most 128"),
        (["generate", "x", "-m", "{model}", "--stop-strings", "\udcff"],
         "stop_strings is not UTF-8"),
        (["generate", "x", "-m", "{model}", "--prefix-cache", "{tmp}/no/such/x"],
         "no/such/x cannot be written: No such file or directory"),
        (["generate", "x", "-m", "{model}", "--prefix-cache", "{tmp}"],
         "--prefix-cache must be a file"),
        (["generate", "x", "-m", "{model}", "--prefix-cache", "/dev/null"],
         "--prefix-cache must be a file"),
        (["generate", "x", "-m", "{model}", "--prefix-cache", "{model}/config.json"],
         "is no file of PrefixCache.save"),
        (["tune", "{model}", "--rows", "1000000000"], "GB of memory"),
        (["tune", "{model}", "--rows", "9" * 400], "--rows must be at most 1,000,000,000, got 999"),
        (["tune", "{model}", "--rows", "0"], "--rows must be positive, got 0"),
        (["tune", "{tmp}"], "not a fastgen model directory"),
        (["info", "{tmp}"], "not a fastgen model directory"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["export"], "Missing argument 'MODEL'"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_on_stderr(args, words, directory, tmp_path):
    filled = [arg.format(model=directory, tmp=tmp_path) for arg in args]
    code, out, err = run(*filled)
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"fastgen: .*\n", err), err
    assert words in err


JUNK = [
    "", " ", "x", "\0", "-1", "0", "5", "1.5", "1e999", "-1e999", "nan", "NaN", "9" * 400,
    "Infinity", "true", "null", '"x"', "[]", "{}", "[5]", "[-5]", "[1.5]", "[null]", "[[]]",
    "[[5]]", "[[[5]]]", "[[5, 1]]", "[[5], 1]", '[[[5], "x"]]', '["x"]', '[["x"]]',
    "[[[5], NaN]]", '{"5": "x"}', '{"5": NaN}', '{"x": 1}', '{"5": [1]}', '{"-1": 1}',
    "[" * 100_000, "\udcff", '"\\ud800"',
]  # fmt: skip


@pytest.mark.parametrize("knob", [knob.name for knob in dataclasses.fields(Params)])
def test_any_knob_with_any_junk_is_text_or_one_line(knob, model, monkeypatch, capfd):
    monkeypatch.setattr(fastgen, "load", lambda *_, **__: model)
    flag = f"--{knob.replace('_', '-')}"
    for junk in JUNK:
        found = commands.run(
            ["generate", PROMPT, "-m", "it", "--max-new-tokens", "2", "--do-sample", flag, junk]
        )
        out, err = capfd.readouterr()
        assert "Traceback" not in err, junk
        if found == 0:
            assert out.startswith(PROMPT) and err == "", junk
        else:
            late = "no token can be drawn" in err  # which only a step finds out
            assert found == 2 and (late or out == ""), junk
            assert re.fullmatch(r"fastgen: .*\n", err), (junk, err)


def test_no_prompt_on_a_terminal_is_an_error_not_a_wait(directory):
    ours, theirs = pty.openpty()
    try:
        process = started("generate", "-m", directory, stdin=theirs)
        out, err = process.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (process.returncode, out) == (2, b"")
    assert err.startswith(b"fastgen: no prompt: pass it as an argument")


def test_without_a_command_the_help_is_shown():
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: fastgen ") and "generate" in err


def test_a_model_for_ids_only_says_so(directory, tmp_path):
    ids_only = shutil.copytree(directory, tmp_path / "model")
    for path in ids_only.glob("tokenizer*"):
        path.unlink()
    told = json.loads((ids_only / "fastgen.json").read_text())
    told["files"] = {k: v for k, v in told["files"].items() if "tokenizer" not in k}
    (ids_only / "fastgen.json").write_text(json.dumps(told))
    code, _, err = run("generate", "x", "-m", ids_only)
    assert code == 2 and "exported for ids only" in err
    assert "no (ids only)" in run("info", ids_only)[1]


# --- info --------------------------------------------------------------------------------------


def test_info_says_what_the_directory_holds_and_what_the_export_found(model, directory):
    code, out, err = run("info", directory)
    assert (code, err) == (0, "")
    facts, _, found = out.partition("\n\n")
    lines = dict(line.split(maxsplit=1) for line in facts.splitlines())
    assert found.startswith("beside the original:\n")
    assert lines["model"].endswith("(gpt2)") and lines["precision"] == "fp32"
    weights = json.loads((directory / "fastgen.json").read_text())["parameters"]
    assert lines["weights"] == f"{weights:,}"
    assert lines["vocabulary"] == f"{tiny.VOCAB} tokens" and lines["context"] == "128 positions"
    whole = sum(held.nbytes for held in model.model.new_cache(1, 128).slots(0, 1))
    row = f"{whole / 1e6:.1f} MB a row of 128"
    assert lines["cache"] == f"float32, {whole // 128:,} bytes a token, {row}"
    assert re.search(r"\nlargest logit error +\d\.\de-0\d\n", out)
    assert re.search(r"\ngreedy tokens until one differs +72 of 72\n", out)
    assert re.search(r"\ntime, decode: \w+ \d+%, .*\n", out)
    assert re.search(r"\nthe export took: .* MB of disk\nbeyond the tolerance: nothing\n", out)


def test_info_as_json_holds_the_whole_report(directory):
    code, out, err = run("info", directory, "--json")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said.pop("report") == json.loads((directory / "report.json").read_text())
    assert said == json.loads((directory / "fastgen.json").read_text())


def test_info_names_an_allowed_mismatch_and_what_a_precision_costs(directory, tmp_path):
    changed = shutil.copytree(directory, tmp_path / "model")
    report = json.loads((changed / "report.json").read_text())
    report["mismatch"] = ["a logit differs by 5 of the largest"]
    report["quality"] = report["logits"] | {
        "perplexity": 12.5, "more_perplexity": 0.0204, "kl": 2e-3, "top1": 0.9,
    }  # fmt: skip
    text = json.dumps(report)
    (changed / "report.json").write_text(text)
    told = json.loads((changed / "fastgen.json").read_text())
    told["files"]["report.json"] = len(text)
    (changed / "fastgen.json").write_text(json.dumps(told))
    _, out, _ = run("info", changed)
    assert "\nbeyond the tolerance: a logit differs by 5 of the largest\n" in out
    assert re.search(r"\nperplexity +12\.500 \(\+2\.04%\)\n", out)
    assert re.search(r"\ntop-1 agreement +90\.00%\n", out)


# --- export ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_directory(pair, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("source") / "tiny-gpt2"
    pair("gpt2")[0].save_pretrained(place)
    tiny.tokenizer().save_pretrained(place)
    return place


def test_export_shows_its_steps_and_names_the_directory(transformers_directory, tmp_path, expected):
    code, out, err = run("export", transformers_directory, "--precision", "fp32", cwd=tmp_path)
    assert code == 0 and out.startswith("  "), err
    assert out.strip() in run("info", "tiny-gpt2-fp32", cwd=tmp_path)[1]  # the table, again
    steps = err.splitlines()
    assert all(re.match(r"\[\d/\d\] .* \d+\.\d s ", line) for line in steps), err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-gpt2-fp32"]
    found = run("generate", PROMPT, "-m", "tiny-gpt2-fp32", "--max-new-tokens", "8", cwd=tmp_path)
    assert found == (0, expected, "")


def test_ctrl_c_during_an_export_leaves_nothing_and_ends_it_quietly(
    transformers_directory, tmp_path
):
    process = started("export", transformers_directory, "out", cwd=tmp_path, bufsize=0)
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)  # until the temporary neighbour is there: it converts
    assert process.poll() is None
    begun = process.stderr.readline()  # the model is loaded, and the next step runs
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    err = begun + err
    # Python itself ends by the signal, which shells show as 130, if it came inside an `exec`.
    assert process.returncode in (130, -signal.SIGINT), err.decode()
    assert out == b""
    assert b"Traceback" not in err, err.decode()
    assert all(re.match(rb"\[\d+/\d+\] ", line) for line in err.split(b"\n") if line), err.decode()
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_destructor_is_heard():
    """Python ignores what is raised there: an export went on as if nothing had been asked.

    At once, also where the main thread waits for something.
    """
    program = """
import os, signal, time
from fastgen.system.interrupt import heard

class Gone:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)

with heard():
    try:
        Gone()
        time.sleep(600)
    except KeyboardInterrupt:
        print("heard")
"""
    with interrupt(signal.SIG_DFL):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
        )
    assert (done.stdout, done.stderr, done.returncode) == ("heard\n", "", 0)
