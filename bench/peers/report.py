"""The measurements as Markdown tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peers.cases import BEAM_LENGTHS, BEAMS, CASES, CHAT, COLD, LONG, MAIN, Case
from peers.engines import BASE, NAMES, OURS, adapter

Line = dict[str, Any]
Key = tuple[str, str]  # engine, precision
CLASSES = {"fp32": "fp32", "int8": "8 bit", "int4": "4 bit"}
COLOURS = {"fp32": "#8c9bab", "int8": "#3b7dd8", "int4": "#e08a1e"}


class Results:
    """The lines of one shape, looked up by engine, precision and case."""

    def __init__(self, lines: Sequence[Line], shape: str) -> None:
        self.lines = [line for line in lines if line.get("shape") == shape]
        self.seconds: dict[tuple[Key, str], dict[int, float]] = {}
        self.firsts: dict[tuple[Key, str], list[tuple[float, float]]] = {}
        for line in self.of("time"):
            cell = key(line), line["case"]
            self.seconds.setdefault(cell, {})[line["round"]] = line["seconds"]
            if first := line.get("first"):
                self.firsts.setdefault(cell, []).append((first, line["seconds"] - first))
        self.tried = {key(line) for line in self.lines}
        self.keys = [k for k in every_key() if k in {k for k, _ in self.seconds} | self.cold_keys()]

    def of(self, kind: str) -> list[Line]:
        """The lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]

    def cold_keys(self) -> set[Key]:
        """The engines that were started cold."""
        return {key(line) for line in self.of("cold")}

    def median(self, who: Key, case: str) -> float | None:
        """Median seconds of a case over its rounds."""
        rounds = self.seconds.get((who, case))
        return statistics.median(rounds.values()) if rounds else None

    def phases(self, who: Key, case: str) -> tuple[float, float] | None:
        """Median seconds to the first token of a case, and from it to the last; None if untold."""
        rounds = self.firsts.get((who, case))
        if not rounds:
            return None
        before, after = zip(*rounds, strict=True)
        return statistics.median(before), statistics.median(after)

    def ratio(self, who: Key, other: Key, case: str) -> float | None:
        """The median of the rounds' ratios: so many times faster than another."""
        mine = self.seconds.get((who, case), {})
        theirs = self.seconds.get((other, case), {})
        both = mine.keys() & theirs.keys()
        return statistics.median(theirs[r] / mine[r] for r in both) if both else None

    def best(self, case: str, precision: str, among: Iterable[Key]) -> Key | None:
        """The fastest at a precision."""
        medians = {k: self.median(k, case) for k in among if k[1] == precision}
        return min(
            (k for k, m in medians.items() if m is not None),
            key=lambda k: medians[k] or 0.0,
            default=None,
        )

    def why_not(self, who: Key, case: str) -> str:
        """The reason why a cell has no number."""
        for line in self.of("absent"):
            if key(line) == who and line["case"] in (case, "*"):
                return str(line["reason"])
        return ""


def markdown(lines: Sequence[Line]) -> str:
    """All tables."""
    out = [
        f"{line['text']}; commit {line['commit']}; medians of {line['rounds']} rounds"
        for line in lines
        if line["kind"] == "machine"
    ]
    for shape in dict.fromkeys(line["shape"] for line in lines if "shape" in line):
        results = Results(lines, shape)
        out += [f"## {shape} shape", *speed(results), *turns(results), *beams(results)]
        out += [*against(results), *starting(results, lines), *remarks(results)]
    return "\n\n".join(part for part in out if part) + "\n"


def speed(results: Results) -> list[str]:
    """Milliseconds a token, by engine and case."""
    cases = [case for case in MAIN if measured(results, case.name)]
    if not cases:
        return []
    titles = [f"{case.title}, ms" if case.new == 1 else case.title for case in cases]
    return [
        "Milliseconds for each token that a row gets, prompt included; in brackets how many times "
        "faster than transformers. Bold: the fastest of its precision.",
        grid(results, cases, titles, lambda case, seconds: f"{1e3 * seconds / case.new:.1f}"),
    ]


