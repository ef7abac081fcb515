"""The stages of an export, each with its steps: a graph is made, compared, and quantised."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir
from numpy.typing import NDArray

import fastgen
from fastgen.engine.output import GenerateOutput
from fastgen.engine.session import UNPACKED, profiled
from fastgen.export import bundle, requirements
from fastgen.export.progress import Cost, Step
from fastgen.export.prove import check, profile, quality
from fastgen.export.quantize import calibrate, grid, kv_int8, recipe, rotate
from fastgen.export.requirements import Budget
from fastgen.export.rewrite import contract, trim, window
from fastgen.export.work import Report, Rows, Work
from fastgen.generator import CausalLM
from fastgen.store.graph_io import GraphIO
from fastgen.store.model_info import GRAPH, WEIGHTS
from fastgen.store.tuning import Tuning
from fastgen.system import memory

TUNED = 1024  # tokens that say whether a target is met: no code is made of them
EAGER = 0.9  # the target is lowered to, each time that the text which decides is not content
QUANTISING = {"int8": Cost(2, 7), "int4": Cost(6, 21)}  # GPTQ takes three times as long


class Graph:
    """Loads the origin, and makes a graph of it that is proved equal."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.repeated = False  # not traced, or only a layer that others are like

    def steps(self) -> list[Step]:
        load = Step("load", Cost(4, 0.5), self._load, self._begin)
        return [load, self._converting(), *self._comparing()]

    def _converting(self, whole: bool = False) -> Step:
        return Step("convert", Cost(5, 2), partial(self._convert, whole))

    def _comparing(self) -> list[Step]:
        asks = not self.work.original.is_known
        return Comparison(self.work, "ONNX", self._judge, asks=asks).steps()

    def _load(self) -> list[str]:
        work = self.work
        budget = Budget(work.out, work.target.precision, len(work.target.parts))
        work.origin = work.opening.load(budget)
        work.shown.watch.unseen = budget.spilled
        needs = [] if budget.needs is None else [budget.needs.summary()]
        return [*work.origin.about(), *needs]

    def _begin(self) -> None:
        work = self.work
        work.shown.weights = requirements.FLOAT * work.origin.parameters
        work.open.enter_context(work.origin.evaluating())
        work.kept = work.open.enter_context(calibrate.shelf(bundle.parent(work.out)))
        work.original = check.Reference(work.origin.probes())
        work.info = replace(
            work.origin.describe(),
            precision=work.target.precision,
            exporter=fastgen.__version__,
        )
        work.directory = work.open.enter_context(bundle.directory(work.out, work.options.force))
        work.shown.watch.directory = work.directory
        if work.options.texts:
            assert work.corpus  # says at once what is wrong with a user's text

    def _convert(self, whole: bool) -> list[str]:
        work = self.work
        work.graph_directory = work.directory_of("fp32")
        graph, about = work.origin.convert(whole)
        unbound = GraphIO.of(replace(work.info, windows=()))
        contract.check(graph, unbound, "convert")
        trim.trim(graph, work.info.max_length)
        contract.check(graph, unbound, "trim")
        work.info = replace(
            work.info,
            hard_limit=work.info.hard_limit or trim.rotations_are_tabled(graph),
            windows=tuple(window.bound(graph)),
        )
        work.save(graph, work.graph_directory)
        work.origin.written(work.graph_directory, work.kept.room)
        self.repeated = bool(graph.meta.get("repeated"))
        return [*about, f"{len(graph.graph)} nodes"]

    def _judge(self, report: Report) -> None:
        work = self.work
        if report["mismatch"] and self.repeated:  # others are, but not this model
            work.shown.again([self._converting(whole=True), *self._comparing()])
            return
        work.judge(report)
        work.proved, work.report = work.graph_directory, report
        work.proved_equal = not report["mismatch"]


