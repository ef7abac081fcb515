"""The cases that are measured, and the prompts of each round."""

from __future__ import annotations

import fnmatch
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

COLD = "cold"  # starting, memory: a case of its own kind
BEAM_LENGTHS = (4, 8, 16, 32, 64)  # the five tables that fastgpt published
BEAM_PROMPT = 24
BEAMS = (1, 2, 3, 4)
WARMING = 16  # tokens at most of a call that warms up
UNUSED = 100  # ids at both ends of the vocabulary: padding and end of text are among them


@dataclass(frozen=True)
class Case:
    """Prompts of these lengths, and what follows them.

    Attributes:
        name: in JSON lines and for `--cases`.
        title: in tables.
        lengths: tokens of each row's prompt.
        new: tokens that are generated, exactly.
        beams: 1 is greedy.
    """

    name: str
    title: str
    lengths: tuple[int, ...]
    new: int
    beams: int = 1

    @property
    def ragged(self) -> bool:
        """True if the prompts differ in length."""
        return len(set(self.lengths)) > 1

    @property
    def positions(self) -> int:
        """The tokens of a model's context that a row takes."""
        return max(self.lengths) + self.new


def _beams(beams: int, new: int) -> Case:
    title = f"{beams} beam{'s' if beams > 1 else ''}, {BEAM_PROMPT} -> {new}"
    return Case(f"beams-{beams}-new-{new}", title, (BEAM_PROMPT,), new, beams)


CHAT = Case("chat", "chat turn, 512 -> 128", (512,), 128)
# So slow that they run only when they are named.
LONG = tuple(
    Case(f"long-{length}", f"{length:,} -> 32", (length,), 32) for length in (2048, 8192, 32768)
)
MAIN = (
    Case("greedy-16", "16 -> 64", (16,), 64),
    Case("greedy-256", "256 -> 64", (256,), 64),
    Case("prefill-512", "first token after 512", (512,), 1),
    CHAT,
    _beams(4, 64),
    *(Case(f"rows-{rows}", f"{rows} rows, 64 -> 64", (64,) * rows, 64) for rows in (8, 16, 32)),
    Case("ragged-8", "8 rows, 8 to 128 -> 64", (8, 25, 42, 59, 77, 94, 111, 128), 64),
)
# What real models are timed on, beside their faithfulness.
PLANE = ("greedy-16", "greedy-256", "prefill-512", "rows-8", "rows-32")
CASES = {
    case.name: case
    for case in (*MAIN, *(_beams(b, new) for new in BEAM_LENGTHS for b in BEAMS), *LONG)
}
USUAL = [*(name for name, case in CASES.items() if case not in LONG), COLD]
TEXT = Case("text", "12 -> 24", (12,), 24)
FIRST = Case("first", "first token after 16", (16,), 1)
AFTER = Case("after", "16 -> 64", (16,), 64)


def chosen(patterns: Sequence[str]) -> list[str]:
    """The names that match any of the patterns, such as `beams-*`.

    Raises:
        ValueError: a pattern that matches no case.
    """
    names = [*CASES, COLD]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no case matches {pattern!r}; there are {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, p) for p in patterns)]


def prompts(case: Case, vocabulary: int, turn: int) -> list[list[int]]:
    """Random ids, the same for every engine and new each turn: some engines keep prefixes."""
    source = random.Random(zlib.crc32(f"{case.name} {turn}".encode()))
    return [
        [source.randrange(UNUSED, vocabulary - UNUSED) for _ in range(length)]
        for length in case.lengths
    ]
