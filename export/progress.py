"""The steps of an export, shown as they run, and what they take: time, memory and disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fastgen.system.memory import trim

PAUSE = 0.02  # seconds between two looks at the memory
LOOKS = 25  # of those for each look at the disk


@dataclass(frozen=True)
class Cost:
    """The time of a step on one machine; what is left is told by their proportions.

    Attributes:
        seconds: of any model.
        more: seconds for each GB of float32 weights.
    """

    seconds: float
    more: float

    def of(self, weights: int) -> float:
        """Seconds for a model of so many bytes in float32."""
        return self.seconds + self.more * weights / 1e9


@dataclass(frozen=True)
class Step:
    """A step of an export.

    Attributes:
        name: as it is shown.
        cost: about what it takes.
        run: does it and returns its findings, which are shown.
        then: decides on what was found, once it is shown: it raises, or has steps taken again.
    """

    name: str
    cost: Cost
    run: Callable[[], list[str]]
    then: Callable[[], None] | None = None


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
    """The memory that a process holds now, by the system's own account of it (Linux).

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
    for root, _, names in os.walk(directory):  # which passes over what it cannot open
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


class Progress:
    """Takes steps one after the other, and shows each with its time and what it found.

    On a terminal the running one is shown too.

    Args:
        stream: where they are shown; None for nowhere.
        clock: tells the time, in seconds.

    Attributes:
        planned: all steps, in order.
        taken: what was shown of those that were taken, for the report.
        weights: bytes of the weights in float32, as soon as they are known.
        watch: what looks at the memory.
    """

    def __init__(
        self, stream: TextIO | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.stream, self._clock = stream, clock
        self.planned: list[Step] = []
        self.taken: list[dict[str, Any]] = []
        self.weights = 0
        self.watch = Watch()
        self._started = self._ended = clock()

    def run(self, steps: Sequence[Step]) -> None:
        """Take all steps, and those that are added meanwhile."""
        self.planned = list(steps)
        while len(self.taken) < len(self.planned):
            self.take()

    def take(self) -> None:
        """Take the next step, and time it."""
        step = self.planned[len(self.taken)]
        label = f"{self._number()} {step.name}"
        live = self.stream is not None and self.stream.isatty()
        if live:
            self._write(f"{label} ...{self._left(0)}")
        start = self._clock()
        try:
            outcome = "; ".join(step.run())
        except BaseException:
            if live:
                self._write("\n")
            raise
        self._ended = self._clock()
        seconds, took = self._ended - start, self.watch.step()
        shown = {"step": step.name, "seconds": round(seconds, 3), "found": outcome}
        self.taken.append(shown | vars(took))
        trim()  # the next step needs the memory
        clear = "\r\x1b[K" if live else ""
        self._write(f"{clear}{label:<38}{seconds:7.1f} s  {outcome}\n")
        if step.then is not None:
            step.then()

    def again(self, steps: Sequence[Step]) -> None:
        """Take some steps once more, now."""
        at = len(self.taken)
        self.planned[at:at] = steps

    def part(self, done: int, total: int) -> None:
        """Show how far the running step is, on a terminal."""
        if self.stream is not None and self.stream.isatty():
            left = self._left(done / total)
            self._write(f"\r\x1b[K{self._number()} {done + 1} of {total} ...{left}")

    def _number(self) -> str:
        return f"[{len(self.taken) + 1}/{len(self.planned)}]"

    def _left(self, share: float) -> str:
        """The time that is left, by how long what is done was expected to take.

        Args:
            share: of the running step that is done.
        """
        expected = [step.cost.of(self.weights) for step in self.planned]
        done = len(self.taken)
        if not done:
            return ""
        began = self._ended if share == 0 else self._clock()
        past = sum(expected[:done]) + share * expected[done]
        left = (began - self._started) / past * (sum(expected) - past)
        return f" about {left:,.0f} s left"

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()
