"""A transformers model as the origin of an export: the original in torch, and its graph."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import tokenizers
import torch
import transformers
from numpy.typing import NDArray

from fastgen.export.prove import check
from fastgen.export.source.origin import Room, Tolerance
from fastgen.export.torch_model.source import Source, quiet
from fastgen.export.trace import graph, hooks, sparse
from fastgen.store import jsonfile
from fastgen.store.model_info import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, ModelInfo

OF_THIS_MACHINE = {"name_or_path", "is_local", "local_files_only", "vocab_file", "tokenizer_file"}


class Original(check.Asked):
    """A transformers model. See `origin.Origin`."""

    first = "fp32"
    tolerance = Tolerance()
    way = "traced by torch"  # how its graph is made

    def __init__(self, loaded: Source) -> None:
        self.loaded = loaded
        self.name, self.note = loaded.name, loaded.note
        self.model = loaded.model

    @cached_property
    def recorded(self) -> tuple[graph.Kept, bool]:
        """Run it: what it keeps of a row, and whether it can compute none beyond its limit."""
        kept = graph.kept_by(self.model)
        limit = self._limit(kept)
        is_hard = sparse.limit(self.model) is not None
        return kept, is_hard or (limit is not None and not self._computes(limit))

    @property
    def kept(self) -> graph.Kept:
        return self.recorded[0]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def tokenizer(self) -> tokenizers.Tokenizer | None:
        tokenizer = self.loaded.tokenizer
        return None if tokenizer is None else tokenizer.backend_tokenizer

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and advice; afterwards each module trains or does not, as before."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with quiet():
                yield
        finally:
            for module in training:
                module.training = True

    def about(self) -> list[str]:
        about = [f"{self.model.config.model_type}, {self.parameters / 1e6:,.1f} M weights"]
        about.append(self.way)
        return about + ([f"for ids only: {self.note}"] if self.tokenizer is None else [])

    def probes(self) -> list[NDArray[np.int64]]:
        return check.probes(self.model, self.loaded.tokenizer, self.kept.layers)

    def convert(self, whole: bool = False) -> tuple[onnx_ir.Model, list[str]]:
        states = len(self.kept.states)
        shown = f"{len(self.kept.layers)} attention layers"
        shown += f", {states} other states" if states else ""
        converted = graph.convert(self.model, self.kept, whole)
        shown += ", alike" if converted.meta.get("repeated") else ""
        return converted, [shown]

    def written(self, directory: Path, room: Room) -> None:
        """It runs by itself."""

    def describe(self) -> ModelInfo:
        kept, hard_limit = self.recorded
        return ModelInfo(
            precision=self.first,
            model_type=self.model.config.model_type,
            name=self.name,
            parameters=self.parameters,
            vocab_size=self.model.get_output_embeddings().weight.shape[0],
            max_length=self._limit(kept),
            hard_limit=hard_limit,
            layers=tuple((layer.kv_heads, layer.head_dim) for layer in kept.layers),
            states=tuple(map(tuple, kept.states.values())),
        )

    def _limit(self, kept: graph.Kept) -> int | None:
        """Positions that it was trained for."""
        if not kept.layers:
            return None  # a recurrence has no last position, whatever length its file says
        config = self.model.config.get_text_config(decoder=True)
        limit: int | None = getattr(config, "max_position_embeddings", None)
        return limit

    def _computes(self, position: int) -> bool:
        """True if the model can compute a token at `position`, the first beyond its limit."""
        ids = torch.zeros(1, 1, dtype=torch.long)
        try:
            with torch.no_grad(), hooks.positions(self.model, ids + position) as given:
                self.model(input_ids=ids, **given)
        except (IndexError, RuntimeError):
            return False
        return True

    def report(self) -> dict[str, Any]:
        return {"proof": f"the original ran (transformers {transformers.__version__})"}

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def write_configuration(self, to: Path) -> None:
        config = json.loads(self.model.config.to_json_string(use_diff=False))
        # Where the model came from is in `fastgen.json`, as a name; here it may be a path.
        config.pop("_name_or_path", None)
        jsonfile.write(to / CONFIG, config)
        defaults = self.model.generation_config.to_dict()
        defaults = {name: value for name, value in defaults.items() if value is not None}
        jsonfile.write(to / GENERATION_CONFIG, defaults)
        if self.loaded.tokenizer is not None:
            self.loaded.tokenizer.save_pretrained(to)
            path = to / TOKENIZER_CONFIG
            kept = json.loads(path.read_text(encoding="utf-8"))
            if getattr(self.loaded.tokenizer, "split_special_tokens", False):
                kept["split_special_tokens"] = True  # which `save_pretrained` leaves out
            jsonfile.write(path, {k: v for k, v in kept.items() if k not in OF_THIS_MACHINE})
