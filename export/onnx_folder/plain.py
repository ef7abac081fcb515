"""A graph as others run it: one row, a growing past, by `session.run`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel
from fastgen.export.onnx_folder.signature import LOGITS, Signature
from fastgen.export.source.origin import NOTHING

# onnxruntime's: where the weights of a graph lie that does not come from a file.
PLACE = "session.model_external_initializers_file_folder_path"
LARGEST = 1 << 30  # bytes of weights within a graph; a file of protobuf has 2 GB at most
# Operators that take one scale for all tokens of a step.
QUANTISED_TOGETHER = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}


class Plain:
    """The folder's own graph, as it is.

    Args:
        path: of the graph.
        files: what lies beside it that it reads.
        signature: what it takes.
    """

    def __init__(self, path: Path, files: Sequence[Path], signature: Signature) -> None:
        self.signature = signature
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        model = ir.load(path)
        self.operators = {node.op_type for node in model.graph.all_nodes()}
        changed = any(file.is_symlink() or file.parent != path.parent for file in (path, *files))
        for node in model.graph:
            # A ring keeps as many tokens as a window has; a past that grows has them as well.
            changed |= node.attributes.pop("sliding_window_cache", None) is not None
        try:
            self.session = open_graph(model if changed else path, options)
        except Exception as error:  # onnxruntime raises classes of its own, derived from Exception
            message = str(error).strip().splitlines()[-1]
            raise UnsupportedModel(
                f"onnxruntime cannot run {path.name} on a CPU: {message}"
            ) from error

    def logits(
        self, row: NDArray[np.int64], then: NDArray[np.int64] = NOTHING
    ) -> NDArray[np.float32]:
        """float32 [length, vocab] of a row, at once, and of tokens that follow it, one by one, as
        the engine is fed: kernels of few bits round one token otherwise than several.
        """
        head = len(row) if self.masks else 1
        logits, past = self._step(row[:head], self.signature.nothing(1))
        if len(logits) < head:  # of the last position only
            head = 1
            logits, past = self._step(row[:1], self.signature.nothing(1))
        parts = [logits]
        for token in [*row[head:], *then]:
            logits, past = self._step(np.array([token]), past)
            parts.append(logits)
        return np.concatenate(parts)

    def continuation(self, row: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """The likeliest tokens after a row, one by one."""
        tokens: list[int] = []
        head = len(row) if self.masks else 1
        logits, past = self._step(row[:head], self.signature.nothing(1))
        for token in row[head:]:
            logits, past = self._step(np.array([token]), past)
        while True:
            tokens.append(int(logits[-1].argmax()))
            if len(tokens) == count:
                return np.array(tokens, np.int64)
            logits, past = self._step(np.array(tokens[-1:]), past)

    @cached_property
    def masks(self) -> bool:
        """Tell if a token does not see later ones that are fed with it.

        A graph that was made for one token after a past (decoder_with_past_model) may let it.
        """
        if self.operators & QUANTISED_TOGETHER:
            return True  # a token's logits depend on all others, and no mask could be told
        nothing = self.signature.nothing(1)
        logits = [self._step(np.array(ids), nothing)[0] for ids in ([0, 1, 2], [0, 3, 4])]
        return len(logits[0]) < 3 or np.allclose(logits[0][0], logits[1][0], 1e-2, 1e-3)

    def _step(
        self, ids: NDArray[np.int64], past: list[NDArray[Any]]
    ) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
        names = [LOGITS, *self.signature.present]
        logits, *present = self.session.run(names, self.signature.feeds(ids[None], past))
        return logits[0].astype(np.float32), present


def open_graph(graph: ir.Model | Path, options: Any) -> Any:
    """A session of a graph. Its weights are read from where they lie.

    onnxruntime follows no link out of a graph's directory, and the hub's cache is made of links:
    so it is told the directory that they lead to. Where they lie in several, they are linked into
    one, and copied where file systems do not allow that.

    Args:
        graph: a file; or a graph whose weights come to be named otherwise.
    """
    with ExitStack() as stack:
        source: str | bytes = str(graph)
        if isinstance(graph, ir.Model) and _inline(graph.graph) < LARGEST:
            source, directory = _gathered(graph, stack)
            options.add_session_config_entry(PLACE, directory)
        elif isinstance(graph, ir.Model):
            source = str(Path(_temporary(stack)) / "graph.onnx")
            ir.save(graph, source, external_data="graph.onnx.data")
        return onnxruntime.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], enable_fallback=False
        )


def _temporary(stack: ExitStack) -> str:
    return stack.enter_context(tempfile.TemporaryDirectory(prefix="fastgen-"))


def _inline(graph: ir.Graph) -> int:
    """Bytes of weights that are in no file, or are made when they are read."""
    tensors = [value.const_value for value in graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor))


def _gathered(model: ir.Model, stack: ExitStack) -> tuple[bytes, str]:
    """A graph as bytes, and the directory in which it finds its weights."""
    held = [
        (value, tensor)
        for graph in (model.graph, *model.graph.subgraphs())
        for value in graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    ]
    files = {tensor.path: Path(os.path.realpath(tensor.path)) for _, tensor in held}
    directories = {file.parent for file in files.values()}
    if len(directories) == 1:
        directory = str(*directories)
        names = {path: file.name for path, file in files.items()}
    else:
        directory = _temporary(stack)
        names = {path: f"weights.{number}" for number, path in enumerate(files)}
        for path, name in names.items():
            link_or_copy(files[path], Path(directory) / name)
    for value, tensor in held:
        value.const_value = ir.ExternalTensor(
            names[tensor.path],
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or str(value.name),
            base_dir=directory,
        )
    return ir.to_proto(model).SerializeToString(), directory


def link_or_copy(source: Path, to: Path) -> None:
    """Another name of a file, or a copy of it where file systems do not allow that."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)


def observe(
    model: ir.Model,
    values: Sequence[ir.Value],
    feeds: Sequence[dict[str, NDArray[Any]]],
    most: int = 1 << 22,
) -> list[dict[str, NDArray[Any] | tuple[int, ...]]]:
    """Run a graph and give some of its values: arrays, or shapes of large ones.

    Raises:
        UnsupportedModel: it does not run; the message names what failed.
    """
    names = list(dict.fromkeys(str(v.name) for v in (*model.graph.outputs, *values)))
    model = model.clone()  # whose outputs can become others; weights are shared
    graph = model.graph
    by_name = {str(value.name): value for node in graph for value in node.outputs}
    given = {str(value.name) for value in graph.outputs}
    graph.outputs.extend(by_name[name] for name in names if name not in given)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    observed = []
    try:
        session = open_graph(model, options)
        taken = {value.name for value in session.get_inputs()}
        for fed in feeds:
            arrays = session.run(names, {name: fed[name] for name in fed if name in taken})
            observed.append(
                {
                    name: array if array.size <= most else array.shape
                    for name, array in zip(names, arrays, strict=True)
                }
            )
    except Exception as error:  # onnxruntime raises classes of its own, derived from Exception
        message = str(error).strip().splitlines()[-1]
        raise UnsupportedModel(f"its graph does not run: {message}") from error
    return observed
