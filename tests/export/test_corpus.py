"""The texts that exports are calibrated and judged on begin as a model's do and share nothing."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import fastgen
from fastgen.export import export
from fastgen.export.prove import corpus, own_text
from fastgen.export.prove.own_text import Wish, Writer, own_texts
from fastgen.export.prove.reader import ROW, Reader
from fastgen.store.model_info import ModelInfo
from fastgen.text.tokenizer import _byte_level

BOS, EOS, VOCAB = 256, 257, 258
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bytes_tokenizer(bos: bool) -> Tokenizer:
    """A token for each byte; ids of bytes are their own numbers."""
    vocab = {char: byte for char, byte in _byte_level().items()} | {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return tokenizer


class Origin:
    """The part of an export's origin that a corpus asks."""

    def __init__(self, tokenizer: Tokenizer | None, template: str | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template

    def write_configuration(self, to: Path) -> None:
        (to / "config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": [EOS]}))
        said = {"bos_token": "<s>"} | ({"chat_template": self.template} if self.template else {})
        (to / "tokenizer_config.json").write_text(json.dumps(said))


def about(limit: int | None = 512, vocab: int = VOCAB) -> ModelInfo:
    return ModelInfo("fp32", "gpt2", vocab, limit, hard_limit=False, layers=())


@functools.cache
def shipped(bos: bool = True, template: str | None = None, **kwargs) -> corpus.Corpus:
    return corpus.of(Origin(bytes_tokenizer(bos), template), about(**kwargs))


def paragraphs(rows) -> set[bytes]:
    """Lines long enough that two texts would not have them by chance."""
    found = [bytes(int(one) for one in row if one < BOS) for row in rows]
    return {line for text in found for line in text.split(b"\n") if len(line) > 60}


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("tokens", [1024, 15_000])
def test_calibration_and_judgement_share_no_row_and_no_paragraph(tokens, template):
    text = shipped(template=template)
    one, other = text.calibration(tokens), text.evaluation(tokens)
    assert not {row.tobytes() for row in one} & {row.tobytes() for row in other}
    assert not paragraphs(one) & paragraphs(other)
    for rows in (one, other):
        assert tokens <= sum(map(len, rows)) < tokens + 300
        assert all(row.dtype == np.int64 and 2 <= len(row) <= ROW for row in rows)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(few=st.integers(500, 3000), more=st.integers(1, 10_000))
@example(few=1425, more=25)
def test_all_kinds_count_alike_and_fewer_tokens_are_of_the_same_text(few, more):
    text = shipped()
    small, large = text.evaluation(few), text.evaluation(few + more)
    used = [count["evaluation"] for count in text.kinds.values()]
    assert sum(used) == sum(map(len, large)) and max(used) - min(used) <= ROW
    held = [row.tobytes() for row in large]
    later = [row for row in small if not any(one.startswith(row.tobytes()) for one in held)]
    # Where rows are shorter, it may take one more of a kind.
    assert len(later) <= (0 if few >= 2 * ROW * len(text.kinds) else len(text.kinds))
    again = shipped(True).evaluation(few)  # read anew
    assert [row.tolist() for row in again] == [row.tolist() for row in small]


@pytest.mark.parametrize("bos", [False, True])
def test_rows_begin_as_the_tokenizer_begins_a_text_and_hold_no_other_ids(bos):
    rows = shipped(bos).calibration(5000)
    assert {bool(row[0] == BOS) for row in rows} == {bos}
    assert not any((row[1:] >= BOS).any() for row in rows)
    few = shipped(bos, vocab=123).calibration(5000)  # no letter beyond z
    assert max(int(row.max()) for row in few) < 123
    assert all(np.isin(np.arange(97, 102), row).sum() > 1 for row in few if len(row) > 60)


def test_rows_are_as_long_as_the_model_takes():
    assert max(map(len, shipped(limit=48).calibration(3000))) == 48


def test_conversations_are_in_the_models_template_and_plain_where_it_has_none():
    def chats(text: corpus.Corpus) -> list[bytes]:
        rows = text.only(["chat"]).calibration(3000)
        return [bytes(int(one) for one in row if one < BOS) for row in rows]

    rendered = chats(shipped(template=TEMPLATE))
    assert all(one.startswith(b"[user]") for one in rendered)  # a refused system role is left out
    starts = [
        row[:2].tolist() for row in shipped(template=TEMPLATE).only(["chat"]).calibration(500)
    ]
    assert all(start == [BOS, ord("[")] for start in starts)  # bos is there once
    plain = chats(shipped())
    assert plain[0].startswith((b"User: ", b"System: ")) and not any(b"[user]" in p for p in plain)
    broken = shipped(template="{% for %}")
    assert "conversations are plain text" in broken.summary() and chats(broken) == plain


