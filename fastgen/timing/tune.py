"""Measure on this machine: which model, how many threads, which kernels.

Every candidate is loaded, warmed up, timed and dropped, in turn and in several rounds; medians
count. So a busy minute hits all of them, and memory never holds more than one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastgen.engine.model import Model
from fastgen.engine.prefill import prefill as read
from fastgen.errors import ModelError
from fastgen.sampling.softmax import divergence, log_softmax
from fastgen.store import jsonfile
from fastgen.store.jsonfile import is_number, is_object, take
from fastgen.store.model_info import REPORT, ModelInfo
from fastgen.store.tuning import Tuning, kernels
from fastgen.system.cpu import physical_cores, usable_cpus
from fastgen.timing.rounds import in_rounds

NEAR = 0.03  # of two that are as near as this, the one with fewer threads, or that sleeps, wins
CLOSE = 1e-3  # KL divergence in nats that kernels may add
ROUNDED = 0.02  # and many tokens in int8, which round activations otherwise: asked for
WARM = 2  # steps that are not timed


@dataclass(frozen=True)
class Workload:
    """The call that is timed: its rows, its prompt, and the tokens after it."""

    rows: int = 1
    prompt: int = 64
    new: int = 32


@dataclass
class Candidate:
    """A model with settings, and what was measured of it.

    Attributes:
        decode: seconds of a step, by round.
        prefill: seconds to the first token, by round.
        divergence: KL from what the model's default settings say, in nats.
        many_from: tokens from which the second form paid, by round; none where there is one form.
    """

    directory: Path
    tuning: Tuning
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    divergence: float = 0.0
    many_from: list[int] = field(default_factory=list)

    @property
    def measured(self) -> Tuning:
        """The settings, with what was found of the second form."""
        if not self.many_from:
            return self.tuning
        return replace(self.tuning, many_from=statistics.median_low(self.many_from))

    def seconds(self, new: int) -> float:
        """Seconds of a whole call: the prompt and `new` tokens."""
        return statistics.median(self.prefill) + new * statistics.median(self.decode)


def candidates(directory: Path, prefill_precision: str | None = None) -> list[Candidate]:
    """The settings that are tried with a model.

    Args:
        prefill_precision: tried besides, where the model has it (see `fastgen.load`). None for
            int8 where that takes hardly more memory, and "same" where it does not.
    """
    if prefill_precision is None:
        small = ModelInfo.read(directory).second_form_is_small
        prefill_precision = "int8" if small else "same"
    threads = {1, physical_cores(), len(usable_cpus())}
    count = physical_cores() // 2
    while count > 1:  # wide machines run out of memory bandwidth before they run out of cores
        threads.add(count)
        count //= 2
    plain = [Tuning(threads=n) for n in sorted(threads)]
    sleeping = [Tuning(threads=n, spinning=False) for n in sorted(threads) if n > 1]
    others = [Tuning(threads=physical_cores(), entries=entries) for entries in kernels()]
    if prefill_precision != "same" and ModelInfo.read(directory).can_read_prompts:
        others += [replace(tuning, prefill_precision=prefill_precision) for tuning in plain]
    return [Candidate(directory, tuning) for tuning in plain + sleeping + others]


def measure(
    tried: Sequence[Candidate],
    work: Workload,
    rounds: int,
    shown: Callable[[], None],
) -> None:
    """Time every candidate in each round, in place.

    Args:
        tried: the candidates of all models.
        work: what is timed.
        rounds: how often; the first of each process warms the file cache too.
        shown: called after each timing.
    """
    by_default: dict[Path, NDArray[np.float32]] = {}  # settings, which come first

    def once(candidate: Candidate, _: int) -> None:
        model = Model(candidate.directory, tuning=candidate.tuning)
        prefill, decode, logits = _timed(model, work)
        candidate.prefill.append(prefill)
        candidate.decode.append(decode)
        if model.many_from is not None:
            candidate.many_from.append(model.many_from)
        expected = log_softmax(by_default.setdefault(candidate.directory, logits))
        lost = divergence(expected, log_softmax(logits)) / len(logits)
        candidate.divergence = max(candidate.divergence, lost)
        shown()

    in_rounds({n: partial(once, candidate) for n, candidate in enumerate(tried)}, rounds, warm=0)


def _timed(model: Model, work: Workload) -> tuple[float, float, NDArray[np.float32]]:
    """Seconds of the prompt and of a step, and float32 [rows, vocab] after the prompt."""
    new = work.new + WARM
    limit = model.info.max_length or work.prompt + new
    length = max(1, min(work.prompt, limit - new))
    if length + new > limit:
        raise ValueError(f"{model.directory} takes {limit} positions: tune with fewer new tokens")
    ids = np.random.default_rng(0).integers(0, model.info.vocab_size, (work.rows, length))
    for _ in range(2):
        cache = model.new_cache(work.rows, length + new)
        start = time.perf_counter()
        logits = read(model, cache, list(ids), 0)
        prefill = time.perf_counter() - start
    for step in range(new):
        if step == WARM:
            start = time.perf_counter()
        model.forward(list(ids[:, -1:]), cache)
    return prefill, (time.perf_counter() - start) / work.new, logits


def best(tried: Sequence[Candidate], new: int) -> Candidate:
    """The fastest, or one that is nearly as fast and takes less of the machine."""
    allowed = [
        candidate
        for candidate in tried
        if candidate.divergence
        <= (CLOSE if candidate.tuning.prefill_precision == "same" else ROUNDED)
    ]
    fastest = min(candidate.seconds(new) for candidate in allowed)
    near = [candidate for candidate in allowed if candidate.seconds(new) <= (1 + NEAR) * fastest]
    return min(
        near,
        key=lambda candidate: (
            candidate.tuning.threads,
            candidate.tuning.spinning,
            candidate.seconds(new),
        ),
    )


def within(directory: Path, max_kl: float, min_top1: float) -> bool:
    """True where a model's own report keeps the accuracy budget. fp32 was proved equal."""
    kl, top1 = accuracy(directory)
    return kl <= max_kl and top1 >= min_top1


