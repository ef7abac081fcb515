"""What an export shows while it runs, and what it takes of the machine: time, memory and disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fastgen.system.memory import trim

PAUSE = 0.02  # seconds between two looks at the memory
LOOKS = 25  # of those for each look at the disk

# What a step takes on one machine: seconds, and more of them for each GB of float32 weights. What
# is left is told by their proportions.
EXPECTED = {
    "load": (4, 0.5),
    "original logits": (0.5, 1.6),
    "convert": (5, 2),
    "logits compared": (0.5, 1),
    "greedy text compared": (0.5, 2.5),
    "quantise to": (2, 7),
    "quantise keys and values": (2, 15),
    "text compared": (1, 3.5),
    "time by operator": (1, 1),
    "bundle": (0.2, 0.3),
}
INT4 = 3  # times as long for GPTQ


@dataclass
class Peaks:
    """The most that was seen, in bytes; None where the system does not tell.

    Attributes:
        anonymous: memory that the system could not have back, since no file has its content.
        resident: memory, what is mapped from files included.
        disk: of the files that are written.
    """

    anonymous: int | None = None
    resident: int | None = None
    disk: int | None = None

    def see(self, other: Peaks) -> None:
        for name, value in vars(other).items():
            if value is not None:
                setattr(self, name, max(value, getattr(self, name) or 0))


def memory(process: int | str = "self") -> Peaks:
    """What a process holds now, by the system's own account of it (Linux).

    Of one that has ended, and elsewhere, nothing is known.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return Peaks()
    held = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    size = {
        name: int(held.get(name, "0 kB").split()[0]) << 10
        for name in ("RssAnon", "RssShmem", "VmRSS")
    }
    return Peaks(size["RssAnon"] + size["RssShmem"], size["VmRSS"])


class Watch:
    """Looks at the process while it works.

    Attributes:
        directory: whose files are counted, once there is one.
        unseen: bytes of files that no directory shows.
    """

    def __init__(self) -> None:
        self.directory: Path | None = None
        self.unseen = 0
        self._since_start, self._since_step = Peaks(), Peaks()
        self._ended = threading.Event()

    @property
    def peaks(self) -> Peaks:
        """Since it began."""
        self._look(disk=True)
        return self._since_start

    @contextmanager
    def working(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def step(self) -> Peaks:
        """The peaks of the step that ends now; the next one begins."""
        self._look(disk=True)
        ended, self._since_step = self._since_step, Peaks()
        return ended

    def _watch(self) -> None:
        looks = 0
        while not self._ended.wait(PAUSE):
            looks += 1
            self._look(disk=looks % LOOKS == 0)

    def _look(self, disk: bool) -> None:
        now = memory()
        if disk and self.directory is not None:
            now.disk = self.unseen + on_disk(self.directory)
        for peaks in (self._since_start, self._since_step):
            peaks.see(now)


def on_disk(directory: Path) -> int:
    """Bytes of the files below a directory, some of which may go meanwhile, and it too."""
    total = 0
    for place, _, names in os.walk(directory):  # which passes over what it cannot open
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total


class Progress:
    """Shows each step with its time and what it found; on a terminal, the running one too.

    Attributes:
        steps: what was shown, for the report.
        weights: bytes of the weights in float32, as soon as they are known.
        watch: what looks at the memory.
    """

    def __init__(self, names: list[str], stream: TextIO | None) -> None:
        self.names = names
        self.stream = stream
        self.steps: list[dict[str, Any]] = []
        self.weights = 0
        self.watch = Watch()
        self._started = self._ended = time.perf_counter()

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time a step; what is appended to the yielded list is shown as its finding."""
        label = f"[{len(self.steps) + 1}/{len(self.names)}] {name}"
        live = self.stream is not None and self.stream.isatty()
        if live:
            self._write(f"{label} ...{self._left(0)}")
        found: list[str] = []
        start = time.perf_counter()
        try:
            yield found
        except BaseException:
            if live:
                self._write("\n")
            raise
        self._ended = time.perf_counter()
        seconds, took = self._ended - start, self.watch.step()
        shown = {"step": name, "seconds": round(seconds, 3), "found": "; ".join(found)}
        self.steps.append(shown | vars(took))
        trim()  # the next step needs the memory
        clear = "\r\x1b[K" if live else ""
        self._write(f"{clear}{label:<38}{seconds:7.1f} s  {'; '.join(found)}\n")

    def again(self, *names: str) -> None:
        """Some steps are taken once more, now."""
        at = len(self.steps)
        self.names[at:at] = names

    def part(self, done: int, total: int) -> None:
        """Show how far the running step is, on a terminal."""
        if self.stream is not None and self.stream.isatty():
            step = f"[{len(self.steps) + 1}/{len(self.names)}]"
            self._write(f"\r\x1b[K{step} {done + 1} of {total} ...{self._left(done / total)}")

    def _left(self, share: float) -> str:
        """About how long it will be, by how long what is done was expected to take.

        Args:
            share: of the running step that is done.
        """
        expected = [_expected(name, self.weights) for name in self.names]
        done = len(self.steps)
        if not done:
            return ""
        began = self._ended if share == 0 else time.perf_counter()
        past = sum(expected[:done]) + share * expected[done]
        left = (began - self._started) / past * (sum(expected) - past)
        return f" about {left:,.0f} s left"

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()


def _expected(name: str, weights: int) -> float:
    kind = next((kind for kind in EXPECTED if kind in name), "bundle")
    fixed, more = EXPECTED[kind]
    return (fixed + more * weights / 1e9) * (INT4 if name == "quantise to int4" else 1)