def turns(results: Results) -> list[str]:
    """The wait for the first token and the pace after it, of a chat turn and of long prompts."""
    cases = [case for case in (CHAT, *LONG) if measured(results, case.name)]
    if not cases:
        return []
    rows = []
    for who in results.keys:
        cells = []
        for case in cases:
            found = results.phases(who, case.name)
            pace = found and 1e3 * found[1] / (case.new - 1)
            cells += [f"{found[0]:.2f}", f"{pace:.1f}"] if found else ["-", "-"]
        rows.append([label(who), *cells])
    titles = [f"{case.lengths[0]:,} -> {case.new}" for case in cases]
    heads = [head for title in titles for head in (f"{title}: first, s", "then ms a token")]
    return [
        "The wait for the first token, and the milliseconds of each that follows:",
        table(["", *heads], rows),
    ]


def beams(results: Results) -> list[str]:
    """fastgpt's five tables: milliseconds a call, by generated length and number of beams."""
    out = []
    for new in BEAM_LENGTHS:
        cases = [CASES[f"beams-{n}-new-{new}"] for n in BEAMS]
        cases = [case for case in cases if measured(results, case.name)]
        if cases:
            titles = [case.title.split(",")[0] for case in cases]
            out.append(f"Milliseconds a call, {new} new tokens after {cases[0].lengths[0]}:")
            out.append(grid(results, cases, titles, lambda case, seconds: f"{1e3 * seconds:.0f}"))
    return out


def grid(
    results: Results,
    cases: Sequence[Case],
    titles: Sequence[str],
    show: Callable[[Case, float], str],
) -> str:
    """A table with a row for each engine and precision, and a column for each case."""
    fastest = {
        (case.name, p): results.best(case.name, p, results.keys) for case in cases for p in CLASSES
    }
    rows = []
    for who in results.keys:
        cells = []
        for case in cases:
            seconds = results.median(who, case.name)
            if seconds is None:
                cells.append("-")
                continue
            text = show(case, seconds)
            if fastest[case.name, who[1]] == who:
                text = f"**{text}**"
            ratio = results.ratio(who, (BASE, "fp32"), case.name)
            cells.append(text if ratio is None or who[0] == BASE else f"{text} ({ratio:.2f})")
        rows.append([label(who), *cells])
    return table(["", *titles], rows)


def against(results: Results) -> list[str]:
    """fastgen beside the fastest peer of the same precision, in every case."""
    rows = []
    peers = [k for k in results.keys if k[0] not in OURS]
    mine = [k for k in results.keys if k[0] in OURS]
    for case in CASES.values():
        cells = []
        for who in mine:
            best = results.best(case.name, who[1], peers)
            ratio = best and results.ratio(who, best, case.name)
            cells.append(f"{ratio:.2f} ({adapter(best[0]).title})" if best and ratio else "-")
        if set(cells) - {"-"}:
            rows.append([case.title, *cells])
    if not rows:
        return []
    return [
        "How many times faster fastgen is than the fastest peer of that precision:",
        table(["", *map(label, mine)], rows),
    ]


def starting(results: Results, lines: Sequence[Line]) -> list[str]:
    """Cold start, memory and installed size."""
    installed = {line["engine"]: line["megabytes"] for line in lines if line["kind"] == "installed"}
    rows = []
    for who in results.keys:
        mine = [line for line in results.of("cold") if key(line) == who]
        if mine:
            numbers = [
                statistics.median(line[name] for line in mine) if name in mine[0] else None
                for name in ("seconds", "resident", "peak")
            ]
            cells = [f"{numbers[0]:.2f}", *("-" if n is None else f"{n:.0f}" for n in numbers[1:])]
            size = installed.get(who[0])
            rows.append([label(who), *cells, "-" if size is None else f"{size:.0f}"])
    if not rows:
        return []
    return [
        "A new process up to its first token (16 tokens of prompt), and the memory of that process "
        "after 64 more:",
        table(["", "start, s", "resident MB", "peak MB", "installed MB"], rows),
    ]


