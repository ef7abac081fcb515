"""Scores of given tokens against torch, and conversations against transformers' templates."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny import ragged

import fastgen
from fastgen.engine import score
from fastgen.text import chat_template
from fastgen.text.message_forms import NoFormHelps

KINDS = ["gpt2", "llama", "gemma2"]


def expected_of(theirs: Any, row: list[int]) -> np.ndarray:
    """float32 [length - 1]: torch's log-probability of each token but the first."""
    with torch.no_grad():
        logprobs = theirs(torch.tensor([row])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_torch(pair, kind, chunk):
    theirs, ours = pair(kind)
    rows = ragged(61, (5, 90, 1, 33, 64, 65, 2, 7))
    found = score.log_probabilities(ours.model, [np.array(row) for row in rows], chunk=chunk)
    assert [len(one) for one in found] == [len(row) for row in rows]
    for row, one in zip(rows, found, strict=True):
        assert np.isnan(one[0])
        close(one[1:], expected_of(theirs, row))


@pytest.mark.parametrize("kind", KINDS)
def test_continuations_of_a_prefix_are_scored_as_whole_texts(pair, kind):
    theirs, ours = pair(kind)
    prefix = ragged(62, (40,))[0]
    rows = ragged(63, (3, 1, 20, 9, 2, 12))
    found = ours.score(rows, prefix=prefix)
    for row, one in zip(rows, found, strict=True):
        assert len(one) == len(row)
        close(one, expected_of(theirs, prefix + row)[len(prefix) - 1 :])
    alone = ours.score(rows[2], prefix=np.array(prefix))
    close(alone, found[2])
    close(ours.score([7], prefix=[5]), expected_of(theirs, [5, 7]))


def test_a_prefix_is_read_once(pair, monkeypatch):
    _, ours = pair("llama")
    read = []
    forward = ours.model.forward

    def counted(new: Any, *args: Any) -> Any:
        read.append(sum(map(len, new)))
        return forward(new, *args)

    monkeypatch.setattr(ours.model, "forward", counted)
    ours.score([[5, 6]] * 9, prefix=list(range(3, 93)))
    assert sum(read) == 90 + 9  # the prefix's last token predicts the first of all rows


def test_whatever_comes_in(pair):
    """Texts, rows, arrays, tensors and masks; one is one array, several are a list."""
    _, ours = pair("llama")
    text = "The quick brown fox"
    ids = ours.tokenizer.encode(text)
    expected = ours.score(ids)
    assert isinstance(expected, np.ndarray)
    for one in (text, np.array(ids), torch.tensor(ids)):
        np.testing.assert_array_equal(ours.score(one), expected)
    for several in ([text], [ids], np.array([ids]), torch.tensor([ids])):
        found = ours.score(several)
        assert isinstance(found, list) and len(found) == 1
        np.testing.assert_array_equal(found[0], expected)
    padded = np.array([[0, 0, *ids], [*ids, 5, 6]])
    mask = np.ones_like(padded)
    mask[0, :2] = 0
    found = ours.score(padded, attention_mask=mask)
    close(found[0][1:], expected[1:])
    assert len(found[1]) == len(ids) + 2
    assert len(ours.score([0, 5, 0])) == 3  # the pad token, but no padding
    close(
        ours.score([" jumps", " is"], prefix=text)[0],
        ours.score(ids + ours.tokenizer.encode(" jumps"))[len(ids) :],
    )


def test_perplexity_counts_every_predicted_token(pair):
    theirs, ours = pair("llama")
    texts = ["The quick brown fox", "and so it goes, on and on", "i"]
    losses = np.concatenate([expected_of(theirs, ours.tokenizer.encode(text)) for text in texts])
    assert ours.perplexity(texts) == pytest.approx(np.exp(-losses.mean()), rel=1e-4)
    assert ours.perplexity(texts[0]) == pytest.approx(ours.perplexity([texts[0]]))
    with pytest.raises(ValueError, match="perplexity needs a text of at least two tokens"):
        ours.perplexity([[5]])


def test_what_cannot_be_scored_is_said(pair):
    _, ours = pair("gpt2")
    assert len(ours.score([5] * 128)) == 128
    for call, words in (
        (lambda: ours.score([]), "empty"),
        (lambda: ours.score([[5], []]), "row 1 .* empty"),
        (lambda: ours.score([[5, 99]]), "99 .* outside the vocabulary"),
        (lambda: ours.score([5] * 129), "129 tokens cannot be scored: the model takes 128"),
        (lambda: ours.score([5] * 100, prefix=[5] * 29), "129 tokens cannot be scored"),
        (lambda: ours.score([5], prefix=[[5], [6]]), "prefix must be one text or row, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# -- Conversations -------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be brief. \u4f60\u597d <&>"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.", "tool_calls": None},
    {"role": "user", "content": ["a", {"b": 1.5, "c": None}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": "int"}}}]

CHATML = """{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
<|im_start|>system
None.<|im_end|>
    {% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

RICH = """{{ bos_token }}{%- set ns = namespace(n=0, last='') -%}
{% for message in messages %}
  {% if message.role == 'never' %}{% continue %}{% endif %}
  {% set ns.n = ns.n + 1 %}
  {% if message.role == 'assistant' %}
{% generation %}{{ message.content | trim }}{{ eos_token }}{% endgeneration %}
  {% else %}[{{ message.role | upper }}] {{ message.content | tojson }}{% endif %}
  {{ 'tool_calls' in message }} {{ message | tojson(indent=2) }}
{% endfor %}
{{ ns.n }} {{ dict(a=1)['a'] }} {{ tools | tojson if tools else 'no tools' }}
{{ documents is none }} {{ flavour | default('plain') }} {{ strftime_now('%Y') | length }}
{% if messages | length > 9 %}{{ raise_exception('too long') }}{% endif %}"""


def told(directory: Path, template: Any, *, in_file: bool) -> tuple[Any, fastgen.CausalLM]:
    """transformers' tokenizer and the model of a directory that has this chat template."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory, save_jinja_files=in_file)
    return tokenizer, fastgen.load(directory)


@pytest.fixture
def directory(pair, tmp_path):
    return shutil.copytree(pair("llama")[1].directory, tmp_path / "model")


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("template", [CHATML, RICH, {"default": CHATML, "tool_use": RICH}])
def test_prompts_are_those_of_transformers(directory, template, in_file):
    settings = directory / "fastgen.json"
    description = json.loads(settings.read_text())
    changed = description["files"].pop("tokenizer_config.json"), description["files"]
    assert changed  # its size changes with the template
    settings.write_text(json.dumps(description))
    tokenizer, model = told(directory, template, in_file=in_file)
    for tools in (None, TOOLS):
        for variables in ({}, {"flavour": "sweet"}):
            expected = tokenizer.apply_chat_template(
                TALK, tools=tools, tokenize=False, add_generation_prompt=True, **variables
            )
            found = chat_template.prompt(
                directory, model.tokenizer.config, TALK, tools, **variables
            )
            assert found == expected


THINKING = (
    "{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content }}|{{ m.thinking }}|"
    "{{ m.reasoning }}|{{ m.content }}]{% endfor %}"
)


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning_content": "a"},
        {"thinking": "b"},
        {"reasoning": "c"},
        {"reasoning": "c", "thinking": "b"},
        {"reasoning_content": "a", "thinking": "b", "reasoning": "c"},
        {"reasoning_content": None, "reasoning": "c"},
        {"reasoning": ""},
        {},
    ],
)
def test_reasoning_has_the_names_that_it_has_in_transformers(directory, said):
    (directory / "chat_template.jinja").write_text(THINKING)
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = THINKING
    talk = [TALK[0], {"role": "assistant", "content": "d", **said}, TALK[0]]
    expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert chat_template.prompt(directory, {}, talk) == expected


def test_lipsum_is_jinjas_within_bounds(directory):
    """Its words are random, so their number is what can be compared."""
    template = "{{ messages[0].content }}{{ lipsum(n=2, html=false, min=3, max=4) }}"
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template([TALK[0]], tokenize=False)
    (directory / "chat_template.jinja").write_text(template)
    assert len(chat_template.prompt(directory, {}, [TALK[0]]).split()) == len(expected.split())
    (directory / "chat_template.jinja").write_text(template.replace("n=2", "n=999999999"))
    with pytest.raises(ValueError, match="lipsum makes more than 10,000 words"):
        chat_template.prompt(directory, {}, [TALK[0]])


def test_a_reply_is_what_follows_the_template(directory):
    (directory / "chat_template.jinja").write_text(CHATML)
    model, tokenizer = fastgen.load(directory), copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = CHATML
    reply = model.chat(TALK, max_new_tokens=7, eos_token_id=None)
    ids = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    out = model.generate(ids, max_new_tokens=7, eos_token_id=None)[0]
    assert reply == tokenizer.decode(out[len(ids) :], skip_special_tokens=True)
    several = model.chat(TALK, max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert isinstance(several, list) and len(several) == 2


def test_a_reply_is_as_long_as_it_is_asked_to_be(directory, monkeypatch):
    model = fastgen.load(directory)
    asked: list[Any] = []
    monkeypatch.setattr(chat_template, "prompt", lambda *args, **kwargs: "hello")
    monkeypatch.setattr(model, "_written", lambda ids, knobs: asked.append(knobs) or [""])
    model.chat(TALK)
    model.chat(TALK, max_new_tokens=5)
    model.chat(TALK, generation_config={"max_new_tokens": 6})
    model.generation_config.max_length = 50
    model.chat(TALK)
    assert [knobs.get("max_new_tokens") for knobs in asked] == [256, 5, None, None]


def test_what_a_template_cannot_do_is_said(directory):
    config = fastgen.load(directory).tokenizer.config
    for template, messages, words in (
        (CHATML, [], "messages must be a non-empty list of dicts"),
        (CHATML, ["Hi"], "messages must be a non-empty list of dicts"),
        (CHATML, [{"content": object()}], "must be plain data"),
        (RICH, TALK * 3, "refuses these messages: too long"),
        ("{% if %}", TALK, "the chat template is damaged"),
        ("{{ messages.append(1) }}", TALK, "refuses"),
        ("{{ messages.__class__.__mro__ }}", TALK, "refuses"),
        ("{% set ns = namespace(__x=1) %}", TALK, "cannot have the attribute '__x'"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", TALK, "cannot have the attribute '_x'"),
    ):
        with pytest.raises(ValueError, match=words):
            chat_template.prompt(directory, config | {"chat_template": template}, messages)
    with pytest.raises(ValueError, match="has no chat template"):
        chat_template.prompt(directory, config, TALK)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1 + 'a' }}", "fails with these messages: TypeError"),
        ("{{ 1 // 0 }}", "fails with these messages: ZeroDivisionError"),
        ("{{ 2.0 ** 1e10 }}", "fails with these messages: OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% include 'x' %}", "fails with these messages"),
        ("\ud800", "fails with these messages: UnicodeEncodeError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is damaged"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "is damaged"),
        ("x" * 100_001, "is damaged: it has 100,001 characters"),
        ("{{ 'a' * 10**10 }}", "makes more than"),
        ("{{ 10**10 * [0] }}", "makes more than"),
        ("{{ (10 ** 1000) ** 1000 }}", "makes a number of more than"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ range(99999) | join('x' * 99999) }}", "makes more than"),
        ("{{ ('x' * 99999).join(range(99999) | map('string')) }}", "makes more than"),
        ("{{ '%1000000000d' % 1 }}", "a format has a width"),
        ("{{ '%*d' % (1000000000, 1) }}", "a format has a width"),
        ("{{ '%(a)1000000000d' | format(a=1) }}", "a format has a width"),
        ("{{ '{:1000000000d}'.format(1) }}", "a format has a width"),
        ("{{ '{:{}}'.format(1, 1000000000) }}", "a format has a width"),
        ("{{ ['{:1000000000d}'] | map('attr', 'format') | list }}", None),
        ("{{ 'a'.ljust(10**10) }}", "ljust has a width"),
        ("{{ 'a' | center(10**10) }}", "center has a width"),
        ("{{ (1).to_bytes(10**10, 'big') }}", "to_bytes has a width"),
        ("{{ 1 | round(10**9, 'ceil') }}", "round has a width"),
        ("{{ [[1]] | tojson(indent=10**9) }}", "makes more than"),
        ("{% set x = 'a' * 999999 %}{{ x.replace('', x) }}", "makes more than"),
        ("{% set x = 'a' * 999999 %}{{ x | replace('a', x) }}", "makes more than"),
        ("{% set n = namespace(a='xx') %}{% for i in range(99) %}"
         "{% set n.a = n.a ~ n.a %}{% endfor %}", "makes more than"),
        ("{% set n = namespace(a='xx') %}{% for i in range(99) %}"
         "{% set b %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = b %}{% endfor %}", "makes more"),
        ("{% set n = namespace(a=[1]) %}{% for i in range(99) %}"
         "{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}", "makes a value of more than"),
        ("{% set n = namespace(a=1) %}{% for i in range(99) %}"
         "{% set n.a = (n.a, n.a) %}{% endfor %}{{ {n.a: 1} }}", "makes a value of more than"),
        ("{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}", "makes more than"),
    ],
)  # fmt: skip
def test_whatever_a_template_does_is_one_error(template, words):
    def reply() -> str:  # whatever else the machine does
        return chat_template.rendered(template, {}, {"messages": TALK}, seconds=60)

    if words is None:  # the method is there, but only as a name
        assert "10000000000" not in reply()
        return
    with pytest.raises(ValueError, match=rf"the chat template .*{words}"):
        reply()


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{% for a in range(99999) | map('string') | map('list') | sum(start=[]) %}{% endfor %}",
    ],
)
def test_a_template_without_end_is_stopped_on_any_thread(template):
    found: list[str] = []

    def work() -> None:
        try:
            chat_template.rendered(template, {}, {"messages": TALK}, seconds=0.2)
        except NoFormHelps as error:  # then `prompt` tries no other form of the messages
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert found == ["the chat template refuses these messages: it takes more than 0.2 seconds"]