class Comparison:
    """Compares what the last written graph says with the original, through fastgen's own engine.

    Args:
        name: of the graph, in the steps' names.
        judge: takes the report.
        rows: of ids on which it is compared too, where it was quantised: once they are known.
        asks: whether the original was not asked before.
    """

    def __init__(
        self,
        work: Work,
        name: str,
        judge: Callable[[Report], None],
        rows: Callable[[], Rows] | None = None,
        asks: bool = False,
    ) -> None:
        self.work, self.name = work, name
        self.judge, self.rows, self.asks = judge, rows, asks
        self.model: CausalLM | None = None
        self.written: GenerateOutput  # after the rows, greedily
        self.report: Report = {}

    def steps(self) -> list[Step]:
        steps = [Step(f"{self.name} greedy text", Cost(0.5, 1), self._greedy)]
        if self.asks:
            steps.append(Step(f"{self._original} asked", Cost(0.5, 2.5), self._ask))
        steps.append(Step(f"{self.name} compared", Cost(0.5, 1), self._compare))
        if self.rows is not None and not self.work.options.quick:
            steps.append(Step(f"{self.name} text compared", Cost(1, 3.5), self._text))
        return [*steps[:-1], replace(steps[-1], then=self._end)]

    @property
    def _original(self) -> str:
        return "each row alone" if self.work.opening.asks_graph else "original"

    @property
    def _count(self) -> int:
        """Tokens of the greedy continuation of a row."""
        return check.OWN_TOKENS if self.work.opening.asks_graph else check.NEW_TOKENS

    def _greedy(self) -> list[str]:
        """Continue the probes, and see where the time of that goes."""
        work, count = self.work, self._count
        with tempfile.TemporaryDirectory() as place:
            with profiled(Path(place)):
                self.model = CausalLM(work.graph_directory, tuning=work.tuning)
            self.model.model.grain = check.GRAIN
            self.written = check.continued(self.model, work.original.rows, count)
            events = Path(self.model.model.session.end_profiling())
            work.time = profile.by_operator(events, count - 1)
        return [f"{step} {next(iter(shares))}" for step, shares in work.time.items()]

    def _ask(self) -> list[str]:
        work, origin = self.work, self.work.origin
        guesses = check.guessed(self.written, self._count)

        def logits(row: NDArray[np.int64], then: NDArray[np.int64]) -> NDArray[np.float32]:
            return work.kept(origin.logits(row, then))

        check.ask(work.original, logits, origin.continuation, guesses)
        rows = work.original.rows
        return [f"{len(rows)} rows of {', '.join(str(len(row)) for row in rows)} tokens"]

    def _compare(self) -> list[str]:
        work = self.work
        assert self.model is not None
        original = work.original
        agreement = check.compare_export(original, self.model.model, self.written)
        greedy = check.compare_continuation(self.written, original.continuation)
        self.report = {
            "bytes": sum((work.graph_directory / name).stat().st_size for name in (GRAPH, WEIGHTS)),
            "logits": asdict(agreement),
            "greedy": asdict(greedy),
            "mismatch": check.judge(agreement, work.origin.tolerance, greedy),
        }
        if self.rows is not None and work.options.quick:
            self.report |= {"quick": True, "mismatch": []}
        return [agreement.summary(), greedy.summary()]

    def _text(self) -> list[str]:
        """Measure what it costs on rows, and whether that is too much."""
        work = self.work
        assert self.model is not None and self.rows is not None
        work.exact.ask(self.rows())
        measured = quality.measure(work.exact, self.model.model, self.rows(), work.shown.part)
        self.report |= {
            "quality": asdict(measured) | {"more_perplexity": measured.more_perplexity},
            "mismatch": check.judge(measured, work.target.tolerance),
        }
        return [measured.summary()]

    def _end(self) -> None:
        self.model = None
        self.judge(self.report)


