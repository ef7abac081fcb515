"""Models that keep states besides keys and values: the same answers, whatever moves the rows."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calls import generate
from tiny import ragged

import fastgen
from fastgen import commands
from fastgen.engine import batch
from fastgen.engine.cache import Cache
from fastgen.engine.prefill import Chunks
from fastgen.export import export

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
GATED_DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip

# One of each mechanism, and what its configuration needs besides the usual.
KINDS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8, "intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": GATED_DELTA,
    "rwkv": {"attention_hidden_size": 64},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "minimax": {"head_dim": 16, "num_local_experts": 2, "block_size": 8,
                "layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"head_dim": 16, "lru_width": 64, "num_hidden_layers": 3,
                        "attention_window_size": 8, "num_key_value_heads": 1},
    "zaya": {"head_dim": 16, "num_experts": 2, "moe_intermediate_size": 32},
}  # fmt: skip
QUICK = [kind for kind in KINDS if kind not in ("minimax", "recurrent_gemma", "zaya")]
# What moves rows and reads in parts is asked of states alone, and of states beside attention.
MOVED = tiny.some(KINDS, ("mamba", "qwen3_5_text"))
LENGTHS = (1, 9, 30)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(kind: str) -> Any:
        return tiny.exported(kind, tmp_path_factory.mktemp("states") / kind, **KINDS[kind])

    return make


def alone(theirs: Any, row: list[int], **knobs: Any) -> Any:
    """transformers' logits of a row by itself: padded rows of some types differ there."""
    for module in theirs.modules():
        if hasattr(module, "conv1d_state"):  # a row of one token would begin with it
            module.conv1d_state = None
    return theirs.generate(torch.tensor([row]), **{"do_sample": False, **GREEDY, **knobs})


@pytest.mark.parametrize("kind", MOVED)
def test_packed_weights_that_are_kept_say_the_same(stateful, kind, tmp_path, monkeypatch):
    """Weights within the graphs of a scan are kept too."""
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path))
    _, ours = stateful(kind)
    packed = fastgen.load(ours.directory, packed=True)
    assert packed.model.is_packed and packed.model.cautions == []
    for row in ragged(1, LENGTHS):
        np.testing.assert_array_equal(packed.score([row])[0], ours.score([row])[0])


@pytest.mark.parametrize("kind", tiny.some(KINDS, QUICK))
def test_ragged_rows_say_what_transformers_says_of_each(stateful, kind):
    theirs, ours = stateful(kind)
    rows = ragged(1, LENGTHS)
    kept = {"return_dict_in_generate": True, "output_logits": True}
    found = ours.generate(rows, **GREEDY, **kept)
    for place, row in enumerate(rows):
        expected = alone(theirs, row, **kept)
        scale = max(float(step.abs().max()) for step in expected.logits)
        for one, other in zip(expected.logits, found.logits, strict=True):
            assert np.abs(one[0].numpy() - other[place]).max() <= 1e-4 * scale
        assert found.sequences[place][30:] == expected.sequences[0, len(row) :].tolist()


