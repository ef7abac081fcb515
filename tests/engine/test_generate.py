"""All of `generate`: the parity report, stopping, outputs, streamers, configurations, callables."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import parity_report
import pytest
import tiny
import torch
from tiny import left_padded, ragged
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, StopStringCriteria

import fastgen
from fastgen.engine import prepare
from fastgen.inputs import params
from fastgen.sampling.stop import Deadline, StopStrings
from fastgen.text import token_healing

GREEDY = {"do_sample": False, "max_new_tokens": 12}


# All modes and processors on one kind of model, and on all four of the report.
@pytest.mark.parametrize(
    "kinds",
    [("llama",), pytest.param(parity_report.KINDS, marks=pytest.mark.slow)],
    ids=len,
)
def test_no_token_differs_from_transformers(pair, capsys, kinds):
    counts = parity_report.run(pair, kinds)
    with capsys.disabled():
        print(f"\n{parity_report.table(counts)}")
    assert sum(counts.values()) >= 100 * len(kinds)
    assert not any(n for (_, outcome), n in counts.items() if outcome == "different")
    assert sum(n for (_, outcome), n in counts.items() if outcome == "ties") <= 5


# -- Stopping ------------------------------------------------------------------------------------


def byte_fallback() -> Tokenizer:
    """As Llama's: sentencepiece's pieces, and bytes for what has none."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set(tiny.TEXT.replace(" ", "\u2581")) - set("\n\u4f60\U0001f642"))
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("o", "n"), ("\u2581", "o"), ("e", "r")]
    pieces += [*letters, *dict.fromkeys(a + b for a, b in merges)]
    vocabulary = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


def word_pieces() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[PAD]"])
    backend.train_from_iterator([tiny.TEXT, "abcdef"], trainer)
    return backend


def metaspace() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>")
    backend.train_from_iterator([tiny.TEXT, "abcdef"], trainer)
    return backend


