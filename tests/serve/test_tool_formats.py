"""Calls of tools: every format is found by its template, read as it comes, and can be forced."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import llguidance
import pytest
from growth import growth
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_forms import ALONE, ANSWERS, EVERY, EXPECTED, FORMS, KNOWN, TOOLS, template, thinking

from fastgen.sampling import schema
from fastgen.serve.tools import reader
from fastgen.serve.tools.choice import chosen
from fastgen.serve.tools.form import AnswerOptions, GrammarRules
from fastgen.serve.tools.format import Format
from fastgen.serve.tools.reader import (
    THINK,
    AnswerEvent,
    Marks,
    ReadingOptions,
    TextBuffer,
)
from fastgen.serve.tools.shown import TemplateForms, shown
from fastgen.serve.tools.whole import WholeAnswer
from fastgen.text import chat_template


def read(made: Format, pieces: Sequence[str], cut: bool = False, **asked: Any) -> WholeAnswer:
    """Read an answer that comes in pieces."""
    whole = WholeAnswer()
    reader = made.read(ReadingOptions(asked.pop("tools", TOOLS), **asked))
    for piece in pieces:
        whole.take(reader.push(piece))
    whole.take(reader.end(cut))
    return whole


def said(whole: WholeAnswer) -> tuple[str, str, list[tuple[str, Any]]]:
    calls = [(one.name, json.loads(one.arguments)) for one in whole.calls]
    return whole.content, whole.reasoning, calls


def seen(source: str, tokens: Sequence[str] = ()) -> TemplateForms:
    """The forms that a template shows."""

    def render(messages: Any, tools: Any, variables: Any) -> str:
        given = {"messages": messages, "tools": tools, "add_generation_prompt": True}
        return chat_template.rendered(source, {}, given | dict(variables))

    return shown(render, tokens)


def test_a_call_may_begin_as_the_prompt_ends() -> None:
    """Gemma 4's prompt ends in `<|channel>` where a call has `<|tool_call>`, a text behind it."""
    text = "{{ m.content }}"
    silent = "{% if not m.tool_calls %}" + text + "{% endif %}"
    found = seen(FORMS["gemma"][0].replace(text, silent) + "<|channel>thought\n<channel|>")
    assert found.format is not None and found.format.name == "gemma"


def test_the_end_of_a_message_is_no_end_of_thoughts() -> None:
    """Phi's messages end in `<|end|>`, as those of gpt-oss do."""
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    )
    assert seen(source).reasoning is None
    assert seen(f"{source}<think></think>").reasoning == THINK


def test_every_format_has_a_form_here() -> None:
    assert FORMS.keys() == KNOWN.keys()


# --- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_a_template_shows_its_format(name: str) -> None:
    found = seen(FORMS[name][0])
    assert found.tools and found.format is not None and found.format.name == name


def test_what_a_template_says_of_others_does_not_count() -> None:
    """A mark in its source, or in a comment, is no form that comes out."""
    silent = "{# <tool_call> [TOOL_CALLS] #}{% set x = '<tool_call>' %}"
    found = seen(silent + "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert not found.tools and found.format is None
    strange = template("<<call {{ f.name }} with {{ f.arguments | tojson }}>>")
    assert seen(strange).tools and seen(strange).format is None
    mixed = seen(silent + FORMS["mistral11"][0])
    assert mixed.format is not None and mixed.format.name == "mistral11"


def test_a_bare_call_stands_where_an_answer_begins() -> None:
    header = "<|header|>{}<|over|>\n\n"
    text = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        + header.format("{{ m.role }}")
        + "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}BEFORE"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}'
        "{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}" + header.format("assistant")
    )
    for before, name in (("", "llama"), ("<|python_start|><|python_end|>", "llama"), ("<x>", None)):
        found = seen(text.replace("BEFORE", before)).format
        assert (found.name if found else None) == name


