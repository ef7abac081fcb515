"""The source of a graph, whatever it is: the same steps follow for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastgen.store.model_info import ModelInfo

if TYPE_CHECKING:
    import onnx_ir
    import tokenizers


@dataclass(frozen=True)
class Tolerance:
    """The difference that an export may have; the defaults are those of fp32.

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
        """Decided by KL alone: a flat distribution changes its likeliest token at KL 0.001."""
        return cls(max_difference=None, kl=kl, top1=None, greedy=False)


NOTHING: NDArray[np.int64] = np.empty(0, np.int64)

# Gives an array of a shape and type, in a file: logits of a large vocabulary need much room.
Room = Callable[[tuple[int, int], DTypeLike], NDArray[Any]]


class Origin(Protocol):
    """A transformers model, an ONNX folder, or a checkpoint whose family is known.

    Attributes:
        name: what it is called: a hub id or a directory's own name, never a path.
        tokenizer: that cuts its texts; None for ids only.
        note: why there is no tokenizer.
        tolerance: what the graph may differ by from the original, before it is quantised.
        first: the precision of that graph.
        parameters: numbers of its weights.
    """

    name: str
    note: str
    first: str

    @property
    def tokenizer(self) -> tokenizers.Tokenizer | None: ...

    @property
    def tolerance(self) -> Tolerance: ...

    @property
    def parameters(self) -> int: ...

    def evaluating(self) -> AbstractContextManager[None]:
        """While it is read and asked."""

    def about(self) -> list[str]:
        """Findings of the step that loads it."""

    def probes(self) -> list[NDArray[np.int64]]:
        """Ragged rows of ids to compare on."""

    def logits(
        self, row: NDArray[np.int64], then: NDArray[np.int64] = NOTHING
    ) -> NDArray[np.float32]:
        """The original's: float32 [length, vocab] of one row and of tokens that follow it, which it
        reads one at a time, if that makes a difference to it.
        """

    def continuation(self, row: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """The tokens that the original adds to a row, greedily."""

    def describe(self) -> ModelInfo:
        """The content of `fastgen.json` in its first precision, but for windows and files.

        Asked after the probes, where the original is at hand; it runs nothing.
        """

    def convert(self, whole: bool = False) -> tuple[onnx_ir.Model, list[str]]:
        """The graph by the contract, not trimmed, and the findings of that step.

        `meta["repeated"]` of the graph says whether `whole` would give one that is made otherwise:
        traced, and every layer of it.
        """

    def written(self, directory: Path, room: Room) -> None:
        """Take note of where the graph was written in its first precision, to be asked there, and
        of what gives arrays for its logits.

        Only for origins that nothing else runs: `logits` then ask that graph.
        """

    def report(self) -> dict[str, Any]:
        """More fields of the report."""

    def versions(self) -> dict[str, str]:
        """Of what it was read with."""

    def write_configuration(self, to: Path) -> None:
        """config.json, generation_config.json and the tokenizer's files."""


def name_of(path: Path) -> str:
    """The name of the model in a directory; the hub's own cache tells its id."""
    parts = path.resolve().parts
    for repository, below in itertools.pairwise(parts):
        if repository.startswith("models--") and below == "snapshots":
            return repository.removeprefix("models--").replace("--", "/")
    return parts[-1]
