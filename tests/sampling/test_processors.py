"""Every processor against transformers' own class, the chain against transformers' order.

Where a sum is compared with a bound (top_p, typical_p, top_h), fastgen and torch add float32
numbers in different orders, so a sum within about 1e-6 of the bound may fall on either side.
The examples below are drawn with fixed seeds and none of them does; nothing is excused. Among
*equal* logits torch's choice is arbitrary (its sort is not stable): there the kept values are
compared, not their places.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as hf

from fastgen.inputs.params import Params
from fastgen.sampling import processors, watermark
from fastgen.sampling.processors import Chain, Context, build

VOCAB = 48  # transformers' selfhash needs 40
EOS = 3
INF = float("inf")


# -- Helpers -------------------------------------------------------------------------------------


def context(ids, prompt=None, max_length=1000, pads=None) -> Context:
    rows = len(ids)
    ids = [np.asarray(row, dtype=np.int64) for row in ids]
    prompts = [len(row) for row in ids] if prompt is None else [prompt] * rows
    return Context(
        ids=ids,
        prompt_lengths=np.array(prompts),
        max_lengths=np.full(rows, max_length),
        pads=np.zeros(rows, dtype=np.int64) if pads is None else np.asarray(pads),
        batch_ids=np.arange(rows),
    )


def nothing(rows: int) -> Context:
    return context([[1, 2]] * rows)


def torch_of(processor, ids, logits: np.ndarray) -> np.ndarray:
    """The result of a transformers processor for equally long rows."""
    with torch.no_grad():
        out = processor(torch.tensor(np.array(ids)), torch.tensor(logits))
    return out.numpy()


def logits_cases() -> dict[str, np.ndarray]:
    """Logits [rows, vocab] float32: ordinary, and of every kind that breaks code."""
    rng = np.random.default_rng(0)
    normal = (rng.standard_normal((6, VOCAB)) * 3).astype(np.float32)
    some_banned = normal.copy()
    some_banned[rng.random(normal.shape) < 0.6] = -INF
    one_left = np.full((3, VOCAB), -INF, dtype=np.float32)
    one_left[range(3), [0, 5, VOCAB - 1]] = [1.5, -2, 0]
    two_left = one_left.copy()
    two_left[:, 7] = 0.25
    return {
        "normal": normal,
        "sharp": normal * 8,
        "flat": normal * np.float32(0.05),
        "negative": normal - 50,
        "some banned": some_banned,
        "one left": one_left,
        "two left": two_left,
        "large": (rng.standard_normal((2, 5000)) * 4).astype(np.float32),
        "tiny": (rng.standard_normal((4, 2))).astype(np.float32),
        "single": np.array([[0.3], [-2.0]], dtype=np.float32),
    }


def broken_cases() -> dict[str, np.ndarray]:
    """Logits that no distribution belongs to."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((2, VOCAB)).astype(np.float32)
    with_nan, with_inf, huge = base.copy(), base.copy(), base.copy()
    with_nan[0, 4] = np.nan
    with_inf[0, 4] = INF
    huge[0, :2] = [3.4e38, -3.4e38]
    return {
        "nan": with_nan,
        "inf": with_inf,
        "all banned": np.full((2, VOCAB), -INF, dtype=np.float32),
        "huge": huge,
    }


def tied_cases() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {
        "all equal": np.zeros((2, VOCAB), dtype=np.float32),
        "few values": rng.integers(-2, 3, (6, VOCAB)).astype(np.float32),
        "few values, some banned": np.where(
            rng.random((6, VOCAB)) < 0.5, -INF, rng.integers(0, 3, (6, VOCAB))
        ).astype(np.float32),
    }


