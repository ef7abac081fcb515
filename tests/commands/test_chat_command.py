"""`fastgen chat` and the conversation behind it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import fastgen
from fastgen import commands
from fastgen.commands.chat import _harmless
from fastgen.conversation import Conversation
from fastgen.engine.prefix_cache import BLOCK
from fastgen.inputs.params import Params, sampling

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and 'forbidden' in m.content %}"
    "{{ raise_exception('no such system message') }}{% endif %}"
    "<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
SHORT = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
FLAGS = ["--max-new-tokens", "6", "--eos-token-id", "null", "--no-do-sample"]


def with_template(source: Path, place: Path) -> Path:
    shutil.copytree(source, place)
    (place / "chat_template.jinja").write_text(TEMPLATE)
    return place


@pytest.fixture(scope="module")
def long(pair, tmp_path_factory) -> Path:
    """A model for conversations that can go on for a long time."""
    source = pair("llama", max_position_embeddings=1 << 15)[1].directory
    return with_template(source, tmp_path_factory.mktemp("long") / "model")


@pytest.fixture(scope="module")
def short(pair, tmp_path_factory) -> Path:
    """One of 128 positions."""
    return with_template(pair("llama")[1].directory, tmp_path_factory.mktemp("short") / "model")


@pytest.fixture
def talk(long) -> Iterator[Conversation]:
    with contextlib.closing(Conversation(fastgen.load(long), SHORT)) as conversation:
        yield conversation


def run(*args: str | Path, stdin: str | bytes = "") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `fastgen chat`, in this process."""
    with CliRunner().isolation(input=stdin) as (out, err, _):
        code = commands.run(["chat", *map(str, args)])
        return code, out.getvalue().decode(), err.getvalue().decode()


def replies(directory: Path, *texts: str, system: str | None = None, **knobs: Any) -> list[str]:
    """The answers of `CausalLM.chat` to the same texts, one after the other."""
    model = fastgen.load(directory)
    messages = [{"role": "system", "content": system}] if system else []
    out = []
    for text in texts:
        messages.append({"role": "user", "content": text})
        out.append(model.chat(messages, **{**SHORT, **knobs}))
        messages.append({"role": "assistant", "content": out[-1]})
    return out