class Cache:
    """Stores keys and values in 8 bits."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.rows: Rows = ()

    def steps(self) -> list[Step]:
        name = f"{self.work.target.cache_precision} cache"
        quantise = Step("quantise keys and values", Cost(2, 15), self._quantise)
        return [quantise, *Comparison(self.work, name, self._judge, lambda: self.rows).steps()]

    def _quantise(self) -> list[str]:
        gc.collect()  # graphs are full of cycles: the one before goes now, with its weights
        work, precision = self.work, self.work.target.cache_precision
        limit, graph = work.info.max_length, onnx_ir.load(work.graph_directory / GRAPH)
        reached = kv_int8.reach(graph, work.corpus.calibration(kv_int8.TOKENS), limit)
        judged = work.judged_on(2 * quality.TOKENS)
        self.rows = kv_int8.long_rows(judged, limit, quality.TOKENS)
        work.scales = kv_int8.quantize(graph, reached)
        work.info = replace(work.info, cache_dtype=kv_int8.DTYPES[precision])
        work.graph_directory = work.directory_of("cache")
        work.save(graph, work.graph_directory)
        return [f"{sum(array.size for array in reached.values()):,} channels, {precision}"]

    def _judge(self, report: Report) -> None:
        self.work.judge(report)
        self.work.report = {"fp32": self.work.report, "cache": report} | report


class Weights:
    """Quantises the weights of a graph that was proved equal, and finds out what that costs.

    Kernels go up the ladder until the text says that the target is met, first that of
    calibration and then that which nothing was chosen by.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.open = ExitStack()  # holds the plan, until it is carried out
        self.plan: recipe.Plan
        self.turned: list[str] = []
        self.tuned: Rows = ()  # they say whether the target is met
        self.rows: Rows = ()
        self.again = 0

    def steps(self) -> list[Step]:
        return self._steps(self._quantise)

    def _steps(self, quantise: Callable[[], list[str]]) -> list[Step]:
        precision = self.work.target.precision
        step = Step(f"quantise to {precision}", QUANTISING[precision], quantise)
        comparison = Comparison(self.work, precision, self._judge, lambda: self.rows)
        return [step, *comparison.steps()]

    def _quantise(self) -> list[str]:
        gc.collect()  # graphs are full of cycles: the one before goes now, with its weights
        work, precision = self.work, self.work.target.precision
        used, self.rows = work.rows(recipe.RECIPES[precision].tokens + TUNED)
        self.tuned, used = apart(used, TUNED)
        if not work.options.quick:
            work.exact.ask([*self.tuned, *self.rows])
            memory.trim()
        graph, self.turned = self._turn(work.graph_directory)
        work.open.enter_context(self.open)
        plan = recipe.planned(graph, precision, used, work.shown.part)
        self.plan = self.open.enter_context(plan)
        if self.plan.has_bits and not work.options.quick:
            self._sense()
            self.plan.spend()
        work.graph_directory = work.directory_of("weights")
        return [*self.turned, *self._make(), work.corpus.summary()]

    def _sense(self) -> None:
        self.plan.sense(self.tuned, self.work.exact, self.work.shown.part)

    def _turn(self, directory: Path) -> tuple[onnx_ir.Model, list[str]]:
        """The graph at `directory` with what can be turned, if it still says the same then."""
        graph = onnx_ir.load(directory / GRAPH)
        done = rotate.rotate(graph)
        if not done:
            return onnx_ir.load(directory / GRAPH), []
        work, turned = self.work, directory.with_name("turned")
        work.save(graph, turned)
        model = CausalLM(turned, tuning=Tuning(entries=UNPACKED)).model
        agreement = check.compare_export(work.original.shorter(), model)
        del model, graph
        memory.trim()
        if check.judge(agreement, work.origin.tolerance):
            shutil.rmtree(turned)
            return onnx_ir.load(directory / GRAPH), [
                "what was turned said something else: left as it was"
            ]
        return onnx_ir.load(turned / GRAPH), [f"turned: {', '.join(done)}"]

    def _make(self) -> list[str]:
        """Write the cheapest graph that is within the target on some rows, as far as one is."""
        work = self.work
        while True:
            model = self.plan.make(work.shown.part)
            work.save(model, work.graph_directory)
            del model
            if work.options.quick:
                break
            written = CausalLM(work.graph_directory).model
            measured = quality.measure(work.exact, written, self.tuned).kl
            del written
            memory.trim()
            if not self._climbs(measured):
                break
        return self._told()

    def _climbs(self, measured: float) -> bool:
        """Send matrices up the ladder, if the whole costs more than is wanted; True if any went."""
        target = self.work.target.tolerance.kl
        if measured <= target:
            return False
        if not self.plan.sensed:
            if self.plan.turn():
                return True
            self._sense()
        return self.plan.aim(measured, target * EAGER**self.again)

    def _told(self) -> list[str]:
        """Say what became of the matrices."""
        plan, kernels = self.plan, Counter(self.plan.kernels())
        lines = [
            ", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common()),
            f"{plan.weight_bits:.2f} bits a weight of the layers",
        ]
        lines += [f"{len(plan.smoothed)} smoothed"] if plan.smoothed else []
        if plan.reached:
            unreached = sum(len(mixture.unreached) for mixture in plan.reached)
            experts = sum(mixture.experts for mixture in plan.reached)
            lines.append(f"the text came to all but {unreached} of {experts} experts")
        return lines

    def _judge(self, report: Report) -> None:
        work, plan = self.work, self.plan
        measured = report.get("quality", {}).get("kl", 0.0)
        self.again += 1
        if self._climbs(measured):
            work.shown.again(self._steps(self._make))
            return
        made = plan.made()
        report |= {
            "matrices": [asdict(matrix) for matrix in made],
            "weight_bits": round(plan.weight_bits, 4),
            "wider": [matrix.name for matrix in made if matrix.wide],
            "smoothed": plan.smoothed,
            "turned": self.turned,
            "kinds": plan.sensed,
            "text": dict(work.corpus.kinds),
        }
        if plan.reached:
            report["experts"] = [asdict(mixture) for mixture in plan.reached]
        work.judge(report)
        work.report = {"fp32": work.report} | work.report | report
        self.open.close()
        del self.plan