WARPERS = [
    *((processors.temperature, (t,), hf.TemperatureLogitsWarper(t)) for t in (0.1, 0.7, 1.3, 50.0)),
    *(
        (processors.top_p, (p, keep), hf.TopPLogitsWarper(p, min_tokens_to_keep=keep))
        for p in (0.0, 0.1, 0.5, 0.9, 0.999)
        for keep in (1, 3)
    ),
    *(
        (processors.min_p, (p, keep), hf.MinPLogitsWarper(p, min_tokens_to_keep=keep))
        for p in (0.0, 0.05, 0.5, 1.0)
        for keep in (1, 3)
    ),
    *(
        (processors.typical_p, (p, keep), hf.TypicalLogitsWarper(p, min_tokens_to_keep=keep))
        for p in (0.01, 0.2, 0.9, 0.995)
        for keep in (1, 3)
    ),
    *(
        (processors.epsilon_cutoff, (p, keep), hf.EpsilonLogitsWarper(p, min_tokens_to_keep=keep))
        for p in (1e-4, 0.02, 0.9)
        for keep in (1, 3)
    ),
    *(
        (processors.eta_cutoff, (p, keep), hf.EtaLogitsWarper(p, min_tokens_to_keep=keep))
        for p in (1e-4, 0.02, 0.9)
        for keep in (1, 3)
    ),
    *((processors.top_h, (h,), hf.TopHLogitsWarper(h)) for h in (0.05, 0.4, 0.9)),
    *(
        (processors.top_k, (max(k, keep),), hf.TopKLogitsWarper(k, min_tokens_to_keep=keep))
        for k in (1, 2, 10, 1000)
        for keep in (1, 3)
    ),
]
warpers = pytest.mark.parametrize(
    ("ours", "knobs", "theirs"), WARPERS, ids=[f"{w[0].__name__}{w[1]}" for w in WARPERS]
)


# -- Warpers -------------------------------------------------------------------------------------


def warped(theirs, logits: np.ndarray) -> np.ndarray:
    return torch_of(theirs, np.zeros((len(logits), 1), int), logits)


def assert_same_cut(ours: np.ndarray, theirs, logits: np.ndarray, case: str) -> None:
    """Equal; but it is arbitrary which impossible tokens min_p and typical_p keep to have enough.

    Those whose probability is 0 in float32 have equal ranks there; fastgen takes the likeliest.
    """
    expected = warped(theirs, logits)
    if isinstance(theirs, hf.MinPLogitsWarper | hf.TypicalLogitsWarper):
        extra = (processors.softmax(logits) == 0) & (ours != expected)
        assert (extra.sum(axis=1) <= 2 * theirs.min_tokens_to_keep).all()
        ours, expected = np.where(extra, -INF, ours), np.where(extra, -INF, expected)
    np.testing.assert_array_equal(ours, expected, err_msg=case)


@warpers
def test_warper_equals_transformers(ours, knobs, theirs):
    for case, logits in logits_cases().items():
        assert_same_cut(ours(logits, *knobs), theirs, logits, case)


@warpers
def test_warper_keeps_as_many_of_equal_logits(ours, knobs, theirs):
    for case, logits in tied_cases().items():
        out, expected = ours(logits, *knobs), warped(theirs, logits)
        np.testing.assert_array_equal(np.sort(out), np.sort(expected), err_msg=case)


@warpers
def test_warper_of_broken_logits(ours, knobs, theirs):
    for case, logits in broken_cases().items():
        out = ours(logits, *knobs)
        if isinstance(theirs, hf.EtaLogitsWarper | hf.TopHLogitsWarper) and case != "huge":
            bad = ~np.isfinite(logits.max(axis=1))  # transformers raises
            np.testing.assert_array_equal(out[bad], logits[bad])
        else:
            assert_same_cut(out, theirs, logits, case)