IDIOMS = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.first }}{{ loop.last }}"
    "{{ loop.previtem is defined }}{{ loop.nextitem }}{{ loop.revindex }}{% else %}no{% endfor %}",
    "{% for m in messages[1:] if m.role != 'user' %}{{ m.content }}{{ loop.index }}{% endfor %}",
    "{% for m in messages[::-1] %}{{ messages|length - 1 - loop.index0 }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for k, v in messages[0] | dictsort %}{{ k ~ '=' ~ v }}{% endfor %}",
    "{% for a in [[1, [2]], [3]] recursive %}{{ a if a is number else loop(a) }},{% endfor %}",
    "{% macro f(x, y=[1], z='a') %}<{{ x }}{{ y }}{{ z }}{{ varargs }}>{% endmacro %}{{ f(1) }}",
    "{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter upper %}b{{ x }}{% endfilter %}",
    "{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}{{ {'a': [a, none, true]} }}{{ (1,) + b }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | map('upper') | first }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | list }}",
    "{{ 'a,b'.split(',') }}{{ ' x '.strip() }}{{ 'ab'.startswith('a') }}{{ '-'.join(['a', 'b']) }}",
    "{{ 'a-%s-%05.2f' % ('b', 1.5) }}{{ '%s' | format(3) }}{{ '{:>5}{x!r}'.format(1, x='y') }}",
    "{{ 'a\\nb' | indent(4) }}{{ 'abc' | replace('b', 'xx') }}{{ 'aab'.replace('a', '', 1) }}",
    "{{ 1.5 * 100000000 }}{{ 2 ** 10 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 10**9 + 0.5 }}{{ -3 * 'a' }}|",
    "{{ [1, 2, 3] | batch(2, 'x') | list }}{{ [3, 1] | sort }}{{ [1, 2] | sum }}{{ 3.7 | round }}",
    "{{ range(3) | list }}{{ 'x' in ['x', 'y'] }}{{ nothing | default('d') }}{{ nothing }}",
    "{{ messages | tojson(indent=2) }}{{ 'a' | center(9) }}{{ ('word ' * 30) | wordwrap(20) }}",
    "{{ messages | groupby('role') | map('first') | list }}{{ 'a<b' | e }}{{ 'x' | safe }}",
    "{% set ns = namespace(a=[]) %}{% for m in messages %}{% set ns.a = ns.a + [m.role] %}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}{{ ns.a }}",
    "{% with x = 5 %}{{ x }}{% endwith %}{{ messages[-1]['content'][1].b }}{{ messages[0:1] }}",
]