def lines(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


# --- lines that come in --------------------------------------------------------------------------


def test_each_line_is_answered_with_all_that_was_said_before(long):
    expected = replies(long, "Hi", "Go on", "And so?")
    assert run(long, *FLAGS, stdin="Hi\n\nGo on\nAnd so?") == (0, lines(expected), "")
    expected = replies(long, "Hi", "Go on", system="Be kind")
    assert run(long, *FLAGS, "--system", "Be kind", stdin="Hi\nGo on\n") == (0, lines(expected), "")


def test_it_begins_anew_after_a_reset(long):
    first, second = replies(long, "Hi", system="x")[0], replies(long, "Hello", system="x")[0]
    found = run(long, *FLAGS, "--system", "x", stdin="Hi\n/reset\nHello\n")
    assert found == (0, lines([first, second]), "")


def test_a_message_may_have_several_lines(long):
    for typed, text in (
        ("one\\\ntwo\\\nthree\n", "one\ntwo\nthree"),
        ('"""one\ntwo"""\n', "one\ntwo"),
        ('"""\none\n\n  two\\\n"""\n', "one\n\n  two\\"),
        ('"""/reset"""\n', "/reset"),
        ("ein\u00e9 \u4f60\r\n", "ein\u00e9 \u4f60"),
    ):
        assert run(long, *FLAGS, stdin=typed) == (0, lines(replies(long, text)), ""), typed


def test_exit_leaves_what_follows(long):
    found = run(long, *FLAGS, stdin="Hi\n/exit\nHello\n")
    assert found == (0, lines(replies(long, "Hi")), "")
    assert run(long, stdin="") == (0, "", "")


def test_knobs_are_flags_and_can_be_set(long):
    sampled = {"do_sample": True, "seed": 5, "temperature": 1.5}
    expected = [*replies(long, "Hi", **sampled, top_p=0.9), *replies(long, "Hi", num_beams=2)]
    typed = (
        "Hi\n/reset\n/set\n/unset do_sample\n/unset seed\n/set --num-beams 2\n/unset temperature\n"
        "/set\nHi\n"
    )
    flags = ["--do-sample", "--seed", "5", "--temperature", "1.5"]
    code, out, err = run(long, *FLAGS, *flags, stdin=typed)
    assert (code, out) == (0, lines(expected))
    assert err.splitlines() == [
        "max_new_tokens 6",
        "eos_token_id null",
        "do_sample true",
        "seed 5",
        "temperature 1.5",
        "sampled at temperature 1.5, top_k 50, top_p 0.9",
        "max_new_tokens 6",
        "eos_token_id null",
        "num_beams 2",
        "not sampled",
    ]


def test_a_set_knob_can_be_switched_off(long):
    typed = "/set eos_token_id null\n/set max_new_tokens 6\n/set do_sample null\n/set\nHi\n"
    code, out, err = run(long, stdin=typed)
    assert (code, out) == (0, lines(replies(long, "Hi")))
    assert err == "eos_token_id null\nmax_new_tokens 6\ndo_sample null\nnot sampled\n"


# --- how answers are drawn -----------------------------------------------------------------------

SANE = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9}
PLAIN = {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
FIRST = [
    ({}, SANE),
    ({"eos_token_id": 5, "repetition_penalty": 1.1, "temperature": None}, SANE),
    ({"temperature": 0.6}, PLAIN | {"temperature": 0.6}),
    ({"do_sample": True}, PLAIN),
    ({"do_sample": True, "top_k": 20, "top_p": 0.8}, PLAIN | {"top_k": 20, "top_p": 0.8}),
    ({"min_p": 0.1}, PLAIN | {"min_p": 0.1}),
    ({"do_sample": False}, PLAIN | {"do_sample": False}),
    ({"do_sample": False, "top_p": 0.5}, PLAIN | {"do_sample": False, "top_p": 0.5}),
    ({"temperature": 0.0}, PLAIN | {"do_sample": False, "temperature": 0.0}),
    ({"num_beams": 3}, SANE | {"do_sample": False}),
    ({"num_beams": 3, "do_sample": True}, PLAIN),
]


@pytest.mark.parametrize(("own", "expected"), FIRST)
def test_people_read_what_the_models_own_settings_draw_or_sane_ones(own, expected):
    assert sampling(own) == expected


@pytest.mark.parametrize(
    ("own", "knobs", "expected"),
    [
        ({}, {"top_p": 0.5}, SANE | {"top_p": 0.5}),
        ({}, {"seed": 5, "max_new_tokens": 9}, SANE),
        ({}, {"temperature": 0}, SANE | {"do_sample": False, "temperature": 0}),
        ({}, {"num_beams": 2}, SANE | {"do_sample": False}),
        ({}, {"num_beams": 2, "do_sample": True}, SANE),
        ({"num_beams": 3}, {"num_beams": 1}, SANE),
        ({"do_sample": True}, {"temperature": 0}, PLAIN | {"do_sample": False, "temperature": 0}),
        ({"top_k": 20}, {"top_k": None}, PLAIN | {"top_k": None}),
        ({"temperature": 0.3}, {"top_p": 0.9}, PLAIN | {"temperature": 0.3, "top_p": 0.9}),
    ],
)
def test_what_is_set_counts_before_that(own, knobs, expected):
    assert sampling(own, knobs) == expected


@pytest.mark.parametrize(
    ("own", "how", "knobs"),
    [
        ({}, "sampled at temperature 0.7, top_k 50, top_p 0.9", SANE),
        (
            {"temperature": 0.6, "top_k": 20, "min_p": 0.1},
            "sampled at temperature 0.6, top_k 20, top_p 1.0, min_p 0.1",
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "min_p": 0.1},
        ),
        ({"do_sample": False, "temperature": 0.6}, "not sampled", {}),
    ],
)
def test_a_chat_draws_so_and_shows_it(long, tmp_path, terminal, own, how, knobs):
    place = tmp_path / "model"
    shutil.copytree(long, place)
    settings, exported = place / "generation_config.json", place / "fastgen.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    told = json.loads(exported.read_text())
    told["files"][settings.name] = settings.stat().st_size
    exported.write_text(json.dumps(told))
    expected = replies(place, "Hi", "Go on", **knobs, seed=3)
    flags = ["--max-new-tokens", "6", "--eos-token-id", "null", "--seed", "3"]
    assert run(place, *flags, stdin="Hi\nGo on\n") == (0, lines(expected), "")
    assert run(place, stdin="/set")[2] == f"nothing is set\n{how}\n"
    assert f"; {how}. /help" in terminal(place).until(">>> ")


