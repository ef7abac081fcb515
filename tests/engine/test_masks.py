"""The kind of a mask, found by asking it: causal, a sliding window, or something else."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import masking_utils

import fastgen
from fastgen.export import UnsupportedModel, export
from fastgen.export.trace.attention import window_of


def causal(row: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query


def sliding(window: int) -> Any:
    return lambda row, head, query, key: (key <= query) & (key > query - window)


def tabled(mask: Any, length: int) -> Any:
    """The same, by a table of positions."""
    table = torch.arange(length)
    return lambda row, head, query, key: mask(row, head, table[query], table[key])


def chunked(size: int) -> Any:
    left_padding = torch.zeros(2, dtype=torch.int)
    return masking_utils.chunked_causal_mask_function(size, left_padding)


def test_windows_are_told_apart() -> None:
    assert window_of(causal) is None and window_of(causal, 64) is None
    assert window_of(sliding(8)) == window_of(sliding(8), 64) == 8
    assert window_of(sliding(4096), 64) == 4096  # beyond what the model was trained for


def test_a_mask_that_has_tables_is_asked_within_them() -> None:
    for length in (64, 65):
        assert window_of(tabled(causal, length), length) is None
        assert window_of(tabled(sliding(8), length), length) == 8
        assert callable(window_of(tabled(chunked(8), length), length))


def test_what_is_no_window_is_not_taken_for_one() -> None:
    for size in (2, 8, 777, 8192):
        assert callable(window_of(chunked(size)))
    assert callable(window_of(lambda row, head, query, key: (key <= query) & (key % 3 == 0)))
    with pytest.raises(UnsupportedModel, match="not causal"):
        window_of(lambda row, head, query, key: key >= 0)
    with pytest.raises(UnsupportedModel, match="more than positions"):
        window_of(tabled(causal, 5), 64)  # a table of the tokens at hand


def test_an_index_leaves_nothing_out_up_to_its_number_of_tokens_and_beyond_it_nothing_is_said(
    tmp_path,
):
    model = tiny.build(
        "deepseek_v32",
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        index_topk=48,
        index_n_heads=2,
        index_head_dim=16,
        num_key_value_heads=4,
        mlp_layer_types=["dense", "dense"],
    )
    row = list(range(3, 47))
    with torch.no_grad():
        whole = model(torch.tensor([row * 2])).logits[0]
    ours = fastgen.load(export(model, tmp_path / "out", precision="fp32", progress=None))
    assert (ours.model.info.max_length, ours.model.info.hard_limit) == (48, True)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert ours.generate([row], **greedy) == model.generate(torch.tensor([row]), **greedy).tolist()
    with pytest.raises(ValueError, match="48"):
        ours.generate([row], max_new_tokens=5)
    assert model.config.max_position_embeddings == 128
    model.config.index_topk = 80  # the index is there: with a larger one it says something else
    for layer in model.model.layers:
        layer.self_attn.indexer.index_topk = 80
    with torch.no_grad():
        assert not torch.allclose(whole, model(torch.tensor([row * 2])).logits[0], atol=1e-3)
