"""The ends of a row: its length, the clock, an end-of-text token, a text, a caller's criterion."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.inputs.lengths import default_length
from fastgen.inputs.params import Params

# Whether the text of a row, int64 [length], ends with its last token.
StopText = Callable[[NDArray[np.int64]], bool]

# A step: float32 [rows, vocab] of it and of each step before; None where nobody keeps them.
Scores = tuple[NDArray[np.float32], ...] | None

# input_ids int64 [rows, length], scores -> bool [rows] (or one for all)
Criterion = Callable[[NDArray[np.int64], Scores], Any]


def length_limit(
    params: Params, width: int, longest: int, model_limit: int | None, hard_limit: bool
) -> tuple[int, tuple[str, ...]]:
    """The length, prompt and padding included, at which rows end: transformers' `max_length`.

    Args:
        params: the knobs of the call.
        width: tokens of the prompt, padding included.
        longest: tokens of the longest prompt, without padding.
        model_limit: positions that the model was made for; None for any.
        hard_limit: whether the model cannot compute a position beyond the limit.

    Returns:
        The length, and what the caller is to be warned of.

    Raises:
        ValueError: no room for a new token, or more than the model can compute.
    """
    if model_limit is not None and longest > model_limit:
        raise ValueError(f"the prompt has {longest} tokens, the model takes at most {model_limit}")
    usual = default_length("generate", vars(params))
    new = params.max_new_tokens or usual
    limit = width + new if new else params.max_length or 0
    if usual and model_limit is not None:
        limit = min(limit, model_limit)
    if width >= limit:
        raise ValueError(
            f"the prompt has {width} tokens and max_length is {limit}: there is no room for a new "
            "one; set max_new_tokens"
        )
    cautions = []
    if model_limit is not None and longest + limit - width > model_limit:
        text = f"{longest} prompt tokens and {limit - width} new ones exceed the {model_limit} "
        text += "positions that the model was made for"
        if hard_limit:
            raise ValueError(f"{text}: lower max_new_tokens to {model_limit - longest}")
        cautions.append(text)
    if usual:
        text = f"no length is set, so {limit - width} new tokens are generated at most: set "
        cautions.append(text + "max_new_tokens")
    return limit, tuple(cautions)


class StopStrings:
    """Ends a row when its last token completes one of some texts.

    transformers' rule: the tokens' own spellings are joined (prompt included, as many tokens as the
    longest text has characters), and an occurrence must end inside the last token, which is kept
    whole. A token without a spelling matches nothing.

    Args:
        spelling: a token's bytes, or None (see `Tokenizer.spelling`).
        texts: what ends a row.
        in_bytes: whether the window is counted in bytes rather than characters, as transformers
            counts it for byte-level tokenizers and those that fall back to bytes.
        first: tokens at the beginning in which nothing is looked for: OpenAI's rule, where they are
            the prompt.
    """

    def __init__(
        self,
        spelling: Callable[[int], bytes | None],
        texts: Sequence[str],
        in_bytes: bool,
        first: int = 0,
    ) -> None:
        self._spelling, self._first = spelling, first
        self._texts = [text.encode() for text in texts]
        self._window = max(len(text.encode() if in_bytes else text) for text in texts)

    def __call__(self, ids: NDArray[np.int64]) -> bool:
        ids = ids[self._first :]
        last = self._spelling(int(ids[-1]))
        if last is None:
            return False
        text = last
        for token in ids[-2 : -self._window - 1 : -1].tolist():
            before = self._spelling(token)
            if before is None:
                break
            text = before + text
        start = len(text) - len(last)  # an occurrence ends after this
        return any(text.find(stop, max(0, start - len(stop) + 1)) >= 0 for stop in self._texts)


class Deadline:
    """`max_time` seconds from now, by a clock that gives seconds."""

    def __init__(self, max_time: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if max_time is None else clock() + max_time

    def passed(self) -> bool:
        return self._end is not None and self._clock() > self._end


def asked(
    criteria: Sequence[Criterion], ids: NDArray[np.int64], scores: Scores
) -> NDArray[np.bool_]:
    """The rows, as bool [rows], that any of the callers' criteria ends.

    Raises:
        ValueError: a criterion returns neither one truth nor one for each row.
    """
    done = np.zeros(len(ids), np.bool_)
    for criterion in criteria:
        answer = np.asarray(criterion(ids, scores))
        if answer.shape not in ((), (len(ids),)) or answer.dtype.kind not in "biuf":
            raise ValueError(
                f"{criterion!r} returned {answer.dtype} of shape {answer.shape}, expected one "
                f"truth value or ({len(ids)},)"
            )
        done |= answer.astype(np.bool_)
    return done
