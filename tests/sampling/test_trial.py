"""No grammar takes the process with it, and what a schema asks for is what comes, to the digit."""

from __future__ import annotations

import json
import os
import random
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from serving import served

import fastgen
from fastgen.sampling import constraint, schema, trial_process
from fastgen.sampling.trial import Exceeded, Limits, Trial
from fastgen.serve.front import MOST_GRAMMARS

PRIMES = {"type": "integer", "multipleOf": 223092870}  # llguidance counts modulo it
RAW = {"const": -(2**63)}
# As llguidance takes them, past our own checks of what a schema says.
KILLERS: dict[str, tuple[Any, Limits, str]] = {
    "an integer": (RAW, Limits(2), "1 MB of stack"),
    "one near it": ({"enum": [1, {"a": [-(2**63) + 512]}]}, Limits(2), "1 MB of stack"),
    "bounds": (
        {"type": "integer", "minimum": -(2**63), "maximum": -(2**63) + 5}, Limits(2), "stack",
    ),
    "in Lark": ('start: %json {"const": -9223372036854775808}', Limits(2), "1 MB of stack"),
    "primes": (PRIMES, Limits(0.2), "more than 0.2 seconds"),
    "all of primes": (
        {"allOf": [{"multipleOf": one} for one in (2, 3, 5, 7, 11, 13, 17, 19, 23)]},
        Limits(0.2), "more than 0.2 seconds",
    ),
    "memory": (PRIMES, Limits(20, 12 << 20), "more than 12 MB of memory"),
}  # fmt: skip

few = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def demo() -> fastgen.CausalLM:
    return fastgen.load()


@pytest.fixture(scope="module")
def letters() -> trial_process.Spellings:
    """A vocabulary of the bytes alone."""
    return trial_process.Spellings([*(bytes([b]) for b in range(256)), b"end"], [256])


def written(grammar: Any) -> str:
    if isinstance(grammar, str):
        return LLMatcher.grammar_from_lark(grammar)
    return LLMatcher.grammar_from_json_schema(json.dumps(grammar), defaults=constraint.JSON)


# -- The process that may die ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=["forks", "cannot fork"])
def tried(request: pytest.FixtureRequest) -> Iterator[Trial]:
    made = Trial() if request.param == "forks" else Trial(grace=0.1)
    if request.param == "cannot fork":
        program = "import os, runpy; del os.fork; runpy.run_path({!r}, run_name='__main__')"
        program = program.format(trial_process.__file__)
        made.command = [sys.executable, "-I", "-S", "-c", program]
    yield made
    made.close()


@pytest.mark.parametrize("killer", KILLERS)
def test_what_kills_is_an_error_that_says_which_limit(tried, letters, killer):
    grammar, limits, words = KILLERS[killer]
    # Then the process itself dies, and another one is started; and who waits keeps the time.
    alone = "-c" in tried.command
    with pytest.raises(Exceeded, match="ends its process" if alone and "stack" in words else words):
        tried.run(letters, written(grammar), limits, constraint.LIMITS)
    after = tried.pid
    good = tried.run(letters, written({"enum": ["a", 2**40]}), Limits(), constraint.LIMITS)
    assert "error" not in good and good["grown"] < 64 << 20
    assert alone or tried.pid == after  # the vocabulary outlives what it was tried with


def test_what_llguidance_says_comes_back(tried, letters):
    said = tried.run(letters, written("start: x"), Limits(), constraint.LIMITS)
    assert 'unknown name: "x"' in said["error"]


def test_a_process_that_was_ended_is_started_again(tried, letters):
    fine = written({"type": "boolean"})
    tried.run(letters, fine, Limits(), constraint.LIMITS)
    os.kill(tried.pid, 9)
    tried._process.wait()
    assert "error" not in tried.run(letters, fine, Limits(), constraint.LIMITS)
    other = trial_process.Spellings([b"1", b"2", b"end"], [2])
    assert "error" not in tried.run(other, written({"const": 12}), Limits(), constraint.LIMITS)
    assert "error" not in tried.run(letters, fine, Limits(), constraint.LIMITS)


