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

import fastgen
from fastgen.export.prove import check
from fastgen.export.source.origin import Tolerance
from fastgen.export.torch_model.source import Source, quiet
from fastgen.export.trace import graph, hooks, sparse
from fastgen.store import jsonfile
from fastgen.store.model_info import FORMAT

OF_THIS_MACHINE = {"name_or_path", "is_local", "local_files_only", "vocab_file", "tokenizer_file"}


class Original:
    """A transformers model. See `origin.Origin`."""

    first = "fp32"
    tolerance = Tolerance()
    way = "traced by torch"  # how its graph is made

    def __init__(self, loaded: Source) -> None:
        self.loaded = loaded
        self.name, self.note = loaded.name, loaded.note
        self.model = loaded.model

    @cached_property
    def kept(self) -> graph.Kept:
        return graph.kept_by(self.model)

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
        size = sum(p.numel() for p in self.model.parameters())
        about = [f"{self.model.config.model_type}, {size / 1e6:,.1f} M weights"]
        about.append(self.way)
        return about + ([f"for ids only: {self.note}"] if self.tokenizer is None else [])

    def probes(self) -> list[NDArray[np.int64]]:
        return check.probes(self.model, self.loaded.tokenizer, self.kept.layers)

    def logits(self, row: NDArray[np.int64]) -> NDArray[np.float32]:
        (found,) = check.reference_logits(self.model, [row])
        return found

    def continuation(self, row: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        (found,) = check.reference_continuation(self.model, [row], count)
        return found

    def convert(self, whole: bool = False) -> tuple[onnx_ir.Model, list[str]]:
        states = len(self.kept.states)
        shown = f"{len(self.kept.layers)} attention layers"
        shown += f", {states} other states" if states else ""
        converted = graph.convert(self.model, self.kept, whole)
        return converted, [shown + (", alike" if converted.meta.get("repeated") else "")]

    def written(self, place: Path) -> None:
        """It runs by itself."""

    def describe(self, precision: str) -> dict[str, Any]:
        kept = self.kept  # or why there is none
        config = self.model.config.get_text_config(decoder=True)
        # A recurrence has no last position, whatever length its file says it was trained with.
        limit = getattr(config, "max_position_embeddings", None) if kept.layers else None
        return {
            "format": FORMAT,
            "fastgen": fastgen.__version__,
            "precision": precision,
            "model_type": self.model.config.model_type,
            "name": self.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocab_size": self.model.get_output_embeddings().weight.shape[0],
            "max_length": limit,
            "hard_limit": sparse.limit(self.model) is not None
            or (limit is not None and not self._computes(limit)),
            "layers": [[layer.kv_heads, layer.head_dim] for layer in kept.layers],
            "states": [list(shape) for shape in kept.states.values()],
            "cache_dtype": "float32",
        }

    def _computes(self, position: int) -> bool:
        """Whether the model can compute a token at `position`, the first beyond its limit."""
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
        jsonfile.write(to / "config.json", config)
        defaults = self.model.generation_config.to_dict()
        defaults = {name: value for name, value in defaults.items() if value is not None}
        jsonfile.write(to / "generation_config.json", defaults)
        if self.loaded.tokenizer is not None:
            self.loaded.tokenizer.save_pretrained(to)
            path = to / "tokenizer_config.json"
            kept = json.loads(path.read_text(encoding="utf-8"))
            if getattr(self.loaded.tokenizer, "split_special_tokens", False):
                kept["split_special_tokens"] = True  # which `save_pretrained` leaves out
            jsonfile.write(path, {k: v for k, v in kept.items() if k not in OF_THIS_MACHINE})
