"""Reasoning: where a prompt begins it, how long it may become, and who thinks at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.generator import CausalLM
from fastgen.serve.tools.reader import AnswerReader, Marks, ReadingOptions
from fastgen.text.tokenizer import Tokenizer

FORMATS = ("auto", "none")  # split from the content where a template shows it; left there


def inside(prompt: str, marks: Marks | None) -> bool:
    """True where an answer begins within reasoning, as the prompt ends with its mark."""
    return marks is not None and prompt.rstrip().endswith(marks.begin.rstrip())


def reader(model: CausalLM, marks: Marks | None, messages: Sequence[Any]) -> AnswerReader | None:
    """The reader that splits the thoughts from an answer to messages; None where none can be seen.

    Args:
        marks: what the model's template shows around thoughts. Where they are special tokens, a
            text that is decoded without those does not show them.
    """
    if marks is None:
        return None
    tokenizer = model.tokenizer
    hidden = {tokenizer.token(token) for token in tokenizer.special_ids()}
    if {marks.begin, marks.end} & hidden:
        return None
    begun = inside(model.chat_text(messages), marks)
    return AnswerReader(ReadingOptions({}, marks, begun))


class Budget:
    """Ends reasoning after `most` tokens, as a logits processor: then its end mark has to come.

    Args:
        marks: what reasoning stands between.
        most: tokens of reasoning.
        prompt: tokens of the prompt.
        begun: whether the prompt has begun it; else an answer that does not begin with its mark
            is left alone.
    """

    def __init__(
        self, tokenizer: Tokenizer, marks: Marks, most: int, prompt: int, begun: bool
    ) -> None:
        self._tokenizer, self._marks, self._prompt, self._begun = tokenizer, marks, prompt, begun
        self._end = tokenizer.encode(marks.end, add_special_tokens=False)
        before = 0 if begun else len(tokenizer.encode(marks.begin, add_special_tokens=False))
        self._first = most + before  # tokens of the answer, after which the end has to come

    def __call__(self, ids: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rule out, in scores [rows, vocab], all but the next token of the mark where it is due."""
        for row, sequence in enumerate(ids):
            due = self._due(sequence[self._prompt :].tolist())
            if due is not None:
                kept = scores[row, due]
                scores[row] = -np.inf
                scores[row, due] = kept if np.isfinite(kept) else 0.0
        return scores

    def _due(self, generated: Sequence[int]) -> int | None:
        """The token that has to follow these; None where any may."""
        index = len(generated) - self._first
        if not 0 <= index < len(self._end) or list(generated[self._first :]) != self._end[:index]:
            return None
        text = self._text(generated[: self._first])
        if not self._begun and not text.lstrip().startswith(self._marks.begin.strip()):
            return None
        return None if self._marks.end.strip() in text else self._end[index]

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def switched(effort: Any, switches: Sequence[str], enabled: Any) -> dict[str, Any]:
    """The template's variables that switch reasoning on or off.

    Args:
        effort: `reasoning_effort`; "none" asks for none.
        switches: what the template calls its switch (see `tools.shown`).
        enabled: `enable_thinking` of `chat_template_kwargs`; None where it is not given.
    """
    wanted = enabled if enabled is not None else None if effort is None else effort != "none"
    return {} if wanted is None else dict.fromkeys(switches, wanted)
