"""The results of `measure` for people: bars in the terminal, and a PNG."""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen.system import extras
from fastgen.timing.measure import LLAMA_BENCH, Case, Result, title

NUMBERS = 29  # columns: tokens a second, the time, the spread
LEAST_BAR = 8  # where there are fewer columns, there are no bars
SHORTEST = 8  # columns of a model's name
MOST_FLAT = 3  # models whose numbers stand beside each other above their bars
EIGHTHS = " ▏▎▍▌▋▊▉█"  # of a column, in blocks
PLAIN = " #"  # for streams that cannot show them


def drawable() -> Any:
    """matplotlib's `Figure`, if it is there.

    Raises:
        ValueError: it is not; it says what to install.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"a PNG needs matplotlib: {extras.install('bench')}") from error
    return Figure


def of_machine(machine: Mapping[str, Any]) -> str:
    """The machine in a line."""
    memory = machine["memory_bytes"]
    cores = f"{machine['cores']} core{'s' * (machine['cores'] > 1)}"
    parts = [machine["processor"], cores, *([f"{memory / 1e9:,.1f} GB"] if memory else [])]
    versions = [f"{name} {machine[name]}" for name in ("fastgen", "onnxruntime", "numpy")]
    return ", ".join([*parts, *versions, f"Python {machine['python']}"])


# --- what belongs together -----------------------------------------------------------------------


def of_kind(results: Sequence[Result]) -> dict[str, dict[Case, list[Result]]]:
    """By kind and case, of each model its first result; the others are about threads.

    Without llama-bench's tests, which stand by themselves.
    """
    out: dict[str, dict[Case, list[Result]]] = {}
    seen = set()
    for result in results:
        if result.case.kind in LLAMA_BENCH:
            continue
        if (result.model, result.case) not in seen:
            seen.add((result.model, result.case))
            out.setdefault(result.case.kind, {}).setdefault(result.case, []).append(result)
    return out


def of_threads(results: Sequence[Result]) -> dict[Case, dict[int, list[Result]]]:
    """The cases that ran with several numbers of threads: the results of each number."""
    ran = collections.Counter((result.model, result.case) for result in results)
    cases = dict.fromkeys(case for (_, case), times in ran.items() if times > 1)
    return {
        case: {
            count: [result for result in results if (result.case, result.threads) == (case, count)]
            for count in sorted({result.threads for result in results if result.case == case})
        }
        for case in cases
    }


def models(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.model for result in results))


# --- in the terminal -----------------------------------------------------------------------------


def lines(results: Sequence[Result], width: int, encoding: str) -> Iterator[str]:
    """A table with bars, which are scaled within each of its parts.

    Args:
        results: what was measured.
        width: of the terminal, in columns.
        encoding: of the stream that shows it: bars are blocks, or `#` where it has none.
    """
    kinds = of_kind(results)
    generated = [case for kind in ("rows", "beams") for case in kinds.get(kind, ())]
    parts = {
        "reading a prompt": {
            f"{case.prompt:,} tokens": group for case, group in kinds["read"].items()
        },
        f"new tokens, after {generated[0].prompt:,}": {
            title(case): kinds[case.kind][case] for case in generated
        },
    }
    for case, by_count in of_threads(results).items():
        parts[f"{title(case)}, by threads"] = {
            f"{count} thread{'s' * (count > 1)}": group for count, group in by_count.items()
        }
    labels = max(len(label) for part in parts.values() for label in part)
    several = len(models(results)) > 1
    names = max(map(len, models(results))) if several else 0
    names = min(names, max(SHORTEST, width - labels - NUMBERS - LEAST_BAR - 6))
    left = max(2 + labels + 2 + names, *map(len, parts))
    draw, room = _bar(encoding), width - left - NUMBERS - 2
    for heading, part in parts.items():
        every = [result for group in part.values() for result in group]
        unit = "first token" if every[0].case.kind == "read" else "a step"
        yield f"{heading:<{left}}{'tokens/s':>10}{unit:>13}{'+-':>6}"
        most = max(result.rate for result in every)
        for label, group in part.items():
            for index, result in enumerate(group):
                name = f"{'' if index else label:<{labels}}"
                name += f"  {_cut(result.model, names)}" if several else ""
                bar = draw(result.rate / most * room) if room >= LEAST_BAR else ""
                numbers = f"{_number(result.rate):>10}{_time(result.milliseconds):>13}"
                numbers += f"{_spread(result):>6}"
                yield f"{f'  {name}':<{left}}{numbers}  {bar}".rstrip()
        yield ""
    tests = [result for result in results if result.case.kind in LLAMA_BENCH]
    if tests:
        yield from _as_llama_bench(tests, width, encoding)


def _as_llama_bench(results: Sequence[Result], width: int, encoding: str) -> Iterator[str]:
    """The tests that llama-bench runs by default, as it shows them: a Markdown table."""
    between = _first_of(("±", "+-"), encoding)
    cells: list[tuple[str, ...]] = [("model", "threads", "test", "t/s")]
    for result in results:
        told = f"{statistics.fmean(result.rates):.2f} {between} {result.deviation:.2f}"
        cells.append((result.model, str(result.threads), title(result.case), told))
    taken = sum(max(map(len, column)) + 3 for column in list(zip(*cells, strict=True))[1:]) + 4
    room = max(SHORTEST, width - taken)
    cells = [(_cut(model, room), *others) for model, *others in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ("-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])))
    for first, *others in cells:
        padded = [first.ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield f"| {' | '.join(padded)} |"


def _number(rate: float) -> str:
    """With three digits at least."""
    digits = max(0, 2 - math.floor(math.log10(rate))) if 0 < rate < 100 else 0
    return f"{rate:,.{digits}f}"


def _time(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{_number(milliseconds / 1000)} s"
    return f"{_number(milliseconds)} ms"


def _spread(result: Result) -> str:
    return f"{result.spread:.0%}" if len(result.seconds) > 1 else ""


def _cut(text: str, width: int) -> str:
    """A text in `width` columns; its end tells more than its beginning."""
    return text if len(text) <= width else "~" + text[len(text) - width + 1 :]


def _first_of(texts: Sequence[str], encoding: str) -> str:
    """The first that an encoding has, or else the last."""
    for text in texts[:-1]:
        with contextlib.suppress(LookupError, UnicodeEncodeError):
            text.encode(encoding)
            return text
    return texts[-1]


def _bar(encoding: str) -> Callable[[float], str]:
    """The function that draws a bar of a number of columns."""
    marks = _first_of((EIGHTHS, PLAIN), encoding)
    parts = len(marks) - 1

    def draw(columns: float) -> str:
        whole, rest = divmod(max(1, round(columns * parts)), parts)
        return marks[-1] * whole + (marks[rest] if rest else "")

    return draw


# --- as a plot -----------------------------------------------------------------------------------


def png(results: Sequence[Result], machine: Mapping[str, Any], rounds: int, path: Path) -> None:
    """Draw panels of prompts, rows and beams, and below them threads; a colour for each model.

    Raises:
        ValueError: matplotlib is not there.
    """
    colours = {model: f"C{index % 10}" for index, model in enumerate(models(results))}
    kinds, threads = of_kind(results), of_threads(results)
    size = 10 + max(1, len(colours) - MOST_FLAT), 7.5 if threads else 4.2
    figure = drawable()(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2 if threads else 1, 1)
    for axis, cases in zip(_row(grid[0], kinds), kinds.values(), strict=True):
        _bars(axis, cases, colours)
    curves = _row(grid[1], threads) if threads else []
    for axis, (case, by_count) in zip(curves, threads.items(), strict=True):
        _curves(axis, case, by_count, colours)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(labelsize=8)
    if len(colours) > 1:
        handles, names = figure.axes[0].get_legend_handles_labels()
        columns = min(4, len(colours))
        figure.legend(
            handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )
    whose = f"{next(iter(colours))}\n" if len(colours) == 1 else ""
    many = f"medians of {rounds} rounds" if rounds > 1 else "one round"
    figure.suptitle(f"{whose}{of_machine(machine)}; {many}", fontsize=9)
    figure.savefig(path, dpi=130, format="png")


def _row(cell: Any, panels: Mapping[Any, Mapping[Any, Any]]) -> list[Any]:
    """Axes beside each other at a place of a figure's grid, each as wide as what it shows."""
    shares = [1 + len(panel) for panel in panels.values()]
    ends = itertools.accumulate(shares)
    grid = cell.subgridspec(1, sum(shares))
    return [
        cell.get_gridspec().figure.add_subplot(grid[0, end - share : end])
        for share, end in zip(shares, ends, strict=True)
    ]


