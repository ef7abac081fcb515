"""A built graph, and the original in torch that it is proved against."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from fastgen.export.build.origin import Built
from fastgen.export.torch_model.original import Original
from fastgen.export.torch_model.source import Source
from fastgen.store.model_info import ModelInfo


class Proved(Original):
    """A transformers model whose graph is built of its checkpoint. See `origin.Origin`."""

    way = "built of its tensors, proved by torch"

    def __init__(self, loaded: Source, directory: Path) -> None:
        super().__init__(loaded)
        self.built = Built(directory, loaded.name)

    @property
    def parameters(self) -> int:
        return self.built.parameters

    def convert(self, whole: bool = False) -> tuple[ir.Model, list[str]]:
        return self.built.convert(whole)

    def describe(self) -> ModelInfo:
        return self.built.describe()
