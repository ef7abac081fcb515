"""fastgen with keys and values in 8 bits, as OpenVINO keeps them by default."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from peers.engines import ours


class Adapter(ours.Adapter):
    variant = "8-bit keys"
    precisions: ClassVar = {"int8": "int8", "int4": "int4"}
    environment = "ours"

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        from fastgen.export import export
        from peers.models import is_random

        export(
            str(source),
            target,
            precision=precision,
            cache_precision="int8",
            quick=is_random(source),
            force=True,
        )