def test_a_template_that_only_tells_how_to_call() -> None:
    text = (
        "{% if tools %}{{ tools | tojson }} Write <tool_call>\n"
        '{"name": <name>, "arguments": <arguments>}\n</tool_call>.{% endif %}'
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    found = seen(text)
    assert found.format is not None and found.format.name == "hermes"


@pytest.mark.parametrize(
    "marks",
    [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"),
     ("<|START_THINKING|>", "<|END_THINKING|>")],
)  # fmt: skip
def test_a_template_shows_what_stands_around_thoughts(marks: tuple[str, str]) -> None:
    assert seen(thinking(*marks)).reasoning == Marks(*marks)


def test_thoughts_that_only_the_prompt_or_the_vocabulary_shows() -> None:
    plain = template("")
    assert seen(plain).reasoning is None
    assert seen(template("", "<|assistant|><think>\n")).reasoning == THINK
    assert seen(plain, ["<think>", "</think>"]).reasoning == THINK
    switch = "<|assistant|>{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
    found = seen(template("", switch))
    assert found.reasoning == THINK and found.switches == ("enable_thinking",)
    assert seen(FORMS["harmony"][0]).reasoning is not None


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_an_answer_is_read(name: str) -> None:
    content, thought, calls = said(read(EVERY[name], [ANSWERS[name]]))
    assert calls == EXPECTED
    assert content == ("" if name in ALONE else "Well.") and not thought


@pytest.mark.parametrize("name", EVERY)
def test_an_answer_is_read_wherever_it_is_cut_into_pieces(name: str) -> None:
    whole = said(read(EVERY[name], [ANSWERS[name]]))
    assert said(read(EVERY[name], list(ANSWERS[name]))) == whole
    for place in range(1, len(ANSWERS[name])):
        assert said(read(EVERY[name], [ANSWERS[name][:place], ANSWERS[name][place:]])) == whole


NOISE = [
    "weather", "now", "unknown", "{", "}", "[", "]", "(", ")", '"', "'", ",", ":", " ", "\n", "<",
    ">", "\\", "1", "-2.5e3", "true", "None", "city", "days", '{"city": "x", "days": 2}', "=",
    '{"name": "weather", "arguments": {"city": "a"}}', "Zürich", "<think>", "</think>", "é", "{}",
    '{"name": "now"}', '"a\\u00e9"', "functions.now:0", 'call tool="now" index="1"',
]  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_what_comes_is_read_alike_however_it_is_cut_and_is_legal(name: str) -> None:
    """Any text gives the same events, with arguments that are JSON and tools that exist."""
    made = EVERY[name]
    parts = st.sampled_from([*NOISE, *made.marks, *NOISE, made.mark, ANSWERS[name]])
    thoughts = st.sampled_from([None, made.reasoning or THINK])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(parts, max_size=14), st.randoms(), st.booleans(), thoughts, st.booleans())
    def holds(parts: list[str], chance: random.Random, cut: bool, marks: Any, inside: bool) -> None:
        text, asked = "".join(parts), {"reasoning": marks, "inside": inside and marks is not None}
        whole = said(read(made, [text], cut, **asked))
        places = sorted(chance.choices(range(len(text) + 1), k=5))
        pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        assert said(read(made, pieces, cut, **asked)) == whole
        assert said(read(made, list(text), cut, **asked)) == whole
        for called, arguments in whole[2]:
            assert called in TOOLS and isinstance(arguments, dict)

    holds()


OF_CHANNELS = {"harmony", "kimi3", "command_r"}


