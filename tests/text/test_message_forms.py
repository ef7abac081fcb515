"""Messages as a chat template reads them: whatever form it wants, it shows what was said."""

from __future__ import annotations

import copy
import html
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.text import chat_template

# How a template reads a content, and what it makes of a text.
READS = {
    "a text": "{{ m.content FILTER }}",
    "parts": "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text FILTER }}{% endif %}"
    "{% endfor %}",
    "either": "{% if m.content is string %}{{ m.content FILTER }}{% else %}"
    "{% for c in m.content %}{{ c['text'] FILTER }}{% endfor %}{% endif %}",
    "the first part": "{{ m.content[0].text FILTER }}",
    "the system's text, parts of others": "{% if m.role == 'system' %}{{ '' + m.content FILTER }}"
    "{% else %}{% for c in m.content %}{{ c.text FILTER }}{% endfor %}{% endif %}",
    "parts of the user, texts of others": "{% if m.role == 'user' %}"
    "{% for c in m.content %}{{ c.text FILTER }}{% endfor %}{% else %}"
    "{{ '' + m.content FILTER }}{% endif %}",
}
FILTERS: dict[str, Any] = {
    "": str,
    "| trim": str.strip,
    "| e": lambda text: html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;"),
    "| tojson": lambda text: json.dumps(text, ensure_ascii=False),
    "| upper": str.upper,
}
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def prompt(template: str, messages: list[Any]) -> str:
    return chat_template.prompt(Path("nowhere"), {"chat_template": template}, messages)


def talks() -> st.SearchStrategy[list[dict[str, Any]]]:
    parts = st.lists(WORDS.map(lambda text: {"type": "text", "text": text}), max_size=3)
    content = st.one_of(WORDS, parts)
    roles = st.sampled_from(["user", "assistant"])
    system = st.lists(st.just("system"), max_size=1)
    named = st.builds(lambda first, rest: [*first, *rest], system, st.lists(roles, min_size=1))
    return named.flatmap(
        lambda names: st.tuples(*(content for _ in names)).map(
            lambda said: [
                {"role": role, "content": one} for role, one in zip(names, said, strict=True)
            ]
        )
    )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(READS)), st.sampled_from(sorted(FILTERS)), talks())
def test_whatever_a_template_reads_it_shows_what_was_said(reads, way, talk):
    before = copy.deepcopy(talk)
    template = "{% for m in messages %}<" + READS[reads].replace("FILTER", way) + ">{% endfor %}"
    found = prompt(template, talk)
    place = 0
    for message in talk:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content]
        whole = FILTERS[way]("".join(texts)) in found[place:]
        for text in () if whole else texts:
            if text.strip():
                assert FILTERS[way](text) in found[place:]
                place = found.index(FILTERS[way](text), place)
    assert "'type'" not in found and '"type"' not in found  # no part as data
    assert talk == before


def test_a_template_is_asked_once_for_all_that_differs_in_its_words_alone(monkeypatch):
    count, usual = [0], chat_template.rendered

    def counting(*args):
        count[0] += 1
        return usual(*args)

    monkeypatch.setattr(chat_template, "rendered", counting)

    def asked(template, messages, **variables):
        count[0] = 0
        config = {"chat_template": template}
        return chat_template.prompt(Path("nowhere"), config, messages, **variables), count[0]

    def talk(*texts):
        roles = ("system", "user", "assistant", "user")
        return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]

    template = READS["parts of the user, texts of others"].replace("FILTER", "")
    template = "{# once #}{% for m in messages %}[" + template + "]{% endfor %}{{ why }}"
    text, first = asked(template, talk("a", "b"))
    assert (text, first > 2) == ("[a][b]", True)  # several forms were tried
    assert asked(template, talk("other words", "qx0y0z")) == ("[other words][qx0y0z]", 1)
    assert asked(template, talk("a", "b", "c", "d"))[1] > 1  # another talk may be read otherwise
    assert asked(template, talk("a", " "))[1] > 1
    assert asked(template, talk("a", "b"), why="!") == ("[a][b]!", first)
    parts = [{"role": "user", "content": [{"type": "text", "text": "b"}]}]
    assert asked(template, parts)[1] > 1 and asked(template, talk("a", "b"))[1] == 1
    # What is lost is said each time, in the words of each.
    deaf = "{# once #}{% for m in messages %}<{{ m.role }}>{% endfor %}"
    for said in ("Hi", "Bye"):
        with pytest.raises(ValueError, match=f"what the user says in message 1: '{said}'"):
            asked(deaf, talk("a", said))
    picky = "{% if messages[0].content != 'go' %}{{ raise_exception('no') }}{% endif %}go"
    for _ in range(2):
        assert asked(picky, [{"role": "user", "content": "go"}])[0] == "go"
        with pytest.raises(ValueError, match="no"):
            asked(picky, [{"role": "user", "content": "stop"}])


