"""The picture of real models: tokens a second against KL, a point an engine and precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import report
from peers.cases import CASES
from peers.engines import BASE, NAMES, OURS, adapter

CASE = "greedy-16"
MARKS = {"llama": "^", "openvino_llm": "s", "ort_genai": "D", "ct2": "v", "optimum_onnx": "P"}
COLOURS = {
    "llama": "#8a6d3b",
    "openvino_llm": "#2f7fbf",
    "ort_genai": "#7a5fc0",
    "ct2": "#3f9464",
    "optimum_onnx": "#8c9bab",
    "ours": "#d9480f",
}
SHORT = {
    "int8": "8 bit",
    "int6": "6 bit",
    "int4": "4 bit",
}  # where an engine has no name of its own
Box = tuple[float, float, float, float]  # left, right, bottom, top
POINT = 0.014, 0.016  # half of a point, as shares of the axes
LETTER = 0.021, 0.02  # a letter's width and half of its height, likewise


def draw(figure: Any, lines: Sequence[report.Line], path: Path) -> None:
    """A panel for each model that was timed, on an opaque ground: it is shown in dark pages too.

    Args:
        figure: matplotlib's `Figure`.
    """
    found = {
        shape: report.Results(lines, shape)
        for shape in report.REAL
        if any(line.get("shape") == shape and line["kind"] == "time" for line in lines)
    }
    made = figure(figsize=(4.6 * len(found), 4.2), layout="constrained", facecolor="white")
    for axis, (shape, results) in zip(
        made.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        panel(axis, results)
        axis.set_title(report.REAL[shape], fontsize=11)
    made.axes[0].set_ylabel("tokens a second, one row, 16 -> 64", fontsize=9)
    handles: dict[str, Any] = {}
    for axis in made.axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    order = [adapter(name).title for name in (*OURS[:1], *NAMES) if adapter(name).title in handles]
    order = list(dict.fromkeys(order))
    made.legend(
        [handles[name] for name in order],
        order,
        loc="outside lower center",
        ncols=len(order),
        frameon=False,
        fontsize=9,
    )
    made.savefig(path, dpi=110)


def panel(axis: Any, results: report.Results) -> None:
    """One model. What loses nothing, float32, has no place on this scale and is left to tables."""
    points = {}
    for who, loss in results.losses.items():
        seconds = results.median(who, CASE)
        if seconds and who[1] != "fp32" and who[0] != BASE and not adapter(who[0]).model_of:
            points[who] = loss.kl, report.rate(CASES[CASE], seconds)
    ours = [who for who in points if who[0] in OURS]
    for who, (kl, rate) in points.items():
        axis.plot(
            kl,
            rate,
            MARKS.get(who[0], "o"),
            color=COLOURS[who[0]],
            markersize=9 if who in ours else 7,
            label=adapter(who[0]).title,
            zorder=3,
        )
    axis.set_xscale("log")
    axis.margins(0.16, 0.12)
    axis.set_ylim(bottom=0)
    label(axis, points)
    exact = {name: results.median((name, "fp32"), CASE) for name in (BASE, "ours")}
    for name, seconds in exact.items():
        if seconds:
            rate = report.rate(CASES[CASE], seconds)
            axis.axhline(rate, color="#b0b7bf", linewidth=0.8, linestyle=":", zorder=1)
            axis.annotate(
                f"{adapter(name).title} in float32",
                (1, rate),
                xycoords=axis.get_yaxis_transform(),
                xytext=(-3, 2),
                textcoords="offset points",
                ha="right",
                fontsize=7,
                color="#6b7480",
            )
    axis.set_xlabel("KL from float32, nats (left is more faithful)", fontsize=9)
    axis.grid(True, which="major", color="#e6e9ec", linewidth=0.7, zorder=0)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def label(axis: Any, points: dict[report.Key, tuple[float, float]]) -> None:
    """A name beside each point, where the fewest points and other names are."""
    place = axis.transData + axis.transAxes.inverted()
    at = {who: place.transform(point) for who, point in points.items()}
    taken = [(x - POINT[0], x + POINT[0], y - POINT[1], y + POINT[1]) for x, y in at.values()]
    for who, (x, y) in sorted(at.items(), key=lambda one: one[1][0]):
        name = adapter(who[0]).precisions[who[1]]
        name = SHORT.get(name, name)
        long = LETTER[0] * len(name)
        # By side: where the name is, and its alignment.
        sides = {
            "left": (x + 2 * POINT[0], y, x + 2 * POINT[0] + long),
            "center": (x - long / 2, y + 2.2 * POINT[1], x + long / 2),
            "right": (x - 2 * POINT[0] - long, y, x - 2 * POINT[0]),
            "below": (x - long / 2, y - 2.2 * POINT[1], x + long / 2),
        }
        boxes = {
            side: (left, right, middle - LETTER[1], middle + LETTER[1])
            for side, (left, middle, right) in sides.items()
        }
        side = min(boxes, key=lambda one: sum(overlap(boxes[one], other) for other in taken))
        taken.append(boxes[side])
        left, right, bottom, top = boxes[side]
        align = "center" if side == "below" else side
        axis.annotate(
            name,
            (
                {"left": left, "right": right, "center": (left + right) / 2}[align],
                (bottom + top) / 2,
            ),
            xycoords="axes fraction",
            ha=align,
            va="center",
            fontsize=8,
            color=COLOURS[who[0]],
            fontweight="bold" if who[0] in OURS else "normal",
        )


def overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    wide = min(one[1], other[1]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[2], other[2])
    return max(0.0, wide) * max(0.0, high)