def test_a_fork_of_ours_does_not_talk_to_our_process(letters):
    made = Trial()
    made.run(letters, written({}), Limits(), constraint.LIMITS)
    ours, _ = made._process, made._leave()
    made.run(letters, written({}), Limits(), constraint.LIMITS)
    assert made.pid != ours.pid and ours.poll() is None
    made.close()
    made._process = ours
    made.close()


def test_no_process_is_an_error(letters):
    made = Trial()
    made.command = ["/nowhere/python"]
    with pytest.raises(ValueError, match="no process for it can be started"):
        made.run(letters, written({}), Limits(), constraint.LIMITS)


def test_limits_are_positive():
    for wrong in ((0,), (float("nan"),), (1, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            Limits(*wrong)


def count_trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    plain = Trial.run

    def run(self: Trial, vocabulary: Any, grammar: str, *args: Any) -> Any:
        seen.append(grammar)
        return plain(self, vocabulary, grammar, *args)

    monkeypatch.setattr(Trial, "run", run)
    return seen


def test_a_grammar_is_tried_once(demo, monkeypatch):
    known, trials = constraint.of(demo.tokenizer), count_trials(monkeypatch)
    monkeypatch.setattr(known, "limits", Limits(0.2))
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(demo.call, "x", regex="once[0-9]", max_new_tokens=3) for _ in range(4)]
        assert len({id(one.result().request.constraint._compiled) for one in made}) == 1
    assert len(trials) == 1
    for _ in range(3):  # nor is one that was refused
        with pytest.raises(ValueError, match="json_schema cannot be used: compiling it takes more"):
            demo.call("x", json_schema=PRIMES, max_new_tokens=3)
    assert len(trials) == 2


def test_an_automaton_that_is_full_is_not_used_again(demo):
    """It is shared by all texts of a grammar and only grows."""
    tokenizer = fastgen.Tokenizer.of(demo.tokenizer.backend)
    few, size = {"max_lexer_states": 2000}, demo.tokenizer.backend.get_vocab_size()
    vocabulary = constraint.Vocabulary(tokenizer, size, constraint.LIMITS | few)

    def begun(seed: int) -> bool:
        compiled = vocabulary.compiled("regex", ".*a.{300}", Limits())
        form = constraint.Constraint("regex", compiled, vocabulary._writer.eos_token_id, (), 1)
        text, choice = [], random.Random(seed)
        for _ in range(10):
            text += tokenizer.encode(choice.choice("ab"), add_special_tokens=False)
            try:
                form.complete(np.array(text))
            except ValueError as error:
                assert "too many states" in str(error)
                return False
        return True

    found = [begun(seed) for seed in range(40)]
    full = found.index(False)
    assert found[full + 1]


# -- What a schema says is what is written --------------------------------------------------------


def texts(model: fastgen.CausalLM, asked: Any, count: int = 3) -> list[str]:
    """Some texts of a schema, of tokens by chance; those that come to an end."""
    tokenizer, size = model.tokenizer, model.model.info.vocab_size
    knob = fastgen.Params(json_schema=asked)
    start = constraint.build(knob, tokenizer, size, 1)._compiled.start
    found = []
    for seed in range(count):
        matcher, ids, choice = start.deep_copy(), [], random.Random(seed)
        for _ in range(60):
            mask = matcher.compute_bitmask()
            if mask[size // 8] >> size % 8 & 1:  # the end of text may come
                found.append(b"".join(tokenizer.spelling(i) or b"" for i in ids).decode())
                break
            token = trial_process._allowed(mask, choice)
            if token is None or token > size or not matcher.try_consume_tokens([token]):
                break
            ids.append(token)
    return found


ODD = st.one_of(
    st.integers(-(2**65), 2**65),
    st.builds(
        lambda sign, power, more: sign * 2**power + more,
        st.sampled_from([-1, 1]),
        st.integers(50, 65),
        st.integers(-1030, 1030),
    ),
    st.sampled_from([10**18, -(10**18), 10**30, 0, 1234567890123456789]),
)


@few
@given(
    number=st.one_of(ODD, st.floats(allow_nan=False, allow_infinity=False)), nested=st.booleans()
)
@example(number=1801439850948199.0, nested=False)
def test_a_number_is_written_as_it_is_or_refused(demo, number, nested):
    asked = {"enum": [{"a": [number]}]} if nested else {"const": number}
    try:
        found = texts(demo, asked, 1)
    except ValueError as error:
        assert "digits cannot all be written" in str(error)
        assert abs(number) > 2**53 or not schema._is_exact(number)
        return
    for text in found:
        value = json.loads(text, parse_float=Decimal)
        value = value["a"][0] if nested else value
        assert value == number or value == Decimal(repr(number))
    assert len(found) == 1 or len(repr(number)) > 20


BOUNDS = st.fixed_dictionaries(
    {"type": st.sampled_from(["integer", "number", ["integer", "null"]])},
    optional={
        name: st.one_of(ODD, st.floats(-1e20, 1e20), st.integers(-9, 9))
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    },
)


@few
@given(asked=BOUNDS)
def test_numbers_are_within_their_bounds_or_refused(demo, asked):
    try:
        found = texts(demo, asked)
    except ValueError as error:
        assert "json_schema cannot be used" in str(error)
        return
    for text in found:
        value = json.loads(text, parse_float=Decimal)
        if value is None:
            assert "null" in asked["type"]
            continue
        for name, holds in (
            ("minimum", Decimal.__ge__),
            ("maximum", Decimal.__le__),
            ("exclusiveMinimum", Decimal.__gt__),
            ("exclusiveMaximum", Decimal.__lt__),
        ):
            if name in asked:
                assert holds(Decimal(value), Decimal(repr(asked[name]))), (text, asked)


@pytest.mark.parametrize(
    ("bounds", "only"),
    [
        ({"minimum": 2**53 + 1, "maximum": 2**53 + 3}, 2**53 + 2),
        ({"exclusiveMinimum": 2**53, "maximum": 2**53 + 2}, 2**53 + 2),
        ({"minimum": 2**53, "exclusiveMinimum": True, "maximum": 2**53 + 3}, 2**53 + 2),
        ({"minimum": 2**63 - 1024, "maximum": 2**63 - 1}, 2**63 - 1024),
        ({"minimum": 2**63 - 1024}, 2**63 - 1024),
        ({"minimum": -(2**64), "maximum": -(2**63) + 1024}, -(2**63) + 1024),
    ],
)
def test_bounds_are_rounded_inwards(demo, bounds, only):
    assert set(texts(demo, {"type": "integer", **bounds})) == {str(only)}


@pytest.mark.parametrize("kind", ["integer", "number"])
def test_the_range_of_int64_is_no_error(kind):
    own = {"type": kind, "format": "int64", "minimum": -(2**63), "maximum": 2**63 - 1}
    text, notes = schema.prepared(json.dumps(own))
    assert notes == []
    assert abs(json.loads(text)["minimum"] / 2**63 + 1) < 1e-8
    _, notes = schema.prepared(json.dumps({"type": kind, "minimum": 0, "maximum": 2**64 - 1}))
    assert notes == ["maximum 18446744073709551615 is beyond 2**63: numbers end there"]


# -- What only annotates --------------------------------------------------------------------------

OTHERS = (
    "password", "path", "binary", "regex", "uri-reference", "file-path", "directory-path", "byte",
    "iri", "idn-email", "json-pointer", "uri-template", "phone", "a format that nobody knows",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(schema.FORMATS | {*OTHERS}))
def test_formats_that_llguidance_does_not_know_are_told_about(demo, name):
    """This fails once it learns another one, which belongs to FORMATS then."""
    raw = LLMatcher.validate_grammar(written({"type": "string", "format": name}))
    assert ("Unknown format" in raw) == (name in OTHERS)
    made = demo.call("x", json_schema={"type": "string", "format": name}, max_new_tokens=3)
    told = (f"format {name} is an annotation: texts are not held to it",) * (name in OTHERS)
    assert made.notes == told


def test_the_caller_is_warned(demo):
    asked = {"type": "object", "properties": {"p": {"type": "string", "format": "path"}}}
    with pytest.warns(UserWarning, match="format path is an annotation"):
        demo.complete("x", json_schema=asked, max_new_tokens=2)
    with pytest.warns(UserWarning, match="format path is an annotation"):
        demo.generate([5], json_schema=asked, max_new_tokens=2)
    with pytest.warns(UserWarning, match="format path is an annotation"):
        demo.generate([5], grammar=f"start: %json {json.dumps(asked)}", max_new_tokens=2)


IDLE: list[dict[str, Any]] = [
    {"uniqueItems": False}, {"minContains": 0}, {"maxContains": 3}, {"not": False}, {"if": {}},
    {"then": {"type": "null"}}, {"propertyNames": True}, {"unevaluatedProperties": True},
    {"dependentRequired": {}}, {"minProperties": 0}, {"format": "int64"}, {"nullable": True},
    {"deprecated": True}, {"example": 3}, {"discriminator": {"propertyName": "x"}},
]  # fmt: skip


@pytest.mark.parametrize("idle", IDLE, ids=str)
def test_keywords_that_rule_nothing_out_change_nothing(demo, idle):
    asked = {"type": ["integer", "array"], "items": {"type": "boolean"}, "maxItems": 2}
    made = demo.call(
        "x", json_schema={"$defs": {"a": asked | idle}, "$ref": "#/$defs/a"}, max_new_tokens=3
    )
    assert made.notes == ()
    if "uniqueItems" in idle:
        with pytest.raises(ValueError, match='Unimplemented keys: \\["uniqueItems"\\]'):
            demo.call("x", json_schema={"type": "array", "uniqueItems": True}, max_new_tokens=3)


def test_names_and_values_are_no_keywords():
    own = {
        "type": "object",
        "properties": {"format": {"const": {"format": "path", "uniqueItems": False}}},
        "required": ["format"],
        "default": {"format": "path"},
    }
    assert schema.prepared(json.dumps(own)) == (json.dumps(own), [])


LOOP = "leads back to itself"
WRONG: list[tuple[Any, str]] = [
    ({"$ref": "#"}, LOOP),
    ({"allOf": [{"$ref": "#"}]}, LOOP),
    ({"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}, LOOP),
    ({"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}, LOOP),
    ({"$ref": "#/x/y~1z", "x": {"y/z": {"$ref": "#/x/y~1z"}}}, LOOP),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, LOOP),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, LOOP),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "options of oneOf overlap"),
    ({"name": "x", "strict": True, "schema": {"type": "object"}}, "OpenAI's wrapper"),
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}, "OpenAI's wrapper"),
    ({"type": "integer", "allOf": [{"multipleOf": 65536}, {"multipleOf": 65537}]}, "multipleOf"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "words"), WRONG, ids=lambda one: str(one)[:40])
def test_what_cannot_be_says_why(demo, asked, words):
    with pytest.raises(ValueError, match="json_schema cannot be used: .*" + words):
        demo.call("x", json_schema=asked, max_new_tokens=3)


def test_what_ends_may_refer_to_itself(demo):
    tree = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
            "required": ["next"], "additionalProperties": False}  # fmt: skip
    for text in texts(demo, tree):
        jsonschema.validate(json.loads(text), tree)
    demo.call("x", json_schema={"type": "array", "items": {"$ref": "#"}}, max_new_tokens=3)


