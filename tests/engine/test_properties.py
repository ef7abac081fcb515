"""The law at every door: an answer, or one of our own errors, and the next call is unharmed.

An answer that transformers gives too is the same answer. Nothing warns but what is documented to.
`FASTGEN_EXAMPLES=5000 pytest tests/engine/test_properties.py` tries that many of each law.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny import left_padded

import fastgen
from fastgen.__main__ import main
from fastgen.engine import speculative

EXAMPLES = int(os.environ.get("FASTGEN_EXAMPLES", "60"))
law = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[*HealthCheck],
    derandomize="FASTGEN_EXAMPLES" not in os.environ,
    print_blob=True,
)

TOKEN = st.integers(3, tiny.VOCAB - 1)
ROWS = st.lists(st.lists(TOKEN, min_size=1, max_size=10), min_size=1, max_size=3)
OURS = ".*(no length is set|padded on the right|positions that the model was made for)"


@contextlib.contextmanager
def lawful(model: fastgen.CausalLM) -> Iterator[None]:
    """One of our own errors or none, no warning but ours, and a next call as if nothing was."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", OURS, UserWarning)
        try:
            yield
        except ValueError as error:
            words = str(error)
            assert words and "\n" not in words.strip(), words
            own = type(error) is ValueError or type(error).__module__.startswith("fastgen")
            assert own, repr(error)
            event("refused")
        else:
            event("answered")
        found = model.generate([[5, 6, 7], [8, 9]], max_new_tokens=4)
    if not hasattr(model, "_first_answer"):
        model._first_answer = found
    assert found == model._first_answer


# -- What transformers answers, we answer the same ------------------------------------------------

FEW = st.lists(TOKEN, min_size=1, max_size=4)
KNOBS: dict[str, st.SearchStrategy[Any]] = {
    "do_sample": st.booleans(),
    "num_beams": st.integers(1, 4),
    "num_return_sequences": st.integers(1, 3),
    "max_new_tokens": st.integers(1, 10),
    "max_length": st.integers(1, 20),
    "min_length": st.integers(0, 16),
    "min_new_tokens": st.integers(0, 8),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "length_penalty": st.floats(-3, 3),
    "temperature": st.floats(0.3, 4),
    "top_k": st.integers(0, 120),
    "top_p": st.floats(0, 1.2),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(0.01, 1),
    "top_h": st.floats(0.05, 1),
    "epsilon_cutoff": st.floats(0, 0.3),
    "eta_cutoff": st.floats(0, 0.3),
    "repetition_penalty": st.floats(0.3, 3),
    "encoder_repetition_penalty": st.floats(0.3, 3),
    "no_repeat_ngram_size": st.integers(0, 4),
    "encoder_no_repeat_ngram_size": st.integers(0, 4),
    "bad_words_ids": st.lists(FEW, min_size=1, max_size=4),
    "sequence_bias": st.dictionaries(
        FEW.map(tuple), st.floats(-9, 9), min_size=1, max_size=4
    ),
    "renormalize_logits": st.booleans(),
    "remove_invalid_values": st.booleans(),
    "forced_bos_token_id": TOKEN,
    "forced_eos_token_id": TOKEN,
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 5), st.floats(0.5, 2)),
    "suppress_tokens": FEW,
    "begin_suppress_tokens": FEW,
    "guidance_scale": st.floats(0.5, 3),
    "watermarking_config": st.fixed_dictionaries(
        {"bias": st.floats(0.5, 5), "greenlist_ratio": st.floats(0.1, 0.9)}
    ),
    "stop_strings": st.lists(st.text("aeiou fox", min_size=1, max_size=3), min_size=1, max_size=2),
    "eos_token_id": st.one_of(st.none(), TOKEN, st.lists(TOKEN, min_size=1, max_size=4)),
    "pad_token_id": st.integers(0, tiny.VOCAB - 1),
    "return_dict_in_generate": st.booleans(),
    "output_scores": st.booleans(),
    "output_logits": st.booleans(),
}  # fmt: skip


@st.composite
def knobs_of(draw: Any, strategies: dict[str, Any], most: int = 6) -> dict[str, Any]:
    """A few knobs, each with a value of its own."""
    names = draw(st.lists(st.sampled_from(sorted(strategies)), max_size=most, unique=True))
    return {name: draw(strategies[name]) for name in names}


def theirs_of(model: Any, ids: Any, knobs: dict[str, Any]) -> Any:
    """The answer of transformers; None if it raises."""
    tokenizer = {"tokenizer": tiny.tokenizer()} if "stop_strings" in knobs else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model.generate(ids, **knobs, **tokenizer)
        except Exception as error:  # whatever it is: then there is nothing to compare with
            event(f"transformers: {type(error).__name__}")
            return None