class Grid:
    """Holds weights on the grid that their file has them on: nothing is quantised twice."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.made: list[str] = []
        self.rows: Rows = ()

    def steps(self) -> list[Step]:
        precision = self.work.target.precision
        hold = Step("hold weights on their grid", Cost(1, 1), self._hold)
        return [hold, *Comparison(self.work, precision, self._judge, lambda: self.rows).steps()]

    def _hold(self) -> list[str]:
        gc.collect()  # graphs are full of cycles: the one before goes now, with its weights
        work = self.work
        graph = onnx_ir.load(work.graph_directory / GRAPH)
        self.made = grid.hold(graph, work.shown.part)
        work.graph_directory = work.directory_of("grid")
        work.save(graph, work.graph_directory)
        self.rows = work.judged_on(quality.TOKENS)
        kernels = Counter(self.made)
        return [", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common())]

    def _judge(self, report: Report) -> None:
        report |= {"kernels": dict(Counter(self.made)), "text": dict(self.work.corpus.kinds)}
        self.work.judge(report)
        self.work.report = {"fp32": self.work.report} | self.work.report | report


def apart(rows: Rows, tokens: int) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Some of the rows, of all kinds, about so many tokens together, and the others."""
    every = max(2, sum(map(len, rows)) // tokens)
    return list(rows[::every]) or list(rows), [
        row for index, row in enumerate(rows) if index % every or len(rows) == 1
    ]


PARTS: dict[str, Callable[[Work], Cache | Grid | Weights]] = {
    "cache": Cache,
    "grid": Grid,
    "weights": Weights,
}


def quantised(work: Work) -> Sequence[Step]:
    """The steps that quantise what the target says."""
    return [step for part in work.target.parts for step in PARTS[part](work).steps()]
