"""fastgen, installed from this checkout."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peers.engines import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Adapter(Engine):
    title = "fastgen"
    precisions: ClassVar = {"fp32": "fp32", "int8": "int8", "int4": "int4"}
    longest = 32768
    model: Any

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        from fastgen.export import export
        from peers.models import is_random

        # Random weights say nothing of a text, so quantised models are not compared on one.
        quick = is_random(source)
        export(str(source), target, precision=precision, quick=quick, force=True)

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

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        import numpy as np

        positions = np.arange(len(row))[None]
        cache = self.model.model.new_cache(1, 2 * len(row))
        new = [np.array(row)]
        return np.array(self.model.model.forward(new, cache, logits_positions=positions)[0])


class Clock:
    """A streamer that notes when the prompt is given to it, and then the tokens of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, ids: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