@pytest.mark.parametrize("knob", [knob.name for knob in dataclasses.fields(Params)])
def test_every_knob_is_checked_at_once(talk, knob):
    """With the error of `Params` where that has one, and nothing is changed by it."""
    before = dict(talk.knobs)
    for junk in ({}, [[[]]], "zzz", -5, float("nan"), 10**30):
        try:
            Params(**{knob: junk})
            expected = None
        except ValueError as error:
            expected = str(error)
        try:
            talk.set(knob, junk)
            assert expected is None, junk
            talk.unset(knob)
            talk.knobs = dict(before)
        except ValueError as error:
            assert expected is None or str(error) == expected, junk
        assert talk.knobs == before


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("/set temperatur 1", "temperatur is not a keyword of generate; did you mean temperature?"),
        ("/set temperature hot", "temperature must be a number, got 'hot'"),
        ("/set max_new_tokens 0", "max_new_tokens must be positive, got 0"),
        ("/set num_return_sequences 2", "num_return_sequences=2 needs do_sample=True"),
        ("/set num_beams 2\n/set num_return_sequences 2", "num_return_sequences must be 1"),
        ("/set use_cache true", "use_cache changes nothing here"),
        ("/set prefix_cache 5", "prefix_cache is not a keyword of generate"),
        ("/set stop_strings []", "stop_strings must be a non-empty text"),
        ("/set eos_token_id", "/set needs a value for eos_token_id"),
        ("/unset top_k", "top_k is not set; set are: eos_token_id, do_sample"),
        ("/unset", "/unset needs KNOB"),
        ("/save", "/save needs FILE"),
        ("/reset all", "/reset takes nothing, got 'all'"),
        ("/frobnicate", "there is no command /frobnicate: /help lists them"),
        ("/system forbidden", "no such system message"),
        ("/load {tmp}/none", "none: No such file or directory"),
        ("/load {tmp}", "Is a directory"),
        ("/save {tmp}", "must be a file"),
        ("/save {tmp}/no/such", "no/such cannot be written: No such file or directory"),
        ('""""""', "the message is empty"),
        ('"""no end', "a message has no end"),
        ("no end\\", "a message has no end"),
        (b"\xff\xfe", "it is not UTF-8: invalid start byte at byte 0"),
    ],
)
def test_an_error_is_one_line_and_ends_what_no_terminal_says(long, tmp_path, typed, words):
    raw = typed if isinstance(typed, bytes) else typed.format(tmp=tmp_path).encode()
    code, out, err = run(long, *FLAGS[2:], stdin=b"Hi\n" + raw + b"\nHello\n")
    if "no end" in words:
        code, out, err = run(long, *FLAGS[2:], stdin=b"Hi\n" + raw)
    assert code == 2 and out.count("\n") >= 1
    assert re.fullmatch(r"fastgen: line \d: .*\n", err), err
    assert words in err
    assert f"line {2 + raw.count(10)}:" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "0", "--do-sample"], "temperature must be a number above 0"),
        (["--num-return-sequences", "2", "--do-sample"], "num_return_sequences must be 1"),
        (["--system", "forbidden"], "no such system message"),
        (["--threads", "0"], "threads must be positive, got 0"),
    ],
)
def test_what_is_wrong_from_the_start_is_said_there(long, flags, words):
    code, out, err = run(long, *flags, stdin="Hi\n")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"fastgen: .*\n", err) and words in err


def test_help_lists_every_command(long):
    _, _, err = run(long, stdin="/help\n")
    listed = re.findall(r"^(/\w+)", err, re.MULTILINE)
    assert listed == ["/set", "/unset", "/system", "/reset", "/save", "/load", "/help", "/exit"]


