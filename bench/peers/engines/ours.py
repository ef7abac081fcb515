"""fastgen, installed from this checkout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from peers.engines import Engine


class Adapter(Engine):
    title = "fastgen"
    precisions: ClassVar = {"fp32": "fp32", "int8": "int8", "int4": "int4"}
    longest = 32768
    model: Any

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        from fastgen.export import export

        # Random weights say nothing of a text, so quantised models are not compared on one.
        export(str(source), target, precision=precision, quick=True, force=True)

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import fastgen

        self.model = fastgen.load(directory, threads=threads)

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        clock = None if beams > 1 else Clock()
        out = self.model.generate(
            prompts,
            do_sample=False,
            num_beams=beams,
            max_new_tokens=new,
            min_new_tokens=new,
            streamer=clock,
        )
        if clock:
            self.first = clock.times[1]
        return [list(row[-new:]) for row in out]


class Clock:
    """A streamer that notes when the prompt is given to it, and then the tokens of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
