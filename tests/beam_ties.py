"""Measure how near the numbers lie that transformers' beam search compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationMixin

TIE = 1e-5


def closest(theirs: Any, ids: torch.Tensor, knobs: dict[str, Any]) -> float:
    """The smallest difference between two numbers that transformers compares in this call."""
    gaps = [1.0]

    def note(values: torch.Tensor) -> None:
        values = values[values > -1e8].double().sort().values
        gaps.extend(values.diff().tolist())

    candidates, stop = (
        GenerationMixin._get_top_k_continuations,
        GenerationMixin._check_early_stop_heuristic,
    )

    def noted_candidates(self: Any, accumulated_log_probs: Any, **kwargs: Any) -> Any:
        for row in accumulated_log_probs:
            note(row.topk(min(kwargs["beams_to_keep"] + 1, len(row))).values)
        return candidates(self, accumulated_log_probs=accumulated_log_probs, **kwargs)

    def noted_stop(**kwargs: Any) -> Any:
        length = kwargs["cur_len"] - kwargs["decoder_prompt_len"]
        if kwargs["early_stopping"] == "never" and kwargs["length_penalty"] > 0:
            length = kwargs["max_length"] - kwargs["decoder_prompt_len"]
        best = kwargs["running_beam_scores"][:, :1] / length ** kwargs["length_penalty"]
        for row in torch.cat((kwargs["beam_scores"], best), dim=1):
            note(row)
        return stop(**kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationMixin, "_get_top_k_continuations", noted_candidates)
        patch.setattr(GenerationMixin, "_check_early_stop_heuristic", staticmethod(noted_stop))
        theirs.generate(ids, **knobs)
    return min(gaps)