def test_ctrl_c_ends_it_where_nobody_types(long):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fastgen",
            "chat",
            long,
            "--max-new-tokens",
            "30000",
            "--eos-token-id",
            "null",
            "--suppress-tokens",
            "[0,1,2,97,98]",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    assert len(process.stdout.read(20)) == 20
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, b"")


# --- files ---------------------------------------------------------------------------------------


def test_a_conversation_is_saved_and_goes_on(long, tmp_path):
    expected = replies(long, "Hi \U0001f642", "Go on", "More", system="x")
    file = tmp_path / "talk.json"
    code, out, err = run(
        long, *FLAGS, "--system", "x", stdin=f"Hi \U0001f642\nGo on\n/save {file}\n"
    )
    assert (code, out, err) == (0, lines(expected[:2]), "")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    found = json.loads(file.read_text())["messages"]
    assert [one["role"] for one in found] == ["system", *["user", "assistant"] * 2]
    assert found[2] == {"role": "assistant", "content": expected[0]}
    typed = f"Another\n/load {file}\nMore\n/system\n"
    code, out, err = run(long, *FLAGS, stdin=typed)
    assert (code, out.splitlines()[-1], err) == (0, expected[2], "x\n")


def test_a_link_to_a_saved_conversation_stays_one(talk, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    talk.save(tmp_path / "link")
    talk.save(tmp_path / "link")
    assert json.loads((tmp_path / "real").read_text()) == {"messages": []}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"messages": 5}', '{"messages": [5]}', '{"messages": [{"role": "user"}]}',
     '{"messages": [{"role": "user", "content": 5}]}', "[" * 100_000,
     '{"messages": [{"role": "tool", "content": "x"}]}',
     '{"messages": [{"role": "user", "content": "x", "name": "y"}]}',
     '{"messages": [{"role": "user", "content": "\\ud800"}]}',
     '{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}',
     '{"messages": [{"role": "system", "content": "forbidden"}]}'],
)  # fmt: skip
def test_a_file_that_holds_no_conversation_changes_nothing(talk, tmp_path, content):
    "".join(talk.answer("Hi"))
    before = talk.messages
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match=r"file is damaged \(.*\): load|no such system message"):
        talk.load(tmp_path / "file")
    assert talk.messages == before


# --- what is read --------------------------------------------------------------------------------

LONG = "The quick brown fox jumps over the lazy dog, one by one. " * 5


def tokens(model: fastgen.CausalLM, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_special_tokens=False)


def test_a_turn_reads_what_is_new_and_the_last_reply(talk):
    model = talk.model
    first = "".join(talk.answer(LONG))
    start = tokens(model, f"<s>user {LONG}</s><s>assistant ")
    assert talk.took.prompt == talk.took.read == len(start)
    "".join(talk.answer("Go on"))
    whole = tokens(
        model, f"<s>user {LONG}</s><s>assistant {first}</s><s>user Go on</s><s>assistant "
    )
    known = len(start) // BLOCK * BLOCK  # of the first prompt; its reply was not read
    assert known > 3 * BLOCK
    assert talk.cache.tokens_reused == known
    assert (talk.took.prompt, talk.took.read) == (len(whole), len(whole) - known)


def test_what_is_read_ahead_is_the_last_reply_too(long):
    """Then the next turn reads the new message and less than a block; the text is the same."""
    knobs = SHORT | {"max_new_tokens": 90}
    with contextlib.closing(Conversation(fastgen.load(long), knobs, "x" * 70)) as talk:
        talk.read_ahead()
        first = "".join(talk.answer("Hi"))
        system = tokens(talk.model, f"<s>system {'x' * 70}</s><s>user")
        assert talk.took.prompt - talk.took.read == len(system) // BLOCK * BLOCK > BLOCK
        talk.read_ahead()
        second = "".join(talk.answer("Go on"))
        start = f"<s>system {'x' * 70}</s><s>user Hi</s><s>assistant {first}</s><s>user"
        known = len(tokens(talk.model, start)) // BLOCK * BLOCK
        assert talk.took.prompt - talk.took.read == known > 4 * BLOCK
        assert talk.took.new == 90
    assert [first, second] == replies(long, "Hi", "Go on", system="x" * 70, **knobs)


