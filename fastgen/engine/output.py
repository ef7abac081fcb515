"""The output: tokens as they are made, and the record of a whole generation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        logprob: its log-probability under the scores that it was chosen from, or as the model has
            it (see `CausalLM.call`).
        top_logprobs: the likeliest (token, log-probability) pairs, if `top_logprobs` asks for them.
        finish_reason: None until the last token; then "eos", "length", "stop_string", "time" or
            "criterion"; or "grammar": what `json_schema`, `regex` or `grammar` asks for is there,
            nothing more may follow, and there is no end-of-text token to say so, or no room.
        row: which row of the call it belongs to.
    """

    id: int
    text: str
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] | None
    finish_reason: str | None
    row: int = 0


@dataclass(frozen=True)
class Decision:
    """A choice among options (see `CausalLM.choose`).

    Attributes:
        index: of the likeliest option.
        option: that option, as it was given.
        probabilities: of each option, in their order; their sum is 1.
        logprobs: of each option, the log-probability of its tokens after the prompt, summed up.
    """

    index: int
    option: Any
    probabilities: list[float]
    logprobs: list[float]

    @property
    def confidence(self) -> float:
        """0 where all options are alike, 1 where one is certain (transformers' `confidence`)."""
        even = 1 / len(self.probabilities)
        if even == 1:
            return 1.0
        return max(0.0, (self.probabilities[self.index] - even) / (1 - even))


@dataclass(eq=False)
class GenerateOutput(Mapping[str, Any]):
    """The result of `generate` with `return_dict_in_generate=True`, in transformers' names.

    It has them as attributes, and is a mapping of those that are set, as transformers' outputs
    are: `output.sequences`, `output["sequences"]`, `"scores" in output`, `output.keys()`, and
    `output[0]`, the first that is set. The arrays are torch tensors if the ids came as one, else
    numpy's.

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
        attentions, hidden_states, cache, past_key_values: None; here for scripts that look.
    """

    sequences: Any
    scores: tuple[NDArray[np.float32], ...] | None = None
    logits: tuple[NDArray[np.float32], ...] | None = None
    sequences_scores: Any = None
    beam_indices: Any = None
    finish_reasons: list[str] | None = None
    top_logprobs: list[list[tuple[tuple[int, float], ...]]] | None = None
    attentions: None = None
    hidden_states: None = None
    cache: None = None
    past_key_values: None = None

    def _set(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def __getitem__(self, key: str | int | slice) -> Any:
        """By name, or by place among what is set."""
        return self._set()[key] if isinstance(key, str) else tuple(self._set().values())[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._set())

    def __len__(self) -> int:
        return len(self._set())

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are set, in order."""
        return tuple(self._set().values())