@pytest.mark.parametrize("vocab", [1, 50, 3300, 50257])
@pytest.mark.parametrize("k", [1, 2, 50])
def test_kth_largest(vocab, k):
    rng = np.random.default_rng(3)
    k = min(k, vocab)
    for values in (rng.standard_normal(vocab), rng.integers(0, 4, vocab), -np.arange(vocab)):
        values = values.astype(np.float32)
        assert processors._kth_largest(values, k) == np.sort(values)[-k]
        values[rng.integers(0, vocab, vocab // 2)] = -INF
        assert processors._kth_largest(values, k) == np.sort(values)[-k]


def test_top_p_of_nothing_is_greedy_among_equals():
    logits = tied_cases()["few values"]
    kept = processors.top_p(logits, 0.0)
    np.testing.assert_array_equal(np.isfinite(kept).sum(axis=1), 1)
    np.testing.assert_array_equal(kept.argmax(axis=1), logits.argmax(axis=1))


@pytest.mark.parametrize("top_p", [0.3, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_warpers_on_a_large_vocabulary(top_p, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((2, 50257)) * (1 + 2 * seed)).astype(np.float32)
    for ours, knobs, theirs in (
        (processors.top_p, (top_p,), hf.TopPLogitsWarper(top_p)),
        (processors.typical_p, (top_p,), hf.TypicalLogitsWarper(top_p)),
    ):
        kept = np.isfinite(ours(logits, *knobs))
        expected = np.isfinite(warped(theirs, logits))
        # Thousands of tokens of about 1e-6 lie at such a cut: the last one is within rounding.
        assert abs(kept.sum() - expected.sum()) <= 1e-3 * expected.sum()
        mass = processors.softmax(logits.astype(np.float64))
        assert (mass * (kept != expected)).sum() < 5e-5


# -- Penalties and bans --------------------------------------------------------------------------


def histories(seed: int, rows: int = 4, length: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 6, (rows, length))


def random_logits(seed: int, rows: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, VOCAB)) * 3).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -INF
    return logits


@pytest.mark.parametrize("penalty", [0.3, 1.2, 1e30])
@pytest.mark.parametrize("pads", [None, [0, 3, 5, 12]])
def test_repetition_penalty(penalty, pads):
    ids, logits = histories(0), random_logits(1)
    logits[:, 3] *= 1e20
    theirs = hf.RepetitionPenaltyLogitsProcessor(
        penalty, None if pads is None else torch.tensor(pads)
    )
    ours = processors.repetition_penalty(context(ids, pads=pads), logits.copy(), penalty)
    np.testing.assert_array_equal(ours, torch_of(theirs, ids, logits))


def test_repetition_penalty_of_ids_beyond_the_logits():
    ids, logits = histories(0), random_logits(1)
    ids[0, 3] = VOCAB + 4
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.5)
    ours = processors.repetition_penalty(context(ids), logits.copy(), 1.5)
    np.testing.assert_array_equal(ours, torch_of(theirs, ids, logits))


@pytest.mark.parametrize("penalty", [0.3, 1.2])
def test_encoder_repetition_penalty(penalty):
    ids, logits = histories(0), random_logits(1)
    theirs = hf.EncoderRepetitionPenaltyLogitsProcessor(penalty, torch.tensor(ids[:, :5]))
    ours = processors.encoder_repetition_penalty(context(ids, prompt=5), logits.copy(), penalty)
    np.testing.assert_array_equal(ours, torch_of(theirs, ids, logits))


@pytest.mark.parametrize("size", [1, 2, 3, 12, 13, 20])
@pytest.mark.parametrize("seed", range(4))
def test_no_repeat_ngram(size, seed):
    ids, logits = histories(seed) % 3, random_logits(seed)
    ours = processors.no_repeat_ngram(context(ids), logits.copy(), size)
    theirs = torch_of(hf.NoRepeatNGramLogitsProcessor(size), ids, logits)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("length", [7, 8, 12])
def test_encoder_no_repeat_ngram(size, length):
    ids, logits = histories(5)[:, :length] % 3, random_logits(5)
    theirs = hf.EncoderNoRepeatNGramLogitsProcessor(size, torch.tensor(ids[:, :7]))
    ours = processors.encoder_no_repeat_ngram(context(ids, prompt=7), logits.copy(), size)
    np.testing.assert_array_equal(ours, torch_of(theirs, ids, logits))


BIASES = {(4,): 2.5, (1,): -7.0, (0, 4): 1.25, (1, 4): -INF, (2, 4): 0.5, (1, 2, 3, 5): 9.0}
BIASES |= {(0,) * 13: 3.0, tuple(histories(6)[0, -3:]) + (4,): 0.1}


def test_sequence_bias():
    ids, logits = histories(6), random_logits(6)
    groups = processors.by_prefix_length("sequence_bias", BIASES, VOCAB)
    theirs = hf.SequenceBiasLogitsProcessor([[list(k), v] for k, v in BIASES.items()])
    ours = processors.sequence_bias(context(ids), logits.copy(), groups)
    np.testing.assert_allclose(ours, torch_of(theirs, ids, logits), rtol=1e-6)
    assert not np.array_equal(ours, logits)


def test_bad_words_leave_out_eos():
    ids, logits = histories(6), random_logits(6)
    words = [[EOS], [5], [int(ids[0, -1]), EOS], [0, 1, 2], [6, 7]]
    theirs = hf.NoBadWordsLogitsProcessor(words, torch.tensor([EOS, 9]))
    chain = build(Params(bad_words_ids=words, eos_token_id=[EOS, 9]), VOCAB)
    np.testing.assert_array_equal(chain(context(ids), logits), torch_of(theirs, ids, logits))


def test_classifier_free_guidance():
    logits, unconditional = random_logits(7), random_logits(8)
    for scale in (0.0, 0.5, 1.5, -2.0):
        ours = processors.classifier_free_guidance(logits, unconditional, scale)
        a, b = (torch.tensor(x).log_softmax(-1) for x in (logits, unconditional))
        np.testing.assert_allclose(ours, (scale * (a - b) + b).numpy(), rtol=1e-5, atol=1e-5)


def test_guidance_uses_the_unconditional_logits():
    logits, unconditional = random_logits(7), random_logits(8)
    chain = build(Params(guidance_scale=1.5), VOCAB, unconditional=lambda context: unconditional)
    expected = processors.classifier_free_guidance(logits, unconditional, 1.5)
    np.testing.assert_array_equal(chain(nothing(4), logits), expected)
    with pytest.raises(ValueError, match="guidance_scale"):
        build(Params(guidance_scale=1.5), VOCAB)


def allow_some(batch_id: int, ids) -> list[int]:
    return [batch_id, int(ids[-1]) + 1, 7]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_prefix_allowed_tokens(num_beams):
    ids, logits = histories(9), random_logits(9)
    logits[:3] = -INF
    logits[3, 7] = 1.0
    theirs = hf.PrefixConstrainedLogitsProcessor(allow_some, num_beams)
    rows = Context(**(vars(context(ids)) | {"batch_ids": np.arange(4) // num_beams}))
    ours = processors.prefix_allowed_tokens(rows, logits.copy(), allow_some)
    np.testing.assert_array_equal(ours, torch_of(theirs, ids, logits))


@pytest.mark.parametrize("returned", [[], [VOCAB], [-1]])
def test_prefix_allowed_tokens_must_exist(returned):
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
        processors.prefix_allowed_tokens(nothing(2), random_logits(0, 2), lambda *_: returned)


def test_remove_invalid_values():
    for logits in (*broken_cases().values(), *logits_cases().values()):
        expected = torch_of(hf.InfNanRemoveLogitsProcessor(), [[0]], logits)
        np.testing.assert_array_equal(processors.remove_invalid_values(logits), expected)


@pytest.mark.parametrize("length", [5, 7, 8, 12])
def test_exponential_decay_length_penalty(length):
    ids, logits = histories(10)[:, :length], random_logits(10)
    eos = np.array([EOS, 8])
    theirs = hf.ExponentialDecayLengthPenalty((2, 1.7), eos.tolist(), 5)
    ours = processors.exponential_decay_length_penalty(context(ids, 5), logits.copy(), 2, 1.7, eos)
    np.testing.assert_allclose(ours, torch_of(theirs, ids, logits), rtol=1e-6)


def test_exponential_decay_after_very_long_texts_is_finite_or_infinite_but_not_nan():
    logits = np.array([[0.0, 1.0, -1.0]], dtype=np.float32)
    late = context([np.zeros(3000, dtype=int)], prompt=1)
    out = processors.exponential_decay_length_penalty(
        late, logits.copy(), 0, 1.6, np.array([0, 1, 2])
    )
    assert not np.isnan(out).any()


def test_renormalize_logits():
    for logits in logits_cases().values():
        expected = torch_of(hf.LogitNormalization(), [[0]], logits)
        np.testing.assert_allclose(processors.log_softmax(logits), expected, rtol=1e-5, atol=1e-5)


def test_openai_penalties():
    logits = np.zeros((2, 5), dtype=np.float32)
    rows = context([[0, 1, 2, 2, 3], [4, 4, 4, 4, 4]], prompt=2)
    chain = build(Params(frequency_penalty=0.5, presence_penalty=0.25), 5)
    np.testing.assert_array_equal(
        chain(rows, logits), [[0, 0, -1.25, -0.75, 0], [0, 0, 0, 0, -1.75]]
    )
    chain = build(Params(logit_bias={"1": 2, 3: -100}), 5)
    np.testing.assert_array_equal(chain(rows, logits), [[0, 2, 0, -100, 0]] * 2)


# -- User callables ------------------------------------------------------------------------------


def test_user_processors_run_in_their_place():
    seen = []

    def shift(ids, scores):
        seen.append((ids, scores.copy()))
        scores += 1
        return scores.astype(np.float64)

    chain = build(
        Params(suppress_tokens=[2], do_sample=True, temperature=2.0),
        VOCAB,
        logits_processor=[shift],
    )
    assert [step.name for step in chain.steps] == [
        "suppress_tokens",
        "logits_processor shift",
        "temperature",
        "top_k",
    ]
    logits = np.zeros((2, VOCAB), dtype=np.float32)
    out = chain(context([[1, 2], [3, 4]]), logits)
    assert out.dtype == np.float32 and out[0, 0] == 0.5 and (logits == 0).all()
    np.testing.assert_array_equal(seen[0][0], [[1, 2], [3, 4]])
    assert seen[0][1][0, 2] == -INF


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda ids, scores: None, "lambda.*float array, got NoneType"),
        (lambda ids, scores: scores > 0, "lambda.*float array, got bool"),
        (lambda ids, scores: scores[0], "lambda.*shape"),
    ],
)
def test_user_processors_are_checked(answer, message):
    chain = build(Params(), VOCAB, logits_processor=[answer])
    with pytest.raises(ValueError, match=message):
        chain(nothing(2), random_logits(0, 2))


def test_user_processors_are_asked_one_length_at_a_time():
    seen = []

    def shift(ids, scores):
        seen.append(ids.tolist())
        return scores + ids[:, -1:]

    logits = random_logits(0, 3)
    chain = build(Params(), VOCAB, logits_processor=[shift])
    out = chain(context([[1, 7], [3], [5, 2]]), logits)
    assert seen == [[[3]], [[1, 7], [5, 2]]]
    np.testing.assert_array_equal(out, logits + np.float32([[7], [3], [2]]))


# -- Watermarks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 50, 1009])
@pytest.mark.parametrize("seed", [0, 1, 15485863, 2**64 - 5])
def test_randperm_is_that_of_torch(n, seed):
    expected = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_array_equal(watermark.randperm(n, n, seed), expected)
    np.testing.assert_array_equal(watermark.randperm(n, n // 3, seed), expected[: n // 3])


GREEN = [
    {},
    {"greenlist_ratio": 0.6, "bias": 1.0, "hashing_key": 7},
    {"seeding_scheme": "selfhash", "greenlist_ratio": 0.5},
    {"seeding_scheme": "selfhash", "context_width": 4},
    {"context_width": 13},
]


@pytest.mark.parametrize("config", GREEN, ids=str)
def test_green_lists(config):
    rng = np.random.default_rng(11)
    vocab = 300
    logits = (rng.standard_normal((3, vocab)) * 3).astype(np.float32)
    ids = rng.integers(0, vocab, (3, 12))
    theirs = hf.WatermarkLogitsProcessor(vocab, "cpu", **config)
    chain = build(Params(watermarking_config=config), vocab)
    ours = chain(context(ids), logits)
    np.testing.assert_array_equal(ours, torch_of(theirs, ids, logits))
    assert config.get("context_width") == 13 or not np.array_equal(ours, logits)


SYNTHID = [
    {"ngram_len": 5, "keys": [654, 400, 836, 123]},
    {"ngram_len": 2, "keys": [1, 2**40], "context_history_size": 3},
    {"ngram_len": 3, "keys": [654, 400], "skip_first_ngram_calls": True},
    {"ngram_len": 1, "keys": [5]},
    {"ngram_len": 3, "keys": [9, 8], "debug_mode": True, "sampling_table_size": 101},
]


@pytest.mark.parametrize("config", SYNTHID, ids=str)
def test_synthid_over_many_steps(config):
    rng = np.random.default_rng(12)
    config = transformers.SynthIDTextWatermarkingConfig(**config)
    theirs = config.construct_processor(VOCAB, "cpu")
    chain = build(Params(watermarking_config=config), VOCAB)
    ids, marked = rng.integers(0, 3, (3, 4)), 0
    for _ in range(25):
        logits = random_logits(int(rng.integers(1000)), 3)
        ours, expected = chain(context(ids, prompt=4), logits), torch_of(theirs, ids, logits)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)
        marked += not np.array_equal(ours, logits)
        ids = np.concatenate((ids, rng.integers(0, 3, (3, 1))), axis=1)  # few ids: they repeat
    assert marked


def test_synthid_of_a_row_does_not_depend_on_who_left():
    config = {"ngram_len": 3, "keys": [9, 8]}
    chain = build(Params(watermarking_config=config), VOCAB)
    ids, logits = histories(13), random_logits(13)
    whole = chain(context(ids, prompt=4), logits)
    np.testing.assert_array_equal(chain(context(ids[2:], prompt=4), logits[2:]), whole[2:])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seeding_scheme": "left"}, "seeding_scheme"),
        ({"greenlist_ratio": 1.0}, "greenlist_ratio"),
        ({"context_width": 0}, "context_width"),
        ({"biass": 1.0}, "biass"),
        ({"ngram_len": 5}, "keys"),
        ({"ngram_len": 5, "keys": []}, "keys"),
        ({"ngram_len": 5, "keys": [1], "sampling_table_size": 2**25}, "sampling_table_size"),
        ("green", "to_dict"),
    ],
)
def test_watermarking_config_is_checked(config, message):
    with pytest.raises(ValueError, match=message):
        build(Params(watermarking_config=config), VOCAB)


