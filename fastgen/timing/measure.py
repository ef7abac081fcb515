"""The speed of models on this machine: reading prompts, one row, many rows, beams, threads.

Last come the two tests that llama-bench runs by default, pp512 and tg128: a prompt of 512 tokens,
and 128 tokens one after the other with nothing before them.

A case is a call of `generate` whose length is forced. In every round each model is loaded, does
every case once and is dropped, and medians of the rounds count: a busy minute hits all of them, and
memory never holds more than one.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from fastgen.engine import memory_estimate
from fastgen.engine.model import Model
from fastgen.engine.prepare import Loaded, Objects, prepare
from fastgen.engine.step import Kind
from fastgen.inputs.params import Params
from fastgen.store.model_info import ModelInfo
from fastgen.store.tuning import Tuning, read
from fastgen.system.cpu import cpu_name, memory_bytes, physical_cores, usable_cpus
from fastgen.timing.rounds import in_rounds

WARM = 3  # new tokens of the call before a case, which is not timed


@dataclass(frozen=True)
class Case:
    """A call that is timed.

    Attributes:
        kind: "read" for a prompt up to its first token; "rows" and "beams" for the steps after it;
            "pp" and "tg" for llama-bench's tests, a prompt and nothing but steps.
        prompt: tokens of each row's prompt.
        new: tokens that follow.
        rows: rows that are generated together.
        beams: width of the search; 1 for none.
    """

    kind: str
    prompt: int
    new: int
    rows: int = 1
    beams: int = 1

    @property
    def tokens(self) -> int:
        """The tokens that count: those of the prompt, or those of all rows after the first."""
        if self.kind == "tg":
            return self.new
        return self.prompt if self.kind in ("read", "pp") else self.rows * (self.new - 1)

    @property
    def steps(self) -> int:
        """Among which the seconds are divided: to the first token it is one."""
        if self.kind == "tg":
            return self.new
        return 1 if self.kind in ("read", "pp") else self.new - 1


@dataclass
class Result:
    """A case of one model with a number of threads, and the seconds of each round."""

    model: str
    case: Case
    threads: int
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second, by the median."""
        return self.case.tokens / statistics.median(self.seconds)

    @property
    def milliseconds(self) -> float:
        """Of a step, or until the first token."""
        return 1e3 * statistics.median(self.seconds) / self.case.steps

    @property
    def spread(self) -> float:
        """Half of what lies between the slowest round and the fastest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / 2 / statistics.median(self.seconds)

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each round."""
        return [self.case.tokens / seconds for seconds in self.seconds]

    @property
    def deviation(self) -> float:
        """The sample standard deviation of `rates`, which llama-bench shows; 0 of one round."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {
            "tokens_per_second": self.rate,
            "milliseconds": self.milliseconds,
            "spread": self.spread,
            "mean_tokens_per_second": statistics.fmean(self.rates),
            "deviation_tokens_per_second": self.deviation,
        }


@dataclass(frozen=True)
class CaseOptions:
    """The cases that are wanted; None for the usual ones, as far as they fit.

    Attributes:
        new: tokens that rows and beams are given.
        memory: bytes that they have to fit into; None for those of this machine.
    """

    prompts: Sequence[int] | None = None
    rows: Sequence[int] | None = None
    beams: Sequence[int] | None = None
    threads: Sequence[int] | None = None
    new: int = 32
    memory: int | None = None


PROMPTS, ROWS, BEAMS = (64, 512), (1, 8, 32), (4,)
LLAMA_BENCH = ("pp", "tg")  # kinds of what it measures, too
READ, WRITTEN = 512, 128  # tokens of pp512 and tg128


def thread_counts() -> list[int]:
    """1, 2, 4 and so on, up to the physical cores."""
    cores = physical_cores()
    return sorted({*(2**n for n in range(cores.bit_length())), cores})


def cases(infos: Mapping[str, ModelInfo], asked: CaseOptions) -> tuple[list[Case], list[str]]:
    """The cases of every model, and notes on those that do not fit one of them.

    Raises:
        ValueError: what was asked for does not fit a model's positions, or the memory.
    """
    prompts = _lengths(infos, asked)
    out = [Case("read", prompt, 1) for prompt in prompts]
    out += [Case("rows", prompts[0], asked.new, rows=n) for n in asked.rows or ROWS]
    out += [Case("beams", prompts[0], asked.new, beams=n) for n in asked.beams or BEAMS]
    most = min((info.max_length for info in infos.values() if info.max_length), default=READ + 1)
    out += [Case("pp", min(READ, most - 1), 1), Case("tg", 1, min(WRITTEN, most - 1))]
    given = {"read": True, "rows": bool(asked.rows), "beams": bool(asked.beams)}
    notes: list[str] = []
    for case in list(out):
        try:
            for info in infos.values():
                _check_room(info, case, asked.memory)
        except ValueError as error:
            must = given.get(case.kind) or case.rows * case.beams == 1
            if must and case.kind not in LLAMA_BENCH:
                raise
            out.remove(case)
            notes.append(f"left out: {title(case)}: {error}")
    return out, notes


def _lengths(infos: Mapping[str, ModelInfo], asked: CaseOptions) -> list[int]:
    """The prompts' lengths: those that were asked for, or the usual ones cut to what fits."""
    limits = {name: info.max_length for name, info in infos.items() if info.max_length is not None}
    if not limits:
        return list(asked.prompts or PROMPTS)
    name = min(limits, key=lambda one: limits[one])
    room = limits[name] - asked.new
    if room < 1:
        raise ValueError(f"{name} takes {limits[name]} positions, --new {asked.new} leaves none")
    for prompt in asked.prompts or ():
        if prompt > room:
            raise ValueError(
                f"{name} takes {limits[name]} positions, which --prompt {prompt} and --new "
                f"{asked.new} exceed"
            )
    return list(asked.prompts or dict.fromkeys(min(prompt, room) for prompt in PROMPTS))


