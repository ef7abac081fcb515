"""fastgen with a second form of its layers in memory, int8 a channel, for many tokens at once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from peers.engines import ours


class Adapter(ours.Adapter):
    variant = "many tokens in int8"
    precisions: ClassVar = {"int8": "int8", "int4": "int4"}
    environment = "ours"
    model_of = "ours"
    note = (
        '"many tokens in int8" is `prefill_precision="int8"`: its KL is that of prompts and of '
        "many rows; a step of one row loses what the line without it says"
    )

    @classmethod
    def runs(cls, directory: Path) -> bool:
        from fastgen.store.model_info import ModelInfo

        return ModelInfo.parse(directory).can_read_prompts

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import fastgen

        self.model = fastgen.load(directory, threads=threads, prefill_precision="int8")