# -- The chain -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=8, n_layer=1, n_head=1)
    return GPT2LMHeadModel(config).eval()


KNOBS = {
    "guidance_scale": st.sampled_from([1.0, 1.5, 0.5]),
    "sequence_bias": st.just([[[4], 2.0], [[1, 2], -3.0], [[0, 1, 2], 4.0]]),
    "encoder_repetition_penalty": st.sampled_from([1.0, 0.7, 1.4]),
    "repetition_penalty": st.sampled_from([1.0, 0.7, 1.4]),
    "no_repeat_ngram_size": st.integers(0, 3),
    "encoder_no_repeat_ngram_size": st.integers(0, 3),
    "bad_words_ids": st.just([[5], [0, 1], [EOS]]),
    "min_length": st.integers(0, 16),
    "min_new_tokens": st.sampled_from([0, 2, 6]),
    "forced_bos_token_id": st.just(2),
    "forced_eos_token_id": st.sampled_from([EOS, [EOS, 1]]),
    "remove_invalid_values": st.booleans(),
    "exponential_decay_length_penalty": st.just((2, 1.2)),
    "suppress_tokens": st.just([1, 9]),
    "begin_suppress_tokens": st.just([2, 10]),
    "temperature": st.sampled_from([1.0, 0.6, 1.9]),
    "top_h": st.sampled_from([0.3, 0.8]),
    "top_k": st.sampled_from([0, 1, 5, 50]),
    "top_p": st.sampled_from([1.0, 0.3, 0.9]),
    "min_p": st.sampled_from([0.01, 0.2]),
    "typical_p": st.sampled_from([1.0, 0.4, 0.9]),
    "epsilon_cutoff": st.sampled_from([0.0, 0.01]),
    "eta_cutoff": st.sampled_from([0.0, 0.01]),
    "watermarking_config": st.sampled_from([GREEN[1], GREEN[2]]),
    "renormalize_logits": st.booleans(),
}


