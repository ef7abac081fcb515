"""fastgen, installed from this checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from peers.engines import Engine


class Adapter(Engine):
    title = "fastgen"
    precisions: ClassVar = {"fp32": "fp32", "int8": "int8", "int4": "int4"}
    model: Any

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        from fastgen.export import export

        # Random weights fail the check of quantised models, which compares texts.
        export(str(source), target, precision=precision, allow_mismatch=True, force=True)

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import fastgen

        self.model = fastgen.load(directory, threads=threads)

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        out = self.model.generate(
            prompts, do_sample=False, num_beams=beams, max_new_tokens=new, min_new_tokens=new
        )
        return [list(row[-new:]) for row in out]