def test_reading_ahead_ends_when_the_conversation_does(long):
    """It is asked to between two chunks."""
    talk = Conversation(fastgen.load(long), SHORT, "word " * 2500)
    talk.read_ahead()
    talk.close()
    assert len(talk.cache) == 0  # as nothing is kept of a prompt that was not read to its end
    talk._leaving = False
    talk._read(talk._ids(talk.messages))
    assert len(talk.cache) > 2500


def test_an_answer_that_is_stopped_is_part_of_the_conversation(talk):
    asked = iter([False, False, False, True])
    talk.set("max_new_tokens", 50)
    said = "".join(talk.answer("Hi", lambda: next(asked)))
    assert talk.turns == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
    assert 0 < talk.took.new <= 4 and talk.took.finish_reason is None


def test_a_message_is_taken_back_if_it_was_stopped_before_an_answer(talk):
    asked = []
    text = "a " * 1000  # of several chunks
    assert "".join(talk.answer(text, lambda: not asked.append(1))) == ""
    assert len(asked) == 1  # after the first chunk
    assert talk.turns == [] and talk.took.new == 0
    assert "".join(talk.answer("Hi")) == replies(talk.model.directory, "Hi")[0]


def test_beams_can_be_stopped_between_steps(talk, monkeypatch):
    talk.set("num_beams", 3)
    talk.set("max_new_tokens", 3000)
    asked: list[int] = []
    steps: list[int] = []
    forward = talk.model.model.forward
    monkeypatch.setattr(
        talk.model.model, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k)
    )
    assert "".join(talk.answer("Hi", lambda: asked.append(1) or len(asked) > 9)) == ""
    assert len(asked) == 10 and len(steps) < 30 and talk.turns == []


def test_the_error_of_an_answer_leaves_what_was_said(talk):
    "".join(talk.answer("Hi"))
    before = talk.messages
    for text in ("", "\ud800"):
        with pytest.raises(ValueError, match="the message"):
            talk.answer(text)
    talk.set("bad_words_ids", [[i] for i in range(talk.model.model.info.vocab_size)])
    talk.set("do_sample", True)
    with pytest.raises(ValueError, match="no token can be drawn"):
        "".join(talk.answer("Go on"))
    assert talk.messages == before


# --- positions -----------------------------------------------------------------------------------


def test_old_turns_are_left_out_and_the_system_message_never_is(short):
    """Without a warning, and so that the turns that follow begin with what was read before."""
    knobs = {"eos_token_id": None, "max_new_tokens": 8, "do_sample": False}
    texts = [f"turn {n}, abc" for n in range(12)]
    model = fastgen.load(short)
    talk = Conversation(model, knobs, "sys")
    found, left_out, reused = [], [], []
    for text in texts:
        found.append("".join(talk.answer(text)))
        left_out.append(talk.dropped)
        reused.append(talk.took.prompt - talk.took.read)
        assert talk.took.prompt + 8 <= 128 and talk.took.new == 8
        sent = [*talk.messages[:1], *talk.turns[talk.dropped : -1]]
        assert model.chat(sent, **knobs) == found[-1]
        assert sent[0]["role"] == "system" and sent[1]["role"] == "user"
    assert len(talk.turns) == 24 and left_out[0] == 0 and left_out[-1] > 10
    again = [now for before, now in itertools.pairwise(left_out) if now == before]
    assert again and any(reused[1:])
    typed = "\n".join(texts)
    flags = ["--eos-token-id", "null", "--max-new-tokens", "8", "--no-do-sample", "--system", "sys"]
    code, out, err = run(short, *flags, stdin=typed)
    assert (code, out) == (0, lines(found))
    notes = err.splitlines()
    assert len(notes) == len(set(left_out)) - 1
    assert notes[-1] == (
        "The conversation has outgrown the model's positions: its first "
        f"{left_out[-1]} messages are no longer read."
    )
    talk.close()


