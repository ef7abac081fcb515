"""The keywords of an export, gathered and checked, and the target that they amount to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastgen.export.prove import corpus
from fastgen.export.quantize import kv_int8
from fastgen.export.quantize.recipe import RECIPES
from fastgen.export.source.origin import Tolerance

PRECISIONS = ("fp32", *RECIPES)
CACHE_PRECISIONS = tuple(kv_int8.DTYPES)

# What a precision may differ by from the original; `export` and the command line can change it.
# Kernels are chosen for it (see `recipe`), and what cannot reach it is refused.
TOLERANCES = {
    "fp32": Tolerance(),
    "int8": Tolerance.quantised(kl=0.006),
    "int4": Tolerance.quantised(kl=0.1),
    # Weights on the grid of their file cost little: what is left is activations in 8 bits, and the
    # nearest codes of types whose levels 8 bits do not have.
    "grid": Tolerance.quantised(kl=0.02),
}


@dataclass(frozen=True)
class ExportOptions:
    """The keywords of `export`, as its docstring has them.

    Raises:
        ValueError: `cache_precision` is not known, or a text cannot be read.
    """

    tokenizer: object | None
    precision: str | None
    cache_precision: str
    force: bool
    allow_mismatch: bool
    revision: str | None
    adapter: str | os.PathLike[str] | None
    texts: Sequence[Path]
    tolerance: Tolerance | None
    max_kl: float | None
    min_top1: float | None
    quick: bool
    build: bool | None
    prove: bool

    def __post_init__(self) -> None:
        if self.cache_precision not in CACHE_PRECISIONS:
            known = ", ".join(CACHE_PRECISIONS)
            raise ValueError(
                f"cache_precision must be one of {known}, got {self.cache_precision!r}"
            )
        for path in self.texts:
            corpus.read(path)

    def target(self, first: str, precision: str, held: bool = False) -> Target:
        """The target for a graph that is in the precision `first` already.

        Args:
            held: weights stay on the grid that their file has them on.

        Raises:
            ValueError: nothing of it is quantised, and there are texts to calibrate on.
        """
        parts = ["cache"] if self.cache_precision != "fp32" else []
        parts += ["grid" if held else "weights"] if precision != first else []
        if self.texts and not parts:
            raise ValueError(
                f"text is for what is quantised, and of {precision} nothing is: leave it out"
            )
        judged = "grid" if "grid" in parts else precision
        usual = usual_tolerance(judged, self.cache_precision, self.max_kl, self.min_top1)
        return Target(precision, self.cache_precision, parts, self.tolerance or usual)


@dataclass(frozen=True)
class Target:
    """The aim of an export.

    Attributes:
        precision, cache_precision: in the end.
        parts: that are quantised, in order: "cache", and "weights" or "grid", both or none.
        tolerance: what may differ from the original then.
    """

    precision: str
    cache_precision: str
    parts: Sequence[str]
    tolerance: Tolerance


def texts_of(
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[Path]:
    """The user's files: none, one or several."""
    given = [text] if isinstance(text, str | os.PathLike) else text or ()
    return [Path(path) for path in given]


def usual_tolerance(
    precision: str, cache_precision: str, kl: float | None = None, top1: float | None = None
) -> Tolerance:
    """That of the coarser of the two; with another bound or two where they are given."""
    usual = max(
        (TOLERANCES[precision], TOLERANCES[cache_precision]), key=lambda tolerance: tolerance.kl
    )
    usual = usual if kl is None else replace(usual, kl=kl)
    return usual if top1 is None else replace(usual, top1=top1)
