"""Time engines on a CPU, interleaved in one run: fastgen beside its peers.

    python bench/peers --home DIR --json results.jsonl --picture results.png
    python bench/peers --engines transformers_eager ct2 ours --cases greedy-16 'beams-*' --rounds 3
    python bench/peers --shapes llama-0.5b --cases 'long-*' --rounds 1
    python bench/peers --report results.jsonl --picture results.png
    python bench/peers --home DIR --shapes smollm2 gemma3 mgm --picture plane.png --page plane.md

Run it with the Python that has fastgen's `export` extra. Each engine gets an environment of its own
from `requirements/`, and each model is converted once; `--home` keeps both for the next run. An
engine that cannot be installed is left out, and said so. `--make` converts what is missing and
times nothing: the run after it needs a quiet machine only for as long as it times.

Besides shapes with random weights there are real models (`bench/real.py`). Of these the engines'
faithfulness stands beside their speed: each one's own logits on the same rows of text, compared
with those of transformers in float32. It is measured once and kept as converted models are.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import real  # noqa: E402
import shapes  # noqa: E402

from peers import cases, faith, report  # noqa: E402
from peers.engines import BASE, NAMES, PRECISIONS, adapter  # noqa: E402
from peers.home import CHECKOUT, Home, Unavailable  # noqa: E402
from peers.workers import Failed, Worker  # noqa: E402

SOME = ("fp32", "int8", "int4")
SHAPES = {  # what is measured by default, and in which precisions
    "distilgpt2": SOME,
    "smollm-135m": SOME,
    "llama-0.5b": ("int8", "int4"),
}
# Of real models: fp32 of transformers and fastgen alone, for the shapes tell of the others'.
EXACT = (BASE, "ours")
REAL = (*EXACT, "ort_genai", "ct2", "openvino_llm", "llama", "ours_many")
COLD_STARTS = 3
FIRST_TOKENS = 32  # prompts of the check


class Lines:
    """The measurements, line by line; each is written as soon as it is known."""

    def __init__(self, path: Path | None) -> None:
        self.all: list[dict[str, Any]] = []
        self.file = path.open("w") if path else None

    def add(self, kind: str, **values: Any) -> None:
        """Keep a line, and write it."""
        line = {"kind": kind, **values}
        self.all.append(line)
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def absent(self, shape: str, worker: tuple[str, str], case: str, reason: object) -> None:
        """A cell without a number, and why."""
        name, precision = worker
        self.add(
            "absent", shape=shape, engine=name, precision=precision, case=case, reason=str(reason)
        )


def main() -> None:
    args = arguments()
    if args.report:
        lines = [json.loads(line) for path in args.report for line in path.open()]
    else:
        lines = measure(args)
    print(report.markdown(lines))
    if args.picture:
        report.picture(lines, args.picture)
    if args.page:
        picture = args.picture and os.path.relpath(args.picture, args.page.parent)
        args.page.write_text(report.page(lines, picture), encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=NAMES,
        metavar="ENGINE",
        help=f"of {', '.join(NAMES)}; of real models by default {', '.join(REAL)}",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=[*shapes.SHAPES, *real.MODELS],
        default=list(SHAPES),
        metavar="SHAPE",
        help=f"of {', '.join(shapes.SHAPES)}, or real models: {', '.join(real.MODELS)}",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        help="fp32, int8, int4; of the shape of half a billion the last two; of real models all",
    )
    known = ", ".join([*cases.CASES, cases.COLD])
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="PATTERN",
        help=f"of {known}; all but long-*, which are slow; of real models {', '.join(cases.PLANE)}",
    )
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--home",
        type=Path,
        default=os.environ.get("FASTGEN_BENCH_HOME"),
        help="keeps environments and models; else temporary",
    )
    parser.add_argument("--make", action="store_true", help="time nothing: convert models")
    parser.add_argument("--json", type=Path, help="write what was measured, as JSON lines")
    parser.add_argument("--picture", type=Path, help="draw a PNG; needs matplotlib")
    parser.add_argument("--page", type=Path, help="write the tables as a page, with the picture")
    parser.add_argument("--report", type=Path, nargs="+", help="measure nothing: read such files")
    args = parser.parse_args()
    try:
        args.cases = args.cases and cases.chosen(args.cases)
    except ValueError as error:
        parser.error(str(error))
    return args


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run everything that was asked for."""
    lines = Lines(args.json)
    with contextlib.ExitStack() as stack:
        path = args.home or stack.enter_context(tempfile.TemporaryDirectory())
        home = stack.enter_context(contextlib.closing(Home(Path(path))))
        lines.add(
            "machine",
            text=shapes.machine(args.threads),
            commit=commit(),
            rounds=args.rounds,
            command=command(args),
        )
        for shape in args.shapes:
            workers = list(ready(args, home, shape, lines))
            if shape in real.MODELS:
                faithful(home, shape, workers, lines)
            if args.make:
                continue
            model = Tried(home.source(shape), shape)
            try:
                check(model, workers, lines)
                for name in args.cases or (cases.PLANE if model.real else cases.USUAL):
                    if name == cases.COLD:
                        cold(model, workers, lines)
                    elif cases.CASES[name].positions > model.positions:
                        progress(f"{shape} {name}: it has {model.positions} positions")
                    else:
                        run(model, cases.CASES[name], workers, args.rounds, lines)
            finally:
                for worker in workers:
                    worker.stop()
        for name in args.engines or NAMES:
            with contextlib.suppress(Unavailable):
                size = home.megabytes(adapter(name).environment or name)
                lines.add("installed", engine=name, megabytes=size)
    return lines.all


