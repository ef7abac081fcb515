"""What a mask is, by asking it: causal, a sliding window, or something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastgen.export import UnsupportedModel
from fastgen.export.attention import window_of
from transformers import masking_utils


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