@pytest.mark.parametrize("template", IDIOMS)
def test_within_its_limits_a_template_says_what_jinja2_makes_of_it(tmp_path, template):
    jinja = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    jinja.filters["tojson"] = chat_template._to_json
    talk = [{k: v for k, v in message.items() if v is not None} for message in TALK]
    expected = jinja.from_string(template).render(messages=talk)
    assert chat_template.rendered(template, {}, {"messages": talk}) == expected


def test_a_long_conversation_is_within_what_a_template_may_do(tmp_path):
    talk = [{"role": "user", "content": f"{turn} " + "word " * 400} for turn in range(500)]
    config = {"chat_template": CHATML.replace("message.content", "message.content | trim")}
    assert len(chat_template.prompt(tmp_path, config, talk)) > 1_000_000


@pytest.mark.parametrize(
    "shape", [5, [1], [["default", "x"]], {"default": 5}, [{"name": "default"}]]
)
def test_a_template_of_an_odd_shape_is_damage(tmp_path, shape):
    with pytest.raises(
        fastgen.ModelError, match=r"tokenizer_config\.json is damaged \(chat_template"
    ):
        chat_template.prompt(tmp_path, {"chat_template": shape}, TALK)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(fastgen.ModelError, match=r"chat_template\.jinja is damaged"):
        chat_template.prompt(tmp_path, {}, TALK)


def test_without_jinja2_the_error_names_the_extra(directory):
    (directory / "chat_template.jinja").write_text(CHATML)
    program = (
        "import sys; sys.modules['jinja2'] = None; import fastgen\n"
        f"fastgen.load({str(directory)!r}).chat([{{'role': 'user', 'content': 'Hi'}}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "chat needs jinja2: pip install 'fastgen-onnx[chat]'" in done.stderr
