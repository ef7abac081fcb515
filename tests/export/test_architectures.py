"""A type for each mechanism, through what the table of all types asks: bench/architectures.py."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import tiny

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

import architectures  # noqa: E402
import shrink  # noqa: E402

# One type for each mechanism, the quickest to export. Most have tests of their own besides, which
# run with every change: test_parity, test_attention, test_experts, test_states, test_masks.
ALONE = {"mllama", "got_ocr2", "doge"}
EXACT = [
    "gpt2",  # learned positions
    "gemma3_text",  # windows and full attention, rotations of their own
    "gemma2",  # capped scores
    "bert",  # an encoder as a decoder
    "bart",  # positions that it counts itself
    "roberta",  # generate counts them from another number than forward
    "granite_swa",  # sinks
    "bloom",  # biases by distance
    "llama4_text",  # chunks
    "deepseek_v3",  # heads of unlike sizes; experts with shared ones
    "qwen2_moe",  # experts
    "lfm2",  # convolutions
    "mamba2",  # recurrences alone
    "gemma4_text",  # layers that share keys
    "mllama",  # it reads more ids than it says
    "got_ocr2",  # another model within it attends
    "deepseek_v32",  # an index, while it picks all tokens
    "doge",  # keys with scores of their own
    "inkling_text",  # scores by distance and the query's state
    "inkling2_text",  # and with the position; sinks of queries
    "minimax",  # a scan, and a cache of the model's own
    "recurrent_gemma",  # a scan, and state that the module keeps
    "zaya",  # a convolution before attention
    "roformer",  # rotations for one row of positions
    "dory",  # layers that run several times, with keys of each
    "inkling2_loop_text",  # and attention of a token to what its layers said
]
# What is not, and why.
REFUSED = {
    "moshi": "its cache forgets what lies before a window",
    "musicgen": "it has several output embeddings",
    "blt": "several models, one within another",
    "xlstm": r"state of its own \(rnn_state\)",
    "gemma4_unified_assistant": "it is that model's assistant",
}


def known(kind):
    if kind not in architectures.types():
        pytest.skip(f"transformers {architectures.transformers.__version__} has no {kind}")


@pytest.mark.parametrize("kind", tiny.some(EXACT, ALONE))
def test_it_is_exact(kind, tmp_path):
    known(kind)
    found = architectures.examine(kind, tmp_path)
    assert (found.outcome, found.reason, found.notes) == (architectures.EXACT, "", [])


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_with_the_reason(kind, tmp_path):
    known(kind)
    found = architectures.examine(kind, tmp_path)
    assert found.outcome == architectures.REFUSED
    assert re.search(REFUSED[kind], found.reason), found.reason
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_quantised_rows_are_independent(tmp_path):
    found = architectures.examine("llama", tmp_path, quantised=True)
    assert (found.outcome, found.notes) == (architectures.EXACT, [])


def test_one_that_dies_or_takes_too_long_does_not_stop_the_others(monkeypatch):
    def examine(kind, *_):
        if kind == "dies":
            os._exit(3)
        while kind == "hangs":
            pass
        return architectures.Found(kind)

    monkeypatch.setattr(architectures, "examine", examine)
    found = {one.kind: one for one in architectures.run(["dies", "hangs", "fine"], False, 2, 3)}
    assert {kind: one.outcome for kind, one in found.items()} == {
        "dies": architectures.FAILED,
        "hangs": architectures.LATE,
        "fine": architectures.EXACT,
    }
    assert found["dies"].reason == "its process ended with 3"


def test_what_goes_wrong_is_what_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(shrink, "build", lambda _: 1 / 0)
    found = architectures.examine("llama", tmp_path)
    assert found.outcome == architectures.UNBUILT
    assert found.reason.startswith("ZeroDivisionError: division by zero (test_architectures.py:")


def test_the_table_says_what_became_of_each():
    found = [
        architectures.Found("llama", difference=1e-6),
        architectures.Found("t1", architectures.REFUSED, "no | place"),
        architectures.Found(
            "t2", architectures.REFUSED, "no | place", 0.0, 0.0, True, ["int4: off"]
        ),
    ]
    text = architectures.table(found, "the command")
    assert "    the command\n" in text and "3 types: 1 exact, 2 refused." in text
    assert "| rotations | llama 1e-06 |" in text
    assert "| no \\| place | t1, t2 |" in text
    assert "1 types load and run in int8" in text and "but for:\n\n- t2: int4: off\n" in text


# --- how configurations shrink ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"],
                         "sliding_window": 8}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("nemotron_h", {"layer_types": ["linear_attention", "moe", "full_attention", "mlp"]}),
        ("deepseek_v3", {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
                         "n_routed_experts": 4, "num_experts_per_tok": 2}),
        ("gemma4_text", {"enable_moe_block": True, "num_kv_shared_layers": 2}),
        ("mamba2", {"expand": 2, "num_heads": 4, "head_dim": 32}),
        ("bert", {"is_decoder": True}),
        ("gpt_neo", {"attention_layers": ["global", "local"]}),
    ],
)  # fmt: skip
def test_small_configurations_keep_their_mechanisms(kind, settings):
    config = shrink.config_of(kind)
    assert {name: getattr(config, name) for name in settings} == settings


def test_most_types_need_no_line_of_ours():
    """A type that does not shrink is not run; the names in `ON` are attributes, not types."""
    small, large = [], []
    for kind in architectures.types():
        try:
            config = shrink.config_of(kind)
        except Exception:  # of all kinds: some defaults do not build in transformers either
            large.append(kind)
            continue
        text = config.get_text_config(decoder=True)
        width = getattr(text, "hidden_size", None) or getattr(text, "d_model", 0)
        (small if width <= 2 * shrink.HIDDEN else large).append(kind)
    assert len(large) <= 5, large