def _check_room(info: ModelInfo, case: Case, memory: int | None) -> None:
    params = Params(num_beams=case.beams)
    parts = memory_estimate.of_call(info, params, case.rows, case.prompt, case.prompt + case.new)
    memory_estimate.check(parts, "fewer rows or beams, or a shorter prompt, need less", memory)


def title(case: Case) -> str:
    """A case in words: "reading 64 tokens", "8 rows", "4 beams"; "pp512" and "tg128"."""
    if case.kind in ("pp", "tg"):
        return f"{case.kind}{case.tokens}"
    if case.kind == "read":
        return f"reading {case.prompt:,} tokens"
    return f"{case.beams} beams" if case.kind == "beams" else rows(case.rows)


def rows(count: int) -> str:
    """ "1 row", "8 rows"."""
    return f"{count:,} row{'s' * (count > 1)}"


def planned(
    models: Mapping[str, Path], timed: Sequence[Case], threads: Sequence[int] | None
) -> list[list[Result]]:
    """The results to come, still empty: those of one load together.

    All cases run with the most of the threads that are asked for, else with those that the model
    was tuned to. With other numbers of threads, the longest prompt and the fewest rows.

    Args:
        models: the directory of each, by the name that it is shown with.
        threads: to compare; None for `thread_counts`.
    """
    usual = {name: (read(directory) or Tuning()).threads for name, directory in models.items()}
    most = max(threads) if threads else None
    loads = [[Result(name, case, most or usual[name]) for case in timed] for name in models]
    longest = max((case for case in timed if case.kind == "read"), key=lambda case: case.prompt)
    fewest = min((case for case in timed if case.kind == "rows"), key=lambda case: case.rows)
    for count in threads or thread_counts():
        for name in models:
            if count != (most or usual[name]):
                loads.append([Result(name, case, count) for case in (longest, fewest)])
    return loads


def measure(
    models: Mapping[str, Path],
    loads: Sequence[Sequence[Result]],
    rounds: int,
    shown: Callable[[], None] = lambda: None,
) -> None:
    """Fill in what `planned` gave, round after round.

    Args:
        shown: called after each timing.

    Raises:
        ModelError: a directory cannot be used.
        ValueError: a number of threads, or beams that a vocabulary does not have.
    """

    def once(load: Sequence[Result], _: int) -> None:
        model = Model(models[load[0].model], load[0].threads)
        for result in load:
            run(model, replace(result.case, new=min(result.case.new, WARM)))
            result.seconds.append(run(model, result.case))
            shown()

    in_rounds({n: partial(once, one) for n, one in enumerate(loads)}, rounds, warm=0)


def run(model: Model, case: Case, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a case, by a clock: up to the first token, of the steps after it, or of all."""
    ids = np.random.default_rng(0).integers(0, model.info.vocab_size, (case.rows, case.prompt))
    knobs = {"max_new_tokens": case.new, "num_beams": case.beams, "eos_token_id": None}
    mask = np.ones_like(ids)
    start = clock()
    call = prepare(Loaded(model), ids, Objects(attention_mask=mask), knobs)
    read, ends = start, []
    for step in call.steps():
        if step.kind is Kind.READ:
            read = clock()
        elif step.kind is Kind.SEARCHED or case.beams == 1:
            ends.append(clock())
    if case.kind in ("read", "pp", "tg"):  # the step that reads tg's one token is one of its steps
        return ends[-1] - start
    # The first token of plain rows comes of the prompt alone; beams go on to the next one at once.
    return ends[-1] - (read if case.beams > 1 else ends[0])


def machine() -> dict[str, Any]:
    """The machine that a measurement holds for: the processor and the versions of what runs."""
    import fastgen

    return {
        "processor": cpu_name(),
        "cores": physical_cores(),
        "cpus": len(usable_cpus()),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "fastgen": fastgen.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }


def labels(given: Sequence[str]) -> list[str]:
    """Short names of models: the last part of a path or a hub id, or all where two are alike."""
    last = [Path(os.path.abspath(one)).name for one in given]
    return [name if last.count(name) == 1 else one for name, one in zip(last, given, strict=True)]