@st.composite
def some_knobs(draw) -> dict:
    names = draw(st.sets(st.sampled_from(sorted(KNOBS)), max_size=8))
    knobs = {name: draw(KNOBS[name]) for name in sorted(names)}
    return knobs | {
        "do_sample": draw(st.booleans()),
        "num_beams": draw(st.sampled_from([1, 2])),
        "eos_token_id": draw(st.sampled_from([EOS, [EOS, 6]])),
    }


def theirs_of(model, knobs: dict, prompt: np.ndarray, mask: np.ndarray, allowed, max_length: int):
    """transformers' list of processors for these knobs, made as `generate` makes it."""
    knobs = knobs | {"pad_token_id": 0, "max_length": max_length}
    if "watermarking_config" in knobs:
        made = transformers.WatermarkingConfig(**knobs["watermarking_config"])
        knobs["watermarking_config"] = made
    config, _ = model._prepare_generation_config(GenerationConfig(**knobs))
    model._prepare_special_tokens(config, device="cpu")
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + prompt.shape[1]
    return model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=prompt.shape[1],
        encoder_input_ids=torch.tensor(prompt),
        prefix_allowed_tokens_fn=allowed,
        model_kwargs={"attention_mask": torch.tensor(mask)},
        device="cpu",
    )


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    knobs=some_knobs(),
    seed=st.integers(0, 10_000),
    prompt=st.integers(1, 8),
    new=st.integers(0, 6),
    constrained=st.booleans(),
)
@pytest.mark.filterwarnings("ignore")
def test_chain_equals_that_of_transformers(model, knobs, seed, prompt, new, constrained):
    rng = np.random.default_rng(seed)
    prompts, beams = 2, knobs["num_beams"]
    rows = prompts * beams
    pads = rng.integers(0, prompt, prompts)
    mask = (np.arange(prompt) >= pads[:, None]).astype(np.int64)
    ids = rng.integers(0, 12, (prompts, prompt)) * mask
    mask, ids, pads = (np.repeat(x, beams, axis=0) for x in (mask, ids, pads))
    theirs = theirs_of(
        model, knobs, ids[::beams], mask, allow_some if constrained else None, prompt + 6
    )
    ids = np.concatenate((ids, rng.integers(0, 12, (rows, new))), axis=1)
    logits = (rng.standard_normal((rows, VOCAB)) * 3).astype(np.float32)

    def unconditional(context: Context) -> np.ndarray:
        last = torch.tensor([ids[-1:] for ids in context.ids])
        return model(last).logits[:, -1].detach().numpy()

    chain = build(
        Params(**knobs),
        VOCAB,
        prefix_allowed_tokens_fn=allow_some if constrained else None,
        unconditional=unconditional,
    )
    rows_seen = Context(
        ids=list(ids),
        prompt_lengths=np.full(rows, prompt),
        max_lengths=np.full(rows, prompt + 6),
        pads=pads,
        batch_ids=np.arange(rows) // beams,
    )
    ours = chain(rows_seen, logits)
    try:
        expected = torch_of(theirs, ids, logits)
    except ValueError:  # top_h and eta_cutoff, where a row has no token left
        assert not np.isfinite(ours).any(axis=1).all()
        return
    # remove_invalid_values makes equals of the banned: which of these stay is arbitrary.
    ours, expected = (np.where(x < -1e37, -INF, x) for x in (ours, expected))
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-5)


