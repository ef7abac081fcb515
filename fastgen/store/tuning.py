"""The best way to run a model on this machine, as `fastgen tune` measured it and left it there.

Without it, a model runs on all physical cores, which spin while they wait for each other.
"""

from __future__ import annotations

import functools
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnxruntime

from fastgen.store import files, jsonfile
from fastgen.store.jsonfile import is_count, is_object, take
from fastgen.store.model_info import TUNING
from fastgen.system.cpu import cpu_name, physical_cores, usable_cpus

MOST_THREADS = 2**16  # of any machine
MOST_TOKENS = 2**31  # of a step: more than any has
# How prompts and other steps of many tokens are computed: as all else, or in int8 per channel.
PREFILL_PRECISIONS = ("same", "int8")

# Kernels that onnxruntime has besides its default, by the processors that have them: session
# entries that are tried, and the only ones that are taken from a file.
KERNELS: dict[str, list[dict[str, str]]] = {
    "aarch64": [{"mlas.enable_gemm_fastmath_arm64_bfloat16": "1"}],
    "arm64": [{"mlas.enable_gemm_fastmath_arm64_bfloat16": "1"}],
}


@dataclass(frozen=True)
class Tuning:
    """Settings of a session.

    Attributes:
        threads: of a step.
        spinning: whether threads spin while they wait for more of a step, or sleep.
        entries: session configuration entries of onnxruntime that choose kernels.
        prefill_precision: of many tokens, "same" or "int8"; see `fastgen.load`. (The file has it
            as "prompts".)
        many_from: new tokens of all rows from which a step takes the matrices that read prompts;
            None to measure it on loading.
    """

    threads: int = field(default_factory=physical_cores)
    spinning: bool = True
    entries: dict[str, str] = field(default_factory=dict)
    prefill_precision: str = "same"
    many_from: int | None = None

    def __str__(self) -> str:
        kernels = [f"{name}={value}" for name, value in self.entries.items()]
        waiting = [] if self.spinning else ["sleeping"]
        precision = self.prefill_precision
        prompts = [] if precision == "same" else [f"many tokens in {precision}"]
        plural = "s" if self.threads > 1 else ""
        return ", ".join([f"{self.threads} thread{plural}", *waiting, *kernels, *prompts])


def here() -> dict[str, str | int]:
    """The machine that a measurement holds for: this processor, as many CPUs, this onnxruntime."""
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cpus": len(usable_cpus()),
        "onnxruntime": onnxruntime.__version__,
    }


def read(directory: Path) -> Tuning | None:
    """Read what was measured for this machine; None if nothing was, or it is another machine's.

    Raises:
        ModelError: the file holds what no measurement here leaves; it says what to do.
    """
    path = directory / TUNING
    if not path.is_file():
        return None
    advice = f"delete it, or run `fastgen tune {directory}` again"
    content = jsonfile.read(path, advice)
    measured = take(content, path, "here", is_object, "an object", advice)
    settings = take(content, path, "tuning", is_object, "an object", advice)
    settings = {"prompts": "same", "many_from": None} | settings  # of older versions
    setting = functools.partial(take, settings, path, advice=advice)
    mine = measured == here()
    most = len(usable_cpus()) if mine else MOST_THREADS
    tuning = Tuning(
        threads=setting("threads", lambda v: is_count(v, most), f"a number from 1 to {most}"),
        spinning=setting("spinning", lambda v: isinstance(v, bool), "true or false"),
        entries=setting(
            "entries",
            lambda v: v in [{}, *kernels()] if mine else is_object(v),
            "entries that `fastgen tune` tries on this machine",
        ),
        prefill_precision=setting(
            "prompts", lambda v: v in PREFILL_PRECISIONS, " or ".join(PREFILL_PRECISIONS)
        ),
        many_from=setting(
            "many_from", lambda v: v is None or is_count(v, MOST_TOKENS), "null or a number"
        ),
    )
    return tuning if mine else None


def kernels() -> list[dict[str, str]]:
    """The session entries that may be faster than none on this processor."""
    return KERNELS.get(platform.machine().lower(), [])


def write(directory: Path, tuning: Tuning) -> None:
    """Leave `tuning` beside the model, at once and whole."""
    settings = asdict(tuning)
    settings["prompts"] = settings.pop("prefill_precision")
    content = {"here": here(), "tuning": settings}
    with files.atomic_file("the tuning's file", directory / TUNING) as made:
        made.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
