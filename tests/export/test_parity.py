"""Every architecture: the export says what transformers says, prefill and decode, ragged rows."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from tiny import left_padded, ragged

NEW = 16
# A type for each mechanism; the others do what these do, or what test_architectures asks of theirs.
QUICK = {
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "gpt_neox", "opt",
    "gpt_bigcode", "olmo2", "smollm3", "cohere",
}  # fmt: skip


@pytest.mark.parametrize("kind", tiny.some(tiny.ARCHITECTURES, QUICK))
def test_greedy_tokens_and_logits_are_those_of_transformers(pair, kind):
    theirs, ours = pair(kind)
    rows = ragged(1)
    ids, mask = left_padded(rows)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    expected = theirs.generate(ids, attention_mask=mask, **settings)
    found = ours.generate(rows, **settings)
    scale = max(float(step.abs().max()) for step in expected.logits)
    for step, (a, b) in enumerate(zip(expected.logits, found.logits, strict=True)):
        assert np.abs(a.numpy() - b).max() <= 2e-5 * scale, f"step {step}"
    assert found.sequences == expected.sequences.tolist()


@pytest.mark.parametrize(
    "kind", tiny.some(["mistral", "gemma2", "gemma3_text", "starcoder2"], QUICK)
)
def test_window_layers_are_exported_as_such(pair, kind):
    theirs, ours = pair(kind)
    row = ragged(2, (60,))
    expected = theirs.generate(
        torch.tensor(row), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ours.generate(row, max_new_tokens=NEW, eos_token_id=None) == expected.tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_padded_arrays_come_back_as_transformers_lays_them_out(pair, kind):
    theirs, ours = pair(kind)
    ids, mask = left_padded(ragged(3))
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    for mine in (
        ours.generate(ids, attention_mask=mask, max_new_tokens=NEW),
        ours.generate(ids, max_new_tokens=NEW),  # the mask is inferred from the padding
    ):
        assert isinstance(mine, torch.Tensor)
        assert torch.equal(mine, expected)
    array = ours.generate(ids.numpy(), attention_mask=mask.numpy(), max_new_tokens=NEW)
    assert isinstance(array, np.ndarray) and array.dtype == np.int64
    assert np.array_equal(array, expected.numpy())