def test_order_of_all_knobs(model):
    everything = {
        "guidance_scale": 1.5,
        "sequence_bias": [[[4], 2.0]],
        "encoder_repetition_penalty": 1.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "logit_bias": {1: 1.0},
        "no_repeat_ngram_size": 3,
        "encoder_no_repeat_ngram_size": 3,
        "bad_words_ids": [[5]],
        "min_length": 10,
        "forced_bos_token_id": 2,
        "forced_eos_token_id": 3,
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": (2, 1.2),
        "suppress_tokens": [1],
        "begin_suppress_tokens": [2],
        "temperature": 0.5,
        "top_h": 0.5,
        "top_k": 10,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.9,
        "epsilon_cutoff": 0.01,
        "eta_cutoff": 0.01,
        "watermarking_config": {},
        "renormalize_logits": True,
    }
    ours = ("frequency_penalty", "logit_bias")
    prompt = np.ones((1, 4), dtype=np.int64)
    known = {name: value for name, value in everything.items() if name not in ours}
    their_list = theirs_of(
        model, known | {"do_sample": True, "eos_token_id": EOS}, prompt, prompt, None, 20
    )
    chain = build(
        Params(**everything, do_sample=True, eos_token_id=EOS), VOCAB, unconditional=lambda c: c
    )
    assert [step.name for step in chain.steps] == list(everything)
    assert len(chain.steps) == len(their_list) + len(ours)