TOKENIZERS = {
    "byte level": tiny.tokenizer,
    "byte fallback": lambda: PreTrainedTokenizerFast(tokenizer_object=byte_fallback()),
    "word pieces": lambda: PreTrainedTokenizerFast(tokenizer_object=word_pieces()),
    "metaspace": lambda: PreTrainedTokenizerFast(tokenizer_object=metaspace()),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_spelt_as_transformers_spells_them(kind):
    theirs = TOKENIZERS[kind]()
    ours = fastgen.Tokenizer.of(theirs)
    mode = StopStringCriteria._get_stop_string_matching_mode(theirs)
    spelt, ids = StopStringCriteria.clean_tokenizer_vocab(theirs, stop_string_matching_mode=mode)
    assert (mode is not None) == (ours.bytes_are is not None)
    for text, index in zip(spelt, ids, strict=True):
        assert ours.spelling(index) == (text if isinstance(text, bytes) else text.encode()), index
    assert ours.spelling(10_000) is None


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_stop_strings_follow_the_rule_of_transformers(kind):
    theirs = TOKENIZERS[kind]()
    ours = fastgen.Tokenizer.of(theirs)
    known = sorted(theirs.get_vocab().values())
    hits = 0
    for seed in range(12):
        random = np.random.default_rng(seed)
        few = random.choice(known, 8)  # of few tokens, so that stop strings do occur
        rows = [random.choice(few, 24) for _ in range(6)]
        texts = []
        for row in rows[:4]:
            text = b"".join(ours.spelling(int(i)) or b"" for i in row).decode(errors="ignore")
            start, length = int(random.integers(len(text) + 1)), int(random.integers(1, 9))
            texts.append(text[start : start + length] or "x")
        criterion = StopStringCriteria(theirs, texts)
        found = StopStrings(ours.spelling, texts, ours.bytes_are is not None)
        for row in rows:
            for length in range(1, len(row) + 1):
                expected = bool(criterion(torch.tensor(row[None, :length]), None)[0])
                assert found(row[:length]) == expected, (texts, row[:length].tolist())
                hits += expected
    assert 50 < hits < 12 * 6 * 24 - 50


def pieces_of(ours: fastgen.CausalLM, row: list[int], start: int, count: int) -> str:
    """The text of some generated tokens, to serve as a stop string."""
    plain = ours.generate(row, eos_token_id=None, **GREEDY)[0][len(row) :]
    spelt = b"".join(ours.tokenizer.spelling(i) or b"" for i in plain[start : start + count])
    return spelt.decode(errors="ignore")


@pytest.mark.parametrize("eos", [2, None])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stop_strings_end_rows_as_there(pair, kind, eos):
    """With an eos, ended rows are padded; without one they go on until all have ended."""
    theirs, ours = pair(kind)
    rows = ragged(41, (3, 6, 9))
    ids, mask = left_padded(rows)
    texts = [text for i, row in enumerate(rows[:2]) if (text := pieces_of(ours, row, 2 + 3 * i, 2))]
    assert texts
    for more in ({}, {"num_beams": 3}):
        knobs = {**GREEDY, "eos_token_id": eos, "pad_token_id": 0, "stop_strings": texts, **more}
        expected = theirs.generate(ids, attention_mask=mask, tokenizer=tiny.tokenizer(), **knobs)
        found = ours.generate(ids, attention_mask=mask, **knobs)
        assert torch.equal(found, expected), more
        mine = ours.generate(ids, attention_mask=mask, tokenizer=tiny.tokenizer(), **knobs)
        assert torch.equal(mine, expected), more
    out = ours.generate(
        rows, return_dict_in_generate=True, **GREEDY, eos_token_id=eos, stop_strings=texts
    )
    assert "stop_string" in out.finish_reasons


class EndsWith(StoppingCriteria):
    """As people write them: for tensors, and remembering each row that has ended."""

    def __init__(self, tokens: list[int], remember: bool) -> None:
        self.tokens = torch.tensor(tokens)
        self.ended: torch.Tensor | None = None
        self.remember = remember

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = torch.isin(input_ids[:, -1], self.tokens.to(input_ids.device))
        if self.remember:
            self.ended = ended = ended if self.ended is None else self.ended | ended
        return ended


@pytest.mark.parametrize("eos", [2, None])
@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 0}])
def test_stopping_criteria_of_transformers_work_as_they_are(pair, eos, more):
    theirs, ours = pair("llama")
    rows = ragged(42, (3, 6, 9))
    ids, mask = left_padded(rows)
    ends = [ours.generate(row, eos_token_id=None, **GREEDY)[0][len(row) + 3] for row in rows[:2]]
    knobs = {**GREEDY, "eos_token_id": eos, "pad_token_id": 0, **more}

    def criteria() -> StoppingCriteriaList:
        return StoppingCriteriaList([EndsWith(ends, remember="num_beams" not in more)])

    torch.manual_seed(5)
    expected = theirs.generate(ids, attention_mask=mask, stopping_criteria=criteria(), **knobs)
    for given in (ids, ids.numpy(), rows):
        given_mask = None if given is rows else mask
        found = ours.generate(
            given, attention_mask=given_mask, stopping_criteria=criteria(), seed=5, **knobs
        )
        assert np.array_equal(found, expected)


def test_criteria_see_all_rows_and_what_they_were_chosen_from(pair):
    _, ours = pair("llama")
    rows = ragged(42, (3, 6, 9))
    plain = np.array(ours.generate(rows, eos_token_id=None, **GREEDY))
    eos = int(plain[0, 9 + 3])
    seen = []

    def criterion(ids: np.ndarray, scores: tuple[np.ndarray, ...]) -> bool:
        assert isinstance(ids, np.ndarray) and len(scores) == ids.shape[1] - 9
        assert scores[-1].dtype == np.float32
        running = ~(ids[:, 9:-1] == eos).any(axis=1)
        assert (scores[-1].argmax(axis=1) == ids[:, -1])[running].all()
        seen.append(ids.shape)
        return False

    kept = {"output_scores": True, "return_dict_in_generate": True}
    ours.generate(rows, eos_token_id=eos, stopping_criteria=[criterion], **GREEDY, **kept)
    assert seen == [(3, 9 + step) for step in range(1, 13)]
    # One, without a list; and nobody keeps scores.
    ours.generate(rows, stopping_criteria=lambda ids, scores: scores is None, **GREEDY)
    with pytest.raises(ValueError, match=r"of shape \(2,\), expected .* \(3,\)"):
        ours.generate(rows, stopping_criteria=[lambda ids, scores: [True, False]], **GREEDY)