def test_some_kinds_can_be_asked_for():
    text = shipped()
    assert {name for name, used in text.only(["code"]).kinds.items()} == {"code"}
    with pytest.raises(ValueError, match=r"kinds must be some of prose, .*, got \['verse'\]"):
        text.only(["verse"])


def test_the_models_own_text_is_what_it_says_and_differs_by_side(pair):
    """Tokens are likely where the model itself wrote them: far likelier than random ones."""
    _, model = pair("gpt2")
    text = corpus.of(Origin(None), about(vocab=model.model.info.vocab_size, limit=32), (), model)
    one, other = text.calibration(200), text.evaluation(200)
    assert set(text.kinds) == {corpus.OWN} and text.kinds["own"]["calibration"] >= 200
    assert not {row.tobytes() for row in one} & {row.tobytes() for row in other}
    wish, beside = Wish(60, 5), Wish(100, 77, [[3], [5]])
    (alone,), (among, rows) = own_texts(model, [wish], 32), own_texts(model, [wish, beside], 32)
    assert [row.tolist() for row in alone] == [row.tolist() for row in among]
    assert [row[:1].tolist() for row in rows[:2]] == [[3], [5]] and sum(map(len, rows)) >= 100
    random = np.random.default_rng(0).integers(0, model.model.info.vocab_size, (4, 32))
    told = [
        np.nanmean(np.concatenate(model.score([r.tolist() for r in rows])))
        for rows in (own_texts(model, [Wish(128, 1)], 32)[0], random)
    ]
    assert told[0] > told[1]


def test_own_text_is_made_when_it_is_asked_for_and_a_quarter_at_most(pair):
    _, model = pair("gpt2")
    loads: list[int] = []

    def load() -> fastgen.CausalLM:
        loads.append(1)
        return model

    vocab = model.model.info.vocab_size
    text = corpus.of(Origin(bytes_tokenizer(True)), about(64, vocab), (), load)
    text.only(["prose", "chat"]).calibration(500)
    assert not loads
    text.calibration(500)
    assert len(loads) == 1 and 0 < text.kinds["own"]["calibration"] <= 500 // 4 + 64
    two = text.only(["prose", "own"])
    two.calibration(2000)
    assert two.kinds["own"]["calibration"] <= 2000 // 4 + 64 and len(loads) == 2


def test_both_sides_are_written_at_once(pair, monkeypatch):
    _, model = pair("gpt2")
    calls: list[int] = []  # wishes of each
    write = own_text.own_texts

    def noted(model, wishes, *rest):
        calls.append(len(wishes))
        return write(model, wishes, *rest)

    monkeypatch.setattr(own_text, "own_texts", noted)
    vocab = model.model.info.vocab_size
    text = corpus.of(Origin(bytes_tokenizer(True)), about(64, vocab), (), model)
    text.write(500, 500)
    rows = [text.calibration(500), text.evaluation(500), text.calibration(400)]
    assert calls == [2] and text.kinds["own"]["evaluation"] > 0
    assert not {row.tobytes() for row in rows[0]} & {row.tobytes() for row in rows[1]}


def test_what_ends_its_texts_at_once_is_written_on(pair):
    """All tokens end a text: rows would be of two tokens."""
    _, model = pair("gpt2")
    reader = Reader(None, model.model.info.vocab_size, 64, eos=tuple(range(10_000)))
    rows = Writer(model, reader, {}).rows("evaluation", 300)
    assert sum(map(len, rows)) >= 300


