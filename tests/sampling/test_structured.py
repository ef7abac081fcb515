"""The text has the form that `json_schema`, `regex` and `grammar` ask for, in every search."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer
from tokenizers_made import byte_level, llama, metaspace, prefixed, wordpiece
from transformers import PreTrainedTokenizerFast

import fastgen
from fastgen import commands
from fastgen.engine import batch, prepare
from fastgen.engine.model import Model
from fastgen.engine.schedule import Scheduler
from fastgen.export import export
from fastgen.sampling import constraint, trial_process
from fastgen.store import hub
from fastgen.text.tokenizer import TextStream

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
SUMS = """
start: sum
sum: term ("+" term)*
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,2}/
"""
PROMPTS = ["Return", "A much longer prompt, of a sentence:", "x = "]

few = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def demo() -> fastgen.CausalLM:
    return fastgen.load()


# -- What is asked for is what comes --------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 7, "top_k": 0, "temperature": 1.5},
    "several": {"do_sample": True, "seed": 3, "num_return_sequences": 3, "top_p": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "seed": 5, "num_return_sequences": 2},
    "diverse beams": {
        "num_beams": 4,
        "num_beam_groups": 2,
        "diversity_penalty": 1.0,
        "num_return_sequences": 4,
    },
    "guesses": {"prompt_lookup_num_tokens": 4},
    "guidance": {"guidance_scale": 1.4},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "do_sample": True},
}

SIMPLE = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, more: {"type": "integer", "minimum": low, "maximum": low + more},
        st.integers(-50, 50),
        st.integers(0, 100),
    ),
    st.builds(lambda most: {"type": "string", "maxLength": most}, st.integers(0, 6)),
    st.sampled_from(["[a-c]{2,4}", "^x-[0-9]+y?$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern, "maxLength": 8}
    ),
    st.sampled_from(["date", "time", "uuid"]).map(lambda f: {"type": "string", "format": f}),
    st.lists(
        st.one_of(st.none(), st.integers(-9, 9), st.text('aé🙂 "\\/\n', max_size=4)),
        min_size=1,
        max_size=3,
        unique_by=repr,
    ).map(lambda some: {"enum": some}),
)


def _object(properties: dict[str, Any], required: bool) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties] if required else [],
        "additionalProperties": False,
    }


SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner),
        st.builds(
            _object,
            st.dictionaries(st.text('ab_é" ', min_size=1, max_size=5), inner, max_size=3),
            st.booleans(),
        ),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    ),
    max_leaves=4,
)


def answers(model: fastgen.CausalLM, prompt: Any, **knobs: Any) -> list[tuple[str, str]]:
    """The text of each row and why it ended."""
    rows: dict[int, list[fastgen.Token]] = {}
    for token in model.stream(prompt, **{"max_new_tokens": 150, **knobs}):
        rows.setdefault(token.row, []).append(token)
    return [
        ("".join(token.text for token in row), str(row[-1].finish_reason))
        for _, row in sorted(rows.items())
    ]


def begins(written: str, text: str) -> bool:
    """True where some text of a grammar of llguidance begins with `text`, by its bytes alone."""
    matcher = LLMatcher(LLTokenizer("byte"), written, log_level=0)
    raw = text.encode()
    return matcher.try_consume_tokens(list(raw)) == len(raw)


@pytest.mark.parametrize("mode", MODES)
@few
@given(schema=SCHEMAS, prompt=st.sampled_from(PROMPTS))
def test_json_is_of_its_schema(demo, mode, schema, prompt):
    found = answers(demo, prompt, json_schema=schema, **MODES[mode])
    assert len(found) <= MODES[mode].get("num_return_sequences", 1)
    for text, reason in found:
        if reason in ("eos", "grammar"):
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        else:
            assert reason == "length"
            written = LLMatcher.grammar_from_json_schema(schema, defaults=constraint.JSON)
            assert begins(written, text.rstrip("\ufffd"))


PARTS = st.one_of(
    st.text("abc 0", min_size=1, max_size=3),
    st.sampled_from(["[a-f]", "[^a-z]", r"\d", r"\w", "é", r"\.", "."]),
)
REGEXES = st.recursive(
    PARTS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{1,3}", "{2}"])).map(
            lambda two: f"({two[0]}){two[1]}"
        ),
    ),
    max_leaves=5,
)


@pytest.mark.parametrize("mode", ["greedy", "sampled", "beams", "beam sampling", "guesses"])
@few
@given(regex=REGEXES, prompt=st.sampled_from(PROMPTS))
def test_a_text_is_what_its_regular_expression_matches(demo, mode, regex, prompt):
    for text, reason in answers(demo, prompt, regex=regex, **MODES[mode]):
        if reason in ("eos", "grammar"):
            assert re.fullmatch(regex, text), (regex, text)
        else:
            assert reason == "length" and begins(LLMatcher.grammar_from_regex(regex), text)


@pytest.mark.parametrize("mode", MODES)
def test_a_text_is_one_of_its_grammar(demo, mode):
    for text, reason in answers(demo, PROMPTS, grammar=SUMS, **MODES[mode]):
        assert re.fullmatch(r"[0-9+()]+", text)
        if reason == "eos":
            assert isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)  # digits, + and ( )
        else:
            assert reason == "length" and begins(LLMatcher.grammar_from_lark(SUMS), text)


def test_any_json(demo):
    for schema in ({}, True, "true", " {} "):
        for text, reason in answers(demo, PROMPTS, json_schema=schema, max_new_tokens=30):
            if reason == "eos":
                json.loads(text)


def test_the_layout_of_json_is_that_of_json_dumps_unless_the_schema_says_otherwise(demo):
    ((text, _),) = answers(demo, "x", json_schema=PERSON)
    assert text == json.dumps(json.loads(text), ensure_ascii=False)
    compact = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
    ((text, _),) = answers(demo, "x", json_schema={**PERSON, "x-guidance": compact})
    assert text == json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))


# -- Rows are their own ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [{"json_schema": PERSON}, {"regex": "[a-z]{3,9}( [0-9]{2}){2}"}, {"grammar": SUMS}]
)
def test_a_row_of_several_is_the_row_alone(demo, form):
    for knobs in ({}, {"do_sample": True, "top_k": 0}):
        seeds = (1, 2, 3) if knobs else None
        together = demo.stream(PROMPTS, max_new_tokens=40, seed=seeds, **knobs, **form)
        rows: list[list[int]] = [[], [], []]
        for token in together:
            rows[token.row].append(token.id)
        for row, prompt in enumerate(PROMPTS):
            seed = seeds and seeds[row]
            alone = demo.stream(prompt, max_new_tokens=40, seed=seed, **knobs, **form)
            assert [token.id for token in alone] == rows[row]


def test_beams_of_several_prompts_are_those_alone(demo):
    knobs: dict[str, Any] = {"num_beams": 3, "json_schema": PERSON}
    together = answers(demo, PROMPTS, **knobs)
    assert together == [answers(demo, prompt, **knobs)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def exact(tmp_path_factory) -> fastgen.CausalLM:
    """A random model in float32 with the demo's tokenizer.

    Several tokens of a row are rounded otherwise than one. In float32 that stays rounding; in int8
    a code beside it changes, and one sampled token in some hundred with it.
    """
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(hub.DEMO / "tokenizer.json"))
    ids = fastgen.load().generation_config.to_dict()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    model = tiny.build("llama", **sizes, eos_token_id=ids["eos_token_id"])
    place = tmp_path_factory.mktemp("exact") / "model"
    return fastgen.load(export(model, place, tokenizer=tokenizer, precision="fp32", progress=None))


@pytest.mark.parametrize("knobs", [{}, {"do_sample": True, "seed": 11, "top_k": 0}])
def test_guesses_change_nothing(exact, always_guess, knobs):
    for form in ({"json_schema": PERSON}, {"regex": "(abc, ){3,5}[a-z]+!"}, {"grammar": SUMS}):
        plain = answers(exact, PROMPTS, **form, **knobs)
        assert answers(exact, PROMPTS, **form, **knobs, prompt_lookup_num_tokens=5) == plain
        assert answers(exact, PROMPTS, **form, **knobs, assistant_model=exact) == plain


def test_calls_side_by_side_share_nothing(demo):
    asked: list[dict[str, Any]] = [
        {"json_schema": PERSON},
        {},
        {"json_schema": PERSON, "do_sample": True, "seed": 3},
        {"regex": "[a-z]{2,8} [0-9]{4}"},
        {"json_schema": PERSON, "num_beams": 2},
        {"grammar": SUMS, "eos_token_id": None},
        {"regex": "a", "suppress_tokens": [demo.tokenizer.index("a")]},
        {"regex": "[ab]{20}"},
    ]
    asked = [{"max_new_tokens": 40, **one} for one in asked]
    calls = [demo.call(PROMPTS[i % 3], **one) for i, one in enumerate(asked)]
    scheduler = Scheduler(demo.model, chunk=64)
    for one in calls:
        scheduler.submit(one)
    while not scheduler.idle:
        scheduler.step()
    scheduler.close()
    for i, (one, knobs) in enumerate(zip(calls, asked, strict=True)):
        (row,) = one.request.rows
        if "suppress_tokens" in knobs:
            assert "no token can be drawn" in str(one.request.error)
            continue
        assert one.request.error is None
        alone = [token.id for token in demo.stream(PROMPTS[i % 3], **knobs)]
        assert row.generated.tolist() == alone


# -- Tokens that are certain ----------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each call of a model."""
    seen: list[int] = []
    plain = Model.forward

    def counted(self: Model, new: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(new))
        return plain(self, new, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", counted)
    return seen


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"do_sample": True, "seed": 5, "top_k": 0},
        {"do_sample": True, "seed": 5, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 4},
        {"eos_token_id": None},
        {"stop_strings": ['"age']},
        {"max_new_tokens": 7},
        {"repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize("prompt", ["Return", PROMPTS])
def test_what_is_certain_takes_no_step_and_changes_nothing(
    demo, monkeypatch, forwards, knobs, prompt
):
    def run() -> tuple[Any, int]:
        forwards.clear()
        tokens = list(demo.stream(prompt, **{"max_new_tokens": 60, "json_schema": PERSON, **knobs}))
        found: dict[int, list[Any]] = {}
        for token in tokens:
            found.setdefault(token.row, []).append((token.id, token.text, token.finish_reason))
        return found, len(forwards)

    taken, steps = run()
    monkeypatch.setattr(prepare, "_may_force", lambda request: False)
    one_by_one, more = run()
    assert taken == one_by_one
    assert steps < more


def test_what_is_certain_has_certainty_as_its_probability(demo):
    tokens = list(demo.stream("x", json_schema=PERSON, max_new_tokens=60))
    assert all(token.logprob <= 0 for token in tokens)
    assert [t.logprob for t in tokens].count(0.0) > 10


@pytest.mark.parametrize(
    "knobs",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"top_logprobs": 3},
        {"min_new_tokens": 3},
        {"guidance_scale": 1.4},
        {"num_beams": 2},
        {"logits_processor": [lambda ids, scores: scores]},
        {"stopping_criteria": [lambda ids, scores: False]},
    ],
)
def test_nothing_is_taken_where_somebody_looks_at_every_step(demo, forwards, knobs):
    made = demo.call("x", json_schema=PERSON, max_new_tokens=20, **knobs)
    assert not made.request.forces
    assert demo.call("x", json_schema=PERSON, max_new_tokens=20).request.forces