# -- The service ----------------------------------------------------------------------------------

STRICT = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0},
                   "b": {"anyOf": [{"$ref": "#/$defs/c"}, {"type": "null"}]}},
    "$defs": {"c": {"type": "object", "properties": {"d": {"enum": ["x", "y"]}}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def url(demo) -> Iterator[str]:
    with served(demo, grammars=Limits(0.3, 64 << 20)) as address:
        yield address
    constraint.of(demo.tokenizer).limits = Limits()


def post(url: str, **body: Any) -> tuple[int, str]:
    given = {"prompt": "x", "max_tokens": 30, "temperature": 0, **body}
    kind = {"Content-Type": "application/json"}
    asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(given).encode(), kind)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def said(answer: tuple[int, str]) -> str:
    """The text, or the error."""
    status, body = answer
    found = json.loads(body)
    return found["choices"][0]["text"] if status == 200 else found["error"]["message"]


def test_strangers_grammars_end_nothing_but_their_own_requests(url, demo):
    expected = demo.complete("x = ", max_new_tokens=60, eos_token_id=None)
    asked = {"prompt": "x = ", "max_tokens": 60, "eos_token_id": None, "temperature": 0}
    killers = [
        {"json_schema": PRIMES}, {"json_schema": RAW}, {"regex": "(" * 3000 + "a" + ")" * 3000},
        {"grammar": "start: %json " + json.dumps(RAW)},
        {"json_schema": {"type": "integer", "multipleOf": 223092870 * 2}},
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        wrong = [pool.submit(post, url, **one) for one in killers]
        beside = [pool.submit(post, url, **asked) for _ in range(3)]
        known = pool.submit(post, url, json_schema={"const": 7})
        assert urllib.request.urlopen(f"{url}/health", timeout=60).status == 200
        for one in beside:
            assert said(one.result()) == expected
        assert said(known.result()) == "7"
        for one in wrong:
            assert one.result()[0] == 400, one.result()
            assert "cannot be used" in said(one.result())
    # Whichever comes first.
    assert re.search(r"more than (0\.3 seconds|64 MB of memory)", said(wrong[0].result()))


def test_only_so_many_new_grammars_wait(url, monkeypatch):
    go, plain = threading.Event(), Trial.run

    def slow(self: Trial, *args: Any) -> Any:
        assert go.wait(30)
        return plain(self, *args)

    assert post(url, regex="known")[0] == 200
    monkeypatch.setattr(Trial, "run", slow)
    with ThreadPoolExecutor(MOST_GRAMMARS + 1) as pool:
        calls = [
            pool.submit(post, url, regex=f"waits{i}[a-z]", max_tokens=9)
            for i in range(MOST_GRAMMARS + 1)
        ]
        try:
            (refused,) = wait(calls, 20, return_when=FIRST_COMPLETED).done
            status, body = refused.result()
            assert status == 429 and "queue_full" in body
            assert post(url, regex="known")[0] == 200  # and what is known does not wait
            assert [call for call in calls if call.done()] == [refused]
        finally:
            go.set()
        assert all(call.result()[0] == 200 for call in calls if call is not refused)


def test_the_answer_says_what_it_is_not_held_to(url):
    asked = {"type": "string", "format": "path", "maxLength": 3}
    told = ["format path is an annotation: texts are not held to it"]
    assert json.loads(post(url, json_schema=asked)[1])["warnings"] == told
    assert "warnings" not in post(url, json_schema={"const": 1})[1]
    lines = post(url, json_schema=asked, stream=True)[1].split("\n\n")
    chunks = [json.loads(one[6:]) for one in lines if one.startswith("data: {")]
    assert [chunk.get("warnings") for chunk in chunks] == [told] + [None] * (len(chunks) - 1)


def test_strict_is_openais():
    closed = schema.strict(STRICT)
    assert closed["required"] == ["a", "b"] and closed["additionalProperties"] is False
    assert closed["$defs"]["c"]["required"] == ["d"]
    assert "required" not in STRICT
    for wrong in (
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"a": {}}},
        {"type": "object", "patternProperties": {"a": {"type": "null"}}},
        {"allOf": [{"type": "object"}, {"type": "object"}]},
    ):
        with pytest.raises(ValueError, match="strict: "):
            schema.strict(wrong)


@settings(max_examples=10, deadline=None)
@given(st.sets(st.sampled_from("abcd"), min_size=1), st.sets(st.sampled_from("abcd")))
def test_a_strict_text_has_what_the_schema_names_and_nothing_else(demo, names, required):
    asked = {"type": "object", "properties": {one: {"type": "boolean"} for one in names},
             "required": sorted(names & required)}  # fmt: skip
    found = texts(demo, schema.strict(asked), 2)
    assert found and all(json.loads(text).keys() == names for text in found)