def test_a_criterion_with_an_eos_pads_as_there(pair):
    theirs, ours = pair("llama")
    ids, mask = left_padded(ragged(42, (3, 6, 9)))
    plain = ours.generate(ids, attention_mask=mask, eos_token_id=None, **GREEDY)
    criteria = StoppingCriteriaList([EosTokenCriteria(eos_token_id=int(plain[0, 9 + 3]))])
    knobs = {**GREEDY, "attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(ids, stopping_criteria=criteria, **knobs)
    assert torch.equal(ours.generate(ids, stopping_criteria=criteria, **knobs), expected)


def test_max_time_ends_the_call(pair):
    _, ours = pair("llama")
    out = ours.generate(
        [[5, 6, 7], [8, 9, 3]],
        max_new_tokens=100,
        max_time=0.0,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert np.shape(out.sequences) == (2, 4) and out.finish_reasons == ["time", "time"]
    now = [0.0]

    def slow(ids, scores):
        now[0] += 1
        return False

    call = ours.call(
        [5, 6, 7],
        max_new_tokens=100,
        eos_token_id=None,
        stopping_criteria=[slow],
        return_dict_in_generate=True,
    )
    call.request.deadline = Deadline(15, clock=lambda: now[0])
    for _ in call.steps():
        pass
    out = call.result()
    assert out.finish_reasons == ["time"]
    assert now[0] == 16 and len(out.sequences[0]) == 3 + 16


# -- Callables -----------------------------------------------------------------------------------


class Favour(LogitsProcessor):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        more = torch.nn.functional.one_hot(input_ids[:, -1] * 0 + self.token, scores.shape[1])
        return scores + 3.0 * more


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.8}])
def test_logits_processors_of_transformers_work_as_they_are(pair, more):
    theirs, ours = pair("llama")
    rows = ragged(43, (5, 5))
    ids = torch.tensor(rows)
    knobs = {**GREEDY, "eos_token_id": None, "repetition_penalty": 1.2, **more}
    torch.manual_seed(2)
    expected = theirs.generate(ids, logits_processor=LogitsProcessorList([Favour(11)]), **knobs)
    assert (expected == 11).any()
    for given in (ids, rows):
        found = ours.generate(
            given, logits_processor=LogitsProcessorList([Favour(11)]), seed=2, **knobs
        )
        assert np.array_equal(found, expected)


def test_functions_get_what_the_ids_are(pair):
    theirs, ours = pair("llama")
    kinds: list[type] = []

    def processor(ids: Any, scores: Any) -> Any:
        kinds.extend((type(ids), type(scores)))
        return scores - 1.0

    def allowed(batch_id: int, ids: Any) -> list[int]:
        kinds.append(type(ids))
        return list(range(10 + batch_id, 60))

    ids = torch.tensor(ragged(44, (5, 5)))
    expected = theirs.generate(ids, prefix_allowed_tokens_fn=allowed, **GREEDY)
    for given, kind in ((ids, torch.Tensor), (ids.numpy(), np.ndarray), (ids.tolist(), np.ndarray)):
        kinds.clear()
        found = ours.generate(
            given, prefix_allowed_tokens_fn=allowed, logits_processor=[processor], **GREEDY
        )
        assert set(kinds) == {kind}
        assert np.array_equal(found, expected)


# -- Outputs -------------------------------------------------------------------------------------

OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 20, "temperature": 0.8, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.6},
        {"num_beams": 3, "do_sample": True},
    ],
)
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_scores_logits_and_transition_scores_are_those_of_transformers(pair, kind, more):
    theirs, ours = pair(kind)
    ids, mask = left_padded(ragged(45, (4, 9)))
    torch.manual_seed(3)
    plain = theirs.generate(ids, attention_mask=mask, **{**GREEDY, **more}, eos_token_id=None)
    knobs = {**GREEDY, **more, **OUTPUTS, "eos_token_id": int(plain[0, 9 + 4]), "pad_token_id": 0}
    torch.manual_seed(3)
    expected = theirs.generate(ids, attention_mask=mask, **knobs)
    found = ours.generate(ids, attention_mask=mask, seed=3, **knobs)
    assert torch.equal(found.sequences, expected.sequences)
    new = found.sequences[:, 9:]
    ended = torch.zeros(len(new), dtype=torch.bool)
    beams = "num_beams" in more
    for step, (a, b) in enumerate(zip(expected.scores, found.scores, strict=True)):
        assert isinstance(b, torch.Tensor) and b.dtype == torch.float32
        for x, y in ((a, b), (expected.logits[step], found.logits[step])):
            assert x.shape == y.shape
            torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3) if beams else (
                torch.testing.assert_close(y[~ended], x[~ended], rtol=1e-3, atol=1e-3)
            )
        ended |= new[:, step] == knobs["eos_token_id"] if not beams else False
    for normalize in (False, True):
        given = {"normalize_logits": normalize}
        if beams:
            given["beam_indices"] = expected.beam_indices
        a = theirs.compute_transition_scores(expected.sequences, expected.scores, **given)
        b = ours.compute_transition_scores(expected.sequences, expected.scores, **given)
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        as_arrays = {k: v.numpy() if k == "beam_indices" else v for k, v in given.items()}
        arrays = [step.numpy() for step in expected.scores]
        c = ours.compute_transition_scores(expected.sequences.tolist(), arrays, **as_arrays)
        assert isinstance(c, np.ndarray) and np.array_equal(c, b.numpy())
        mine = ours.compute_transition_scores(found.sequences, found.scores, **given)
        kept = torch.ones_like(new, dtype=torch.bool)
        if not beams:
            kept = (
                (new == knobs["eos_token_id"]).cumsum(1) - (new == knobs["eos_token_id"]).int()
            ) == 0
        torch.testing.assert_close(mine[kept], a[kept], rtol=1e-3, atol=1e-3)
        assert not mine[~kept].any()
    if beams:
        lengths = (found.beam_indices >= 0).sum(1)
        total = ours.compute_transition_scores(found.sequences, found.scores, found.beam_indices)
        penalty = lengths ** knobs.get("length_penalty", 1.0)
        torch.testing.assert_close(total.sum(1) / penalty, found.sequences_scores)
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores)
    else:
        assert found.sequences_scores is None and found.beam_indices is None


def test_outputs_are_found_by_name_and_by_place_and_lists_are_lists(pair):
    _, ours = pair("gpt2")
    out = ours.generate([[5, 6, 7]], top_logprobs=3, **OUTPUTS, **GREEDY)
    assert out["sequences"] is out[0] is out.sequences and isinstance(out.sequences, list)
    assert out[1] is out.scores and isinstance(out.scores[0], np.ndarray)
    bare = ours.generate([[5, 6, 7]], return_dict_in_generate=True, **GREEDY)
    assert bare.scores is None and bare.logits is None and bare.top_logprobs is None
    for step, token in enumerate(out.sequences[0][3:]):
        best = out.top_logprobs[0][step]
        assert best[0][0] == token and len(best) == 3
        logits = out.logits[step][0].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        for index, value in best:
            assert value == pytest.approx(expected[index], abs=1e-5)
        assert [value for _, value in best] == sorted((v for _, v in best), reverse=True)


# -- Streamers -----------------------------------------------------------------------------------


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[list[Any]] = []
        self.kinds: set[type] = set()
        self.ended = 0

    def put(self, value: Any) -> None:
        self.kinds.add(type(value))
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("more", [{}, {"do_sample": True, "num_return_sequences": 2}])
def test_streamers_get_what_transformers_puts(pair, more):
    theirs, ours = pair("llama")
    ids, mask = left_padded(ragged(46, (4, 7)))
    plain = ours.generate(ids, attention_mask=mask, seed=1, eos_token_id=None, **{**GREEDY, **more})
    knobs = {**GREEDY, "eos_token_id": int(plain[0, 7 + 3]), "pad_token_id": 0, **more}
    one, two, three = Recorder(), Recorder(), Recorder()
    torch.manual_seed(1)
    theirs.generate(ids, attention_mask=mask, streamer=one, **knobs)
    ours.generate(ids, attention_mask=mask, streamer=two, seed=1, **knobs)
    ours.generate(ids.numpy(), attention_mask=mask.numpy(), streamer=three, seed=1, **knobs)
    assert two.values == one.values == three.values
    assert two.ended == three.ended == 1
    assert two.kinds == {torch.Tensor} and three.kinds == {np.ndarray}


