"""A GGUF file, and transformers' own reading of it, which the graph is proved against."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

from fastgen.errors import UnsupportedModel
from fastgen.export.build.origin import Built
from fastgen.export.gguf import architectures
from fastgen.export.gguf.file import File
from fastgen.export.gguf.parts import of_file
from fastgen.export.prove import check

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Proved(check.Asked, Built):
    """A GGUF file beside what transformers makes of it, in float32. See `origin.Origin`."""

    def __init__(self, file: File) -> None:
        super().__init__(of_file(file))
        self.model = _read(file, self.name)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        from fastgen.export.torch_model.source import quiet

        with quiet():
            yield

    def about(self) -> list[str]:
        return [*super().about(), "proved by torch"]

    def report(self) -> dict[str, Any]:
        import transformers

        version = transformers.__version__
        return {"proof": f"transformers read the same file and ran (transformers {version})"}

    def versions(self) -> dict[str, str]:
        import torch
        import transformers

        ours = super().versions()
        return {**ours, "torch": torch.__version__, "transformers": transformers.__version__}


def refused(file: File) -> str | None:
    """Say what transformers reads of a file otherwise than llama.cpp; None where nothing is."""
    if architectures.FACTORS in file.tensors:
        return f"transformers does not read its {architectures.FACTORS}"
    stretch = file.get("rope.scaling.type", "none")
    if stretch != "none":
        return f"transformers does not read its rope.scaling.type = {stretch!r}"
    return None


def _read(file: File, name: str) -> PreTrainedModel:
    """The model that transformers makes of a file.

    Raises:
        UnsupportedModel: it does not know the architecture, or reads it otherwise.
    """
    why = refused(file)
    if why is not None:
        raise UnsupportedModel(f"{name} cannot be proved: {why}")
    import torch
    from transformers import AutoModelForCausalLM

    from fastgen.export.torch_model.source import quiet

    place = {"pretrained_model_name_or_path": file.path.parent, "gguf_file": file.path.name}
    try:
        # (Its bar of the tensors is none that can be told to be quiet.)
        with quiet(), redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except ValueError as error:
        raise UnsupportedModel(
            f"{name} cannot be proved: transformers does not read it: {error}"
        ) from error
    return model.eval()
