"""Classifier-free guidance: what the model would say without the prompt (arXiv 2306.17806)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.model import Model
from fastgen.processors import Context


class Unconditional:
    """Unconditional logits of the rows of one request, from a cache of their own.

    The text without the prompt starts with the last token of the prompt, or with a negative
    prompt. Beams do not reorder it: transformers does not either.

    Args:
        model: the model that generates.
        rows: how many rows the request has.
        capacity: tokens that a row may reach.
        negative_prompts: int64 [length] for each prompt, without padding; None for none.
        copies: rows that share a prompt (beams, or sequences of one prompt).
    """

    def __init__(
        self,
        model: Model,
        rows: int,
        capacity: int,
        negative_prompts: Sequence[NDArray[np.int64]] | None,
        copies: int,
    ) -> None:
        self._model = model
        self._negative = negative_prompts
        self._copies = copies
        longest = max((len(row) for row in negative_prompts or ()), default=1)
        self._cache = model.new_cache(rows, capacity + 2 * longest)
        self._slots: list[int] = []  # which row of the request each slot holds

    def __call__(self, context: Context) -> NDArray[np.float32]:
        """float32 [rows, vocab]: the unconditional logits of the rows of `context`."""
        rows = context.rows.tolist()
        if not self._slots:
            self._slots = rows
            return self._model.forward(self._starts(context), self._cache)[:, 0].copy()
        if rows != self._slots:  # rows have left
            self._cache.take([self._slots.index(row) for row in rows])
            self._slots = rows
        return self._model.forward([ids[-1:] for ids in context.ids], self._cache)[:, 0].copy()

    def _starts(self, context: Context) -> list[NDArray[np.int64]]:
        if self._negative is None:
            return [ids[-1:] for ids in context.ids]
        return [self._negative[row // self._copies] for row in context.rows]