def test_a_users_text_takes_the_place_of_all(tmp_path):
    texts = tmp_path / "own.txt"
    texts.write_text("".join(f"Paragraph {n}: {f'so {n} ' * 60}\n\n" for n in range(40)))
    lines = tmp_path / "lines.jsonl"
    said = [
        {"text": "A text of its own, number one"},
        {"ids": [7, 8, 9] * 20},
        {"messages": [{"role": "user", "content": "Well?"}]},
        {"text": "And another one"},
    ]
    lines.write_text("\n".join(map(json.dumps, said)) + "\n\n")
    text = corpus.of(Origin(bytes_tokenizer(True), TEMPLATE), about(), [texts, lines])
    one, other = text.calibration(4000), text.evaluation(4000)
    assert set(text.kinds) == {"own.txt", "lines.jsonl"}
    read = {bytes(int(i) for i in row if i < BOS) for row in one}
    judged = {bytes(int(i) for i in row if i < BOS) for row in other}
    assert b"A text of its own, number one" in read and b"[user]Well?\n" in read
    assert bytes([7, 8, 9] * 20) in judged and b"And another one" in judged
    numbered = [set(re.findall(rb"Paragraph (\d+):", b"".join(rows))) for rows in (read, judged)]
    assert not numbered[0] & numbered[1] and min(map(len, numbered)) > 3


@pytest.mark.parametrize("content", ["One short sentence. And a second one.", "[1, 2, 3, 4, 5, 6]"])
def test_a_single_text_is_halved(tmp_path, content):
    path = tmp_path / ("one.jsonl" if content[0] == "[" else "one.txt")
    path.write_text(content if content[0] != "[" else f'{{"ids": {content}}}')
    text = corpus.of(Origin(bytes_tokenizer(False)), about(), [path])
    one, other = text.calibration(100), text.evaluation(100)
    assert len(one) == len(other) == 1
    whole = json.loads(content) if content[0] == "[" else list(content.encode())
    assert [*one[0], *other[0]] == whole


REFUSED = {
    "no such file": (None, "text must be a file, .* is none"),
    "nothing in it": ("\n \n", "text must be a file with text, .* has none"),
    "two fields": ('{"text": "a", "ids": [1, 2]}', "line 1: needs one of text, ids, messages"),
    "no field": ('{"text": "a"}\n{"prompt": "b"}', r"line 2: needs one of .*, has \['prompt'\]"),
    "no JSON": ("Hello", "line 1: not JSON"),
    "no ids": ('{"ids": ["a", "b"]}', "line 1: ids must be a list of two or more token ids"),
    "negative": ('{"ids": [3, -1]}', "line 1: ids must be a list of two or more token ids"),
    "no messages": ('{"messages": ["Hi"]}', "line 1: messages must be a list of objects"),
}


@pytest.mark.parametrize("content, message", REFUSED.values(), ids=REFUSED)
def test_a_users_text_is_read_before_the_model(tmp_path, content, message):
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        export("/no/such/model", tmp_path / "out", text=path, progress=None)


NOT_FOR_IT = {
    "ids beyond": ('{"ids": [1, 999]}', bytes_tokenizer(True), "ids must be below 258, got 999"),
    "no tokenizer": ('{"text": "Hello"}', None, "the model has no tokenizer: give ids"),
    "no template": (
        '{"messages": [{"role": "user", "content": "Hi"}]}', bytes_tokenizer(True),
        "the model has no chat template",
    ),
}  # fmt: skip


@pytest.mark.parametrize("line, tokenizer, message", NOT_FOR_IT.values(), ids=NOT_FOR_IT)
def test_a_users_text_that_the_model_cannot_read_is_refused(tmp_path, line, tokenizer, message):
    path = tmp_path / "text.jsonl"
    path.write_text(f"{line}\n{line}")
    with pytest.raises(ValueError, match=message):
        corpus.of(Origin(tokenizer), about(), [path])


def test_the_report_says_what_was_read_and_the_old_name_still_works(tmp_path):
    path = tmp_path / "ids.jsonl"
    rows = np.random.default_rng(0).integers(0, tiny.VOCAB, (8, 40)).tolist()
    path.write_text("\n".join(json.dumps({"ids": row}) for row in rows))
    with pytest.warns(DeprecationWarning, match="calibration is now named text"):
        made = export(
            tiny.build("gpt2"), tmp_path / "out", calibration=path, max_kl=1, progress=None
        )
    report = json.loads((made / "report.json").read_text())
    assert report["text"] == {"ids.jsonl": {"calibration": 160, "evaluation": 160}}
    assert report["tolerance"]["top1"] is None and report["tolerance"]["kl"] == 1
    with pytest.raises(ValueError, match="text is for what is quantised, and of fp32 nothing is"):
        export(tiny.build("gpt2"), tmp_path / "no", text=path, precision="fp32", progress=None)
