"""How a model runs best on this machine: what `fastgen tune` measured and left beside the model.

Without it, a model runs on all physical cores, which spin while they wait for each other.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnxruntime

from fastgen.cpu import cpu_name, physical_cores, usable_cpus

FILE = "tuned.json"


@dataclass(frozen=True)
class Tuning:
    """Settings of a session.

    Attributes:
        threads: of a step.
        spinning: whether threads spin while they wait for more of a step, or sleep.
        entries: session configuration entries of onnxruntime that choose kernels.
    """

    threads: int = field(default_factory=physical_cores)
    spinning: bool = True
    entries: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kernels = [f"{name}={value}" for name, value in self.entries.items()]
        waiting = [] if self.spinning else ["sleeping"]
        plural = "s" if self.threads > 1 else ""
        return ", ".join([f"{self.threads} thread{plural}", *waiting, *kernels])


def here() -> dict[str, str | int]:
    """What a measurement holds for: this processor, as many CPUs, this onnxruntime."""
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "cpus": len(usable_cpus()),
        "onnxruntime": onnxruntime.__version__,
    }


def read(directory: Path) -> Tuning | None:
    """What was measured for this machine; None if nothing was, or it is another machine's.

    Raises:
        ValueError: the file is damaged; it says what to do.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tuning = Tuning(**found["tuning"])
        if found["here"] != here():
            return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): delete it, or run `fastgen tune {directory}` again"
        ) from error
    return tuning


def write(directory: Path, tuning: Tuning) -> None:
    """Leave `tuning` beside the model, at once and whole."""
    temporary = directory / f".{FILE}.{os.getpid()}"
    content = {"here": here(), "tuning": asdict(tuning)}
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(directory / FILE)
    finally:
        temporary.unlink(missing_ok=True)