@law
@given(rows=ROWS, knobs=knobs_of(KNOBS), seed=st.integers(0, 2**32))
def test_an_answer_is_that_of_transformers(both, rows, knobs, seed):
    theirs, model = both
    ids, mask = left_padded(rows)
    knobs = {"max_new_tokens": 6, "pad_token_id": 0, "attention_mask": mask, **knobs}
    torch.manual_seed(seed)
    expected = theirs_of(theirs, ids, knobs)
    state = torch.get_rng_state()
    with lawful(model):
        torch.manual_seed(seed)
        found = model.generate(ids, **knobs)
        if expected is not None:
            same(found, expected)
            assert torch.equal(torch.get_rng_state(), state) or not knobs.get("do_sample")


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.tolist() == expected.tolist()
        return
    assert found.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits", "beam_indices", "sequences_scores"):
        assert (name in found) == (name in expected)
    assert len(found.get("scores", ())) == len(expected.get("scores", ()))


GUESSES: dict[str, st.SearchStrategy[Any]] = {
    name: KNOBS[name]
    for name in (
        "do_sample",
        "num_return_sequences",
        "max_new_tokens",
        "min_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "stop_strings",
        "eos_token_id",
        "forced_eos_token_id",
    )
}


@law
@given(
    rows=ROWS,
    knobs=knobs_of(GUESSES),
    guess=st.one_of(
        st.fixed_dictionaries({"prompt_lookup_num_tokens": st.integers(1, 6)}),
        st.fixed_dictionaries({"num_assistant_tokens": st.integers(1, 6)}),
    ),
    seed=st.integers(0, 2**32),
    repeat=st.integers(1, 3),
)
def test_guesses_change_nothing(ours, rows, knobs, guess, seed, repeat):
    knobs = {"max_new_tokens": 8, "seed": seed, **knobs}
    rows = [row * repeat for row in rows]
    if "num_assistant_tokens" in guess:
        guess = {"assistant_model": ours, **guess}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            speculative.SpeculationBudget, "allowed", lambda self, left: left if self.plain else 0
        )
        with lawful(ours):
            plain = ours.generate(rows, **knobs)
            assert ours.generate(rows, **knobs, **guess) == plain


# -- Junk -----------------------------------------------------------------------------------------

LARGE = [2**31, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**30]
NUMBERS = st.one_of(
    st.integers(-3, 120),
    st.sampled_from(LARGE),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-320, 1e-9, 1e9, 1e38, 1e39, 1e308]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
ODD = st.sampled_from(
    [
        None,
        True,
        False,
        "",
        "x",
        "5",
        "\ud800",
        b"ab",
        (),
        [],
        {},
        set(),
        {5},
        {5: 6},
        {"a": 1},
        object(),
        np.array(5),
        np.array([1, 2]),
        np.array([[1.5]]),
        np.array(["a"]),
        np.float32(0.5),
        np.int64(3),
        np.array([1, 2], "m8[s]"),
        np.ma.masked_array([1, 2], [0, 1]),
        torch.tensor(3),
        torch.tensor([3.5]),
        torch.tensor([1, 2]).to(torch.bfloat16),
        torch.ones(2).to_sparse(),
        torch.ones(2, device="meta"),
        range(3),
        iter([1]),
        int,
        lambda *values: values[-1],
        lambda *values: None,
        1j,
        np.complex64(1),
    ]
)
JUNK = st.recursive(
    NUMBERS | ODD,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(
            st.one_of(st.integers(-2, 120), st.sampled_from(["5", "x"])), inner, max_size=3
        )
    ),
    max_leaves=6,
)
ARGUMENTS = (
    "attention_mask", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask",
    "assistant_model", "tokenizer", "prefix_cache", "streamer", "inputs", "nonsense",
)  # fmt: skip
NAMES = sorted(set(fastgen.Params.__dataclass_fields__) - {"max_time"})
ANYTHING = {name: NUMBERS | JUNK for name in [*NAMES, *ARGUMENTS]} | {
    name: NUMBERS | KNOBS[name] for name in KNOBS
}
IDS = st.one_of(
    ROWS, st.lists(TOKEN, min_size=1, max_size=8), ROWS.map(lambda rows: np.array(rows[0]))
)


