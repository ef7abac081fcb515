"""Classifier-free guidance: the logits without the prompt (arXiv 2306.17806)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.model import Model
from fastgen.engine.prefill import WHOLE, Chunks, Prefill
from fastgen.sampling.processors import Context


class Unconditional:
    """Unconditional logits of the rows of one request, from a cache of their own.

    The text without the prompt starts with the last token of the prompt, or with a negative
    prompt, which is read before the first step (`begin`). Beams do not reorder it: transformers
    does not either.

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
        self._cache = model.new_cache(rows, capacity + longest + WHOLE.margin)
        self._slots: list[int] = []  # which row of the request each slot holds
        self._prefill: Prefill | None = None

    def begin(self, chunks: Chunks = WHOLE) -> Prefill | None:
        """Begin to read the negative prompts, if there are any."""
        if self._negative is not None:
            rows = sorted(self._negative, key=len)
            self._prefill = Prefill(self._model, self._cache, rows, 0, chunks=chunks)
        return self._prefill

    def __call__(self, context: Context) -> NDArray[np.float32]:
        """float32 [rows, vocab]: the unconditional logits of the rows of `context`."""
        rows = context.rows.tolist()
        if not self._slots:
            self._slots = rows
            return self._first(context)
        if rows != self._slots:  # rows have left
            self._cache.take([self._slots.index(row) for row in rows])
            self._slots = rows
        return self._model.forward([ids[-1:] for ids in context.ids], self._cache)[:, 0].copy()

    def _first(self, context: Context) -> NDArray[np.float32]:
        if self._negative is None or self._prefill is None:
            return self._model.forward([ids[-1:] for ids in context.ids], self._cache)[:, 0].copy()
        lengths = [len(row) for row in self._negative]
        places = np.argsort(np.argsort(lengths, kind="stable"), kind="stable")
        sources = places[context.rows // self._copies]
        self._cache.take(sources.tolist())
        return np.asarray(self._prefill.logits[sources])
