"""Rotations that change with the length of the text, as those of its first part.

Keys are kept rotated. A rotary embedding of the types `dynamic` and `longrope` turns all of them
otherwise once a text grows beyond the length that the model was first trained for; up to there it
is like any other. So the export takes the angles of that part, and the model has that many
positions: `max_length`, a hard limit.

For longer texts with `longrope`, give the model's configuration `long_factor` as `short_factor`
too. Then nothing changes with the length, in transformers either, and all positions are there;
short texts are then turned by the long factors, which the model was not trained for.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

Rotations = tuple[torch.Tensor, ...]  # cosines and sines, [rows, new, size]
Forward = Callable[[torch.Tensor, torch.Tensor], Rotations]


def limit(model: PreTrainedModel) -> int | None:
    """The length up to which no rotation changes; None if none ever does."""
    limits = [_limit(module) for module in model.modules()]
    return min((one for one in limits if one is not None), default=None)


def settle(model: PreTrainedModel) -> None:
    """Give `model` that many positions, where there is such a limit, and their rotations alone."""
    length = limit(model)
    if length is None:
        return
    config = model.config.get_text_config(decoder=True)
    config.max_position_embeddings = min(length, config.max_position_embeddings)
    for module in model.modules():
        if _limit(module) is not None:
            module.forward = _First(module, config.max_position_embeddings)


def settled(module: torch.nn.Module) -> bool:
    """True if the rotations of a module do not change any more."""
    return isinstance(module.forward, _First)


def _limit(module: torch.nn.Module) -> int | None:
    """The first length of a rotary embedding that has one."""
    kind = getattr(module, "rope_type", None)
    if not isinstance(kind, str) or settled(module):
        return None
    config: Any = module.config
    settings = config.rope_parameters
    if kind == "longrope" and any(
        settings.get(f"short_{name}") != settings.get(f"long_{name}")
        for name in ("factor", "mscale")
    ):
        return int(settings["original_max_position_embeddings"])
    return int(config.max_position_embeddings) if kind in ("longrope", "dynamic") else None


class _First:
    """A rotary embedding's forward up to a length: [rows, new] positions to cosines and sines.

    Raises:
        IndexError: a position beyond it.
    """

    def __init__(self, module: torch.nn.Module, length: int) -> None:
        self.length = length
        module.inv_freq = module.original_inv_freq.clone()  # it may have seen a longer text
        self.forward = _without_change(module, length) or _table(module, length)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor) -> Rotations:
        if not torch.compiler.is_exporting() and int(position_ids.max()) >= self.length:
            raise IndexError(f"the model takes {self.length} positions")
        return self.forward(x, position_ids)


def _without_change(module: torch.nn.Module, length: int) -> Forward | None:
    """The forward that transformers wraps with the change, which the export makes an operator of.

    None if it changes by itself.
    """
    plain = types.MethodType(inspect.unwrap(type(module).forward), module)
    like, positions = torch.zeros(1), torch.arange(length + 1)[None]
    first, longer = module.forward(like, positions[:, :length]), plain(like, positions)
    if any(not torch.equal(a, b[:, :length]) for a, b in zip(first, longer, strict=True)):
        return None
    return plain


def _table(module: torch.nn.Module, length: int) -> Forward:
    cos, sin = (table[0] for table in module.forward(torch.zeros(1), torch.arange(length)[None]))
    return lambda x, position_ids: (cos[position_ids], sin[position_ids])