def accuracy(directory: Path) -> tuple[float, float]:
    """KL divergence in nats from the original, and the share of equal likeliest tokens.

    Raises:
        ModelError: the directory has no report, or one that does not say this.
    """
    path = directory / REPORT
    if not path.is_file():
        raise ModelError(f"{directory} has no {REPORT}: export the model again")
    report = jsonfile.read(path)
    where = "quality" if report.get("quality") else "logits"
    comparison = take(report, path, where, is_object, "an object")
    kl, top1 = (take(comparison, path, name, is_number, "a number") for name in ("kl", "top1"))
    return float(kl), float(top1)


def table(tried: Sequence[Candidate], chosen: Sequence[Candidate], new: int) -> Iterator[str]:
    """Lines that say what was measured, `*` for what is chosen for each model.

    And what the second form takes, where it was tried.
    """
    yield f"{'':2}{'model':<28}{'settings':<28}{'ms a token':>11}{'prompt ms':>11}{'KL':>9}"
    for candidate in tried:
        kl, _ = accuracy(candidate.directory)
        yield (
            f"{'*' if candidate in chosen else '':2}{candidate.directory.name:<28}"
            f"{candidate.tuning!s:<28}"
            f"{1e3 * statistics.median(candidate.decode):>11.2f}"
            f"{1e3 * statistics.median(candidate.prefill):>11.1f}{kl + candidate.divergence:>9.1e}"
        )
    second = [one.directory for one in tried if one.tuning.prefill_precision != "same"]
    for directory in dict.fromkeys(second):
        more = ModelInfo.read(directory).many_tokens_bytes / 1e6
        yield f"many tokens in int8 take {more:,.1f} MB of memory more in {directory.name}"