def test_neutral_knobs_add_nothing():
    logits = random_logits(0)
    for params in (Params(), Params(eos_token_id=EOS), Params(do_sample=True, top_k=0)):
        chain = build(params, VOCAB)
        assert not chain and chain(nothing(4), logits) is logits
    assert not build(Params(top_k=5, top_p=0.5, temperature=0.0), VOCAB)  # greedy ignores them
    assert Chain()(nothing(4), logits) is logits


def test_min_new_tokens_overrides_min_length():
    for knobs in ({"min_length": 50, "min_new_tokens": 0}, {"min_length": 50}):
        chain = build(Params(**knobs, eos_token_id=EOS), VOCAB)
        assert bool(chain) is ("min_new_tokens" not in knobs)


def test_rows_of_different_lengths():
    """A batch of a server: each row comes out as it would alone."""
    ids = [[1, 2], [1, 2, 3, 1, 2], [7], [0, 0, 4, 4, 4, 4, 0, 0]]
    logits = random_logits(20)
    rows = Context(
        ids=[np.array(row) for row in ids],
        prompt_lengths=np.array([2, 3, 1, 4]),
        max_lengths=np.array([3, 9, 8, 9]),
        pads=np.array([0, 1, 0, 2]),
        batch_ids=np.array([4, 5, 6, 7]),
    )
    params = Params(
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        encoder_no_repeat_ngram_size=2,
        frequency_penalty=0.5,
        sequence_bias=[[[2, 3], 1.0]],
        min_new_tokens=3,
        forced_bos_token_id=2,
        forced_eos_token_id=EOS,
        begin_suppress_tokens=[8],
        exponential_decay_length_penalty=(1, 1.5),
        eos_token_id=EOS,
        watermarking_config=SYNTHID[0],
    )
    chain = build(params, VOCAB)
    together = chain(rows, logits)
    for row in range(4):
        alone = Context(
            ids=rows.ids[row : row + 1],
            prompt_lengths=rows.prompt_lengths[row : row + 1],
            max_lengths=rows.max_lengths[row : row + 1],
            pads=rows.pads[row : row + 1],
            batch_ids=rows.batch_ids[row : row + 1],
        )
        np.testing.assert_array_equal(chain(alone, logits[row : row + 1])[0], together[row])


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        ({"sequence_bias": [[[VOCAB], 1.0]]}, "sequence_bias"),
        ({"bad_words_ids": [[1, -2]]}, "bad_words_ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"forced_bos_token_id": VOCAB}, "forced_bos_token_id"),
        ({"forced_eos_token_id": [1, VOCAB]}, "forced_eos_token_id"),
        ({"exponential_decay_length_penalty": (1, 2.0)}, "eos_token_id"),
    ],
)
def test_knobs_that_cannot_be_met(knobs, name):
    with pytest.raises(ValueError, match=name):
        build(Params(**knobs), VOCAB)