def test_guessed_tokens_are_put_all(pair, always_guess):
    theirs, ours = pair("llama")
    row = ragged(47, (6,))[0] * 3
    knobs = {**GREEDY, "prompt_lookup_num_tokens": 4, "eos_token_id": None}
    one, two = Recorder(), Recorder()
    theirs.generate(torch.tensor([row]), streamer=one, pad_token_id=0, **knobs)
    out = ours.generate([row], streamer=two, **knobs)
    assert two.values[0] == one.values[0] == [row]
    for recorder in (one, two):
        put = [token for value in recorder.values[1:] for token in np.ravel(value).tolist()]
        assert put == out[0][len(row) :]
    assert max(np.size(value) for value in two.values[1:]) > 1
    with pytest.raises(ValueError, match="streamer cannot follow 2 rows"):
        ours.generate([row, row], streamer=two, **knobs)
    with pytest.raises(ValueError, match="streamer cannot be used with num_beams=2"):
        ours.generate([row], streamer=two, num_beams=2, max_new_tokens=3)


@pytest.mark.parametrize("more", [{}, {"prompt_lookup_num_tokens": 3}])
def test_text_streamers_of_transformers_work_as_they_are(pair, capsys, more):
    _, ours = pair("llama")
    tokenizer = tiny.tokenizer()
    row = tokenizer("the quick the quick the")["input_ids"]
    knobs = {**GREEDY, **more, "max_new_tokens": 30, "eos_token_id": None}
    text = tokenizer.decode(ours.generate(row, **knobs)[0][len(row) :])
    ours.generate(row, streamer=TextStreamer(tokenizer, skip_prompt=True), **knobs)
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=lambda: ours.generate(row, streamer=streamer, **knobs))
    thread.start()
    assert "".join(streamer) == text
    thread.join()


# -- Configurations ------------------------------------------------------------------------------

CHOICES: dict[str, list[Any]] = {
    "max_length": [30, 40], "max_new_tokens": [5, 9], "min_length": [3], "min_new_tokens": [2],
    "do_sample": [True, False], "num_beams": [1, 3], "early_stopping": [True, "never"],
    "temperature": [0.7, 1.0], "top_k": [0, 7, 50], "top_p": [0.9, 1.0], "min_p": [0.1],
    "typical_p": [0.8], "epsilon_cutoff": [0.02], "eta_cutoff": [0.01], "top_h": [0.5],
    "repetition_penalty": [1.2], "length_penalty": [0.5, 2.0], "no_repeat_ngram_size": [2],
    "renormalize_logits": [True], "guidance_scale": [1.5], "pad_token_id": [0, 3],
    "eos_token_id": [2, [2, 5]], "bos_token_id": [1], "suppress_tokens": [[4, 5]],
    "exponential_decay_length_penalty": [(3, 1.2)], "bad_words_ids": [[[7, 8]]],
    "forced_eos_token_id": [2], "output_scores": [True], "return_dict_in_generate": [True],
    "use_cache": [True, False], "stop_strings": [["x"]], "num_assistant_tokens": [7],
}  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_settings_merge_as_in_transformers(pair, seed):
    theirs, _ = pair("gpt2")
    random = np.random.default_rng(seed)

    def some(share: float, off: float = 0.0) -> dict[str, Any]:
        drawn = {k: v[int(random.integers(len(v)))] for k, v in CHOICES.items()}
        kept = {k: v for k, v in drawn.items() if random.random() < share}
        return {
            k: None if random.random() < off and k != "max_length" else v for k, v in kept.items()
        }

    model_defaults = GenerationConfig(**some(0.3))
    config = GenerationConfig(**some(0.3)) if random.random() < 0.7 else None
    kwargs = some(0.3, off=0.3)
    kept, theirs.generation_config = theirs.generation_config, model_defaults
    try:
        expected, _ = theirs._prepare_generation_config(config, **kwargs)
    finally:
        theirs.generation_config = kept
    given = config.to_dict() if config is not None else None
    found = params.resolve(model_defaults.to_dict(), given, kwargs)
    merged = {name: getattr(expected, name) for name in CHOICES.keys() & params.NAMES}
    if all(not c.get("max_length") for c in (kwargs, given or {}, model_defaults.to_dict())):
        assert merged.pop("max_length") == 20  # 20 new tokens, see `stop.length_limit`
    if merged["top_k"] is None:
        merged["top_k"] = 0
    assert found == params.Params(**{k: v for k, v in merged.items() if v is not None})


