"""One file an engine: how it converts the model, loads it and generates.

The driver imports these files to know what an engine can do; workers import them inside the
engine's own environment. So they import their engine late.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peers.cases import Case

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OURS = ("ours", "ours_int8_keys", "ours_many")
NAMES = (
    "transformers_eager",
    "optimum_onnx",
    "ort_genai",
    "ct2",
    "openvino_llm",
    "llama",
    *OURS,
)
BASE = NAMES[0]  # what the others are compared with
PRECISIONS = {  # by bits of a weight, from many to few: what the tables call each
    "fp32": "fp32",
    "int8": "8 bit",
    "int6": "6 bit",
    "int4-k": "4 bit, mixed",  # llama.cpp's Q4_K_M: some matrices in more bits
    "int4": "4 bit",
}


class Engine:
    """The protocol of an adapter. Lengths are forced: no end-of-text token ends a row.

    Attributes:
        title: the engine's name in tables.
        variant: what sets it apart from another engine of that name.
        precisions: those of `PRECISIONS` that it has, with its own name for each.
        build: environment variables of `pip install`.
        environment: the engine whose environment it shares; an empty string: it has its own.
        model_of: the engine whose converted models it runs; an empty string: it has its own.
        longest: tokens of the longest prompt that it is asked to read.
        note: what a reader of the numbers should know.
        first: when the last call had its first token, by `time.perf_counter`; None: it cannot tell.
    """

    title: ClassVar[str]
    variant: ClassVar[str] = ""
    precisions: ClassVar[dict[str, str]]
    build: ClassVar[dict[str, str]] = {}
    environment: ClassVar[str] = ""
    model_of: ClassVar[str] = ""
    longest: ClassVar[int] = 8192
    note: ClassVar[str] = ""
    first: float | None = None

    @classmethod
    def refuses(cls, case: Case) -> str:
        """The reason for not doing a case; an empty string if it does it."""
        if max(case.lengths) > cls.longest:
            return f"takes minutes, so it is not asked for more than {cls.longest:,} tokens"
        return ""

    @classmethod
    def runs(cls, directory: Path) -> bool:
        """True if a converted model has what this engine would run of it."""
        return True

    @classmethod
    def converter(cls, shape: str) -> str | None:
        """The requirements file of the environment that `prepare` runs in; None is the driver's."""
        return None

    @staticmethod
    def prepare(source: Path, target: Path, precision: str) -> None:
        """Convert the transformers model of `source` into the directory `target`, once."""

    def load(self, directory: Path, precision: str, threads: int) -> None:
        """Load what `prepare` made, at a precision of `PRECISIONS`."""
        raise NotImplementedError

    def generate(self, prompts: list[list[int]], new: int, beams: int) -> list[list[int]]:
        """Exactly `new` ids for each prompt, greedy or by beam search."""
        raise NotImplementedError

    def logits(self, row: list[int]) -> NDArray[np.float32]:
        """The logits after each of a row's ids, read as a prompt: [len(row), vocab].

        Padding of the vocabulary beyond the model's own may follow; it is cut off.
        """
        raise NotImplementedError


def adapter(name: str) -> type[Engine]:
    """The adapter class of an engine."""
    module: Any = importlib.import_module(f"peers.engines.{name}")
    return module.Adapter


def logits_of_transformers(model: Any, row: list[int]) -> NDArray[np.float32]:
    """`Engine.logits` of a model of transformers."""
    import torch

    with torch.inference_mode():
        found: NDArray[np.float32] = model(torch.tensor([row])).logits[0].float().numpy()
    return found


def left_padded(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and mask of ragged prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return ids, mask


def generate_of_transformers(
    model: Any, prompts: list[list[int]], new: int, beams: int
) -> list[list[int]]:
    """`Engine.generate` of a model that has transformers' own `generate`."""
    import torch

    ids, mask = map(torch.tensor, left_padded(prompts))
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=beams,
        max_new_tokens=new,
        min_new_tokens=new,
    )
    return out[:, ids.shape[1] :].tolist()
