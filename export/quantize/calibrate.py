"""The values that flow through a graph on real text, and the error of a quantised product."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import DTypeLike, NDArray

from fastgen.export.quantize import rotation
from fastgen.export.quantize.kernels import (
    Choice,
    Floats,
    Kernel,
    Product,
    block_codes,
    block_scales,
    channel_codes,
    codes_values,
    multiplied,
    turned_matrix,
)
from fastgen.export.quantize.parts import side_by_side
from fastgen.export.rewrite import onnx_file
from fastgen.store.graph_io import READS_PROMPT, Declared, TensorSpec, fed_tokens

ROW = 128  # tokens of a row, about
TOKENS = 2048  # of calibration, at most
LOGITS = "logits"
ALIGNED = 4096  # bytes: where an array begins in a file
TOGETHER = 512  # tokens whose moments are made by one product, where these are added up
SAMPLE = 512  # tokens of an input that are kept as they are, about
DAMPING = (0.01, 1.0)  # of moments: least and most


@dataclass
class Input:
    """The input of a product, on the calibration text.

    Attributes:
        sample: float32 [tokens, in], some of the tokens.
        every: float32 [tokens, in], all of them; None where their squares are kept.
        squares: float32 [in, in], E[x^T x] of all; None where these are kept.
        tokens: of all.
    """

    sample: Floats
    every: Floats | None
    squares: Floats | None
    tokens: int

    @property
    def moments(self) -> Floats:
        """float32 [in, in], E[x^T x] of all."""
        if self.squares is not None:
            return self.squares
        assert self.every is not None
        squares: Floats = self.every.T @ self.every
        squares /= np.float32(self.tokens)
        return squares

    def divide(self, scales: Floats) -> None:
        """Have each channel divided by its scale [in]."""
        for held in (self.sample, self.every, self.squares):
            if held is not None:
                held /= scales
        if self.squares is not None:
            self.squares /= scales[:, None]


@dataclass(frozen=True)
class Batch:
    """Rows that go through a graph together, right-padded.

    Attributes:
        ids: int64 [rows, new].
        counts: int64 [rows], how many of them are real.
    """

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[NDArray[np.int64]]) -> Batch:
        counts = np.array([len(row) for row in rows])
        ids = np.zeros((len(rows), counts.max()), np.int64)
        for padded, row in zip(ids, rows, strict=True):
            padded[: len(row)] = row
        return cls(ids, counts)

    def real(self, array: Floats) -> Floats:
        """[tokens, size] of what a graph made of the batch, [rows, new, size]: no padding."""
        flat = array.reshape(self.ids.size, -1)
        there = np.arange(self.ids.shape[1]) < self.counts[:, None]
        return flat if there.all() else flat[there.reshape(-1)]


def batches(rows: Sequence[NDArray[np.int64]], tokens: int) -> list[Batch]:
    """Rows of about the same length together, so many tokens at most or one row: longest first."""
    found: list[list[NDArray[np.int64]]] = []
    for row in sorted(rows, key=len, reverse=True):
        if not found or (len(found[-1]) + 1) * len(found[-1][0]) > tokens:
            found.append([])
        found[-1].append(row)
    return [Batch.of(some) for some in found]


def damping(size: int, tokens: int) -> float:
    """Of the moments of `size` inputs (see `gptq.factor`): what they owe to chance, about."""
    return float(np.clip(2 * size / tokens, *DAMPING))


@contextmanager
def inputs(
    model: ir.Model, products: Sequence[Product], rows: Sequence[NDArray[np.int64]]
) -> Iterator[dict[ir.Value, Input]]:
    """Give each distinct input of `products` on `rows`, in files as `values` does.

    Of a wide input all tokens are kept, which are less than their squares, else those.
    """
    wanted = list(dict.fromkeys(product.input for product in products))
    total, every = sum(map(len, rows)), max(1, sum(map(len, rows)) // SAMPLE)
    sampled = sum(len(row[::every]) for row in rows)
    together = list(_together(rows))
    longest = max(sum(map(len, some)) for some in together)
    wide = [value for value in wanted if total <= _width(value)]
    others = [value for value in wanted if value not in wide]
    with (
        weights_directory(model) as directory,
        _spool(directory, total, wide) as kept,
        _spool(directory, longest, others) as seen,
        _spool(directory, sampled, wanted) as samples,
        _spooled(directory, [(_width(value), _width(value)) for value in others]) as squares,
    ):
        session = running(model, [str(value.name) for value in wanted], directory)
        at = begin = 0
        for some in together:
            end = 0
            for row in some:
                new = {value: kept[value][begin + end :] for value in wide}
                new |= {value: seen[value][end:] for value in others}
                _step(session, row, new)
                sample = slice(at, at + len(row[::every]))
                for value in wanted:
                    samples[value][sample] = new[value][: len(row) : every]
                at, end = sample.stop, end + len(row)
            begin += end

            def add(pair: tuple[ir.Value, Floats], end: int = end) -> None:
                x = seen[pair[0]][:end]
                pair[1][...] += x.T @ x

            list(side_by_side(add, list(zip(others, squares, strict=True))))
        del session  # and what memory its steps took
        for square in squares:
            square /= np.float32(total)
        of = dict(zip(others, squares, strict=True))
        yield {
            value: Input(samples[value], kept.get(value), of.get(value), total) for value in wanted
        }


def _together(rows: Sequence[NDArray[np.int64]]) -> Iterator[list[NDArray[np.int64]]]:
    """Rows in order, as many as have TOGETHER tokens or one more: their moments are one product."""
    some: list[NDArray[np.int64]] = []
    for row in rows:
        some.append(row)
        if sum(map(len, some)) >= TOGETHER:
            yield some
            some = []
    if some:
        yield some


@contextmanager
def values(
    model: ir.Model, wanted: Sequence[ir.Value], rows: Sequence[NDArray[np.int64]]
) -> Iterator[dict[ir.Value, Floats]]:
    """Give float32 [tokens, size] of some values of a graph, on `rows`.

    The graph runs once, a row at a time. What is seen can be larger than the model: it goes to a
    file, where it takes no memory that the system could not have back.
    """
    wanted = list(dict.fromkeys(wanted))
    tokens = sum(map(len, rows))
    with weights_directory(model) as directory, _spool(directory, tokens, wanted) as seen:
        _run(model, rows, seen, directory)
        yield seen


def _run(
    model: ir.Model,
    rows: Sequence[NDArray[np.int64]],
    seen: dict[ir.Value, Floats],
    directory: Path,
) -> None:
    session = running(model, [str(value.name) for value in seen], directory)
    at = 0
    for row in rows:
        _step(session, row, {value: held[at:] for value, held in seen.items()})
        at += len(row)


def _step(
    session: onnxruntime.InferenceSession,
    row: NDArray[np.int64],
    seen: dict[ir.Value, Floats],
) -> None:
    """Run a row; what is seen of it is written to where it stays, its first token first."""
    binding = session.io_binding()
    for name, array in feeds(declared(session), Batch.of([row])).items():
        binding.bind_cpu_input(name, array)
    for value, out in seen.items():
        assert value.shape is not None
        shape = [*[1] * (len(value.shape) - 2), len(row), out.shape[1]]
        binding.bind_output(str(value.name), "cpu", 0, np.float32, shape, out.ctypes.data)
    session.run_with_iobinding(binding)


@contextmanager
def _spool(
    directory: Path, tokens: int, wanted: Sequence[ir.Value]
) -> Iterator[dict[ir.Value, Floats]]:
    """Give arrays [tokens, size] in an unnamed file that goes with them."""
    shapes = [(tokens, _width(value)) for value in wanted]
    with _spooled(directory, shapes) as held:
        yield dict(zip(wanted, held, strict=True))


@contextmanager
def _spooled(directory: Path, shapes: Sequence[tuple[int, int]]) -> Iterator[list[Floats]]:
    """Give arrays of zeros in an unnamed file that goes with them."""
    ends = np.cumsum([0, *(rows * columns for rows, columns in shapes)])
    with tempfile.TemporaryFile(dir=directory) as file:
        held = np.asarray(np.memmap(file, np.float32, "w+", shape=(max(1, int(ends[-1])),)))
        yield [
            held[start : start + rows * columns].reshape(rows, columns)
            for (rows, columns), start in zip(shapes, ends, strict=False)
        ]


class Shelf:
    """A file that arrays are kept in, where they take no memory that the system could not have
    back.

    Attributes:
        path: of the file; None where it has no name.
    """

    def __init__(self, file: IO[bytes], path: Path | None = None) -> None:
        self.path, self._file = path, file
        self._places: dict[int, tuple[int, int]] = {}  # by address: where it is, and its bytes
        self._growing = threading.Lock()

    def __call__(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same array, in the file."""
        if self.place(array) is not None:
            return array
        room = self.room(array.shape, array.dtype)
        room[...] = array
        return room

    def room(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array of zeros in the file, to be filled."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self._growing:
            start = -(-self._file.seek(0, os.SEEK_END) // ALIGNED) * ALIGNED
            self._file.truncate(start + max(size, 1))
        array = np.asarray(np.memmap(self._file, dtype, "r+", start, tuple(shape)))
        self._places[array.ctypes.data] = start, size
        return array

    def place(self, array: NDArray[Any]) -> tuple[int, int] | None:
        """The place of an array in the file, and its bytes; None for any other."""
        place = self._places.get(array.ctypes.data)
        return place if place is not None and place[1] == array.nbytes else None


@contextmanager
def shelf(directory: Path) -> Iterator[Shelf]:
    """Give a shelf whose file has no name."""
    with tempfile.TemporaryFile(dir=directory) as file:
        yield Shelf(file)


@contextmanager
def named_shelf(directory: Path) -> Iterator[Shelf]:
    """Give a shelf in a folder of its own below `directory`, where graphs can read from it."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        path = Path(folder) / "kept.data"
        with path.open("w+b") as file:
            yield Shelf(file, path)


def _width(value: ir.Value) -> int:
    width = None if value.shape is None else value.shape[-1]
    assert isinstance(width, int)
    return width


def logits(
    model: ir.Model, rows: Sequence[NDArray[np.int64]], directory: Path, kept: Shelf
) -> Iterator[Floats]:
    """Logits of rows: float32 [length, vocab] of each, valid until the next. See `running`."""
    (value,) = [output for output in model.graph.outputs if output.name == LOGITS]
    session = running(model, [LOGITS], directory, kept)
    with _spool(directory, max(map(len, rows)), [value]) as held:
        for row in rows:
            _step(session, row, held)
            yield held[value][: len(row)]


@contextmanager
def weights_directory(model: ir.Model) -> Iterator[Path]:
    """The directory of the file that a graph's weights are in, or a temporary one."""
    directories = {_directory(tensor) for tensor in _large(model)}
    if len(directories) == 1 and None not in directories:
        yield directories.pop() or Path()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _large(model: ir.Model) -> list[ir.TensorProtocol]:
    """Constants that no graph holds itself."""
    held = [value.const_value for value in model.graph.initializers.values()]
    return [tensor for tensor in held if tensor is not None and tensor.nbytes > onnx_file.INLINE]


def _directory(tensor: ir.TensorProtocol) -> Path | None:
    return Path(tensor.base_dir) if isinstance(tensor, ir.ExternalTensor) else None


def running(
    model: ir.Model,
    names: Sequence[str],
    directory: Path,
    kept: Shelf | None = None,
) -> onnxruntime.InferenceSession:
    """A session of the part of the graph that gives the values of these names, and no other.

    Args:
        directory: see `weights_directory`.
        kept: holds codes, below `directory`: then matrices are packed, as the kernels of a model
            that is used have them. Without, its weights stay in the file that is mapped.
    """
    part = model.clone()
    by_name = {value.name: value for node in part.graph for value in node.outputs}
    part.graph.outputs[:] = [by_name[name] for name in names]
    ir.passes.common.RemoveUnusedNodesPass()(part)
    return opened(part, directory, kept)


def opened(
    part: ir.Model, directory: Path, kept: Shelf | None = None
) -> onnxruntime.InferenceSession:
    """A session of a graph, which is changed: see `running`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if kept is None:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.prepack.enable_parallel", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(dir=directory) as own:
        path, data = directory / "calibration.onnx", Path(own) / "more.data"
        try:
            _spill(part, directory, data, kept)
            ir.save(part, path)
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        finally:
            path.unlink(missing_ok=True)


def _spill(model: ir.Model, directory: Path, data: Path, kept: Shelf | None) -> None:
    """Write large constants that are in no file of `directory` to one below it, `data`."""
    with data.open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= onnx_file.INLINE:
                continue
            if _directory(tensor) == directory:
                continue
            array = np.ascontiguousarray(tensor.numpy())
            place = None if kept is None else kept.place(array)
            if kept is None or kept.path is None or place is None:
                path, start = data, file.seek(-(-file.tell() // ALIGNED) * ALIGNED)
                file.write(array.reshape(-1).view(np.uint8).data)
            else:
                path, start = kept.path, place[0]
            value.const_value = ir.ExternalTensor(
                path.relative_to(directory),
                start,
                array.nbytes,
                tensor.dtype,
                name=str(value.name),
                shape=ir.Shape(tensor.shape.numpy()),
                base_dir=directory,
            )


def declared(session: onnxruntime.InferenceSession) -> list[Declared]:
    """The inputs of a session."""
    return [(value.name, value.type, value.shape) for value in session.get_inputs()]


def feeds(inputs: Sequence[Declared], batch: Batch, start: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs of rows from scratch, their first tokens at position `start`, for all logits."""
    rows, new = batch.ids.shape
    every = np.broadcast_to(np.arange(new), batch.ids.shape).copy()
    fed = fed_tokens(batch.ids, every) | {READS_PROMPT.name: np.array(True)}
    fed["query_seqlens"][:] = batch.counts
    fed["seqlens_k"][:] = batch.counts - 1
    np.minimum(every, batch.counts[:, None] - 1, out=fed["position_ids"])
    fed["position_ids"] += start
    sizes = {"rows": rows, "capacity": new, "prompt_rows": rows, "prompt_capacity": new}
    specs = [TensorSpec.declared(*one) for one in inputs]
    nothing = {spec.name: spec.zeros(**sizes) for spec in specs if spec.name not in fed}
    return {spec.name: fed[spec.name] for spec in specs if spec.name in fed} | nothing


def output_error(x: Floats, weight: Floats, choice: Choice, exact: Floats | None = None) -> float:
    """|x W - x' W'| / |x W| of a quantised product, activations quantised as the kernel does.

    It is the root mean square of that of each token: the few that are a hundred times as large as
    others, such as a text's first, count as any.

    Args:
        x: float32 [tokens, in].
        weight: float32 [in, out].
        exact: x W, where it is known.
    """
    exact = x @ weight if exact is None else exact
    if (turned := choice.kernel.turned) > 0:
        x, weight = rotation.turned(x, turned), turned_matrix(turned, False, weight)
    approximate = quantized_input(x, choice.kernel) @ stored(weight, choice)
    approximate -= exact
    sizes = np.einsum("to,to->t", exact, exact)
    there = sizes > 0
    shares = np.einsum("to,to->t", approximate, approximate)[there] / sizes[there]
    return float(np.sqrt(shares.mean())) if len(shares) else 0.0


def quantized_input(x: Floats, kernel: Kernel) -> Floats:
    """x [tokens, in] after quantisation to 8 bits by token (W8A8) or by block of a token."""
    block = kernel.block or x.shape[1]
    width = -(-x.shape[1] // block) * block
    padded = np.zeros((len(x), width), np.float32)
    padded[:, : x.shape[1]] = x
    parts = padded.reshape(len(x), -1, block)
    scale = np.abs(parts).max(axis=-1, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    return np.asarray((np.rint(parts / scale) * scale).reshape(len(x), width)[:, : x.shape[1]])


def stored(weight: Floats, choice: Choice) -> Floats:
    """The matrix [in, out] that the codes of `choice` stand for (smoothing aside)."""
    kernel = choice.kernel
    if kernel.block == 0:
        nearest, per_channel = channel_codes(weight, choice.scales)
        return multiplied(nearest if choice.codes is None else choice.codes, per_channel)
    scales = block_scales(weight, kernel) if choice.scales is None else choice.scales
    codes = choice.codes
    if codes is None:
        codes = block_codes(weight, kernel, scales, choice.zeros)
    return codes_values(codes, kernel, scales, len(weight), choice.zeros)