def test_a_configuration_may_be_an_object_a_dict_and_the_second_argument(pair):
    theirs, ours = pair("llama")
    ids = torch.tensor([[5, 6, 7]])
    config = GenerationConfig(max_new_tokens=6, num_beams=2, repetition_penalty=1.3, pad_token_id=0)
    expected = theirs.generate(ids, config)
    assert torch.equal(ours.generate(ids, config), expected)
    assert torch.equal(ours.generate(ids, generation_config=config.to_dict()), expected)
    greedy = theirs.generate(ids, config, num_beams=1)
    assert torch.equal(ours.generate(ids, config, num_beams=1), greedy)
    with pytest.raises(ValueError, match=r"generation_config must be a dict or have to_dict"):
        ours.generate(ids, 5)
    with pytest.raises(ValueError, match="temprature is not a keyword"):
        ours.generate(ids, {"temprature": 3})


def test_without_its_defaults_it_is_the_same_model_and_the_other_keeps_them(ours):
    before = ours.generation_config.to_dict()
    assert before["eos_token_id"] == 2
    rows, every = [[5, 6, 7], [8, 9, 11]], {"eos_token_id": None, "pad_token_id": None}
    plain = ours.without_defaults()
    assert plain.generation_config.to_dict() == {} and plain.model is ours.model
    found = plain.generate(rows, max_new_tokens=9)
    assert found == ours.generate(rows, max_new_tokens=9, **every)
    plain.generation_config.max_new_tokens = 3
    assert ours.generation_config.to_dict() == before


def test_what_the_models_own_file_asks_for_is_done_or_an_error(pair):
    _, ours = pair("gpt2")
    ours = fastgen.load(ours.directory)
    ours.generation_config.chat_format = "chatml"  # a note of its own, as some models have
    config = {"chat_format": "chatml", "max_new_tokens": 3}
    assert len(ours.generate([5, 6], config)[0]) == 5
    ours.generation_config.penalty_alpha = 0.6
    with pytest.raises(ValueError, match=r"penalty_alpha=0.6 \(the model's own default\) is not"):
        ours.generate([5, 6])
    assert len(ours.generate([5, 6], penalty_alpha=None, max_new_tokens=3)[0]) == 5
    ours.generation_config = GenerationConfig(max_new_tokens=4, eos_token_id=None)
    assert len(ours.generate([5, 6])[0]) == 6


def test_every_argument_of_transformers_generate_is_known(pair):
    import inspect

    theirs, _ = pair("gpt2")
    names = set(GenerationConfig().to_dict()) | set(inspect.signature(theirs.generate).parameters)
    names -= {"self", "kwargs", "inputs"}
    assert {n for n in names if n[0] != "_"} <= params.KNOWN | set(params.ARGUMENTS)


def test_the_table_of_knobs_in_the_docs_is_the_code():
    page = Path(fastgen.__file__).parents[1] / "docs" / "knobs.md"
    text = page.read_text(encoding="utf-8")
    found = re.search(r"<!-- knobs -->\n(.*)\n<!-- /knobs -->", text, re.DOTALL)
    wanted = 'python -c "import fastgen.inputs.params as p; print(p.table())"'
    assert found and found[1].strip() == params.table(), f"the section is the output of {wanted}"


# -- Guesses and healing, as transformers' users call them -----------------------------------------


def test_an_assistant_is_called_as_in_transformers(pair):
    theirs, ours = pair("llama")
    ids = torch.tensor([ragged(48, (6,))[0]])
    expected = theirs.generate(ids, assistant_model=theirs, pad_token_id=0, **GREEDY)
    assert torch.equal(ours.generate(ids, assistant_model=ours, **GREEDY), expected)
    with pytest.raises(ValueError, match="assistant_model must be a fastgen model, got LlamaFor"):
        ours.generate(ids, assistant_model=theirs, **GREEDY)
    with pytest.raises(ValueError, match=r"assistant_tokenizer=.* is not supported: an assistant"):
        ours.generate(ids, assistant_model=ours, assistant_tokenizer="t", tokenizer="t")


