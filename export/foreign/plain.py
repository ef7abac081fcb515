"""A graph as others run it: one row, a growing past, by `session.run`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from fastgen.export.foreign.signature import LOGITS, Signature
from fastgen.export.unsupported import UnsupportedModel
from numpy.typing import NDArray

STEPS = 8  # last tokens of a row that are fed one at a time, as the engine is fed


class Plain:
    """The folder's own graph, as it is.

    Args:
        path: of the graph.
        files: what lies beside it that it reads.
        signature: what it takes.
    """

    def __init__(self, path: Path, files: Sequence[Path], signature: Signature) -> None:
        self.signature = signature
        with beside([path, *files]) as place:
            self.session = open_graph(place / path.name)

    def logits(self, row: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [length, vocab] of a row: most of it at once, its last tokens one by one."""
        head = max(1, len(row) - STEPS)
        first, past = self._step(row[:head], self.signature.nothing(1))
        parts = [first]
        for token in row[head:]:
            more, past = self._step(np.array([token]), past)
            parts.append(more)
        whole = np.concatenate(parts)
        if len(whole) == len(row):
            return whole
        # Logits of the last position only: each token in a step of its own.
        parts, past = [], self.signature.nothing(1)
        for token in row:
            more, past = self._step(np.array([token]), past)
            parts.append(more)
        return np.concatenate(parts)

    def continuation(self, row: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """The likeliest tokens after a row, one by one."""
        found: list[int] = []
        logits, past = self._step(row, self.signature.nothing(1))
        while True:
            found.append(int(logits[-1].argmax()))
            if len(found) == count:
                return np.array(found, np.int64)
            logits, past = self._step(np.array(found[-1:]), past)

    def _step(
        self, ids: NDArray[np.int64], past: list[NDArray[Any]]
    ) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
        names = [LOGITS, *self.signature.present]
        logits, *present = self.session.run(names, self.signature.feeds(ids[None], past))
        return logits[0].astype(np.float32), present


@contextmanager
def beside(files: Sequence[Path]) -> Iterator[Path]:
    """A directory in which the files lie together under their own names.

    onnxruntime reads weights beside their graph only, and follows no link out of there; the hub's
    cache is made of links. A hard link costs nothing; across file systems it is a copy.
    """
    if not any(path.is_symlink() for path in files) and len({p.parent for p in files}) == 1:
        yield files[0].parent
        return
    with tempfile.TemporaryDirectory(prefix="fastgen-") as place:
        for path in files:
            link_or_copy(path, Path(place) / path.name)
        yield Path(place)


def link_or_copy(source: Path, to: Path) -> None:
    """Another name of a file, or a copy of it where file systems do not allow that."""
    real = source.resolve()
    try:
        os.link(real, to)
    except OSError:
        shutil.copyfile(real, to)


def open_graph(path: Path) -> Any:
    """A session of a graph of others.

    Raises:
        UnsupportedModel: onnxruntime cannot run it on a CPU.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=False
        )
    except Exception as error:  # onnxruntime raises classes of its own, derived from Exception
        said = str(error).strip().splitlines()[-1]
        raise UnsupportedModel(f"onnxruntime cannot run {path.name} on a CPU: {said}") from error


def observe(
    model: ir.Model,
    values: Sequence[ir.Value],
    feeds: Sequence[dict[str, NDArray[Any]]],
    most: int = 1 << 22,
) -> list[dict[str, NDArray[Any] | tuple[int, ...]]]:
    """What some values of a graph are when it is fed so: arrays, or shapes of large ones.

    Raises:
        UnsupportedModel: it does not run; the message names what failed.
    """
    names = list(dict.fromkeys(str(v.name) for v in (*model.graph.outputs, *values)))
    model = model.clone()  # whose outputs can become others; weights are shared
    graph = model.graph
    by_name = {str(value.name): value for node in graph for value in node.outputs}
    given = {str(value.name) for value in graph.outputs}
    graph.outputs.extend(by_name[name] for name in names if name not in given)
    with tempfile.TemporaryDirectory(prefix="fastgen-") as place:
        path = Path(place) / "observed.onnx"
        if _lazy(graph) < 1 << 30:
            _bring(graph, Path(place))
            ir.save(model, path)
        else:
            ir.save(model, path, external_data="observed.data")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            taken = {value.name for value in session.get_inputs()}
            found = []
            for fed in feeds:
                fed = {name: array for name, array in fed.items() if name in taken}
                arrays = session.run(names, fed)
                found.append({
                    name: array if array.size <= most else array.shape
                    for name, array in zip(names, arrays, strict=True)
                })  # fmt: skip
        except Exception as error:  # onnxruntime raises classes of its own, derived from Exception
            said = str(error).strip().splitlines()[-1]
            raise UnsupportedModel(f"its graph does not run: {said}") from error
    return found


def _lazy(graph: ir.Graph) -> int:
    """Bytes of weights that are in no file, or are made when they are read."""
    tensors = [value.const_value for value in graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor))


def _bring(graph: ir.Graph, place: Path) -> None:
    """Weights that lie in files are read from links to them in `place`."""
    names: dict[str, str] = {}
    for value in graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.path not in names:
            names[tensor.path] = f"weights.{len(names)}"
            link_or_copy(Path(tensor.path), place / names[tensor.path])
        value.const_value = ir.ExternalTensor(
            names[tensor.path], tensor.offset, tensor.length, tensor.dtype,
            shape=tensor.shape, name=tensor.name, base_dir=place,
        )  # fmt: skip
