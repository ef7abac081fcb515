"""CTranslate2's Generator, on what its converter for transformers' models makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peers.engines import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Adapter(Engine):
    title = "CTranslate2"
    precisions: ClassVar = {"fp32": "float32", "int8": "int8"}
    model: Any
    tokens: list[str]

    @classmethod
    def converter(cls, shape: str) -> str:
        return "ct2-convert"

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(source)).convert(
            str(target), quantization=Adapter.precisions[precision], force=True
        )

    def load(self, directory: Path, precision: str, threads: int) -> None:
        import ctranslate2

        self.model = ctranslate2.Generator(
            str(directory),
            device="cpu",
            compute_type=self.precisions[precision],
            intra_threads=threads,
            inter_threads=1,
        )
        self.tokens = json.loads((directory / "vocabulary.json").read_text())

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        # It takes and gives tokens as strings; looking them up is a few microseconds.
        out = self.model.generate_batch(
            [[self.tokens[i] for i in prompt] for prompt in prompts],
            beam_size=beams,
            min_length=new,
            max_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [list(result.sequences_ids[0]) for result in out]

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        import numpy as np

        tokens = [[self.tokens[i] for i in row]]
        return np.array(self.model.forward_batch(tokens, return_log_probs=False))[0]