def test_healed_prompts_are_those_of_transformers(pair):
    theirs, ours = pair("gpt2")
    tokenizer = tiny.tokenizer()
    healed = 0
    for text in (
        "The quick br",
        "import n",
        "good b",
        "every fo",
        "on and o",
        "one",
        "return t",
        "as n",
        "fudge; n",
        "and s",
        "over t",
        "quick f",
        "la",
    ):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        knobs = {**GREEDY, "token_healing": True, "tokenizer": tokenizer}
        expected = theirs.generate(ids, **knobs)
        assert torch.equal(ours.generate(ids, **knobs), expected), text
        cut = tokenizer(text.strip())["input_ids"]
        healed += expected[0, : len(cut)].tolist() != cut
    assert healed
    assert ours.generate([5], token_healing=True, max_new_tokens=2)[0][0] == 5


def test_a_healed_prompt_begins_with_what_was_asked():
    """However unlikely: only what continues the last token takes its place."""
    model = fastgen.load()
    text = "Return a list of the strings http"
    for end in range(8, len(text)):
        cut = model.tokenizer.decode(model.tokenizer.encode(text[:end].strip()))
        out = model.generate(
            model.tokenizer.encode(text[:end]),
            token_healing=True,
            max_new_tokens=1,
            repetition_penalty=9.0,
            eos_token_id=None,
        )
        assert model.tokenizer.decode(out[0]).startswith(cut), text[:end]


def test_what_the_last_token_becomes_is_one_that_it_begins():
    """A model that wants something else by far more than the bias is not asked for it."""
    model = fastgen.load()
    ids, other = model.tokenizer.encode("The lis"), model.tokenizer.encode("x")[-1]
    prompt = token_healing.reopen(ids, model.tokenizer)
    assert (prompt.ids, prompt.biases[ids[-1]]) == (ids[:-1], token_healing.ORIGINAL)
    defaults, biases = {"logit_bias": {other: 900.0}}, prompt.biases
    loaded = prepare.Loaded(model.model, defaults, lambda: model.tokenizer)
    one = prepare.last_token(loaded, prompt)
    found = next(step.events[0].token for step in one.steps() if step.events)
    assert found in biases and other not in biases


# -- Several sequences of a prompt -----------------------------------------------------------------


def test_allowed_tokens_are_asked_for_by_the_number_of_the_prompt(pair):
    theirs, ours = pair("llama")
    ids = torch.tensor(ragged(45, (5, 5)))
    asked: list[int] = []

    def allowed(batch_id: int, ids: Any) -> list[int]:
        asked.append(batch_id)
        return list(range(10 + 20 * batch_id, 40 + 20 * batch_id))

    knobs = {
        "do_sample": True,
        "num_return_sequences": 3,
        "max_new_tokens": 6,
        "eos_token_id": None,
    }
    torch.manual_seed(3)
    expected = theirs.generate(ids, prefix_allowed_tokens_fn=allowed, **knobs)
    there, asked[:] = asked[:], []
    found = ours.generate(ids, prefix_allowed_tokens_fn=allowed, seed=3, **knobs)
    assert torch.equal(found, expected) and asked == there


def test_every_row_has_a_text_even_an_empty_one():
    """As many as were asked for; a row may have no token at all."""
    model = fastgen.load()
    knobs = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6}
    assert len(model.complete(["x", "Return"], regex="ab|c", **knobs)) == 6
    groups = {"num_beam_groups": 3, "diversity_penalty": 1.0}
    found = model.complete("x", regex="ab", **knobs, **groups)
    assert isinstance(found, list) and len(found) == 3
    assert "ab" in found


@pytest.mark.parametrize("eos", [None, 7])
@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("beams", [2, 3, 4])
def test_fewer_texts_than_beams_are_repeated(pair, eos, new, beams):
    """There as here: with one text that may be, no sequence is empty and none has a token -1."""
    _, ours = pair("llama")
    knobs = {"num_beams": beams, "num_return_sequences": beams, "max_new_tokens": new}
    found = ours.generate(
        [5, 6, 8], prefix_allowed_tokens_fn=lambda *_: [9], eos_token_id=eos, **knobs
    )
    assert found == [[5, 6, 8] + [9] * new] * beams
