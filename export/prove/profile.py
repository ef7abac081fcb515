"""The share of each operator in a model's time, by onnxruntime's own profiler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.engine.model import Model
from fastgen.engine.prefill import prefill
from fastgen.engine.session import UNPACKED, open_session, session_options
from fastgen.store.model_info import GRAPH
from fastgen.store.tuning import Tuning

PROMPT = 128  # tokens of the prefill
STEPS = 8  # of decoding one row after it
WARM = 1  # run of each kind that is not counted
AROUND = {"Loop", "If", "Scan"}  # operators whose time is that of the nodes in them


def by_operator(directory: Path, tuning: Tuning | None = None) -> dict[str, dict[str, float]]:
    """Share of the time by operator, largest first, of a prefill and of decoding one row.

    Args:
        tuning: how the model is run; None for how it usually is.

    Returns:
        `{"prefill": {operator: share}, "decode": {operator: share}}`.
    """
    model = Model(directory, tuning=Tuning(entries=UNPACKED))
    tuning = tuning or Tuning()
    length = min(PROMPT, (model.info.max_length or PROMPT + STEPS) - STEPS - WARM)
    if length < 1:
        return {}
    prompt = np.random.default_rng(0).integers(0, model.info.vocab_size, length)
    with tempfile.TemporaryDirectory() as temporary:
        options = session_options(tuning)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(temporary) / "profile")
        model.session = open_session(directory / GRAPH, options)
        for _ in range(WARM + 1):
            cache = model.new_cache(1, length + STEPS + WARM)
            prefill(model, cache, [prompt], 0)
        for _ in range(STEPS + WARM):
            model.forward([prompt[-1:]], cache)
        events = json.loads(Path(model.session.end_profiling()).read_text(encoding="utf-8"))
    runs = _runs(events)
    return {
        "prefill": _shares(runs[WARM : WARM + 1]),
        "decode": _shares(runs[2 * WARM + 1 :]),
    }


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
