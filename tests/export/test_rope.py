"""Rotations that change with the length of the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import PreTrainedModel

import fastgen
from fastgen.export import export
from fastgen.export.trace import rope

FIRST, LONGEST = 40, 128
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": FIRST,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [3.0] * 8}  # fmt: skip


def phi3(**changes: Any) -> PreTrainedModel:
    return tiny.build(
        "phi3", rope_parameters=LONG | changes, original_max_position_embeddings=FIRST
    )


def dynamic() -> PreTrainedModel:
    settings = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    return tiny.build("llama", rope_parameters=settings, max_position_embeddings=FIRST)


def alike(model: PreTrainedModel, ours: fastgen.CausalLM, length: int, new: int) -> bool:
    row = np.random.default_rng(length).integers(3, tiny.VOCAB, length).tolist()
    settings = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    expected = model.generate(torch.tensor([row]), **settings).tolist()
    return bool(ours.generate([row], **settings) == expected)


@pytest.mark.parametrize("build", [phi3, dynamic])
def test_up_to_the_first_length_it_is_exact_and_beyond_it_nothing_is_said(build, tmp_path):
    model = build()
    longest = model.config.max_position_embeddings
    with torch.no_grad():
        model(torch.zeros(1, FIRST + 8, dtype=torch.long))  # what it does then is not kept
    ours = fastgen.load(export(model, tmp_path / "out", precision="fp32", progress=None))
    assert (ours.model.info.max_length, ours.model.info.hard_limit) == (FIRST, True)
    assert alike(model, ours, 5, FIRST - 5) and alike(model, ours, FIRST - 8, 8)
    with pytest.raises(ValueError, match=f"{FIRST}"):
        ours.generate([[5] * FIRST], max_new_tokens=1)
    assert model.config.max_position_embeddings == longest
    assert not any(map(rope.settled, model.modules()))


def test_with_the_long_factors_alone_all_positions_are_there(tmp_path):
    model = phi3(short_factor=LONG["long_factor"])
    model.save_pretrained(tmp_path / "model")
    out = export(tmp_path / "model", tmp_path / "out", precision="fp32", progress=None)
    ours = fastgen.load(out)
    assert ours.model.info.max_length == LONGEST
    assert alike(model, ours, FIRST - 8, 16) and alike(model, ours, 100, 16)


def test_a_rotation_that_changes_by_itself_becomes_a_table():
    settings = LONG | {"short_mscale": 1.1, "long_mscale": 1.3}
    model = tiny.build(
        "phimoe",
        num_local_experts=2,
        rope_parameters=settings,
        head_dim=16,
        original_max_position_embeddings=FIRST,
    )
    ids = torch.arange(3, 3 + FIRST)[None]
    with torch.no_grad():
        expected = model(ids).logits
        rope.settle(model)
        assert torch.equal(model(ids).logits, expected)
        with pytest.raises(IndexError, match=f"takes {FIRST} positions"):
            model(torch.zeros(1, FIRST + 1, dtype=torch.long))
