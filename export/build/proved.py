"""A built graph, and the original in torch that it is proved against."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from fastgen.export.build.origin import Built, of_directory
from fastgen.export.torch_model.original import Original
from fastgen.export.torch_model.source import Source
from fastgen.store.model_info import ModelInfo


class Proved(Original):
    """A transformers model whose graph is built of its checkpoint. See `origin.Origin`.

    Args:
        may_trace: whether it is traced instead, should the graph say something else.
    """

    way = "built of its tensors, proved by torch"

    def __init__(self, loaded: Source, directory: Path, may_trace: bool) -> None:
        super().__init__(loaded)
        self.may_trace = may_trace
        self.built = Built(of_directory(directory, loaded.name))

    @property
    def parameters(self) -> int:
        return self.built.parameters

    def convert(self, whole: bool = False) -> tuple[ir.Model, list[str]]:
        if whole:
            return super().convert(whole)
        model, found = self.built.convert()
        model.meta["repeated"] = self.may_trace
        return model, found

    def describe(self) -> ModelInfo:
        return self.built.describe()