def test_imports_numpy_alone():
    """Beyond the standard library; the package's own __init__ is left out."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('fastgen'); package.__path__ = ['fastgen']\n"
        "sys.modules['fastgen'] = package\n"
        "import fastgen.sampling.processors\n"
        "roots = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(roots & {'torch', 'transformers', 'onnxruntime', 'tokenizers'}))\n"
        "print(sorted(name for name in sys.modules if name.startswith('fastgen.')))\n"
    )
    root = processors.__file__.rpartition("/fastgen/")[0]
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert out.stdout.split("\n")[:2] == [
        "[]",
        "['fastgen.inputs', 'fastgen.inputs.tensors', 'fastgen.inputs.validators', "
        "'fastgen.sampling', 'fastgen.sampling.processors', 'fastgen.sampling.softmax', "
        "'fastgen.sampling.watermark']",
    ]


# -- Properties ----------------------------------------------------------------------------------

numbers = st.one_of(
    st.floats(-30, 30, width=32),
    st.sampled_from([0.0, 1.0, -1.0, -INF, -1e30, 1e30]),
)


@st.composite
def some_logits(draw) -> np.ndarray:
    rows, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    values = draw(st.lists(numbers, min_size=rows * vocab, max_size=rows * vocab))
    logits = np.array(values, dtype=np.float32).reshape(rows, vocab)
    logits[np.isneginf(logits).all(axis=1), 0] = 0
    return logits


@st.composite
def warper_chains(draw) -> Params:
    return Params(
        do_sample=True,
        num_beams=draw(st.integers(1, 3)),
        temperature=draw(st.floats(0.01, 100)),
        top_h=draw(st.none() | st.floats(0.01, 1)),
        top_k=draw(st.integers(0, 5)),
        top_p=draw(st.floats(0, 1)),
        min_p=draw(st.none() | st.floats(0, 1)),
        typical_p=draw(st.floats(0.01, 1)),
        epsilon_cutoff=draw(st.floats(0, 0.99)),
        eta_cutoff=draw(st.floats(0, 0.99)),
    )


@settings(max_examples=300, deadline=None)
@given(logits=some_logits(), params=warper_chains())
def test_properties_of_warpers(logits, params):
    given_logits = logits.copy()
    chain = build(params, logits.shape[1])
    out = chain(nothing(len(logits)), logits)
    np.testing.assert_array_equal(logits, given_logits)  # the input is not written to
    kept = out > -INF
    assert kept.any(axis=1).all()  # a token stays
    assert not (kept & np.isneginf(logits)).any()  # a banned one does not come back
    with np.errstate(over="ignore"):
        scaled = (logits / params.temperature).astype(np.float32)
    np.testing.assert_array_equal(out[kept], scaled[kept])  # what stays, stays as it is
    for row in range(len(logits)):  # no row looks at another
        alone = chain(nothing(1), logits[row : row + 1])
        np.testing.assert_array_equal(alone[0], out[row])


@settings(max_examples=100, deadline=None)
@given(logits=some_logits(), top_k=st.integers(1, 6), top_p=st.floats(0, 0.99))
def test_smaller_knobs_keep_less(logits, top_k, top_p):
    few = processors.top_k(logits, top_k) > -INF
    assert (few <= (processors.top_k(logits, top_k + 1) > -INF)).all()
    small = processors.top_p(logits, top_p) > -INF
    assert (small <= (processors.top_p(logits, (1 + top_p) / 2) > -INF)).all()


@settings(max_examples=60, deadline=None)
@given(knobs=some_knobs(), seed=st.integers(0, 10_000))
def test_properties_of_chains(knobs, seed):
    """No input is written to, and no row looks at another (but for its sister beams)."""
    ids, logits = histories(seed), random_logits(seed)
    given_ids, given_logits = ids.copy(), logits.copy()
    chain = build(
        Params(**knobs),
        VOCAB,
        unconditional=lambda context: random_logits(1, 1).repeat(len(context.ids), axis=0),
    )
    out = chain(context(ids, prompt=6), logits)
    np.testing.assert_array_equal(ids, given_ids)
    np.testing.assert_array_equal(logits, given_logits)
    for row in range(len(ids)):
        alone = chain(context(ids[row : row + 1], prompt=6), logits[row : row + 1])
        np.testing.assert_array_equal(alone[0], out[row])
