"""An ONNX folder as the origin of an export: the graph as it is, and the graph by the contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel
from fastgen.export.onnx_folder import folder, rewrite, signature
from fastgen.export.onnx_folder.folder import Choice
from fastgen.export.onnx_folder.plain import Plain
from fastgen.export.onnx_folder.signature import POSITIONS
from fastgen.export.prove import check
from fastgen.export.rewrite.edit import constant, flag, sizes_of
from fastgen.export.source import vocabulary
from fastgen.export.source.origin import NOTHING, Room, Tolerance, name_of
from fastgen.store import jsonfile
from fastgen.store.model_info import CONFIG, GENERATION_CONFIG, ModelInfo

LIMITS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
# What a rewritten graph may differ by from the folder's, by what is in it.
EXACT = Tolerance(max_difference=1e-5)
BLOCKS = Tolerance(max_difference=1e-3, kl=1e-5, top1=0.99)
HALVES = Tolerance(max_difference=0.1, kl=1e-3, top1=0.95, greedy=False)
HALF_BLOCKS = Tolerance(max_difference=0.1, kl=1e-3, top1=0.9, greedy=False)
SHARED = Tolerance(max_difference=0.5, kl=0.1, top1=0.7, greedy=False)


class Folder:
    """A graph of an ONNX folder. See `origin.Origin`."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.name = name_of(choice.folder)
        self.first = choice.first
        self.config = choice.config
        with _named(self.name):
            files = choice.files
            model = folder.load(choice.graph)
            self.signature = signature.read(model.graph, self._heads())
            self.operators = {node.op_type for node in model.graph.all_nodes()}
            self.plain = Plain(choice.graph, files, self.signature)
        self.tokenizer, self.note = vocabulary.read(choice.folder)
        self.bytes = sum(path.stat().st_size for path in (choice.graph, *files))

    def _said(self, *names: str) -> int | None:
        """The first of some numbers of the configuration that is a positive one."""
        known = (self.config.get(name) for name in names)
        return next((n for n in known if type(n) is int and n > 0), None)

    def _heads(self) -> tuple[int, int] | None:
        """Key heads and their size, as the configuration says; None where it does not."""
        heads, width = self._said("num_attention_heads", "n_head"), self._said("hidden_size")
        size = self._said("head_dim") or (width // heads if heads and width else None)
        kept = self._said("num_key_value_heads") or heads
        return (kept, size) if kept and size else None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    @cached_property
    def vocab(self) -> int:
        """Ids that it both reads and says."""
        width = self.logits(np.zeros(1, np.int64)).shape[-1]
        return min(int(width), self._said("vocab_size") or int(width))

    @cached_property
    def limit(self) -> int | None:
        """Positions: as the configuration says, and not more than the graph's tables have."""
        configured, tables = self._said(*LIMITS), self._tables()
        return min([*tables, *([configured] if configured else [])], default=None)

    def _tables(self) -> list[int]:
        """Rows of the tables that the graph looks positions up in."""
        lengths = []
        for node in self.rewritten.model.graph:
            if node.op_type == "GroupQueryAttention" and flag(node, "do_rotary"):
                rows = sizes_of(node.inputs[7])[:1]
                lengths += [count for count in rows if count is not None]
            if node.op_type == "Gather" and (table := constant(node.inputs[0])) is not None:
                offset = _offset(node.inputs[1])
                if offset is not None and table.ndim > 1:
                    lengths.append(len(table) - offset)
        return lengths

    @cached_property
    def rewritten(self) -> rewrite.Rewritten:
        with _named(self.name):
            return rewrite.rewrite(
                folder.load(self.choice.graph),
                self.signature,
                self.vocab,
                self._said("sliding_window", "window_size"),
                self._said(*LIMITS),
            )

    @cached_property
    def parameters(self) -> int:
        """As they are before the graph is trimmed."""
        return _parameters(self.rewritten.model.graph)

    @property
    def tolerance(self) -> Tolerance:
        if self.operators & {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "QLinearMatMul"}:
            return SHARED
        if self.rewritten.halves:
            return HALVES if self.first == "fp32" else HALF_BLOCKS
        return EXACT if self.first == "fp32" else BLOCKS

    def about(self) -> list[str]:
        kind = self.config.get("model_type", "unknown type")
        shown = f"{kind}, {self.choice.graph.name} ({self.choice.name})"
        kinds = " and ".join(dict.fromkeys(self.rewritten.kinds))
        about = [shown, f"{self.bytes / 1e6:,.1f} MB", f"attention of {kinds}"]
        return about + ([f"for ids only: {self.note}"] if self.tokenizer is None else [])

    def probes(self) -> list[NDArray[np.int64]]:
        texts = (
            [] if self.tokenizer is None else [self.tokenizer.encode(t).ids for t in check.TEXTS]
        )
        windows = [window for window in self.rewritten.windows if window is not None]
        return check.ragged(texts, self.vocab, self.limit or 1 << 20, windows)

    def logits(
        self, row: NDArray[np.int64], then: NDArray[np.int64] = NOTHING
    ) -> NDArray[np.float32]:
        return self.plain.logits(row, then)

    def continuation(self, row: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        return self.plain.continuation(row, count)

    def convert(self, whole: bool = False) -> tuple[ir.Model, list[str]]:
        rewritten = self.rewritten
        shown = [f"{len(rewritten.layers)} attention layers"]
        if rewritten.halves:
            shown.append("half precision became single")
        return rewritten.model, shown

    def written(self, directory: Path, room: Room) -> None:
        """It runs by itself."""

    def describe(self) -> ModelInfo:
        rewritten = self.rewritten
        logits = next(value for value in rewritten.model.graph.outputs if value.name == "logits")
        vocab_size = sizes_of(logits)[2]
        assert vocab_size is not None
        return ModelInfo(
            precision=self.first,
            model_type=self.config.get("model_type", "unknown"),
            name=self.name,
            parameters=self.parameters,
            vocab_size=vocab_size,
            max_length=self.limit,
            hard_limit=bool(self._tables()),
            layers=tuple((heads, dim) for heads, dim in rewritten.layers),
        )

    def report(self) -> dict[str, Any]:
        rewritten = self.rewritten
        return {
            "folder": {
                "graph": self.choice.graph.name,
                "precision": self.choice.name,
                "attention": sorted(set(rewritten.kinds)),
                "windows": rewritten.windows,
                "half_precision_became_single": rewritten.halves,
                "proof": "logits and greedy text are compared with the folder's own graph, which "
                "ran by itself, a row at a time, with a past that grows; this one ran through "
                "fastgen's engine, rows of all lengths together",
                "tolerance": asdict(self.tolerance),
                "notes": self._notes(),
            }
        }

    def _notes(self) -> list[str]:
        """Notes for the user: the promise is to equal the folder, right or wrong."""
        notes = []
        if self.tolerance is SHARED:
            notes.append(
                f"{self.choice.graph.name} has one scale for the activations of all rows and "
                "tokens of a step: what a row says depends on its neighbours, by some percent. "
                "Prefer another precision"
            )
        windows = {window for window in self.rewritten.windows if window is not None}
        used = self.config.get("use_sliding_window", True)
        window = self._said("sliding_window", "window_size") if used else None
        if window is not None and window < (self.limit or window + 1) and windows != {window}:
            has = f"one of {min(windows)}" if windows else "none"
            notes.append(f"config.json has a window of {window} tokens, the folder's graph {has}")
        if windows and window is None:
            notes.append(f"the folder's graph has a window of {min(windows)}, config.json none")
        cap = self.config.get("attn_logit_softcapping")
        capped = any(
            node.op_type == "GroupQueryAttention" and node.attributes.get_float("softcap", 0.0)
            for node in self.rewritten.model.graph
        )
        if cap and not capped:
            notes.append(f"config.json caps scores at {cap}, the folder's graph does not")
        return notes

    def versions(self) -> dict[str, str]:
        return {"onnx": onnx.__version__, "onnx_ir": ir.__version__}

    def write_configuration(self, to: Path) -> None:
        jsonfile.write(to / CONFIG, self.config)
        jsonfile.write(to / GENERATION_CONFIG, self.choice.defaults)
        if self.tokenizer is not None:
            vocabulary.write(self.choice.folder, to)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors with the name of the folder before them."""
    try:
        yield
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{name} cannot be exported: {error}") from error


def _offset(index: ir.Value | None) -> int | None:
    """The number added to positions before they are looked up; None for other indices."""
    offset = 0
    while index is not None:
        if index.name == POSITIONS:
            return offset
        node = index.producer()
        if node is None or node.op_type not in ("Add", "Cast", "Unsqueeze", "Reshape"):
            return None
        if node.op_type == "Add":
            constants = [constant(value) for value in node.inputs]
            added = next((array for array in constants if array is not None), None)
            if added is None:
                return None
            offset += int(np.asarray(added).reshape(-1)[0])
            index = next(
                v for v, array in zip(node.inputs, constants, strict=True) if array is None
            )
        else:
            index = node.inputs[0]
    return None


def _parameters(graph: ir.Graph) -> int:
    """Numbers of the matrices and tables, quantised ones counted as what they stand for."""
    sizes = {
        name: int(np.prod(value.const_value.shape.numpy()))
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.dtype.is_floating_point()
    }
    total = 0
    for node in graph:
        if node.op_type == "MatMulNBits":
            total += node.attributes.get_int("K", 0) * node.attributes.get_int("N", 0)
            for value in node.inputs[1:4]:
                sizes.pop(str(value.name), None) if value is not None else None
        elif node.op_type == "MatMulInteger":
            weight = node.inputs[1]
            if weight is not None and weight.const_value is not None:
                total += int(np.prod(weight.const_value.shape.numpy()))
    return total + sum(sizes.values())