def remarks(results: Results) -> list[str]:
    """The notes: empty cells, tokens that differ, threads that go on, and the engines' own."""
    out: dict[str, None] = {}
    for line in results.of("absent"):
        where = "" if line["case"] == "*" else f", {line['case']}"
        if line["reason"] == results.why_not(key(line), "beams-4-new-64") and "beams" in where:
            where = ", beams"
        out[f"{label(key(line))}{where}: {line['reason']}"] = None
    starts = {key(line): line.get("equal_first") for line in results.of("check")}
    told = [f"{label(k)} {starts[k]:.0%}" for k in results.keys if k[1] != "fp32" and starts.get(k)]
    if told:
        out[f"first tokens of random prompts that are transformers': {', '.join(told)}"] = None
    for who in results.keys:
        mine = [line for line in results.of("time") if key(line) == who]
        shares = {line["case"]: line["equal"] for line in mine if line["equal"] is not None}
        for case in shares:
            found = [line["equal"] for line in mine if line["case"] == case]
            if who[1] == "fp32" and min(found) < 1:
                share = statistics.mean(found)
                out[f"{label(who)}, {case}: {share:.1%} of transformers' tokens"] = None
        spun = statistics.median([line["spun"] for line in mine] or [0.0])
        if spun > 0.5:
            out[f"{label(who)}: its threads go on for {spun:.1f} s after a call"] = None
        if note := adapter(who[0]).note:
            out[f"{adapter(who[0]).title}: {note}"] = None
    return ["\n".join(f"- {text}" for text in out)] if out else []


def picture(lines: Sequence[Line], path: Path) -> None:
    """Bars of tokens a second: a row of panels for each shape.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install matplotlib") from error

    panels = {"greedy-16": "one prompt", "beams-4-new-64": "4 beams", "rows-8": "8 prompts",
              "prefill-512": "reading a prompt of 512"}  # fmt: skip
    shapes = list(dict.fromkeys(line["shape"] for line in lines if line["kind"] == "time"))
    figure = Figure(figsize=(14, 4.2 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), len(panels), squeeze=False, sharey="row")
    for shape, row in zip(shapes, axes, strict=True):
        results = Results(lines, shape)
        names = [n for n in reversed(NAMES) if any(n == k[0] for k in results.keys)]
        for axis, (case, title) in zip(row, panels.items(), strict=True):
            bars(axis, results, names, CASES[case])
            axis.set_title(f"{shape}: {title}", fontsize=10)
            axis.set_xlabel("prompt tokens/s" if CASES[case].new == 1 else "tokens/s", fontsize=9)
    figure.legend(
        handles=[Patch(color=COLOURS[p], label=CLASSES[p]) for p in CLASSES],
        loc="outside lower center",
        ncols=len(CLASSES),
        frameon=False,
    )
    figure.savefig(path, dpi=110)


def bars(axis: Any, results: Results, names: Sequence[str], case: Case) -> None:
    """One panel: an engine a place, a precision a bar."""
    rows = len(case.lengths)
    tokens = case.lengths[0] if case.new == 1 else rows * case.new
    for place, name in enumerate(names):
        here = [p for p in CLASSES if (name, p) in results.keys]
        for offset, precision in enumerate(reversed(here)):
            seconds = results.median((name, precision), case.name)
            if seconds is None:
                continue
            y = place + 0.26 * (offset - (len(here) - 1) / 2)
            axis.barh(y, tokens / seconds, 0.24, color=COLOURS[precision])
            axis.annotate(
                f" {tokens / seconds:.0f}", (tokens / seconds, y), va="center", fontsize=7
            )
    axis.set_yticks(range(len(names)), [named(name) for name in names], fontsize=9)
    for tick, name in zip(axis.get_yticklabels(), names, strict=False):  # only the first has any
        tick.set_fontweight("bold" if name in OURS else "normal")
    axis.margins(x=0.14)
    axis.spines[["top", "right"]].set_visible(False)


def key(line: Line) -> Key:
    return line.get("engine", ""), line.get("precision", "")


def every_key() -> list[Key]:
    """Engines and precisions in the order of the tables: by precision."""
    return [(name, p) for p in CLASSES for name in NAMES if p in adapter(name).precisions]


def label(who: Key) -> str:
    """An engine at a precision, with the engine's own name of the precision."""
    return named(who[0], adapter(who[0]).precisions[who[1]])


def named(engine: str, precision: str = "") -> str:
    """An engine, with a precision or alone, and what sets it apart."""
    found = adapter(engine)
    return ", ".join(filter(None, [f"{found.title} {precision}".strip(), found.variant]))


def measured(results: Results, case: str) -> bool:
    return any(name == case for _, name in results.seconds)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


assert COLD not in CASES
