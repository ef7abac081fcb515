"""fastgen in 4 bits, with its layers in 8 bits besides, in memory, for many tokens at once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from peers.engines import ours


class Adapter(ours.Adapter):
    variant = "8-bit prompts"
    precisions: ClassVar = {"int4": "int4"}
    environment = "ours"
    model_of = "ours"
    note = "8-bit prompts: its KL is that of reading; a step of one row is int4's"

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import fastgen

        self.model = fastgen.load(directory, threads=threads, prefill_precision="int8")
