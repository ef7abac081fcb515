"""Tokens become text: whole characters, none lost, none taken back, whatever the tokenizer."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers_made as made
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.engine.output import Token
from fastgen.export.onnx_folder import folder
from fastgen.export.source import vocabulary
from fastgen.serve.answers import LOWEST, GeneratedText, number
from fastgen.text.tokenizer import TextStream, Tokenizer, pieces

KINDS = {
    kind.__name__: Tokenizer.of(kind())
    for kind in (
        made.byte_level,
        made.prefixed,
        made.metaspace,
        made.llama,
        made.gemma,
        made.wordpiece,
        made.suffixed,
        made.undecoded,
    )
}
SCRIPTS = {
    "emoji": (0x1F600, 0x1F64F), "chinese": (0x4E00, 0x9FFF), "hangul": (0xAC00, 0xD7A3),
    "cyrillic": (0x410, 0x44F), "latin": (0x61, 0x7A),
}  # fmt: skip
few = settings(max_examples=25, deadline=None)


def new_text(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool = True) -> str:
    """The text that `decode` gives of all ids, after its text of the prompt."""
    before, whole = (tokenizer.decode(some, skip) for some in (prompt, prompt + ids))
    same = max(n for n in range(len(before) + 1) if whole.startswith(before[:n]))
    return whole[same:]


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool = True) -> str:
    stream = TextStream(tokenizer, prompt, skip)
    return "".join([*map(stream.push, ids), stream.end()])


@st.composite
def rows(draw: st.DrawFn, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A prompt and new tokens: any, many of them bytes where there are some, or of a text."""
    bytes_ = [i for i in range(tokenizer.vocab_size) if tokenizer.is_byte(i)]
    anything = st.integers(0, tokenizer.vocab_size + 2)  # models say more than there is
    ids = draw(st.lists(anything | (st.sampled_from(bytes_) if bytes_ else anything), max_size=14))
    if draw(st.booleans()):
        ids = tokenizer.encode(draw(st.text(max_size=8)) + draw(st.text("a \ufffd🙂", max_size=4)))
    cut = draw(st.integers(0, len(ids)))
    return ids[:cut], ids[cut:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
def test_pieces_are_what_the_new_tokens_add(kind: str, skip: bool) -> None:
    tokenizer = KINDS[kind]

    @few
    @given(rows(tokenizer))
    def law(row: tuple[list[int], list[int]]) -> None:
        prompt, ids = row
        assert streamed(tokenizer, prompt, ids, skip) == new_text(tokenizer, prompt, ids, skip)
        before, whole = (tokenizer.decode(some, skip) for some in (prompt, prompt + ids))
        if whole.startswith(before):
            assert streamed(tokenizer, prompt, ids, skip) == whole[len(before) :]
        assert "".join(pieces(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)

    law()


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_is_taken_back(kind: str) -> None:
    """The pieces so far are the beginning of the text, however it goes on."""
    tokenizer = KINDS[kind]

    @few
    @given(rows(tokenizer), rows(tokenizer))
    def law(row: tuple[list[int], list[int]], other: tuple[list[int], list[int]]) -> None:
        prompt, ids = row
        stream = TextStream(tokenizer, prompt)
        given_out = "".join(map(stream.push, ids))
        assert new_text(tokenizer, prompt, ids + other[1]).startswith(given_out)

    law()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["byte_level", "prefixed", "metaspace", "llama", "gemma"])
def test_neighbours_that_the_vocabulary_lacks_stay_whole(kind: str, script: str) -> None:
    tokenizer, (low, high) = KINDS[kind], SCRIPTS[script]
    prompt = tokenizer.encode("the")
    for first in range(low, high, (high - low) // 20 or 1):
        pair = chr(first) + chr(high - (first - low))
        ids = tokenizer.encode(pair, add_special_tokens=False)
        assert streamed(tokenizer, prompt, ids).removeprefix(" ") == pair


def test_a_character_is_given_out_with_its_last_byte_where_that_is_certain() -> None:
    tokenizer = KINDS["byte_level"]
    stream = TextStream(tokenizer)
    out = [stream.push(token) for token in tokenizer.encode("é🙂a")]
    assert out == ["", "é", "", "", "", "🙂", "a"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["one token", "a text", "bytes"])
def test_the_work_grows_with_the_tokens(
    kind: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in tokens that are decoded: so many for each that is pushed, however many are."""
    tokenizer = KINDS[kind]
    decode, decoded = tokenizer.decode, []

    def counted(ids: list[int], skip_special_tokens: bool = True) -> str:
        decoded.append(len(ids))
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counted)
    known = range(tokenizer.vocab_size)
    rows = {
        "one token": [[token] for token in [*known[:20], *known[250::7]]],
        "a text": [tokenizer.encode("a b你 c🙂\n")],
        "bytes": [[token for token in reversed(known) if tokenizer.is_byte(token)] or [3]],
    }
    for row in rows[what]:
        ids = (row * 100)[:100]
        decoded.clear()
        TextStream(tokenizer, ids)
        assert sum(decoded) <= 3 * len(ids)
        decoded.clear()
        pieces(tokenizer, ids)
        assert sum(decoded) <= 8 * len(ids), row


# --- stop texts ----------------------------------------------------------------------------------

HIDDEN = {1: "<e>", 2: "<s>"}


def cut(tokens: list[Token], stops: list[str]) -> tuple[str, int]:
    """A text before its first stop text, without its special tokens; and the tokens that it took.

    Letters are looked at one by one: a special token's are marked, and taken out at the end.
    """
    spelt: list[tuple[str, bool]] = []
    for count, token in enumerate(tokens, 1):
        spelt += [(char, False) for char in HIDDEN.get(token.id, "")]
        spelt += [(char, True) for char in token.text]
        text = "".join(char for char, _ in spelt)
        places = [text.index(stop) for stop in stops if stop in text]
        if places:
            return "".join(char for char, shown in spelt[: min(places)] if shown), count
    return "".join(char for char, shown in spelt if shown), len(tokens)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "ab", "", "e", "<", "user", 1, 2]), min_size=1, max_size=9),
    st.lists(
        st.sampled_from(["ab", "<s>user", "e<e>", "<e>", "<e>a", "<e><s>", "era", "aa"]), max_size=2
    ),
)
def test_a_text_is_cut_with_its_special_tokens_which_are_then_left_out(
    said: list[Any], stops: list[str]
) -> None:
    tokens = [
        Token(one, "", 0.0, None, None) if one in HIDDEN else Token(9, one, 0.0, None, None)
        for one in said
    ]
    tokens.append(Token(9, "", 0.0, None, "length"))
    text = GeneratedText(stops, HIDDEN)
    parts = [text.push(token) for token in tokens]
    expected, count = cut(tokens, stops)
    assert "".join(piece for piece, _ in parts) == expected
    assert text.count == count
    assert text.reason == ("stop" if count < len(tokens) else "length")
    assert text.tokens == [token for _, some in parts for token in some]
    assert text.tokens == tokens[: len(text.tokens)]
    begin = itertools.accumulate((len(token.text) for token in tokens), initial=0)
    assert text.starts == list(begin)[: len(text.tokens)]
    assert all(start <= len(expected) for start in text.starts)


def test_stop_counts_new_text_and_stop_strings_the_prompts_too(pair: Any) -> None:
    _, model = pair("gpt2")
    prompt = "hello"
    free = model.complete(prompt, max_new_tokens=8, eos_token_id=None)
    across = prompt[-1] + free[0]

    def ids(**knobs: Any) -> list[int]:
        call = model.call(prompt, max_new_tokens=8, eos_token_id=None, **knobs)
        return [event.token for step in call.steps() for event in step.events]

    assert len(ids(stop_strings=[across])) == 1 < len(ids(stop=[across]))
    assert ids(stop=[free[0]]) == ids(stop_strings=[free[0]])
    with pytest.raises(ValueError, match="stop_strings must"):
        model.call(prompt, stop=[""])


@pytest.mark.parametrize("more", [{}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}])
def test_rows_that_go_on_after_their_stop_are_written_as_they_are_returned(
    pair: Any, more: dict[str, Any]
) -> None:
    """Without an end of text; each token once, and the reason with the last alone."""
    _, model = pair("gpt2")
    prompts = [[5, 6, 7], [5, 9, 8], [11, 12, 13]]
    knobs = {"max_new_tokens": 16, "eos_token_id": None, "seed": 3, **more}
    free = model.generate(prompts, **knobs)
    texts = [model.tokenizer.decode([row[3 + place]]) for place, row in enumerate(free)]
    stops = [text for text in texts if text and "\ufffd" not in text] or ["a"]
    rows = model.generate(prompts, stop_strings=stops, **knobs)
    tokens = list(model.stream(prompts, stop_strings=stops, **knobs))
    for place, row in enumerate(rows):
        mine = [token for token in tokens if token.row == place]
        assert [token.id for token in mine] == list(row[3:])
        assert [token.finish_reason is None for token in mine] == [True] * (len(mine) - 1) + [False]
        written = "".join(token.text for token in mine)
        assert written == new_text(model.tokenizer, prompts[place], list(row[3:]))


# --- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"do_sample": True, "temperature": 0.3, "top_p": 0.5, "seed": 1},
        {"bad_words_ids": [[7]], "repetition_penalty": 2.0},
        {"prompt_lookup_num_tokens": 2},
    ],
)
def test_log_probabilities_of_the_model_are_its_own(pair: Any, knobs: dict[str, Any]) -> None:
    """With any knobs, a token's logprob is the log-softmax of its logits: one number."""
    _, model = pair("gpt2")
    prompt = [5, 6, 7]
    call = model.call(
        [prompt], logprobs="model", max_new_tokens=6, top_logprobs=300, eos_token_id=None, **knobs
    )
    events = [event for step in call.steps() for event in step.events]
    ids = [event.token for event in events]
    expected = model.score([prompt + ids])[0][3:]
    np.testing.assert_allclose([event.logprob for event in events], expected, atol=1e-4)
    for event in events:
        pairs = dict(event.top_logprobs)
        assert pairs[event.token] == event.logprob
        assert np.isfinite(list(pairs.values())).all()
        if not knobs:
            assert event.logprob == max(pairs.values())


def test_a_log_probability_is_a_number() -> None:
    assert number(float("-inf")) == LOWEST and number(-1.5) == -1.5
    assert number(float("nan")) is None  # of the first token of a prompt


# --- what an export keeps of a tokenizer ---------------------------------------------------------


def test_special_tokens_are_split_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    backend = made.byte_level()
    backend.save(str(tmp_path / "tokenizer.json"))
    for splits in (True, False):
        backend.encode_special_tokens = splits
        config = {"split_special_tokens": splits}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        expected = backend.encode("a</s>b").ids
        assert (2 in expected) is not splits
        assert Tokenizer(tmp_path).encode("a</s>b") == expected
        assert Tokenizer.of(backend).encode("a</s>b") == expected


def test_what_stands_in_tokenizer_config_alone_is_read_as_transformers_reads_it(
    tmp_path: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    backend = made.byte_level()
    size = backend.get_vocab_size()
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = {"single_word": False, "rstrip": False, "normalized": False}
    config = {
        "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True,
        "added_tokens_decoder": {
            "2": {"content": "</s>", "lstrip": True, "special": True, **plain},
            str(size): {"content": "<call>", "lstrip": False, "special": True, **plain},
        },
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    found, note = vocabulary.read(tmp_path)
    assert found is not None and not note
    for text in ("the cat", "a  </s>b", "a<call>b", " x"):
        assert found.encode(text).ids == theirs(text)["input_ids"]
    assert found.decode([size], skip_special_tokens=True) == ""


def test_an_end_of_text_of_the_configuration_alone_is_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    choice = folder.Choice(tmp_path, tmp_path / "model.onnx", "fp32", "fp32", "fp32")
    assert choice.defaults == {"eos_token_id": [2, 3]}
    other = folder.Choice(tmp_path, tmp_path / "model.onnx", "fp32", "fp32", "fp32")
    (tmp_path / "generation_config.json").write_text("{}")
    assert other.defaults == {}