def test_a_prompt_without_the_users_words_is_an_error():
    shown = "{% for m in messages %}{{ m.content }}{% endfor %}"
    deaf = "{% for m in messages %}<{{ m.role }}>{% endfor %}"
    only_last = "{{ messages[-1].content }}"
    talk = [{"role": "user", "content": "Hi, you"}, {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "Bye"}]  # fmt: skip
    for template in (deaf, only_last):
        with pytest.raises(
            ValueError, match="neither as a text nor as parts what the user says"
        ) as e:
            prompt(template, talk)
        assert "message 0: 'Hi, you'" in str(e.value)
    assert prompt(only_last, talk[-1:]) == "Bye"
    assert prompt(deaf, [{"role": "user", "content": " \n"}]) == "<user>"  # nothing was said
    with pytest.raises(ValueError, match="what the stranger says in message 0"):
        prompt("{{ '' }}", [{"role": "stranger", "content": "Hi"}])
    no_system = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.warns(UserWarning, match="shows no messages of role system"):
        assert prompt(no_system, [{"role": "system", "content": "Hm"}, *talk[-1:]]) == "Bye"
    picture = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {}}]
    with pytest.raises(ValueError, match="content of type image_url is not supported"):
        prompt(shown, [{"role": "user", "content": picture}])


def test_a_template_that_asks_more_of_a_text_gets_the_text():
    picky = (
        "{% if messages[0].content != 'open' %}{{ raise_exception('say open') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    assert prompt(picky, [{"role": "user", "content": "open"}]) == "open"
    with pytest.raises(ValueError, match="refuses these messages: say open"):
        prompt(picky, [{"role": "user", "content": "shut"}])


LOOP = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}"
    "{% endfor %}){% endfor %}{% endfor %}"
)


def called(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return [
        {"role": "user", "content": "Add"},
        {"role": "assistant", "tool_calls": calls, **more},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        WORDS, st.recursive(st.none() | st.integers() | WORDS, st.lists, max_leaves=4), max_size=3
    )
)
def test_arguments_as_json_are_to_the_template_what_the_object_is(arguments):
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = LOOP
    expected = tokenizer.apply_chat_template(called(arguments), tokenize=False)
    for talk in (called(arguments), called(json.dumps(arguments), content=None)):
        before = copy.deepcopy(talk)
        assert prompt(LOOP, talk) == expected
        assert talk == before


@pytest.mark.parametrize("text", ["", "5", "[1]", "{", '{"a": NaN}', "plain", "[" * 100_000])
def test_arguments_that_are_no_object_stay_as_they_are(text):
    shown = (
        "{{ messages[0].content }}{{ messages[1].tool_calls[0].function.arguments }}"
        "{{ messages[2].content }}"
    )
    assert prompt(shown, called(text)) == f"Add{text}3"


def test_a_template_that_writes_arguments_as_text_gets_the_text():
    template = LOOP.replace(
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}",
        "{{ '```' + c.function.arguments + '```' }}",
    )
    assert "f(```{}```)" in prompt(template, called("{}"))


def test_an_assistant_may_say_nothing():
    joined = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant"}]
    assert prompt(joined, talk) == "user: Hi\nassistant: \n"
    assert prompt(joined, called("{}", content=None)).startswith("user: Add\nassistant: \n")