def bounded(knobs: dict[str, Any]) -> dict[str, Any]:
    """Without what would be answered, if slowly: thousands of tokens, beams or sequences."""
    long = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences", "num_beam_groups")

    def slow(name: str, value: Any) -> bool:
        return name in long and isinstance(value, int | float) and 200 < value < 10**9

    return {name: value for name, value in knobs.items() if not slow(name, value)}


@law
@given(ids=IDS | JUNK, knobs=knobs_of(ANYTHING, most=3), length=st.booleans())
def test_generate_takes_anything(ours, ids, knobs, length):
    knobs = bounded(({"max_new_tokens": 3} if length else {}) | knobs)
    with lawful(ours):
        ours.generate(ids, **knobs)


@law
@given(ids=IDS | JUNK | st.text(max_size=8), knobs=knobs_of(ANYTHING, most=3))
def test_stream_takes_anything(ours, ids, knobs):
    knobs = bounded({"max_new_tokens": 3} | knobs)
    knobs.pop("streamer", None)
    knobs.pop("inputs", None)
    with lawful(ours):
        for token in ours.stream(ids, **knobs):
            assert isinstance(token.text, str)


@law
@given(
    ids=IDS | JUNK | st.text(max_size=30) | st.lists(st.text(max_size=9), max_size=3),
    more=knobs_of(
        {"prefix": IDS | JUNK | st.text(max_size=9), "attention_mask": JUNK, "prefix_cache": JUNK},
        most=2,
    ),
)
def test_score_takes_anything(ours, ids, more):
    with lawful(ours):
        found = ours.score(ids, **more)
        for row in found if isinstance(found, list) else [found]:
            assert row.dtype == np.float32 and not (row > 1e-6).any()


# -- The command line -----------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
VALUES = st.one_of(
    st.integers(-3, 120).map(str),
    st.floats().map(str),
    st.sampled_from([str(n) for n in LARGE]),
    TEXTS,
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 120) | st.floats() | TEXTS,
        lambda one: st.lists(one, max_size=3) | st.dictionaries(TEXTS, one, max_size=2),
        max_leaves=5,
    ).map(json.dumps),
)
# A value that its knob takes, as it would be typed; of tuples JSON has no keys.
GOOD = {name: strategy for name, strategy in KNOBS.items() if name != "sequence_bias"}
FLAGS = ["--" + name.replace("_", "-") for name in NAMES if name not in ("num_beams",)]
OTHERS = [
    "--json",
    "--model",
    "--file",
    "--threads",
    "--prefix-cache",
    "--nonsense",
    "-m",
    "--help",
]
SLOW = ("--max-new-tokens", "--max-length", "--num-return-sequences", "--num-beam-groups")


@st.composite
def command_lines(draw: Any) -> list[str]:
    command = draw(st.sampled_from(["generate"] * 8 + ["info", "tune", "export", "nonsense", ""]))
    texts = draw(
        st.sampled_from([[], ["The os"], ["a b"], ["The"], [draw(TEXTS)], ["two", "texts"]])
    )
    words = [command, *texts] if command else []
    for flag in draw(st.lists(st.sampled_from(FLAGS + OTHERS), max_size=2)):
        knob = flag[2:].replace("-", "_")
        good = knob in GOOD and draw(st.integers(0, 3)) > 0
        value = draw(GOOD[knob].map(json.dumps) if good else VALUES)
        if flag in SLOW and value.isdigit() and 200 < int(value) < 10**9:
            continue
        words += draw(st.sampled_from([[flag, value], [f"{flag}={value}"], [flag]]))
    return words


@law
@given(words=command_lines(), stdin=TEXTS)
def test_the_command_line_takes_anything(ours, tmp_path_factory, words, stdin):
    """It ends with 0, or with 2 and one line that says why; `main` is what the command calls."""
    if words and words[0] == "generate" and "-m" not in words and "--model" not in " ".join(words):
        words = [*words, "--max-new-tokens", "3", "--model", str(ours.directory)]
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        for name, stream in (("stdout", out), ("stderr", err)):
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
        patch.setattr(sys, "argv", ["fastgen", *words])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", OURS, UserWarning)
            main()
    out.seek(0)
    err.seek(0)
    printed, said = out.read(), err.read()
    event(f"exit {ended.value.code}")
    assert ended.value.code in (0, 2), (words, said)
    assert "Traceback" not in said, said
    if ended.value.code == 2 and words:
        assert said.strip().splitlines()[-1].startswith("fastgen: "), said
        assert not printed, printed
    if ended.value.code == 0 and "--json" in words and "--help" not in words:
        for line in printed.strip().split("\n") if words[0] == "generate" else [printed]:
            json.loads(line, parse_constant=lambda name: pytest.fail(name))
