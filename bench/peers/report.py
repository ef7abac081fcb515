"""The measurements as Markdown tables and as a picture."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from peers.cases import BEAM_LENGTHS, BEAMS, CASES, CHAT, COLD, LONG, MAIN, PLANE, Case
from peers.engines import BASE, NAMES, OURS, PRECISIONS, adapter
from peers.text import KINDS

Line = dict[str, Any]
Key = tuple[str, str]  # engine, precision
COLOURS = {
    "fp32": "#8c9bab",
    "int8": "#3b7dd8",
    "int6": "#7a5fc0",
    "int4-k": "#c0503b",
    "int4": "#e08a1e",
}
# A file or folder of the machine that measured, in an engine's own words.
PLACE = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?(?:[/\\][^\s/\\'\"()\[\],:]+){2,}[/\\]?")
AS_FAITHFUL = 1.1  # times the KL divergence that another may have and count as faithful as that
REAL = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M", "mgm": "MGM"}
ABOUT = {
    "smollm2": "Its weights lie on llama.cpp's grid of Q4_1, which none of the types below has.",
    "gemma3": "Its weights lie on the grid of llama.cpp's Q4_K_M, which finds it again: that line "
    "says nothing of 4 bits.",
    "mgm": "8.9 million weights that never lay on a grid of 4 bits: the fair judge of 4 bits. It "
    "has no tokenizer, and is judged on text that it wrote itself. It has 512 positions.",
}
PAGE = """# Beside the peers: speed and faithfulness

    {command}

Real models (`bench/real.py`), each engine's own conversion of the same float32 weights. KL is the
mean Kullback-Leibler divergence of an engine's next-token distribution from transformers' in
float32, in nats, over the same rows of text, read as prompts; top-1 the share of places where the
likeliest token is the same; perplexity how much the text's own is above that of float32. Half of
the text is of several kinds, from the half of fastgen's own texts that no export calibrates on;
half is documentation that no export has seen. Speed is measured with forced lengths and random
prompts. What it says, and where fastgen is behind and why: `bench/README.md`.

"""


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
        self.losses = {key(line): Loss(line) for line in self.of("faith")}
        known = {k for k, _ in self.seconds} | self.cold_keys() | self.losses.keys()
        self.keys = [k for k in every_key() if k in known]

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
        """The fastest with as many bits as a precision."""
        return self.fastest(case, (k for k in among if bits(k[1]) == bits(precision)))

    def fastest(self, case: str, among: Iterable[Key]) -> Key | None:
        """The fastest of some."""
        medians = {k: self.median(k, case) for k in among}
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


class Loss:
    """The loss of an engine at a precision on a real model's text, of a line of kind "faith"."""

    def __init__(self, line: Line) -> None:
        self.kinds: dict[str, dict[str, float]] = line["kinds"]
        self.megabytes: float = line["megabytes"]

    def mean(self, name: str, kinds: Iterable[str] = KINDS) -> float:
        """Of a token, over some kinds of text."""
        of = [self.kinds[kind] for kind in kinds if kind in self.kinds]
        return sum(sums[name] for sums in of) / sum(sums["tokens"] for sums in of)

    @property
    def kl(self) -> float:
        """In nats a token; never negative, as it is by rounding where there is no loss."""
        return max(0.0, self.mean("kl"))

    @property
    def more_perplexity(self) -> float:
        """Relative to float32's."""
        return math.exp(self.mean("loss") - self.mean("reference_loss")) - 1


def markdown(lines: Sequence[Line]) -> str:
    """All tables."""
    out = list(
        dict.fromkeys(
            f"{line['text']}; commit {line['commit']}; medians of {line['rounds']} rounds"
            for line in lines
            if line["kind"] == "machine"
        )
    )
    for shape in dict.fromkeys(line["shape"] for line in lines if "shape" in line):
        results = Results(lines, shape)
        if results.losses:
            out += [f"## {REAL[shape]}", ABOUT[shape], *plane(results), *as_faithful(results)]
            out += [*remarks(results)]
            continue
        out += [f"## {shape} shape", *speed(results), *turns(results), *beams(results)]
        out += [*against(results), *starting(results, lines), *remarks(results)]
    return "\n\n".join(part for part in out if part) + "\n"


def page(lines: Sequence[Line], picture: str | None) -> str:
    """The tables of real models as a page, with a picture at that place."""
    commands = (line.get("command") for line in lines if line["kind"] == "machine")
    top = PAGE.format(command=next(filter(None, commands), "python bench/peers"))
    shown = f"![speed against KL by engine and precision]({picture})\n\n" if picture else ""
    return top + shown + markdown(lines)


