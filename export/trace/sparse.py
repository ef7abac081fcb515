"""Attention to the tokens that an index picks, as long as it picks all that there are.

Some models (DeepSeek-V3.2, arXiv 2512.02556, and those after it) look at no more than a number of
tokens, which a small network of each layer picks, or scores of the keys (Shi et al. 2025, arXiv
2508.02124). Up to that number of tokens nothing is left out,
and attention is plain: so the graph has no index, and the model has that many positions:
`max_length`, a hard limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from fastgen.export.trace import attention


def limit(model: PreTrainedModel) -> int | None:
    """The tokens of a text of which none is left out; None for any number."""
    limits = [_covered(picks) for picks in _picking(model)]
    if _by_blocks(model):
        limits.append((5 + 2 * model.config.num_random_blocks) * model.config.block_size)
    return min(limits, default=None)


def settle(model: PreTrainedModel) -> None:
    """Give `model` no more positions than that, and plain attention where it chooses."""
    length = limit(model)
    if length is not None:
        config = model.config.get_text_config(decoder=True)
        config.max_position_embeddings = min(length, config.max_position_embeddings)
    if _by_blocks(model):
        model.base_model.set_attention_type("original_full")


def patches(model: PreTrainedModel) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Stand-ins for the indices while a model is exported."""
    for picks in _picking(model):
        if hasattr(picks, "prepare_dynamic_mask"):  # by scores that count besides
            yield picks, "prepare_dynamic_mask", _raised
        else:
            yield picks, "forward", lambda *_, **__: attention.All()


def _by_blocks(model: PreTrainedModel) -> bool:
    """True if tokens of a long text see blocks of it (BigBird, arXiv 2007.14062)."""
    switches = hasattr(model.base_model, "set_attention_type")
    return switches and model.config.attention_type == "block_sparse"


def _picking(model: PreTrainedModel) -> Iterator[Any]:
    for module in model.modules():
        if any(hasattr(module, name) for name in _COVERED):
            yield module


# How many tokens a module sees at least, by the name of its number.
_COVERED: dict[str, Callable[[Any], int]] = {
    "index_topk": lambda picks: picks.index_topk,
    "keep_window_size": lambda picks: picks.keep_window_size,
    # Blocks of tokens; those after the last whole block are always seen.
    "token_budget": lambda picks: (
        (picks.token_budget // picks.compress_ratio + 1) * picks.compress_ratio - 1
    ),
}


def _covered(picks: Any) -> int:
    return next(int(covered(picks)) for name, covered in _COVERED.items() if hasattr(picks, name))


def _raised(*, dt_states: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    attention.raise_next(dt_states)
    return attention_mask