def ready(args: argparse.Namespace, home: Home, shape: str, lines: Lines) -> Iterator[Worker]:
    """The workers of a shape, with all that they need made; says which cannot be had."""
    usual = tuple(PRECISIONS) if shape in real.MODELS else SHAPES.get(shape, SOME)
    for name in args.engines or (REAL if shape in real.MODELS else NAMES):
        for precision in args.precisions or usual:
            if precision not in adapter(name).precisions:
                continue
            unasked = shape in real.MODELS and not args.precisions and name not in EXACT
            if precision == "fp32" and unasked:
                continue
            try:
                worker = Worker.of(home, shape, name, precision, args.threads)
            except Unavailable as error:
                lines.absent(shape, (name, precision), "*", error)
                continue
            if worker.engine.runs(worker.directory):
                yield worker


def faithful(home: Home, shape: str, workers: list[Worker], lines: Lines) -> None:
    """The loss of each engine on a real model's text, and the size of its files."""
    for worker in workers:
        try:
            found = faith.of(home, shape, worker)
        except (Failed, Unavailable) as error:
            progress(f"{shape} {worker.name} {worker.precision}: no logits: {error}")
            lines.absent(shape, (worker.name, worker.precision), "logits", error)
            continue
        directory = home.source(shape) if worker.name == BASE else worker.directory
        lines.add(
            "faith",
            shape=shape,
            engine=worker.name,
            precision=worker.precision,
            megabytes=faith.megabytes(directory),
            kinds=found,
        )


@dataclasses.dataclass
class Tried:
    """A model that is timed.

    Attributes:
        directory: as transformers saves it.
        name: of a shape, or of a real model.
    """

    directory: Path
    name: str

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.directory / "config.json").read_text())
        return config

    @property
    def real(self) -> bool:
        """True for weights that others trained."""
        return self.name in real.MODELS

    @property
    def vocabulary(self) -> int:
        """The number of ids."""
        return int(self.config["vocab_size"])

    @property
    def positions(self) -> int:
        """The tokens that it was made for."""
        return int(self.config.get("n_positions") or self.config["max_position_embeddings"])


def check(model: Tried, workers: list[Worker], lines: Lines) -> None:
    """Load every worker and compare its tokens with transformers'; drops those that fail.

    After the first token that differs a text goes its own way, so quantised models are judged by
    the first tokens of many prompts.
    """
    shape, many = model.name, 0 if model.real else FIRST_TOKENS  # its logits tell more
    text = cases.prompts(cases.TEXT, model.vocabulary, 0)
    starts = [cases.prompts(cases.FIRST, model.vocabulary, turn) for turn in range(many)]
    expected = None
    for worker in list(workers):
        try:
            ids = worker.generate(cases.TEXT, text)["ids"]
            asked = starts if expected or worker.name == BASE else []
            first = [worker.generate(cases.FIRST, start)["ids"][0] for start in asked]
        except Failed as error:
            progress(f"{shape} {worker.name} {worker.precision}: {error}")
            lines.absent(shape, (worker.name, worker.precision), "*", error)
            worker.stop()
            workers.remove(worker)
            continue
        if worker.name == BASE:
            expected = ids, first
        same = agreement(ids, expected[0]) if expected else None
        same_first = agreement(first, expected[1]) if expected and many else None
        lines.add(
            "check",
            shape=shape,
            engine=worker.name,
            precision=worker.precision,
            equal=same,
            equal_first=same_first,
        )
        parts = [(same, "a text"), (same_first, "first tokens")]
        told = ", ".join(f"{share:.0%} of {what}" for share, what in parts if share is not None)
        progress(f"{shape} {worker.name} {worker.precision}: {told or 'loaded'}")


