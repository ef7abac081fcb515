"""The form of each matrix for many tokens at once: the fastest that keep what the export promised.

The second form rounds activations by token, or by token and group of inputs, where blocks have a
scale of their own for each few. What a kind of matrix costs so is measured at the model's output,
beside its blocks; kinds whose cost is too large for the target take a slower form, or stay in
blocks. (Where nothing was quantised but held as its file has it, all kinds take the same form:
that is found out in seconds.) The whole is judged beside the original, on the text that the export
was judged on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.model import Model
from fastgen.export import bundle
from fastgen.export.prove import quality
from fastgen.export.prove.quality import Quality
from fastgen.export.quantize import prefill_int8
from fastgen.export.quantize.prefill_int8 import Form, Kind
from fastgen.export.work import Report, Work
from fastgen.store.tuning import Tuning
from fastgen.system.memory import trim

SENSED = 512  # tokens that kinds are measured on, about
JUDGED = 3  # times that the whole is
LEAST = 0.5  # of what kinds cost alone, that they may be taken to cost together
# Time of a weight among many tokens, of per channel: bench/README.md, "Many tokens at once".
COSTS = {Form.CHANNELS: 1.0, Form.GROUPS: 1.35, Form.BLOCKS: 2.5}
FORMS = tuple(COSTS)

Forms = dict[str, Form]  # by the name of a kind
Rows = Sequence[NDArray[np.int64]]


@dataclass
class Second:
    """Decides on the second form of a model's matrices, and writes it beside the graph.

    Attributes:
        work: the export, whose graph is written.
    """

    work: Work

    def write(self) -> list[str]:
        """Write the fastest form that is within the target, if there is one; say what it is."""
        work = self.work
        kinds = prefill_int8.kinds(work.directory)
        forms = dict.fromkeys((kind.name for kind in kinds), Form.CHANNELS)
        why = self._written(kinds, forms)
        rows = [] if why else work.judged_on(quality.TOKENS)
        if why or not rows:
            return self._told(why, kinds, forms, None)
        work.exact.ask(rows)
        target = work.target.tolerance.kl
        measured = self._judged(rows)
        if measured.kl > target and "grid" in work.target.parts:
            forms = dict.fromkeys(forms, Form.GROUPS)  # sensing takes longer than all else did
            self._written(kinds, forms)
            measured = self._judged(rows)
        elif measured.kl > target:
            forms, why, measured = self._sought(kinds, forms, measured, rows)
        if not why and measured.kl > target:
            why = f"it would cost a KL divergence of {measured.kl:.1e}, more than {target:.1e}"
        return self._told(why, kinds, forms, measured)

    def _sought(
        self, kinds: Sequence[Kind], forms: Forms, measured: Quality, rows: Rows
    ) -> tuple[Forms, str, Quality]:
        """Seek forms that are within the target, by what each costs alone."""
        base, target = self._base(), self.work.target.tolerance.kl
        sensed, why = self._sensed(kinds), ""
        for _ in range(JUDGED - 1):
            expected = sum(sensed[kind.name][forms[kind.name]] for kind in kinds)
            share = (measured.kl - base) / max(expected, 1e-12)
            forms = chosen(kinds, sensed, max(0.0, target - base) / max(share, LEAST))
            if {*forms.values()} == {Form.BLOCKS}:
                break
            why = self._written(kinds, forms)
            if why:
                break
            measured = self._judged(rows)
            if measured.kl <= target:
                break
        return forms, why, measured

    def _base(self) -> float:
        """KL divergence that the export has already."""
        known = self.work.report.get("quality") or {}
        return float(known.get("kl", 0.0))

    def _written(self, kinds: Sequence[Kind], forms: Forms) -> str:
        """Write a form of each kind; return why it cannot be."""
        by_matrix = {name: forms[kind.name] for kind in kinds for name in kind.members}
        why = prefill_int8.write(self.work.directory, by_matrix)
        bundle.seal(self.work.directory, self.work.info)
        return why

    def _model(self) -> Model:
        tuning = Tuning(prefill_precision="int8", many_from=1)
        return Model(self.work.directory, tuning=tuning)

    def _judged(self, rows: Rows) -> Quality:
        work = self.work
        measured = quality.measure(work.exact, self._model(), rows, work.shown.part)
        trim()
        return measured

    def _sensed(self, kinds: Sequence[Kind]) -> dict[str, dict[Form, float]]:
        """KL divergence from the original that each form of each kind adds, alone.

        Beside the blocks it would seem larger: two ways to round are no nearer to each other than
        both to the original.
        """
        work = self.work
        found: dict[str, dict[Form, float]] = {}
        rows = work.corpus.calibration(SENSED)
        work.exact.ask(rows)

        def divergence(model: Model) -> float:
            return quality.measure(work.exact, model, rows).kl

        every = dict.fromkeys((kind.name for kind in kinds), Form.BLOCKS)
        usual = divergence(Model(work.directory, tuning=Tuning()))
        for done, kind in enumerate(kinds):
            work.shown.part(done, len(kinds))
            found[kind.name] = dict.fromkeys(FORMS, 0.0)
            for form in FORMS[:-1]:
                if not self._written(kinds, every | {kind.name: form}):
                    added = divergence(self._model()) - usual
                    found[kind.name][form] = max(0.0, added)
                    trim()
        return found

    def _told(
        self, why: str, kinds: Sequence[Kind], forms: Forms, measured: Quality | None
    ) -> list[str]:
        work = self.work
        if why:
            prefill_int8.remove(work.directory)
            work.info = replace(work.info, no_prompts=why)
            bundle.seal(work.directory, work.info)
            return [f"none: {why}"]
        held = Counter[str]()
        for kind in kinds:
            held[forms[kind.name].value] += len(kind.members)
        size = prefill_int8.memory(work.directory)
        report: Report = {"bytes": size, "forms": dict(held)}
        work.info = replace(work.info, many_tokens_bytes=size)
        lines = [", ".join(f"{count} {form}" for form, count in held.most_common())]
        if measured is not None:
            report |= {"quality": asdict(measured)}
            lines.append(measured.summary())
        work.report |= {"many_tokens": report}
        return [*lines, f"{size / 1e6:,.1f} MB of memory where it is asked for"]


def chosen(
    kinds: Sequence[Kind], sensed: Mapping[str, Mapping[Form, float]], allowed: float
) -> Forms:
    """The forms that cost least time, and at most so much KL divergence together, or nearly so.

    Each kind begins with the fastest; those go to slower ones first that cost most divergence for
    the time they save.
    """
    forms = dict.fromkeys((kind.name for kind in kinds), FORMS[0])

    def total() -> float:
        return sum(sensed[name][form] for name, form in forms.items())

    while total() > allowed:
        steps = [
            (
                (sensed[kind.name][forms[kind.name]] - sensed[kind.name][slower])
                / (kind.weights * (COSTS[slower] - COSTS[forms[kind.name]])),
                kind.name,
                slower,
            )
            for kind in kinds
            for slower in FORMS[FORMS.index(forms[kind.name]) + 1 :]
        ]
        if not steps:
            break
        _, name, slower = max(steps, key=lambda step: step[0])
        forms[name] = slower
    return forms