def test_torchs_generator_is_left_as_it_would_be(demo):
    ids = torch.tensor([demo.tokenizer.encode("x = ")])
    left = []
    for new in (25, 25):
        torch.manual_seed(3)
        out = demo.generate(ids, do_sample=True, json_schema=PERSON, max_new_tokens=new)
        left.append((out.tolist(), torch.rand(3).tolist(), out.shape[1] - ids.shape[1]))
    torch.manual_seed(3)
    torch.rand(0)
    assert left[0] == left[1]
    plain = demo.generate(ids, do_sample=True, seed=3, json_schema=PERSON, max_new_tokens=25)
    assert plain.tolist() == left[0][0]
    torch.manual_seed(3)
    demo.generate(ids, do_sample=True, max_new_tokens=left[0][2], eos_token_id=None)
    assert torch.rand(3).tolist() == left[0][1]


def test_as_many_are_read_at_once_as_pays():
    assert batch._paying([1]) == 1
    assert batch._paying([9]) == 9
    assert batch._paying([9, 9, 9]) == 9
    assert batch._paying([1] * 31 + [9]) == 1  # thirty-two rows do not wait for one
    assert batch._paying([6] * 16 + [5] * 16) >= 5


def test_what_is_certain_comes_some_tokens_a_step_and_nobody_waits_for_it(demo, monkeypatch):
    """A neighbour gets a token every step, and no step reads more than a chunk."""
    read: list[int] = []
    plain = Model.forward

    def counted(self: Model, new: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(len(new) * max(map(len, new)))
        return plain(self, new, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", counted)
    scheduler = Scheduler(demo.model, chunk=32)
    neighbour = demo.call("x", max_new_tokens=100, eos_token_id=None)
    scheduler.submit(neighbour)
    scheduler.step()
    forced = [demo.call("y", regex=f"(<tool_call>x){{{n}}}", max_new_tokens=90) for n in (900, 9)]
    for one in forced:
        scheduler.submit(one)
    got: dict[int, int] = {}
    while not all(one.request.done for one in forced):
        read.clear()
        told = {id(one): len(events) for one, events in scheduler.step()}
        assert told.get(id(neighbour)) == 1 and max(read) <= 32 and len(read) <= 2
        for one in forced:
            taken = told.get(id(one), 0)
            assert taken <= 1 + batch.FORCED
            got[id(one)] = max(got.get(id(one), 0), taken)
    assert all(most > 5 for most in got.values())  # they are taken together
    assert len(forced[0].request.rows[0].generated) == 90
    scheduler.close()


def test_what_is_certain_is_written_once(demo, monkeypatch):
    """However much has to come: the work grows with the text, not with its square."""
    written: list[int] = []
    plain = constraint.GuidanceTokenizer.written

    def counted(self: Any, wanted: bytes) -> list[int]:
        written.append(len(wanted))
        return plain(self, wanted)

    monkeypatch.setattr(constraint.GuidanceTokenizer, "written", counted)
    for times in (50, 500, 2000):
        written.clear()
        made = demo.call("x", regex=f"(<tool_call>y{times}){{{times}}}", max_new_tokens=60)
        form, tokens = made.request.constraint, np.empty(0, np.int64)
        assert form is not None
        while more := form.certain(tokens, 64):
            tokens = np.append(tokens, more)
            if int(tokens[-1]) in (demo.generation_config.eos_token_id,):
                break
        text = f"<tool_call>y{times}" * times
        assert demo.tokenizer.decode(tokens.tolist(), skip_special_tokens=True) == text
        assert sum(written) < 2 * len(text) + trial_process.AT_ONCE


def test_scores_say_what_is_ruled_out(demo):
    out = demo.generate(
        demo.tokenizer.encode("x"),
        json_schema=PERSON,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(out.scores) == 8
    assert np.isfinite(out.scores[0]).sum() == 1  # "{"
    for step, scores in enumerate(out.scores):
        assert np.isfinite(scores[0, out.sequences[0][-8 + step]])


def test_a_streamer_gets_every_token(demo):
    class Streamer:
        def __init__(self) -> None:
            self.put_there: list[Any] = []

        def put(self, value: Any) -> None:
            self.put_there += np.ravel(value).tolist()

        def end(self) -> None:
            self.put_there.append("end")

    streamer = Streamer()
    ids = demo.tokenizer.encode("x")
    out = demo.generate(ids, json_schema=PERSON, max_new_tokens=40, streamer=streamer)
    assert streamer.put_there == [*out[0], "end"]


# -- Where it ends --------------------------------------------------------------------------------


def test_the_end_and_what_it_is_called(demo):
    assert answers(demo, "x", regex="abc") == [("abc", "eos")]
    assert answers(demo, "x", regex="abc", eos_token_id=None) == [("abc", "grammar")]
    assert answers(demo, "x", regex="abc", eos_token_id=None, num_beams=2) == [("abc", "grammar")]
    long = len(demo.tokenizer.encode("aaa"))
    assert long >= 1
    tokens = len(list(demo.stream("x", regex="abc", max_new_tokens=20))) - 1
    assert answers(demo, "x", regex="abc", max_new_tokens=tokens) == [("abc", "grammar")]
    for knobs in ({}, {"num_beams": 2}):
        ((text, reason),) = answers(demo, "x", regex="[ab]{9,}", max_new_tokens=2, **knobs)
        assert reason == "length" and re.fullmatch("[ab]+", text)


def test_rows_without_an_end_of_text_do_not_linger(demo):
    out = demo.generate(
        [demo.tokenizer.encode(prompt) for prompt in PROMPTS],
        regex="a|bcd[0-9]{5}",
        eos_token_id=None,
        do_sample=True,
        seed=4,
        max_new_tokens=20,
        pad_token_id=0,
        return_dict_in_generate=True,
        top_k=0,
    )
    assert out.finish_reasons == ["grammar"] * 3
    width = max(len(demo.tokenizer.encode(prompt)) for prompt in PROMPTS)
    for row in out.sequences:
        assert re.fullmatch("a|bcd[0-9]{5}", demo.tokenizer.decode(row[width:]))


def test_an_eos_that_is_an_ordinary_token_ends_only_what_is_complete(demo):
    point = demo.tokenizer.index(".")
    for knobs in ({}, {"do_sample": True, "seed": 2, "top_k": 0}):
        ((text, reason),) = answers(
            demo, "x", regex=r"[a-z.]{2}[0-9]{2}", eos_token_id=point, **knobs
        )
        assert reason == "eos" and re.fullmatch(r"[a-z.]{2}[0-9]{2}\.", text)


@pytest.mark.parametrize("mode", ["beams", "beam sampling", "diverse beams"])
@pytest.mark.parametrize("eos", [True, False])
def test_fewer_texts_than_beams(demo, mode, eos):
    """The parts found of two texts are those two, and nothing that is none."""
    if mode == "diverse beams" and not eos:
        return
    more = {} if eos else {"eos_token_id": None}
    knobs = {**MODES[mode], "num_return_sequences": MODES[mode]["num_beams"], **more}
    found = answers(demo, "x", regex="abc|cd", **knobs)
    assert found and {text for text, _ in found} <= {"abc", "cd"}


def test_the_states_that_are_kept_are_few(demo):
    made = demo.call("x", regex="[a-z ]{300}", max_new_tokens=150)
    for _ in made.steps():
        form = made.request.constraint
        assert form is not None and len(form._states) <= form._most == 20


# -- Tokenizers -----------------------------------------------------------------------------------

KINDS = {
    "byte-level": byte_level,
    "byte-level with a space in front": prefixed,
    "unigram with bytes": metaspace,
    "as Llama's": llama,
}


def of_tokenizer(model: fastgen.CausalLM, backend: Tokenizer, prompt: str, **knobs: Any) -> Any:
    """The texts that a model generates with a tokenizer, and why they ended."""
    theirs = fastgen.Tokenizer.of(backend)
    ids = theirs.encode(prompt)
    out = model.generate(
        ids, tokenizer=backend, return_dict_in_generate=True, max_new_tokens=60, **knobs
    )
    found = []
    for row in out.sequences:
        stream = TextStream(theirs, ids)
        text = "".join(stream.push(token) for token in row[len(ids) :]) + stream.end()
        found.append((text, row[len(ids) :]))
    return list(zip(found, out.finish_reasons, strict=True))


@pytest.fixture(scope="module")
def wide(pair):
    """A model with more logits than any of these tokenizers has tokens."""
    return pair("llama", vocab_size=512)[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["greedy", "sampled", "several", "beams", "guesses"])
def test_every_kind_of_tokenizer_writes_it(wide, kind, mode):
    backend = KINDS[kind]()
    most = backend.get_vocab_size()
    assert most < 512
    schema = {**PERSON, "properties": {**PERSON["properties"], "name": {"enum": ["né", "🙂"]}}}
    for (text, ids), reason in of_tokenizer(
        wide, backend, "the cat", json_schema=schema, **MODES[mode]
    ):
        assert max(ids) < most
        if reason == "eos":
            jsonschema.validate(json.loads(text), schema)
        else:
            written = LLMatcher.grammar_from_json_schema(schema, defaults=constraint.JSON)
            assert reason == "length" and begins(written, text.rstrip("\ufffd"))
    for (text, _), reason in of_tokenizer(
        wide, backend, "the cat", regex="[a-z]{2} ?[0-9é]{3}", **MODES[mode]
    ):
        assert reason == "eos" and re.fullmatch("[a-z]{2} ?[0-9é]{3}", text)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_certain_is_written_as_the_tokenizer_writes_it(kind):
    backend = KINDS[kind]()
    theirs = fastgen.Tokenizer.of(backend)
    writer = constraint.GuidanceTokenizer(theirs, 512)
    for text in ('{"name": "', '"age": ', "}", " the cat", "naïve 🙂"):
        ids = writer(text)
        assert b"".join(writer.tokens[i] for i in ids) == text.encode()
        inside = theirs.encode("a" + text, add_special_tokens=False)
        if inside[-len(ids) :] != ids:  # but where "a" becomes one token with what follows
            assert theirs.encode(text, add_special_tokens=False) == ids
    assert all(writer.tokens[i] == b"" for i in range(backend.get_vocab_size(), 512))


def test_words_without_bytes_write_what_they_can(wide):
    """WordPiece puts a space before every word: of texts that have them, it can write some."""
    found = of_tokenizer(wide, wordpiece(), "the cat", regex="( [a-z]{1,4}){2}\\.", do_sample=True)
    ((text, _), reason), *_ = found
    assert reason == "length" or re.fullmatch("( [a-z]{1,4}){2}\\.", text)
    with pytest.raises(ValueError, match="no text of this json_schema can be written with the"):
        of_tokenizer(wide, wordpiece(), "the cat", json_schema=PERSON)


def test_special_tokens_are_no_text(wide):
    backend = byte_level()
    for (text, ids), _ in of_tokenizer(
        wide, backend, "x", regex="(<s>|</s>){6}", do_sample=True, seed=1, num_return_sequences=4
    ):
        assert re.fullmatch("(<s>|</s>){6}", text)
        ids = ids[: ids.index(2)] if 2 in ids else ids
        assert not {0, 1} & set(ids)


# -- At the door ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"json_schema": "no"}, "json_schema must be a JSON schema: an object, true, or the text"),
        ({"json_schema": 5}, "json_schema must be a JSON schema: an object, true, or the text"),
        ({"json_schema": [{}]}, "json_schema must be a JSON schema"),
        ({"json_schema": False}, "json_schema must be a JSON schema"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema must be a JSON schema"),
        ({"json_schema": "9" * 9999}, "json_schema must be a JSON schema"),
        ({"json_schema": "[" * 99999}, "json_schema must be a JSON schema"),
        ({"json_schema": {"type": "strin"}}, "json_schema cannot be used: Invalid type: strin"),
        ({"json_schema": {"not": {}}}, 'json_schema cannot be used: Unimplemented keys: ["not"]'),
        ({"json_schema": {"enum": []}}, "json_schema cannot be used: Unsatisfiable schema"),
        ({"json_schema": {"$ref": "http://127.0.0.1/x"}}, "json_schema cannot be used: "),
        ({"regex": 5}, "regex must be a text, got 5"),
        ({"regex": "["}, "unclosed character class"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"grammar": "start: x"}, 'grammar cannot be used: at 1(8): unknown name: "x"'),
        ({"grammar": "x: /a/"}, "grammar cannot be used: no start rule found"),
        ({"grammar": "start: start"}, "no text of this grammar can be written"),
        ({"regex": "a", "grammar": "start: /a/"}, "regex cannot be used with grammar"),
        ({"regex": "a", "json_schema": {}}, "json_schema cannot be used with regex"),
        ({"regex": "a", "forced_eos_token_id": 0}, "forced_eos_token_id=(0,) cannot be used with"),
        ({"regex": "a", "forced_bos_token_id": 3}, "forced_bos_token_id=3 cannot be used with"),
        ({"regex": "", "eos_token_id": None}, "no text of this regex can be written"),
        ({"regex": "a" * 300_000}, "regex must have at most 262,144 characters, got 300,000"),
        (
            {"regex": "a", "eos_token_id": None, "num_beams": 2, "num_beam_groups": 2,
             "diversity_penalty": 1.0},
            "regex with num_beam_groups=2 needs an eos_token_id",
        ),
        (
            {"grammar": "\n".join(f"x{i}: x{i + 1}" for i in range(9000)) + "\nstart: x0"},
            "grammar must have at most 1,000 rules (colons), got 9,001",
        ),
        (
            {"json_schema": {"$ref": "#/$defs/0", "$defs": {
                str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)
            }}},
            "json_schema must have at most 500 references",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error_at_the_door(demo, knobs, words):
    with pytest.raises(ValueError) as caught:
        demo.call("x", max_new_tokens=5, **knobs)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("knobs", [{}, {"do_sample": True}])
def test_what_others_rule_out_is_an_error_that_names_them(demo, knobs):
    letters = [demo.tokenizer.index(letter) for letter in "ab"]
    with pytest.raises(ValueError, match=r"every one is ruled out by suppress_tokens, regex"):
        demo.complete("x", regex="[ab]{3}", suppress_tokens=letters, max_new_tokens=5, **knobs)
    with pytest.raises(ValueError, match=r"every one is ruled out by min_new_tokens, regex"):
        demo.complete("x", regex="ab", min_new_tokens=9, max_new_tokens=10, **knobs)


def test_a_model_without_a_tokenizer_needs_one(wide, tmp_path):
    ids_only = fastgen.CausalLM.__new__(fastgen.CausalLM)
    ids_only.__dict__.update(wide.__dict__, directory=tmp_path)
    ids_only.__dict__.pop("tokenizer", None)
    with pytest.raises((ValueError, fastgen.ModelError), match=r"tokenizer\.json"):
        ids_only.generate([5, 6], regex="abc", max_new_tokens=5)
    assert ids_only.generate([5, 6], regex="abc", max_new_tokens=9, tokenizer=byte_level())


def test_a_schema_may_be_a_mapping_of_any_kind_and_is_one_knob_with_its_text():
    text = json.dumps(PERSON)
    assert fastgen.Params(json_schema=text) == fastgen.Params(json_schema=PERSON)
    assert fastgen.Params(json_schema=True) == fastgen.Params(json_schema="{}")
    assert hash(fastgen.Params(json_schema=PERSON))


def test_the_command_line(demo, monkeypatch, capfd):
    monkeypatch.setattr(fastgen, "load", lambda *_, **__: demo)

    def run(*flags: str) -> tuple[int, str, str]:
        code = commands.run(["generate", "x = ", "-m", "it", "--max-new-tokens", "60", *flags])
        return (code, *capfd.readouterr())

    code, out, err = run("--json-schema", json.dumps(PERSON))
    assert (code, err) == (0, "")
    jsonschema.validate(json.loads(out.removeprefix("x = ")), PERSON)
    assert run("--regex", "123") == (0, "x = 123\n", "")
    assert run("--grammar", 'start: "ab" "c"') == (0, "x = abc\n", "")
    code, out, err = run("--json-schema", '{"type": "strin"}')
    assert (code, out) == (2, "")
    assert err == "fastgen: json_schema cannot be used: Invalid type: strin\n"


BLOCKED = """
import sys
sys.modules["llguidance"] = None
import fastgen
model = fastgen.load()
print(model.complete("x", max_new_tokens=3) != "")
try:
    model.complete("x", regex="a", max_new_tokens=3)
except ValueError as error:
    print(error)
"""


def test_without_llguidance_all_else_runs_and_the_error_names_the_extra():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [
        "True",
        "json_schema, regex, grammar need llguidance: pip install 'fastgen-onnx[structured]'",
    ], done.stderr
    assert done.stderr == ""


def test_llguidance_is_not_imported_unless_it_is_asked_for():
    program = (
        "import sys, fastgen; fastgen.load().complete('x', max_new_tokens=3);"
        "assert 'llguidance' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
