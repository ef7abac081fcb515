"""An export on its way: what its steps have found and made so far."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from fastgen.engine.model import Model
from fastgen.engine.session import UNPACKED
from fastgen.export import bundle
from fastgen.export.opening import Opening
from fastgen.export.options import ExportOptions, Target
from fastgen.export.progress import Progress
from fastgen.export.prove import check, corpus, quality
from fastgen.export.quantize import calibrate, kernels
from fastgen.export.rewrite import contract, onnx_file
from fastgen.export.source.origin import Origin
from fastgen.generator import CausalLM
from fastgen.store.graph_io import GraphIO
from fastgen.store.model_info import GRAPH, SCALES, ModelInfo
from fastgen.store.tuning import Tuning

WRITER = kernels.Kernel(8, 32)  # of the copy that writes the model's own text

Rows = Sequence[NDArray[np.int64]]
Report = dict[str, Any]


@dataclass
class Work:
    """One export.

    Attributes:
        out: the directory that is written in the end.
        shown: takes the steps.
        open: what stays open until the export is over.
        origin: of the graph, once it is loaded.
        kept: puts an array into a file, where it takes no memory that the system could not have
            back.
        original: what the original says of the probes.
        info: the content of `fastgen.json`.
        directory: becomes `out` at the end.
        graph_directory: the directory of the last graph that was written (see `directory_of`).
        proved: the same of the graph in the origin's precision, once it was compared.
        proved_equal: whether it says what the original says.
        scales: of keys and values, once they are quantised.
        time: of the last graph that was compared (see `profile.by_operator`).
        report: of the last graph, and of those before it.
    """

    opening: Opening
    options: ExportOptions
    target: Target
    out: Path
    shown: Progress
    open: contextlib.ExitStack
    origin: Origin = field(init=False)
    kept: calibrate.Shelf = field(init=False)
    original: check.Reference = field(default_factory=lambda: check.Reference([]))
    info: ModelInfo = field(init=False)
    directory: Path = field(init=False)
    graph_directory: Path = field(init=False)
    proved: Path | None = None
    proved_equal: bool = False
    scales: NDArray[np.float32] | None = None
    time: dict[str, dict[str, float]] = field(default_factory=dict)
    report: Report = field(default_factory=dict)

    def directory_of(self, part: str) -> Path:
        """The directory of the graph in which a part of the target is quantised last.

        The last graph of all is written to `directory`. Earlier ones have directories of their
        own, and the next one reads their weights from there, where they take no memory that the
        system could not have back.

        Args:
            part: of the target; "fp32" for the graph before any.
        """
        last = ["fp32", *self.target.parts][-1]
        return self.directory if part == last else self.working / part

    @property
    def tuning(self) -> Tuning | None:
        """The way the last graph that was written runs to be compared: one in float32 where it is
        mapped, since packing its weights takes longer than it gives back; what is quantised as it
        will be used, which None says.
        """
        quantised = {"weights", "grid"} & set(self.target.parts) or self.target.precision != "fp32"
        is_last = self.graph_directory == self.directory
        return None if is_last and quantised else Tuning(entries=UNPACKED)

    @property
    def working(self) -> Path:
        """The directory of graphs that are not the last one."""
        return self.directory / "work"

    def save(self, graph: onnx_ir.Model, to: Path) -> None:
        """Write a graph: it is a model directory then."""
        contract.check(graph, GraphIO.of(self.info), f"the steps before {to.name} is written")
        to.mkdir(parents=True, exist_ok=True)
        onnx_file.save(graph, to / GRAPH)
        if self.scales is not None:
            np.save(to / SCALES, self.scales)
        bundle.seal(to, self.info)

    @cached_property
    def corpus(self) -> corpus.Corpus:
        """Rows of ids to calibrate on, and others to measure on."""
        return corpus.of(self.origin, self.info, self.options.texts, self._writer)

    def _writer(self) -> CausalLM:
        """A copy of the proved graph in 8 bits, which the model's own text is sampled from: each
        token reads all of it.
        """
        assert self.proved is not None
        copy, graph = self.working / "writer", onnx_ir.load(self.proved / GRAPH)
        kernels.quantize(graph, lambda product: kernels.Choice(WRITER))
        copy.mkdir(parents=True, exist_ok=True)
        onnx_file.save(graph, copy / GRAPH)
        bundle.seal(copy, ModelInfo.read(self.proved))
        return CausalLM(copy)

    def _proved(self) -> Model:
        """The graph in float32, which rows are read by once."""
        assert self.proved is not None
        return Model(self.proved, tuning=Tuning(entries=UNPACKED))

    @cached_property
    def exact(self) -> quality.Exact:
        """The logits that rows should have: the proved graph's, which says what the original says,
        in half the time; or the original's own, where the graph is not proved.
        """
        logits, vocab, room = self.origin.logits, self.info.vocab_size, self.kept.room
        if self.proved_equal:
            return quality.Exact.of(self._proved, vocab, room)
        return quality.Exact(lambda: lambda row: iter([(0, logits(row))]), vocab, room)

    def rows(self, calibration: int) -> tuple[Rows, Rows]:
        """Rows to calibrate on, about so many tokens, and rows to measure on (see `judged_on`)."""
        judged = 0 if self.options.quick else quality.TOKENS
        self.corpus.write(calibration, judged)
        return self.corpus.calibration(calibration), self.judged_on(quality.TOKENS)

    def judged_on(self, tokens: int) -> Rows:
        """Rows to measure on; none where nothing is measured."""
        return [] if self.options.quick else self.corpus.evaluation(tokens)

    def judge(self, report: Report) -> None:
        """Raise a Mismatch for a graph that is beyond the tolerance, if that is not allowed."""
        if report["mismatch"] and not self.options.allow_mismatch:
            raise check.Mismatch(
                f"the export disagrees with the original: {'; '.join(report['mismatch'])}"
            )
