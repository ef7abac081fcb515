"""A step of a call: which kind it was, and the tokens that came of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

from fastgen.engine.request import Row


class Event(NamedTuple):
    """One new token of one row."""

    row: Row
    token: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] | None


class Kind(enum.Enum):
    """The kinds of steps."""

    READ = "a chunk of the prompts was read"
    SEARCHED = "every beam grew by a token; their tokens come at the end"
    TOKENS = "rows got tokens"


class Step(NamedTuple):
    """One step of a call.

    Attributes:
        kind: see `Kind`.
        events: the new tokens, row by row; none but of TOKENS.
    """

    kind: Kind
    events: Sequence[Event] = ()