def test_a_message_that_is_too_long_is_refused_and_not_kept(short):
    texts = ["Hi", "word " * 60]
    code, out, err = run(short, *FLAGS, "--system", "sys", stdin="\n".join(texts))
    assert (code, out) == (2, lines(replies(short, "Hi", system="sys")))
    assert re.fullmatch(
        r"fastgen: line 2: the system message and this one take \d+ tokens, and prompt and answer "
        r"have 128 together: say it in fewer words\n",
        err,
    )
    talk = Conversation(fastgen.load(short), SHORT)
    with pytest.raises(ValueError, match=r"the message takes \d+ tokens"):
        talk.answer(texts[1])
    assert talk.turns == [] and talk.dropped == 0
    talk.unset("max_new_tokens")
    talk.set("max_length", 10)
    with pytest.raises(ValueError, match=r"have 10 together: .*, or set max_new_tokens"):
        talk.answer("How do you do?")
    talk.close()


def test_an_answer_is_as_long_as_there_is_room(short):
    model = fastgen.load(short)
    talk = Conversation(model, {"eos_token_id": None})
    "".join(talk.answer("Hi"))
    assert talk.took.prompt + talk.took.new == 128 and talk.took.finish_reason == "length"
    talk.reset()
    talk.set("max_length", 40)
    "".join(talk.answer("Hi"))
    assert talk.took.prompt + talk.took.new == 40
    talk.set("max_new_tokens", 7)  # which counts where both are set, as everywhere
    "".join(talk.answer("Hi"))
    assert talk.took.new == 7
    talk.close()


# --- without a template --------------------------------------------------------------------------


def test_without_a_template_the_text_goes_on(pair):
    model = pair("llama", max_position_embeddings=1 << 15)[1]
    code, out, err = run(model.directory, *FLAGS, "--system", "Be kind", stdin="Hi\nGo on\n")
    first = model.complete("Be kind\nHi", **SHORT)
    second = model.complete(f"Be kind\nHi{first}\nGo on", **SHORT)
    assert (code, out) == (0, lines([first, second]))
    assert re.fullmatch(r"fastgen: .* has no chat template, so it does not answer: .*\n", err)


def test_the_demo_model_shows_it():
    code, out, err = run("--no-do-sample", stdin="The os module\n")
    assert code == 0 and len(out) > 100
    assert out == fastgen.load().complete("The os module", max_new_tokens=64) + "\n"
    assert [line.partition(":")[0] for line in err.splitlines()] == ["fastgen"] * 2
    assert "no MODEL given" in err and "no chat template" in err


# --- a terminal ----------------------------------------------------------------------------------


class Terminal:
    """`fastgen chat` in a terminal of its own."""

    def __init__(self, *args: str | Path) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastgen", "chat", *map(str, args)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"},
            preexec_fn=lambda: (
                fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                signal.signal(signal.SIGINT, signal.default_int_handler),
            ),
        )
        os.close(theirs)

    def until(self, words: str, seconds: float = 60) -> str:
        """The output up to these words, which come soon."""
        shown, deadline = b"", time.monotonic() + seconds
        while words.replace("\n", "\r\n").encode() not in shown:
            ready, _, _ = select.select([self.ours], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{words!r} does not come after {shown[-300:]!r}"
            shown += os.read(self.ours, 1)
        return shown.decode().replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def type_slowly(self, text: str) -> None:
        """As people do: Python misses a Ctrl-C that comes just before readline begins to wait."""
        asleep, state = 0, Path(f"/proc/{self.process.pid}/stat")
        while asleep < 5:
            time.sleep(0.03)
            waits = not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "S"
            asleep = asleep + 1 if waits else 0
        self.type(text)

    def end(self) -> int:
        with contextlib.suppress(OSError):  # Linux's way to say that nobody has it open
            while os.read(self.ours, 1000):
                pass
        return self.process.wait(timeout=60)


@pytest.fixture
def terminal() -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*args: str | Path) -> Terminal:
        opened.append(Terminal(*args))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.ours)


CTRL_C, CTRL_D = "\x03", "\x04"
ENDLESS = ["--max-new-tokens", "30000", "--eos-token-id", "null", "--do-sample",
           "--temperature", "3", "--suppress-tokens", "[0,1,2,97,98]"]  # fmt: skip


