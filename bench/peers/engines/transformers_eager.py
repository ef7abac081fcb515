"""transformers' own `generate` on torch: what the others are compared with.

Compiled, with a static cache, it was 4% to 8% faster for one prompt after 40 seconds of compiling
anew for each length, and a fifth slower with 4 beams. So it is not among the engines.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peers.engines import Engine, generate_of_transformers, logits_of_transformers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Adapter(Engine):
    title = "transformers"
    precisions: ClassVar = {"fp32": "float32"}
    model: Any

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        (target / "model").symlink_to(source)

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        return generate_of_transformers(self.model, prompts, new, beams)

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        return logits_of_transformers(self.model, row)
