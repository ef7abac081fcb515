"""What a graph is made of, whatever it is: the same steps follow for all."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir
    import tokenizers


@dataclass(frozen=True)
class Tolerance:
    """What an export may differ by; the defaults are those of fp32.

    Attributes:
        max_difference: of a logit, as a share of the largest logit; None where that is only shown.
        kl: mean Kullback-Leibler divergence in nats.
        top1: share of positions with the same likeliest token (ties aside); None likewise.
        greedy: whether the greedy continuation must be the same (ties aside).
    """

    max_difference: float | None = 1e-3
    kl: float = 1e-6
    top1: float | None = 1.0
    greedy: bool = True

    @classmethod
    def quantised(cls, kl: float) -> Tolerance:
        """What KL alone decides: a flat distribution changes its likeliest token at KL 0.001."""
        return cls(max_difference=None, kl=kl, top1=None, greedy=False)


class Origin(Protocol):
    """A transformers model, an ONNX folder, or a checkpoint whose family is known.

    Attributes:
        name: what it is called: a hub id or a directory's own name, never a path.
        tokenizer: that cuts its texts; None for ids only.
        note: why there is no tokenizer.
        tolerance: what the graph may differ by from the original, before it is quantised.
        first: the precision of that graph.
    """

    name: str
    note: str
    first: str

    @property
    def tokenizer(self) -> tokenizers.Tokenizer | None: ...

    @property
    def tolerance(self) -> Tolerance: ...

    def evaluating(self) -> AbstractContextManager[None]:
        """While it is read and asked."""

    def about(self) -> list[str]:
        """What is shown of it."""

    def probes(self) -> list[NDArray[np.int64]]:
        """Ragged rows of ids to compare on."""

    def logits(self, row: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the original says: float32 [length, vocab] of one row."""

    def continuation(self, row: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """The tokens that the original adds to a row, greedily."""

    def convert(self, whole: bool = False) -> tuple[onnx_ir.Model, list[str]]:
        """The graph by the contract, not trimmed, and what is shown of it.

        `meta["repeated"]` of the graph says whether `whole` would give one that is made otherwise.
        """

    def written(self, place: Path) -> None:
        """Where the graph was written, in its first precision, before anything is asked.

        Only for origins that nothing else runs: `logits` then ask that graph.
        """

    def describe(self, precision: str) -> dict[str, Any]:
        """The content of `fastgen.json`, but for the files."""

    def report(self) -> dict[str, Any]:
        """What else the report says."""

    def versions(self) -> dict[str, str]:
        """Of what it was read with."""

    def write_configuration(self, to: Path) -> None:
        """config.json, generation_config.json and the tokenizer's files."""


def name_of(path: Path) -> str:
    """What the model in a directory is called; the hub's own cache tells its id."""
    parts = path.resolve().parts
    for repository, below in itertools.pairwise(parts):
        if repository.startswith("models--") and below == "snapshots":
            return repository.removeprefix("models--").replace("--", "/")
    return parts[-1]