@pytest.mark.parametrize("kind", MOVED)
@pytest.mark.parametrize(
    "knobs", [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_searches_are_those_of_transformers(stateful, kind, knobs):
    theirs, ours = stateful(kind)
    # transformers cannot reorder a state that is not in its Cache: it reads all anew.
    cached = {"use_cache": kind not in ("rwkv", "minimax", "recurrent_gemma")}
    for row in ragged(2, LENGTHS):
        torch.manual_seed(3)
        expected = alone(theirs, row, **cached, **knobs)
        assert ours.generate([row], **GREEDY, **knobs, seed=3) == expected.tolist()


@pytest.mark.parametrize("kind", MOVED)
def test_a_row_says_beside_others_what_it_says_alone(stateful, kind):
    _, ours = stateful(kind)
    rows = ragged(4, (2, 31, 7, 19, 1))
    for knobs in ({}, {"num_beams": 3}, {"do_sample": True, "seed": [1, 2, 3, 4, 5]}):
        together = ours.generate(rows, **GREEDY, **knobs)
        for place, row in enumerate(rows):
            mine = {**knobs, "seed": place + 1} if "seed" in knobs else knobs
            found = ours.generate([row], **GREEDY, **mine)[0]
            assert together[place][31 - len(row) :] == found


def test_a_recurrence_alone_has_no_last_position(tmp_path):
    """RWKV's context_length is what it was trained with: longer prompts are read."""
    theirs, ours = tiny.exported("rwkv", tmp_path / "rwkv", **KINDS["rwkv"], context_length=16)
    assert ours.model.info.max_length is None and not ours.model.info.hard_limit
    (row,) = ragged(7, (40,))
    assert ours.generate([row], **GREEDY) == alone(theirs, row).tolist()


@pytest.mark.parametrize("kind", MOVED)
@pytest.mark.parametrize("chunk", [1, 5])
def test_prompts_may_be_read_in_chunks(stateful, kind, chunk):
    _, ours = stateful(kind)
    rows = ragged(6, (40, 33, 2))
    whole = ours.generate(rows, **GREEDY)
    assert generate(ours, rows, Chunks(chunk, 3 * chunk), **GREEDY) == whole


@pytest.mark.parametrize("kind", MOVED)
def test_rows_that_join_late_and_leave_early_change_nothing(stateful, kind):
    _, ours = stateful(kind)
    rows = ragged(9, (5, 12, 3, 20))
    ends = [4 + 3 * place for place in range(4)]
    expected = [
        ours.generate(row, max_new_tokens=n, eos_token_id=None)[0]
        for row, n in zip(rows, ends, strict=True)
    ]
    running = batch.Batch(ours.model)
    requests = []
    for row, n in zip(rows, ends, strict=True):
        knobs = {"max_new_tokens": n, "eos_token_id": None}
        requests.append(ours._call(row, knobs=knobs).request)
        running.add(requests[-1])
        running.step()
    while running.rows:
        running.step()
    assert [request.sequences()[0].tolist() for request in requests] == expected


@pytest.mark.parametrize("kind", MOVED)
def test_guesses_that_do_not_hold_leave_no_trace(stateful, kind, always_guess):
    _, ours = stateful(kind)
    rows = [row * 3 for row in ragged(5, (4, 7, 2))]
    for sampling in ({}, {"do_sample": True, "seed": 2, "top_k": 3}):
        knobs = {**GREEDY, **sampling}
        plain = ours.generate(rows, **knobs)
        assert ours.generate(rows, prompt_lookup_num_tokens=4, **knobs) == plain


@pytest.mark.parametrize("kind", tiny.some(KINDS, QUICK))
def test_texts_are_scored_as_transformers_scores_them(stateful, kind):
    theirs, ours = stateful(kind)
    rows = ragged(7, (30, 9, 2, 70, 5, 5))
    found = ours.score(rows)
    for row, scores in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = logits[torch.arange(len(row) - 1), torch.tensor(row[1:])]
        np.testing.assert_allclose(scores[1:], expected, atol=2e-3)
    prefix = rows[0]
    after = ours.score(rows[1:], prefix=prefix)
    for row, scores in zip(rows[1:], after, strict=True):
        np.testing.assert_allclose(scores, ours.score(prefix + row)[30:], atol=1e-4)


def test_what_cannot_be_taken_back_is_said(stateful, pair):
    _, ours = stateful("mamba2")
    with pytest.raises(ValueError, match="assistant_model keeps recurrent state"):
        pair("llama")[1].generate([5, 6], max_new_tokens=3, assistant_model=ours)


@pytest.mark.parametrize("kind", MOVED)
def test_what_was_read_of_a_prompt_is_found_where_it_was_cut(stateful, kind, tmp_path):
    # Two threads share mamba's work by chance: a call made twice may differ in a last bit.
    ours = fastgen.load(stateful(kind)[1].directory, threads=1)
    read = functools.partial(generate, ours, chunks=Chunks(row=8))
    kept = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    row = ragged(3, (30,))[0]
    rows = [row, row[:20] + [5, 6, 7], row[:17], row[:9], row[:8], [*row, 9, 9]]
    cache = fastgen.PrefixCache()
    for place in range(2):
        for one in rows:
            plain = read([one], **kept)
            found = read([one], prefix_cache=cache, **kept)
            assert found.sequences == plain.sequences
            assert all(map(np.array_equal, found.logits, plain.logits))
        assert cache.tokens_reused == [16 + 16 + 8 + 24, 40 + 24 + 16 + 16 + 8 + 24 + 24][place]
        cache.save(tmp_path / "file")
        reused, cache = cache.tokens_reused, fastgen.PrefixCache.load(tmp_path / "file")
        cache.tokens_reused = reused
    assert read(rows, prefix_cache=cache, **GREEDY) == read(rows, **GREEDY)
    beams = {"num_beams": 3, **GREEDY}
    assert read([row], prefix_cache=cache, **beams) == read([row], **beams)
    texts = fastgen.PrefixCache()
    for _ in range(2):
        found = ours.score(rows[1:], prefix=row * 3, prefix_cache=texts)
        for one, other in zip(found, ours.score(rows[1:], prefix=row * 3), strict=True):
            np.testing.assert_array_equal(one, other)
    assert texts.tokens_reused == 64


def test_info_says_what_states_take(stateful, capsys):
    ours = stateful("mamba")[1]
    states = list(ours.model.new_cache(1, 64).states(0, 1))
    commands.cli.main(["info", str(ours.directory)], standalone_mode=False)
    said = f"{len(states)} besides, {sum(s.nbytes for s in states):,} bytes a row of any length\n"
    assert f"\nstates       {said}" in capsys.readouterr().out


def test_states_move_with_their_rows():
    cache = Cache([(1, 2)], rows=3, capacity=4, states=[(2,), (1, 3)])
    for slot in range(3):
        for states in cache.states(0, 3):
            states[slot] = slot + 1
    cache.lengths[:] = [1, 2, 3]
    cache.take([2, 0])
    assert [states[:2].ravel()[0] for states in cache.states(0, 3)] == [3, 3]
    assert [int(states[1].ravel()[0]) for states in cache.states(0, 3)] == [1, 1]
    kept = cache.state(1)
    cache.reserve(5, 400)
    assert [int(states[0].ravel()[0]) for states in cache.states(0, 5)] == [3, 3]
    cache.begin(1)
    assert cache.lengths[1] == 0 and not any(states[1].any() for states in cache.states(0, 5))
    cache.restore(1, kept)
    assert cache.lengths[1] == 1 and all((states[1] == 1).all() for states in cache.states(0, 5))
    with pytest.raises(ValueError, match="cannot be trimmed"):
        cache.trim(0, 2)


@pytest.mark.parametrize(("kind", "precision"), [("mamba2", "int8"), ("lfm2", "int4")])
def test_quantised_rows_are_independent(kind, precision, tmp_path):
    out = export(
        tiny.build(kind, **KINDS[kind]),
        tmp_path / "out",
        precision=precision,
        tokenizer=tiny.tokenizer(),
        allow_mismatch=True,
        progress=None,
    )
    ours = fastgen.load(out)
    rows = ragged(3, (3, 12, 7))
    together = ours.generate(rows, **GREEDY)
    for place, row in enumerate(rows):
        assert together[place][12 - len(row) :] == ours.generate([row], **GREEDY)[0]