def run(model: Tried, case: cases.Case, workers: list[Worker], rounds: int, lines: Lines) -> None:
    """Time a case: each round asks every worker in turn, with the same new prompts.

    A shorter round warms up; not for long prompts, most of whose time is warm anyway.
    """
    shape = model.name
    warming = dataclasses.replace(case, new=min(case.new, cases.WARMING))
    able = []
    for worker in workers:
        if reason := worker.engine.refuses(case):
            lines.absent(shape, (worker.name, worker.precision), case.name, reason)
        else:
            able.append(worker)
    for turn in range(1 if case in cases.LONG else 0, rounds + 1):
        progress(f"{shape} {case.name} round {turn}/{rounds}")
        prompts = cases.prompts(case, model.vocabulary, turn)
        expected = None
        for worker in list(able):
            try:
                answer = worker.generate(case if turn else warming, prompts)
            except Failed as error:
                progress(f"{shape} {case.name} {worker.name} {worker.precision}: {error}")
                lines.absent(shape, (worker.name, worker.precision), case.name, error)
                able.remove(worker)
                continue
            if worker.name == BASE:
                expected = answer["ids"]
            if turn:
                lines.add(
                    "time",
                    shape=shape,
                    engine=worker.name,
                    precision=worker.precision,
                    case=case.name,
                    round=turn,
                    seconds=answer["seconds"],
                    first=answer["first"],
                    tokens=case.new * len(case.lengths),
                    equal=agreement(answer["ids"], expected),
                    spun=answer["spun"],
                )


def cold(model: Tried, workers: list[Worker], lines: Lines) -> None:
    """Time new processes up to a first token, and see what they hold after more tokens."""
    shape = model.name
    for worker in workers:
        worker.stop()
    failed = set()
    for turn in range(1, COLD_STARTS + 1):
        progress(f"{shape} cold start {turn}/{COLD_STARTS}")
        for place, worker in enumerate(workers):
            if place in failed:
                continue
            try:
                seconds = worker.cold(
                    cases.FIRST, cases.prompts(cases.FIRST, model.vocabulary, turn)
                )
                worker.generate(cases.AFTER, cases.prompts(cases.AFTER, model.vocabulary, turn))
                held = worker.ask(do="memory")
            except Failed as error:
                lines.absent(shape, (worker.name, worker.precision), cases.COLD, error)
                failed.add(place)
                continue
            finally:
                worker.stop()
            lines.add(
                "cold",
                shape=shape,
                engine=worker.name,
                precision=worker.precision,
                round=turn,
                seconds=seconds,
                **held,
            )


def agreement(ids: list[list[int]], expected: list[list[int]] | None) -> float | None:
    """The share of tokens that are those of transformers; None if it does not run."""
    if expected is None:
        return None
    pairs = [
        pair
        for row, want in zip(ids, expected, strict=True)
        for pair in zip(row, want, strict=True)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def commit() -> str:
    """The checkout's commit, with a plus if files differ from it."""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty=+"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def command(args: argparse.Namespace) -> str:
    """The command that measures this again, with no paths of this machine."""
    words = ["python", "bench/peers", "--home", "DIR"]
    for name in ("engines", "shapes", "precisions", "cases"):
        if given := getattr(args, name):
            words += [f"--{name}", *given]
    words += ["--rounds", str(args.rounds), "--json", "results.jsonl"]
    for name in ("picture", "page"):
        if file := getattr(args, name):
            words += [f"--{name}", f"bench/{file.name}"]
    return shlex.join(words)


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