def test_ctrl_c_stops_the_answer_and_not_the_program(long, terminal, tmp_path):
    shell = terminal(long, *ENDLESS)
    assert "/help" in shell.until(">>> ")
    shell.type("Hello\n")
    shell.until("Hello\n")
    start = shell.until("o") + shell.until("e")  # it streams: 30,000 tokens are far from done
    shell.type(CTRL_C)
    shown = start + shell.until(">>> ")
    stats = re.search(r"\x1b\[2m(\d+) tokens, [\d.,]+ a second; .*; stopped\x1b\[0m", shown)
    assert stats and 2 < int(stats[1]) < 30000, shown
    shell.type(f"/save {tmp_path}/talk\n")
    shell.until(">>> ")
    user, reply = json.loads((tmp_path / "talk").read_text())["messages"]
    assert user["content"] == "Hello"
    assert shown.replace("^C", "").startswith(reply["content"][:2])
    shell.type("/set max_new_tokens 5\n")
    shell.until(">>> ")
    shell.type("Go on\n")
    assert "\x1b[2m5 tokens, " in shell.until(">>> ")
    shell.type(CTRL_D)
    assert shell.end() == 0


def test_ctrl_c_at_the_prompt_takes_back_what_is_typed_and_the_second_leaves(long, terminal):
    shell = terminal(long, *FLAGS)
    shell.until(">>> ")
    for typed in ("some words", '"""\nsome', "one \\\n"):
        shell.type(typed)
        shell.type_slowly(CTRL_C)
        assert "once more" not in shell.until(">>> " if "\n" not in typed else "\n>>> ")
    shell.type_slowly(CTRL_C)
    assert "Ctrl-C once more, Ctrl-D or /exit leaves" in shell.until("\n>>> ")
    shell.type("Hi\n")  # it was not meant
    assert "6 tokens" in shell.until("\n>>> ")
    shell.type_slowly(CTRL_C)
    assert "once more" in shell.until("\n>>> ")
    shell.type_slowly(CTRL_C)
    assert shell.end() == 0


def test_an_error_in_a_terminal_is_said_and_it_goes_on(long, terminal):
    shell = terminal(long, *FLAGS)
    shell.until(">>> ")
    shell.type("/set temperature hot\n")
    assert "fastgen: temperature must be a number, got 'hot'" in shell.until("\n>>> ")
    shell.type('"""\nno end')
    shell.until("no end")
    shell.type("\n" + CTRL_D)
    assert "fastgen: a message has no end" in shell.until("\n>>> ")
    shell.type("/exit\n")
    assert shell.end() == 0


def test_what_a_model_writes_is_no_command_to_the_terminal():
    shown = _harmless("a\tb\n\x1b[2J\x07\r\x9b1m\x7f \u4f60\U0001f642\xa0\ufffd")
    assert shown == "a\tb\n\\x1b[2J\\x07\\r\\x9b1m\\x7f \u4f60\U0001f642\xa0\ufffd"


def test_thoughts_are_dimmed_on_a_terminal_alone(long, terminal, tmp_path):
    thinks = tmp_path / "thinks"
    shutil.copytree(long, thinks)
    (thinks / "chat_template.jinja").write_text(
        TEMPLATE.replace("assistant {%", "assistant <think>{%")
    )
    shell = terminal(thinks, *FLAGS)
    shell.until(">>> ")
    shell.type("Hi\n")
    shown = shell.until("\n>>> ").partition("Hi\n")[2]
    (reply,) = replies(thinks, "Hi", **SHORT)
    dimmed = "".join(
        re.findall(r"\x1b\[2m(.*?)\x1b\[0m", shown.partition("6 tokens")[0], re.DOTALL)
    )
    assert dimmed.split() == _harmless(reply).split()
    assert run(thinks, *FLAGS, stdin="Hi\n")[1] == f"{reply}\n"
    shell.type("/exit\n")
    assert shell.end() == 0


def test_lines_can_be_edited_and_called_up_again(long, terminal):
    pytest.importorskip("readline")
    shell = terminal(long, *FLAGS)
    shell.until(">>> ")
    shell.type("/syst\n")
    assert "no command /syst:" in shell.until("\n>>> ")
    shell.type("\x10em\n")  # Ctrl-P: the line before
    assert "there is no system message" in shell.until("\n>>> ")
    shell.type("/exit\n")
    assert shell.end() == 0
