"""The cost of a precision on text: the exported model beside the original, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastgen.engine.model import Model
from fastgen.export.quantize.divergence import Beside, beside
from fastgen.export.quantize.parts import CHUNK

TOKENS = 1024  # of a text that precisions are measured on, at most
EXACT, MEASURED = 1 << 25, 1 << 24  # logits that a graph is asked for at once, about

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Quality:
    """The exported model against the original in float32, on text it was not calibrated on.

    Its KL divergence is what a target is set for; all else is shown.

    Attributes:
        tokens: predicted tokens.
        perplexity: of the export; `reference_perplexity` is the original's.
        kl: mean Kullback-Leibler divergence from the original, in nats.
        top1: share of positions with the same likeliest token.
        max_difference: largest difference of a logit, as a share of the largest logit.
        mean_difference: the mean, likewise.
        kl_error: the standard error of `kl`, by its differences from token to token.
        perplexity_error: that of `more_perplexity`, likewise: half a per cent in a thousand tokens.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    top1: float
    max_difference: float
    mean_difference: float
    kl_error: float
    perplexity_error: float

    @property
    def more_perplexity(self) -> float:
        """Relative to the original's."""
        return self.perplexity / self.reference_perplexity - 1

    def summary(self) -> str:
        return (
            f"perplexity {self.perplexity:.3f} against {self.reference_perplexity:.3f} "
            f"({self.more_perplexity:+.2%} ± {self.perplexity_error:.2%}), "
            f"KL {self.kl:.1e} ± {self.kl_error:.0e}, top-1 {self.top1:.2%}"
        )


class Exact:
    """Logits of rows as they should be, each computed once: they are in a file from then on.

    Args:
        opened: gives what a row's logits are asked of, some positions at a time, with the first of
            them; it is let go when the rows are done.
        room: gives an array of a shape and type to keep them in.
    """

    def __init__(
        self,
        opened: Callable[[], Callable[[NDArray[np.int64]], Iterator[tuple[int, Logits]]]],
        vocab: int,
        room: Callable[[tuple[int, int], DTypeLike], NDArray[Any]],
    ) -> None:
        self._opened, self._vocab, self._room = opened, vocab, room
        self._held: dict[bytes, Logits] = {}

    @classmethod
    def of(
        cls,
        opened: Callable[[], Model],
        vocab: int,
        room: Callable[[tuple[int, int], DTypeLike], NDArray[Any]],
    ) -> Exact:
        """The logits of a graph that was proved: it stands for the original."""
        return cls(lambda: partial(read, opened(), most=EXACT // vocab), vocab, room)

    def __call__(self, row: NDArray[np.int64]) -> Logits:
        """float32 [length, vocab] of a row of ids."""
        self.ask([row])
        return self._held[row.tobytes()]

    def ask(self, rows: Sequence[NDArray[np.int64]]) -> None:
        """Compute those of several rows at once, which opens the graph once."""
        missing = [row for row in rows if row.tobytes() not in self._held]
        asked = self._opened() if missing else None
        for row in missing:
            assert asked is not None
            held = self._room((len(row), self._vocab), np.float32)
            for start, logits in asked(row):
                held[start : start + len(logits)] = logits
            self._held[row.tobytes()] = held


def measure(
    original: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    exported: Model,
    rows: Sequence[NDArray[np.int64]],
    shown: Callable[[int, int], None] = lambda done, total: None,
) -> Quality:
    """Compare on `rows` of ids, each from scratch.

    Args:
        original: ids [length] -> its logits, float32 [length, vocab].
        shown: called with the number of rows done and their total, as they are.
    """
    found = list[Beside]()
    ours, theirs = list[NDArray[np.float64]](), list[NDArray[np.float64]]()  # of each token
    for done, row in enumerate(rows):
        shown(done, len(rows))
        reference = original(row)
        for start, logits in read(exported, row[:-1], MEASURED // exported.info.vocab_size):
            expected = reference[start : start + len(logits)]
            targets = row[start + 1 : start + 1 + len(logits)]
            one, positions = beside(expected, logits), np.arange(len(logits))
            found.append(one)
            theirs.append(expected[positions, targets] - one.expected_total)
            ours.append(logits[positions, targets] - one.actual_total)
        del reference, expected  # the next row's are as large

    def every(name: str) -> NDArray[np.float64]:
        return np.concatenate([getattr(one, name) for one in found])

    kl, scale = every("kl"), float(every("reach").max()) or 1.0
    loss, reference_loss = (-np.concatenate(some).mean() for some in (ours, theirs))
    return Quality(
        tokens=len(kl),
        perplexity=float(np.exp(loss)),
        reference_perplexity=float(np.exp(reference_loss)),
        kl=max(0.0, float(kl.mean())),
        top1=float(every("same").mean()),
        max_difference=float(every("largest").max()) / scale,
        mean_difference=float(every("mean").mean()) / scale,
        kl_error=_error(kl),
        perplexity_error=float(np.exp(loss - reference_loss))
        * _error(np.concatenate(theirs) - np.concatenate(ours)),
    )


def _error(values: NDArray[np.float64]) -> float:
    """The standard error of their mean."""
    return float(values.std(dtype=np.float64) / np.sqrt(len(values)))


def read(
    model: Model, row: NDArray[np.int64], most: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """A row as a prompt, about `most` tokens at a time: where each part starts, and its logits,
    float32 [part, vocab], valid until the next.
    """
    cache, step = model.new_cache(1, 2 * len(row)), max(CHUNK, most)
    for start in range(0, len(row), step):
        new = row[start : start + step]
        positions = np.arange(len(new))[None]
        yield start, model.forward([new], cache, logits_positions=positions)[0]
    cache.bindings.clear()  # they hold logits, and each other
