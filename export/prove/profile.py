"""The share of each operator in a model's time, by onnxruntime's own profiler."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

AROUND = {"Loop", "If", "Scan"}  # operators whose time is that of the nodes in them


def by_operator(events: Path, steps: int) -> dict[str, dict[str, float]]:
    """Share of the time by operator, largest first, of a prefill and of the steps after it.

    Args:
        events: a file of what a session that was profiled (`engine.session.profiled`) took for
            each node: a prefill, in one call or several, and then `steps` of decoding.

    Returns:
        `{"prefill": {operator: share}, "decode": {operator: share}}`.
    """
    runs = _runs(json.loads(events.read_text(encoding="utf-8")))
    return {"prefill": _shares(runs[:-steps]), "decode": _shares(runs[-steps:])}


def _runs(events: list[dict[str, Any]]) -> list[Counter[str]]:
    """Microseconds by operator of each run of the session, in order."""
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    runs: list[Counter[str]] = [Counter() for _ in starts]
    places = np.array(starts)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            run = int(np.searchsorted(places, event["ts"], side="right")) - 1
            if event["args"]["op_name"] not in AROUND:
                runs[run][event["args"]["op_name"]] += event["dur"]
    return runs


def _shares(runs: list[Counter[str]]) -> dict[str, float]:
    total = sum(runs, Counter())
    whole = sum(total.values()) or 1
    return {name: round(time / whole, 4) for name, time in total.most_common()}
