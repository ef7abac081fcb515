"""`report.json`, all that an export compared and found, as the table that people read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen.store import jsonfile
from fastgen.store.model_info import REPORT

SHOWN = 4  # operators that are named of each kind of step


def table(report: dict[str, Any]) -> str:
    """The findings of an export as lines: a column for each precision, then what they share.

    Args:
        report: the content of `report.json`.

    Raises:
        ModelError: it lacks something, or something in it is of another kind.
    """
    try:
        return _table(report)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise jsonfile.damaged(
            Path(REPORT), f"it says no such thing as an export: {error!r}"
        ) from error


def _table(report: dict[str, Any]) -> str:
    sections = {"fp32": report.get("fp32", report)}
    if "cache" in report:
        sections[f"{report['cache_precision']} cache"] = report["cache"]
    if report["precision"] != "fp32":
        sections[report["precision"]] = report
    columns = [_column(section) for section in sections.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    lines = [["", *sections]] + [[name, *(c.get(name, "") for c in columns)] for name in names]
    return "\n".join([*_aligned(lines), *_notes(report)])


def _column(section: dict[str, Any]) -> dict[str, str]:
    """A precision beside the original: on text where that was measured, else on the probes."""
    text, greedy = section.get("quality"), section["greedy"]
    logits = text or section["logits"]
    column = {
        "largest logit error": f"{logits['max_difference']:.1e}",
        "mean logit error": f"{logits['mean_difference']:.1e}",
        "KL divergence": f"{logits['kl']:.1e}",
        "top-1 agreement": f"{logits['top1']:.2%}",
        "greedy tokens until one differs": f"{greedy['same']} of {greedy['tokens']}",
    }
    if text:
        error = f" ± {text['perplexity_error']:.2%}" if "perplexity_error" in text else ""
        column["perplexity"] = f"{text['perplexity']:.3f} ({text['more_perplexity']:+.2%}{error})"
    if "bytes" in section:
        column["graph and weights"] = f"{section['bytes'] / 1e6:,.1f} MB"
    return column


def _notes(report: dict[str, Any]) -> list[str]:
    """Lines for all precisions: where time goes, the kernels, what is beyond the tolerance."""
    notes = [f"proof: {report['proof']}"] if "proof" in report else []
    notes += [
        f"time, {step}: " + ", ".join(f"{name} {share:.0%}" for name, share in _largest(shares))
        for step, shares in report.get("time", {}).items()
    ]
    if report.get("quick"):
        notes.append("text: not compared, for the export was quick")
    if "peaks" in report:
        notes.append(f"the export took: {_taken(report['peaks'])}")
    if report.get("turned"):
        notes += report["turned"]
    if report.get("matrices"):
        kernels = Counter(one["kernel"] for one in report["matrices"]).most_common()
        matrices = [f"{count} {kernel}" for kernel, count in kernels]
        if "weight_bits" in report:
            matrices.append(f"{report['weight_bits']:.2f} bits a weight of the layers")
        notes.append(f"matrices: {'; '.join(matrices)}")
    if report.get("kinds"):
        costly = sorted(report["kinds"].items(), key=lambda one: -one[1])[:SHOWN]
        told = ", ".join(f"{name} {kl:.1e}" for name, kl in costly)
        notes.append(f"KL divergence of each kind alone, at the cheapest: {told}")
    if "many_tokens" in report:
        notes.append(f"many tokens: {_many(report['many_tokens'])}")
    notes += [f"note: {note}" for note in report.get("folder", {}).get("notes", [])]
    notes.append(f"beyond the tolerance: {'; '.join(report['mismatch']) or 'nothing'}")
    return notes


def _many(second: dict[str, Any]) -> str:
    """The matrices of `prefill_precision="int8"` by their form, their memory, and their cost."""
    forms = ", ".join(f"{count} {form}" for form, count in second["forms"].items())
    text = second.get("quality")
    judged = f"KL divergence {text['kl']:.1e}" if text else "not compared on text"
    return f"{forms}; {second['bytes'] / 1e6:,.1f} MB more; {judged}"


def _taken(peaks: dict[str, Any]) -> str:
    """Memory and disk at most, beside the float32 weights."""
    floats, anonymous = peaks["float32_weights"], peaks["anonymous"]
    told = []
    if anonymous is not None:  # Linux tells
        times = ""
        if anonymous < 4 * floats:  # of a small model the libraries take the most
            times = f", {anonymous / floats:.2f} times the float32 weights"
        told.append(f"{anonymous / 1e6:,.0f} MB of memory{times}")
        told.append(f"{peaks['resident'] / 1e6:,.0f} MB with mapped files")
    return ", ".join([*told, f"{peaks['disk'] / 1e6:,.0f} MB of disk"])


def _largest(shares: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(shares.items(), key=lambda item: -item[1])[:SHOWN]


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