@pytest.mark.parametrize("name", EVERY)
def test_a_text_without_a_mark_is_content(name: str) -> None:
    made = EVERY[name]
    letters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<[{|"))

    @settings(max_examples=40, deadline=None)
    @given(letters)
    def holds(text: str) -> None:
        assert said(read(made, list(text))) == (text, "", [])

    holds()


@pytest.mark.parametrize("name", EVERY)
def test_without_tools_nothing_is_a_call(name: str) -> None:
    content, _, calls = said(read(EVERY[name], [ANSWERS[name]], tools={}))
    assert not calls and ("Well." in content or content == ANSWERS[name])
    if name not in OF_CHANNELS:
        assert content == ANSWERS[name]


@pytest.mark.parametrize("name", EVERY)
def test_a_name_that_the_request_has_not_is_no_call(name: str) -> None:
    content, _, calls = said(read(EVERY[name], [ANSWERS[name]], tools={"other": {}}))
    assert not calls and "weather" in content + ("weather" if name in ("harmony",) else "")


@pytest.mark.parametrize("name", EVERY)
def test_a_call_that_is_cut_off_is_none_and_those_before_it_stay(name: str) -> None:
    made, text, counts = EVERY[name], ANSWERS[name], []
    for place in range(len(text)):
        whole = said(read(made, [text[:place]], cut=True))
        assert whole[2] == EXPECTED[: len(whole[2])]
        rest = whole[0].strip().removeprefix("Well.").strip()
        marks = [*made.marks, made.mark, "Well."]
        assert any(one.startswith(rest) for one in marks) or name in ALONE, whole
        counts.append(len(whole[2]))
    assert counts == sorted(counts) and {0, 1} <= {*counts}


def test_ordinary_json_is_content() -> None:
    for text in (
        '{"name": "Ann", "age": 5}',
        '{"a": [1, {"name": "weather"}]}',
        "[1, 2]",
        "{",
        '{"name": "weather", "temperature": 5}',
        "[weather]",
        "[now]",
    ):
        for name in ALONE:
            assert said(read(EVERY[name], list(text))) == (text, "", [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": 1}', {"a": 1}), ('"{\\"a\\": 1}"', {"a": 1}), ("null", {}), ('""', {}),
     ('{"a": "</tool_call>"}', {"a": "</tool_call>"}), ('{"a": "x\ny"}', {"a": "x\ny"}),
     ('{"a": True, "b": None}', {"a": True, "b": None}), ('{"a": "it\\\'s"}', {"a": "it's"})],
)  # fmt: skip
def test_arguments_as_models_write_them(arguments: str, expected: Any) -> None:
    for members in (
        f'"name": "now", "arguments": {arguments}',
        f'"parameters": {arguments}, "id": 3, "name": "now"',
    ):
        found = read(EVERY["hermes"], list(f"<tool_call>{{{members}}}</tool_call>"))
        assert said(found) == ("", "", [("now", expected)])
    assert said(read(EVERY["hermes"], ['<tool_call>{"name": "now"}</tool_call>']))[2] == [
        ("now", {})
    ]


@pytest.mark.parametrize("bad", ["5", "[1]", '"text"', "{'a': 1}", '{"a": NaN}', '{"a": 01}',
                                 '{"a"}', '{"a": "\\x"}', "[" * 400])  # fmt: skip
def test_arguments_that_are_none_make_no_call(bad: str) -> None:
    text = f'<tool_call>{{"name": "now", "arguments": {bad}}}</tool_call>'
    content, _, calls = said(read(EVERY["hermes"], list(text)))
    assert content == text and not calls


VALUES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"}, "count": {"type": "integer"}, "some": {"type": "array"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]}, "free": {},
        "one": {"$ref": "#/$defs/One"},
    },
    "$defs": {"One": {"enum": ["1", "2"]}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [("text", "5", "5"), ("text", "  a\n\tb ", "  a\n\tb "), ("text", '{"a": 1}', '{"a": 1}'),
     ("count", "5", 5), ("count", "5.0", 5.0), ("count", "five", "five"),
     ("some", "[1, 2]", [1, 2]),
     ("some", "['a', True]", ["a", True]), ("maybe", "null", None), ("maybe", "5", "5"),
     ("free", "true", True), ("free", "a", "a"), ("one", "1", "1"), ("new", "[", "[")],
)  # fmt: skip
def test_texts_become_what_the_schema_says(name: str, raw: str, expected: Any) -> None:
    glm = f"<tool_call>f<arg_key>{name}</arg_key><arg_value>{raw}</arg_value></tool_call>"
    inner = f"<parameter={name}>\n{raw}\n</parameter>"
    xml = f"<tool_call>\n<function=f>\n{inner}\n</function>\n</tool_call>"
    for made, text in (("glm47", glm), ("qwen_xml", xml)):
        found = said(read(EVERY[made], list(text), tools={"f": VALUES}))
        assert found == ("", "", [("f", {name: expected})])


def test_marks_within_values_and_marks_that_are_forgotten() -> None:
    value = "Write <tool_call>, </arg_value> and </tool_call> so."
    glm = f"<tool_call>f<arg_key>text</arg_key><arg_value>{value}</arg_value></tool_call>"
    assert said(read(EVERY["glm47"], list(glm), tools={"f": VALUES}))[2] == [("f", {"text": value})]
    lost = "<tool_call>\n<function=f>\n<parameter=count>\n1\n<parameter=text>\na\n</function>"
    lost += "\n</tool_call>"
    found = said(read(EVERY["qwen_xml"], list(lost), tools={"f": VALUES}))
    assert found == ("", "", [("f", {"count": 1, "text": "a"})])
    bare = "<function=now>\n</function>\nDone."
    assert said(read(EVERY["qwen_xml"], list(bare))) == ("Done.", "", [("now", {})])


@pytest.mark.parametrize("name", EVERY)
def test_reading_takes_time_by_length_alone(name: str) -> None:
    made = EVERY[name]

    def read_letters(count: int) -> None:
        text = ANSWERS[name].replace("Zürich", "x <y [ " * (count // 8)) + f"{made.mark[:-1]} " * 50
        reader = made.read(ReadingOptions(TOOLS))
        for letter in text:
            reader.push(letter)
        reader.end()

    # Ten times as long; a square would take a hundred times as long.
    assert growth(read_letters, 3_000, 30_000, enough=30) <= 30


@pytest.mark.parametrize("name", EVERY)
def test_characters_of_one_piece_are_copied_a_few_times_at_most(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: those that events are made of, and those that are held anew for a mark put back."""
    made, copied = EVERY[name], [0]
    event, put_back = reader.AnswerEvent, reader.TextBuffer.put_back

    def counted(kind: str, text: str = "") -> AnswerEvent:
        copied[0] += len(text)
        return event(kind, text)

    def watched(buffer: TextBuffer, taken: str) -> None:
        before = buffer._held
        put_back(buffer, taken)
        copied[0] += 0 if buffer._held is before else len(buffer._held)

    monkeypatch.setattr(reader, "AnswerEvent", counted)
    monkeypatch.setattr(reader.TextBuffer, "put_back", watched)
    for part in (made.mark, f"{made.mark}{{", f'{made.mark}{{"name": "now", "arg', "a <", "</"):
        text = part * 2000
        copied[0] = 0
        answer = made.read(ReadingOptions(TOOLS))
        answer.push(text)
        answer.end()
        assert copied[0] <= 3 * len(text), part
    # A value in which much looks like its end.
    text = ANSWERS[name].replace("Zürich", "x</y " * 2000)
    copied[0] = 0
    answer = made.read(ReadingOptions(TOOLS))
    assert answer.push(text) + answer.end()
    assert copied[0] <= 3 * len(text)


# --- reasoning -----------------------------------------------------------------------------------

THINKERS = [name for name in EVERY if name not in ("harmony", "kimi3")]


@pytest.mark.parametrize("name", THINKERS)
def test_thoughts_come_before_calls(name: str) -> None:
    made, marks = EVERY[name], EVERY[name].reasoning or THINK
    thought = f"\nIs it {made.mark}?\n"
    text = f"{marks.begin}{thought}{marks.end}\n\n{ANSWERS[name]}"
    expected = ("" if name in ALONE else "Well.", thought.strip(), EXPECTED)
    assert said(read(made, list(text), reasoning=marks)) == expected
    begun = text.removeprefix(marks.begin)
    assert said(read(made, list(begun), reasoning=marks, inside=True)) == expected
    cut = said(read(made, list(begun[:6]), True, reasoning=marks, inside=True))
    assert cut == ("", begun[:6].strip(), [])
    raw = said(read(made, list(text), reasoning=marks, raw=True))
    assert raw[1] == "" and raw[0].startswith(marks.begin + thought + marks.end)
    assert raw[2] == EXPECTED


def test_harmonys_channels() -> None:
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant" + ANSWERS["harmony"]
    marks = KNOWN["harmony"].reasoning
    assert said(read(KNOWN["harmony"], list(text), reasoning=marks)) == ("Well.", "Hm.", EXPECTED)
    final = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    found = said(read(KNOWN["harmony"], list(final), reasoning=marks, tools={}))
    assert found == ("Yes.", "Hm.", [])


# --- forms that are forced -----------------------------------------------------------------------


class Letters:
    """A vocabulary of bytes and special tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, special: Sequence[str]) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [one.encode() for one in special]
        self.tokens.append(b"end")
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


def written(grammar: str, letters: Letters, chance: random.Random, hints: Sequence[str]) -> str:
    """A text of a grammar: any letter that may come, often one that leads to its end."""
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer(letters),
        llguidance.LLMatcher.grammar_from_lark(schema.within(grammar)[0]),
        log_level=0,
    )
    assert not matcher.get_error(), matcher.get_error()
    out: list[int] = []
    plan: Iterator[int] = iter(())
    while len(out) < 4000:
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(len(letters.tokens)) if mask[i >> 3] >> (i & 7) & 1]
        assert allowed, bytes(one for one in out if one < 256)[-200:]
        token = next(plan, -1)
        if token not in allowed:
            plan = iter(())
            if letters.eos_token_id in allowed and chance.random() < 0.3:
                break
            hint = _ids(chance.choice(hints), letters)
            ends = [i for i in allowed if i < 256 and i in b'"}])<>\n']
            easy = [i for i in allowed if i < 256 and i in b"abcf19 {:,"]
            if hint[0] in allowed and chance.random() < 0.3:
                token, plan = hint[0], iter(hint[1:])
            else:
                token = chance.choice(ends if ends and chance.random() < 0.4 else easy or allowed)
        if token == letters.eos_token_id:
            break
        assert matcher.try_consume_tokens([token]) == 1
        out.append(token)
    else:
        pytest.fail(f"no end: {_text(out, letters)[-200:]}")
    return _text(out, letters)


def _ids(text: str, letters: Letters) -> list[int]:
    out = []
    special = {letters.tokens[i].decode(): i for i in letters.special_token_ids[:-1]}
    while text:
        found = next((one for one in special if text.startswith(one)), None)
        out += [special[found]] if found else text[0].encode()
        text = text[len(found or text[0]) :]
    return out


def _text(ids: Sequence[int], letters: Letters) -> str:
    return b"".join(letters.tokens[one] for one in ids).decode(errors="replace")


MANY: dict[str, Any] = {
    **TOOLS,
    "all": {
        "type": "object",
        "properties": {
            "text": {"type": "string", "pattern": "^[ab]{1,3}$"},
            "any": {},
            "list": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
            "deep": {
                "type": "object", "properties": {"n": {"type": ["number", "null"]}},
                "required": ["n"], "additionalProperties": False,
            },
            "either": {"anyOf": [{"enum": ["x", 2]}, {"type": "boolean"}]},
            "named": {"$ref": "#/$defs/Named"},
        },
        "required": ["deep", "named", "either"],
        "additionalProperties": False,
        "$defs": {"Named": {"type": "string", "minLength": 1, "maxLength": 4}},
    },
}  # fmt: skip


BAR = "\uff5cDSML\uff5c"
CLOSES = {
    "qwen_xml": "\n</parameter>", "glm": "</arg_value>", "glm47": "</arg_value>",
    "deepseek32": f"</{BAR}parameter>", "deepseek4": f"</{BAR}parameter>",
    "deepseek41": f"</{BAR} parameter>", "gemma": '<|"|>', "functiongemma": "<escape>",
    "kimi3": "<|close|>argument<|sep|>", "harmony": "<|end|>",
}  # fmt: skip


@pytest.mark.parametrize("special", [False, True], ids=["texts", "special tokens"])
@pytest.mark.parametrize("name", EVERY)
def test_a_call_that_is_forced_is_a_call(name: str, special: bool) -> None:
    """Random texts of the grammar: each reads as calls whose arguments are of the schema."""
    made = EVERY[name]
    marks = [one for one in made.marks if not one.startswith(("<function", "</", "<param"))]
    marks += ["<|end|>"] if name == "harmony" and "<|end|>" not in marks else []
    letters = Letters(marks if special else ())
    ids = {one: 256 + i for i, one in enumerate(marks if special else ())}
    hints = [made.mark, CLOSES.get(name, '"'), *(["<|close|>response<|sep|>"] * (name == "kimi3"))]
    for seed in range(6):
        forced, several, inside = seed < 4, seed % 2 == 1, seed in (1, 5)
        reasoning = (made.reasoning or THINK) if inside else None
        wanted = AnswerOptions(MANY, forced, several, reasoning, inside)
        grammar = made.grammar(GrammarRules(ids), wanted)
        ends = [*hints, *([reasoning.end] if reasoning else [])]
        text = written(grammar, letters, random.Random(seed), ends)
        found = read(made, [text], tools=MANY, reasoning=reasoning, inside=inside)
        assert found.calls or not forced, text
        assert several or len(found.calls) < 2, text
        for call in found.calls:
            jsonschema.validate(json.loads(call.arguments), MANY[call.name])


@pytest.mark.parametrize("special", [False, True], ids=["texts", "special tokens"])
@pytest.mark.parametrize("name", THINKERS)
def test_a_thought_of_a_call_begins_none(name: str, special: bool) -> None:
    """Under "auto" thoughts may hold what outside of them would have to become a call."""
    made, marks = EVERY[name], EVERY[name].reasoning or THINK
    listed = [marks.begin, marks.end] if special else []
    letters, ids = Letters(listed), {one: 256 + i for i, one in enumerate(listed)}
    mark = '{"name": "' if name == "llama" else "[now(" if name == "pythonic" else made.mark
    for inside, begin in ((False, marks.begin), (False, f"\n{marks.begin}"), (True, "")):
        grammar = made.grammar(GrammarRules(ids), AnswerOptions(TOOLS, False, True, marks, inside))
        for text, whole in (
            (f"{begin}Is it {mark} x?{marks.end}Yes.", True),
            (f"{begin}Is it{marks.end}{mark}!", False),
            (f"{begin}Is it{marks.end}Yes.", True),
            (f"{'' if not inside else 'a' + marks.end}{mark}!", False),
        ):
            matcher = llguidance.LLMatcher(
                llguidance.LLTokenizer(letters),
                llguidance.LLMatcher.grammar_from_lark(schema.within(grammar)[0]),
                log_level=0,
            )
            tokens = _ids(text, letters)
            assert (matcher.try_consume_tokens(tokens) == len(tokens)) == whole, (text, grammar)


def test_what_a_form_cannot_say_is_refused() -> None:
    strict = {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}
    for name in ("glm", "qwen_xml", "gemma", "deepseek32", "kimi3"):
        with pytest.raises(ValueError, match="cannot be forced"):
            EVERY[name].grammar(GrammarRules({}), AnswerOptions({"f": strict}, True, True))
    closed = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(ValueError, match="uniqueItems"):
        EVERY["pythonic"].grammar(GrammarRules({}), AnswerOptions({"f": closed}, True, True))
    with pytest.raises(ValueError, match="object"):
        EVERY["hermes"].grammar(
            GrammarRules({}), AnswerOptions({"f": {"type": "array"}}, True, True)
        )


# --- what a request says -------------------------------------------------------------------------


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def test_choices_of_tools() -> None:
    tools = [tool("a", parameters={"type": "object"}), tool("b")]
    assert not chosen(tools, "none", True).tools and not chosen(None, None, True).tools
    auto = chosen(tools, None, False)
    assert [*auto.tools] == ["a", "b"] and not auto.forced and not auto.several
    assert chosen(tools, "required", True).forced
    one = chosen(tools, {"type": "function", "function": {"name": "b"}}, True)
    assert [*one.tools] == ["b"] and one.forced and one.named
    for listed in (
        {"mode": "required", "tools": [tool("b")]},
        {"mode": "auto", "tools": [{"type": "function", "name": "b"}]},
    ):
        for sent in (
            {"type": "allowed_tools", "allowed_tools": listed},
            {"type": "allowed_tools", **listed},
        ):
            found = chosen(tools, sent, True)
            assert [*found.tools] == ["b"] and found.forced == (listed["mode"] == "required")


def test_a_tool_of_no_parameters_is_called_with_none() -> None:
    """`properties: {}` names all there are; an object without `properties` may have any."""
    made = EVERY["plain"]
    for parameters, legal in (
        ({"type": "object", "properties": {}}, False),
        ({"type": "object"}, True),
        ({"type": "object", "properties": {}, "additionalProperties": True}, True),
    ):
        grammar = made.grammar(GrammarRules({}), AnswerOptions({"f": parameters}, True, False))
        text = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        letters = Letters(())
        matcher = llguidance.LLMatcher(
            llguidance.LLTokenizer(letters),
            llguidance.LLMatcher.grammar_from_lark(schema.within(grammar)[0]),
            log_level=0,
        )
        tokens = _ids(text, letters)
        assert (matcher.try_consume_tokens(tokens) == len(tokens)) == legal, parameters


def test_strict_parameters_are_closed() -> None:
    loose = {"type": "object", "properties": {"x": {"type": "integer"}}}
    (found,) = chosen([tool("a", parameters=loose, strict=True)], None, True).tools.values()
    assert found["required"] == ["x"] and found["additionalProperties"] is False
    with pytest.raises(ValueError, match="tools: the parameters of a: strict"):
        chosen(
            [tool("a", parameters={"type": "object", "properties": {"x": {}}}, strict=True)],
            None,
            True,
        )


@pytest.mark.parametrize(
    ("tools", "choice", "told"),
    [([{"type": "custom", "custom": {"name": "x"}}], None, "tools must be functions"),
     ([tool("a b")], None, "a name has"), ([tool("a"), tool("a")], None, "two have one name"),
     ([tool("a", parameters=[])], None, "JSON schema"), ([], "required", "tool_choice needs tools"),
     ([tool("a")], "any", "tool_choice must be"), ([tool("a")], 5, "tool_choice must be"),
     ([tool("a")], {"type": "function", "function": {"name": "c"}}, "none of the tools: a"),
     ([tool("a")], {"type": "allowed_tools", "mode": "x", "tools": []}, "needs a mode")],
)  # fmt: skip
def test_what_is_no_choice_is_told_so(tools: Any, choice: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        chosen(tools, choice, True)