def _bars(axis: Any, cases: Mapping[Case, Sequence[Result]], colours: Mapping[str, str]) -> None:
    """A group of bars for each case of one kind, in it a bar for each model."""
    first, width = next(iter(cases)), 0.8 / len(colours)
    upright = len(colours) > MOST_FLAT
    for index, (model, colour) in enumerate(colours.items()):
        results = [
            next(result for result in group if result.model == model) for group in cases.values()
        ]
        at = [x + width * (index - (len(colours) - 1) / 2) for x in range(len(results))]
        rates = [result.rate for result in results]
        drawn = axis.bar(at, rates, 0.92 * width, color=colour, label=model)
        texts = [_number(result.rate) for result in results]
        if first.kind == "read":
            between = "  " if upright else "\n"
            texts = [
                t + between + _time(o.milliseconds) for t, o in zip(texts, results, strict=True)
            ]
        axis.bar_label(drawn, texts, fontsize=7, padding=3, rotation=90 if upright else 0)
    texts_take = (0.5 if first.kind == "read" else 0.2) if upright else 0.12
    axis.set_ylim(
        0, (1 + texts_take) * max(result.rate for group in cases.values() for result in group)
    )
    about = {
        "read": ("Reading a prompt", "tokens of the prompt; ms until the first new one"),
        "rows": (f"New tokens after a prompt of {first.prompt:,}", "rows generated together"),
        "beams": ("Beam search", "beams"),
    }[first.kind]
    counts = {
        "read": [case.prompt for case in cases],
        "rows": [case.rows for case in cases],
        "beams": [case.beams for case in cases],
    }[first.kind]
    axis.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axis.set_xlim(-0.6, len(counts) - 0.4)
    axis.set_title(about[0], fontsize=9)
    axis.set_xlabel(about[1], fontsize=9)
    axis.set_ylabel("tokens/s of all rows" if first.kind == "rows" else "tokens/s", fontsize=9)


def _curves(
    axis: Any, case: Case, by_count: Mapping[int, Sequence[Result]], colours: Mapping[str, str]
) -> None:
    """Tokens a second by threads, a line for each model."""
    for model, colour in colours.items():
        results = [
            result for group in by_count.values() for result in group if result.model == model
        ]
        counts, rates = [result.threads for result in results], [result.rate for result in results]
        axis.plot(counts, rates, "o-", color=colour, label=model)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(by_count), [str(count) for count in by_count])
    axis.minorticks_off()
    axis.set_xlim(min(by_count) / 1.3, max(by_count) * 1.3)
    axis.set_ylim(0, 1.1 * max(result.rate for group in by_count.values() for result in group))
    name = title(case)
    axis.set_title(f"{name[0].upper()}{name[1:]}, by threads", fontsize=9)
    axis.set_xlabel("threads", fontsize=9)
    axis.set_ylabel("tokens/s", fontsize=9)
