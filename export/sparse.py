"""Attention to the tokens that an index picks, as long as it picks all that there are.

Some models (DeepSeek-V3.2, arXiv 2512.02556, and those after it) look at no more than a number of
tokens, which a small network of each layer picks. Up to that number of tokens nothing is left out,
and attention is plain: so the graph has no index, and the model has that many positions:
`max_length`, a hard limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel


class All:
    """What an index picks: of a mask, all that it shows."""

    def __rand__(self, mask: torch.Tensor) -> torch.Tensor:
        return mask


def limit(model: PreTrainedModel) -> int | None:
    """The tokens of a text of which none is left out; None for any number."""
    return min((_covered(index) for index in _indices(model)), default=None)


def settle(model: PreTrainedModel) -> None:
    """Give `model` no more positions than that."""
    length = limit(model)
    if length is not None:
        config = model.config.get_text_config(decoder=True)
        config.max_position_embeddings = min(length, config.max_position_embeddings)


def places(model: PreTrainedModel) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """What stands in for the indices while a model is exported."""
    for index in _indices(model):
        yield index, "forward", lambda *_, **__: All()


def _indices(model: PreTrainedModel) -> Iterator[Any]:
    for module in model.modules():
        index = getattr(module, "indexer", None)
        if hasattr(index, "index_topk") or hasattr(index, "token_budget"):
            yield index


def _covered(index: Any) -> int:
    """It picks tokens, or blocks of them; those after the last whole block are always seen."""
    if hasattr(index, "index_topk"):
        return int(index.index_topk)
    block = int(index.compress_ratio)
    return int(index.token_budget) // block * block + block - 1
