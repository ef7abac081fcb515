"""All that runs without torch, on the embedded model: `.ci/lowest` runs this file alone.

It takes nothing from conftest.py, which wants other packages of the tests.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import World, serving

import fastgen
from fastgen.store.hub import DEMO

PROMPT = "The os module"
MESSAGES = [{"role": "user", "content": "What is a list?"}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def model() -> fastgen.CausalLM:
    return fastgen.load()


@pytest.fixture(scope="module")
def text(model) -> str:
    return model.complete(PROMPT, max_new_tokens=12)


@pytest.fixture
def copy(tmp_path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "copy")


def command(place: Path, *args: str | Path, prompt: str = "") -> tuple[int, str, str]:
    """`fastgen ARGS` in a directory where no checkout is: exit code, output, errors."""
    done = subprocess.run(
        [sys.executable, "-m", "fastgen", *map(str, args)],
        cwd=place,
        input=prompt.encode(),
        capture_output=True,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_generate(model):
    ids = model.tokenizer.encode(PROMPT)
    rows = model.generate([ids, ids[:1]], max_new_tokens=6)
    assert [len(row) for row in rows] == [len(ids) + 6] * 2  # the shorter one is padded
    for knobs in ({"num_beams": 3}, {"do_sample": True, "seed": 7, "top_p": 0.9}):
        once, again = (model.generate([ids], max_new_tokens=6, **knobs) for _ in range(2))
        assert once == again and once[0][: len(ids)] == ids
    found = model.generate(
        [ids],
        max_new_tokens=6,
        repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        num_beams=4,
        do_sample=True,
        seed=1,
        num_return_sequences=2,
        prompt_lookup_num_tokens=None,
    )
    assert len(found) == 2
    guessed = model.generate([ids], max_new_tokens=6, prompt_lookup_num_tokens=4)
    assert guessed == rows[:1]


def test_stream_and_complete(model, text):
    assert text and not text.startswith(PROMPT)
    assert "".join(token.text for token in model.stream(PROMPT, max_new_tokens=12)) == text


def test_score(model):
    (found,) = model.score([PROMPT])
    assert all(math.isfinite(float(one)) for one in found[1:])
    assert model.perplexity([PROMPT]) > 1


def test_prefix_cache(model, tmp_path):
    cache, long = fastgen.PrefixCache(), " ".join([PROMPT] * 20)
    expected = model.complete(long, max_new_tokens=6)
    assert model.complete(long, max_new_tokens=6, prefix_cache=cache) == expected
    cache.save(tmp_path / "prefixes")
    again = fastgen.PrefixCache.load(tmp_path / "prefixes")
    assert model.complete(long, max_new_tokens=6, prefix_cache=again) == expected
    assert again.hits == 1


def test_chat(copy):
    pytest.importorskip("jinja2")
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    reply = fastgen.load(copy).chat(MESSAGES, max_new_tokens=6)
    written = "[user] What is a list?\n[assistant]"
    assert reply == fastgen.load(copy).complete(written, max_new_tokens=6)


def test_the_command_line(text, tmp_path):
    notice = "fastgen: no --model given, using the embedded demo model\n"
    found = command(tmp_path, "generate", PROMPT, "--max-new-tokens", "12")
    assert found == (0, f"{PROMPT}{text}\n", notice)
    found = command(tmp_path, "generate", "--max-new-tokens", "12", "--json", prompt=PROMPT)
    assert found[0] == 0 and json.loads(found[1])["text"] == text
    flags = ("--do-sample", "--no-renormalize-logits", "--top-k", "5", "--logit-bias", '{"5": 1}')
    assert command(tmp_path, "generate", PROMPT, "--stop-strings", "x", *flags)[0] == 0
    code, out, _ = command(tmp_path, "generate", "--help")
    assert code == 0 and "--do-sample / --no-do-sample" in out
    assert fastgen.__version__ in command(tmp_path, "--version")[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "Usage: fastgen "),
        (["frobnicate"], "fastgen: No such command"),
        (["generate", "x", "--top-k", "many"], "fastgen: Invalid value for '--top-k'"),
        (["generate", "x", "--logit-bias", "many"], "logit_bias must be"),
        (["generate", "x", "--frobnicate"], "fastgen: No such option"),
        (["info", "nothing/here/at/all"], "is not a directory"),
    ],
)
def test_an_error_is_said_and_the_code_is_2(args, words, tmp_path):
    code, out, err = command(tmp_path, *args)
    assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_info_and_tune(copy):
    code, out, _ = command(copy.parent, "info", copy, "--json")
    assert code == 0 and json.loads(out)["precision"]
    code, out, err = command(copy.parent, "tune", copy, "--rounds", "1", "--new", "2")
    assert code == 0 and "ms a token" in out, err
    assert fastgen.load(copy).model.tuning.threads >= 1 and (copy / "tuned.json").is_file()
    assert "(not tuned)" not in command(copy.parent, "info", copy)[1]


def test_the_hub(text, tmp_path):
    shutil.copytree(DEMO, tmp_path / "hub" / "org" / "demo")
    (tmp_path / "home").mkdir()
    ask = ("generate", PROMPT, "-m", "org/demo", "--max-new-tokens", "12")
    with serving(tmp_path / "hub") as hub:
        world = World(hub, tmp_path / "home")
        code, _, err = world.command("info", "org/demo", HF_HUB_OFFLINE="1")
        assert code == 2 and err.endswith("cannot be reached, and it is not in the cache\n")
        code, _, err = world.command("info", "org/nothing")
        assert code == 2 and err.endswith("there is no such repository, or it is private\n")
        code, out, err = world.command(*ask)
        assert (code, out) == (0, f"{PROMPT}{text}\n"), err
        hub.asked.clear()
        code, out, err = world.command(*ask, HF_HUB_OFFLINE="1")
        assert (code, out) == (0, f"{PROMPT}{text}\n"), err
        assert hub.asked == []


@pytest.mark.parametrize("knobs", ["", "num_beams=2", "prompt_lookup_num_tokens=3"])
def test_a_stream_that_is_held_to_the_end_says_nothing(knobs):
    """Its generator is closed when the interpreter has no modules left to import."""
    code = (
        "import fastgen, sys; model = fastgen.load(); "
        f"stream = model.stream('Return', max_new_tokens=50, {knobs}); "
        "next(stream); sys.modules['kept'] = stream"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
