"""What comes out: tokens as they are made, and the record of a whole generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Token:
    """One new token of a stream.

    Attributes:
        id: the token.
        text: the text that it completes; "" while a character is incomplete, or without tokenizer.
        logprob: its log-probability under the scores that it was chosen from.
        top_logprobs: the likeliest (token, log-probability) pairs, if `top_logprobs` asks for them.
        finish_reason: None until the last token; then "eos", "length", "stop_string", "time" or
            "criterion".
        row: which row of the call it belongs to.
    """

    id: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] | None
    finish_reason: str | None
    row: int = 0


@dataclass
class GenerateOutput:
    """What `generate` returns with `return_dict_in_generate=True`, in transformers' names.

    The arrays are torch tensors if the ids came as one, else numpy's.

    Attributes:
        sequences: int64 [rows * num_return_sequences, length], in the kind that came in (lists
            for lists).
        scores: a step: processed scores float32 [rows, vocab], if `output_scores`. Of a row that
            has finished they say that padding is certain (0 for it, -inf for the rest).
        logits: the same before processing, if `output_logits`.
        sequences_scores: float32 [rows], beams only, if `output_scores`.
        beam_indices: int32 [rows, new], beams only, if `output_scores`.
        finish_reasons: why each row ended (see `Token`).
        top_logprobs: a row: a step: the likeliest (token, log-probability) pairs, if asked for.
    """

    sequences: Any
    scores: tuple[NDArray[np.float32], ...] | None = None
    logits: tuple[NDArray[np.float32], ...] | None = None
    sequences_scores: Any = None
    beam_indices: Any = None
    finish_reasons: list[str] | None = None
    top_logprobs: list[list[tuple[tuple[int, float], ...]]] | None = None

    def __getitem__(self, key: str | int) -> Any:
        """`output["sequences"]`, or by place among what is set, as transformers' outputs allow."""
        if isinstance(key, str):
            return getattr(self, key)
        return tuple(value for value in vars(self).values() if value is not None)[key]