def plane(results: Results) -> list[str]:
    """Faithfulness beside speed, by engine and precision."""
    cases = [CASES[name] for name in PLANE if measured(results, name)]
    kinds = [kind for kind in KINDS if any(kind in loss.kinds for loss in results.losses.values())]
    kinds = kinds if len(kinds) > 1 else []
    rows = []
    for who in results.keys:
        loss = results.losses.get(who)
        told = ["-"] * (4 + len(kinds))
        if loss is not None:
            told = [f"{loss.megabytes:.{0 if loss.megabytes >= 20 else 1}f}", small(loss.kl)]
            told += [small(loss.mean("kl", [kind])) for kind in kinds]
            told += [f"{loss.mean('same'):.1%}", f"{loss.more_perplexity:+.2%}"]
        rows.append([label(who), *told, *(pace(results, who, case) for case in cases)])
    heads = ["", "MB", "KL", *(f"KL, {kind}" for kind in kinds), "top-1", "perplexity"]
    heads += [f"{case.title}, ms" if case.new == 1 else case.title for case in cases]
    return [
        "Tokens a second of all rows, prompt included, but for the first token after 512, which is "
        "in milliseconds. Bold: the fastest with that number of bits.",
        table(heads, rows),
    ]


def pace(results: Results, who: Key, case: Case) -> str:
    """A cell of the plane: tokens a second, or milliseconds to the first."""
    seconds = results.median(who, case.name)
    if seconds is None:
        return "-"
    text = f"{1e3 * seconds:.0f}" if case.new == 1 else f"{rate(case, seconds):.0f}"
    return f"**{text}**" if results.best(case.name, who[1], results.keys) == who else text


def rate(case: Case, seconds: float) -> float:
    """Tokens a second of all rows: of the prompt, where only one is new."""
    tokens = case.lengths[0] if case.new == 1 else case.new
    return len(case.lengths) * tokens / seconds


def as_faithful(results: Results) -> list[str]:
    """fastgen beside the fastest peer of any precision that loses no more than it."""
    cases = [name for name in PLANE if measured(results, name)]
    rows, behind, cells = [], [], 0
    for who in results.keys:
        if who[0] not in OURS or who[1] == "fp32" or who not in results.losses:
            continue
        peers = [k for k in results.losses if k[0] not in OURS]
        most = AS_FAITHFUL * results.losses[who].kl
        faithful = [k for k in peers if results.losses[k].kl <= most]
        alike = [k for k in peers if bits(k[1]) == bits(who[1])]
        rows.append([label(who), *(beside(results, who, case, faithful) for case in cases)])
        for case, told in zip(cases, rows[-1][1:], strict=True):
            cells += told != "-"
            if told != "-" and float(told.split()[0]) < 1:
                behind.append(f"{label(who)} {CASES[case].title} {told}")
        rows.append(["the same bits", *(beside(results, who, case, alike) for case in cases)])
    if not rows:
        return []
    heads = [CASES[case].title for case in cases]
    return [
        "How many times faster fastgen is than the fastest peer that is as faithful (of any "
        f"precision, with at most {AS_FAITHFUL} times its KL), and than the fastest of its bits, "
        "however faithful:",
        table(["", *heads], rows),
        f"At equal faithfulness fastgen is ahead or level in {cells - len(behind)} of {cells} "
        f"cells that have such a peer; behind in: {'; '.join(behind) or 'none'}.",
    ]


def beside(results: Results, who: Key, case: str, peers: Iterable[Key]) -> str:
    """The speed in times of the fastest of some peers, and which that is."""
    one_row = len(CASES[case].lengths) == 1 and CASES[case].new > 1
    if one_row and adapter(who[0]).model_of:  # its KL is that of many tokens at once
        return "-"
    best = results.fastest(case, peers)
    ratio = best and results.ratio(who, best, case)
    return f"{ratio:.2f} ({label(best)})" if best and ratio else "-"


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
        (case.name, p): results.best(case.name, p, results.keys)
        for case in cases
        for p in PRECISIONS
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
        out[f"{label(key(line))}{where}: {without_places(line['reason'])}"] = None
    starts = {key(line): line.get("equal_first") for line in results.of("check")}
    told = [
        f"{label(k)} {starts[k] or 0:.0%}" for k in results.keys if k[1] != "fp32" and starts.get(k)
    ]
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


def without_places(text: str) -> str:
    """A message with the name alone of each file that it gives the place of."""
    return PLACE.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def picture(lines: Sequence[Line], path: Path) -> None:
    """Speed against faithfulness of real models; of shapes bars of tokens a second.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says what to install.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install matplotlib") from error

    if any(line["kind"] == "faith" for line in lines):
        from peers import picture_of_plane

        picture_of_plane.draw(Figure, lines, path)
        return
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
        handles=[Patch(color=COLOURS[p], label=PRECISIONS[p]) for p in PRECISIONS],
        loc="outside lower center",
        ncols=len(PRECISIONS),
        frameon=False,
    )
    figure.savefig(path, dpi=110)


def bars(axis: Any, results: Results, names: Sequence[str], case: Case) -> None:
    """One panel: an engine a place, a precision a bar."""
    rows = len(case.lengths)
    tokens = case.lengths[0] if case.new == 1 else rows * case.new
    for place, name in enumerate(names):
        here = [p for p in PRECISIONS if (name, p) in results.keys]
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
    return [(name, p) for p in PRECISIONS for name in NAMES if p in adapter(name).precisions]


def bits(precision: str) -> int:
    """Of a weight, by the name of a precision."""
    return int("".join(filter(str.isdigit, precision)))


def small(value: float) -> str:
    """A divergence with two digits that count."""
    if value < 1e-6:
        return "0"
    return f"{value:.1e}" if value < 1e-4 else f"{value:.{1 - math.floor(math.log10(value))}f}"


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
