"""The values that flow through a graph on real text, and the error of a quantised product."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

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
from fastgen.export.rewrite import onnx_file
from fastgen.store.graph_io import READS_PROMPT, TensorSpec, fed_tokens

ROW = 128  # tokens of a row, about
TOKENS = 2048  # of calibration, at most
ALIGNED = 4096  # bytes: where an array begins in a file
SAMPLE = 512  # tokens of an input that are kept as they are, about


@dataclass
class Input:
    """The input of a product, on the calibration text.

    Attributes:
        sample: float32 [tokens, in], some of the tokens.
        moments: float32 [in, in], E[x^T x] of all.
    """

    sample: Floats
    moments: Floats

    def divide(self, scales: Floats) -> None:
        """Have each channel divided by its scale [in]."""
        self.sample /= scales
        self.moments /= scales
        self.moments /= scales[:, None]


@contextmanager
def inputs(
    model: ir.Model, products: Sequence[Product], rows: Sequence[NDArray[np.int64]]
) -> Iterator[dict[ir.Value, Input]]:
    """Give each distinct input of `products` on `rows`, in files as `values` does."""
    wanted = list(dict.fromkeys(product.input for product in products))
    widths = [_width(value) for value in wanted]
    longest = max(map(len, rows))
    every = max(1, sum(map(len, rows)) // SAMPLE)
    kept = sum(len(row[::every]) for row in rows)
    with (
        weights_directory(model) as directory,
        _spool(directory, longest, wanted) as seen,
        _spool(directory, kept, wanted) as samples,
        _spooled(directory, [(width, width) for width in widths]) as squares,
    ):
        session = running(model, [str(value.name) for value in wanted], directory)
        at = 0
        for row in rows:
            _step(session, row, seen, 0)
            some = len(row[::every])
            for i, value in enumerate(wanted):
                x = seen[value][: len(row)]
                samples[value][at : at + some] = x[::every]
                squares[i] += x.T @ x
            at += some
        del session  # and what memory its steps took
        total = np.float32(sum(map(len, rows)))
        for square in squares:
            square /= total
        yield {value: Input(samples[value], squares[i]) for i, value in enumerate(wanted)}


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
        _step(session, row, seen, at)
        at += len(row)


def _step(
    session: onnxruntime.InferenceSession,
    row: NDArray[np.int64],
    seen: dict[ir.Value, Floats],
    at: int,
) -> None:
    """Run a row; what is seen of it is written where it stays, from the token `at` on."""
    binding = session.io_binding()
    for name, array in feeds(session, row).items():
        binding.bind_cpu_input(name, array)
    for value, out in seen.items():
        assert value.shape is not None
        shape = [*[1] * (len(value.shape) - 2), len(row), out.shape[1]]
        address = out[at:].ctypes.data
        binding.bind_output(str(value.name), "cpu", 0, np.float32, shape, address)
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


@contextmanager
def shelf(directory: Path) -> Iterator[Callable[[NDArray[Any]], NDArray[Any]]]:
    """Give a function that puts an array into an unnamed file and gives it back from there."""
    with tempfile.TemporaryFile(dir=directory) as file:

        def kept(array: NDArray[Any]) -> NDArray[Any]:
            start = file.seek(-(-file.seek(0, os.SEEK_END) // ALIGNED) * ALIGNED)
            file.write(np.ascontiguousarray(array).data.cast("B"))
            file.flush()
            return np.asarray(np.memmap(file, array.dtype, "r", start, array.shape))

        yield kept


def _width(value: ir.Value) -> int:
    width = None if value.shape is None else value.shape[-1]
    assert isinstance(width, int)
    return width


def logits(model: ir.Model, rows: Sequence[NDArray[np.int64]], directory: Path) -> Iterator[Floats]:
    """Logits of rows: float32 [length, vocab] of each, one at a time. See `running`."""
    session = running(model, ["logits"], directory)
    for row in rows:
        yield session.run(["logits"], feeds(session, row))[0][0]


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


def running(model: ir.Model, names: Sequence[str], directory: Path) -> onnxruntime.InferenceSession:
    """A session of the part of the graph that gives the values of these names, and no other.

    Args:
        directory: see `weights_directory`.
    """
    part = model.clone()
    by_name = {value.name: value for node in part.graph for value in node.outputs}
    part.graph.outputs[:] = [by_name[name] for name in names]
    ir.passes.common.RemoveUnusedNodesPass()(part)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weights stay in the file that is mapped: no packed copy of them.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(dir=directory) as own:
        path, data = directory / "calibration.onnx", Path(own) / "more.data"
        try:
            _spill(part, directory, data)
            ir.save(part, path)
            return onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        finally:
            path.unlink(missing_ok=True)


def _spill(model: ir.Model, directory: Path, data: Path) -> None:
    """Write large constants that are in no file of `directory` to one below it, `data`."""
    with data.open("wb") as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= onnx_file.INLINE:
                continue
            if _directory(tensor) == directory:
                continue
            file.seek(-(-file.tell() // ALIGNED) * ALIGNED)
            start = file.tell()
            file.write(np.ascontiguousarray(tensor.numpy()).data.cast("B"))
            value.const_value = ir.ExternalTensor(
                data.relative_to(directory),
                start,
                file.tell() - start,
                tensor.dtype,
                name=str(value.name),
                shape=ir.Shape(tensor.shape.numpy()),
                base_dir=directory,
            )


def feeds(
    session: onnxruntime.InferenceSession, row: NDArray[np.int64], start: int = 0
) -> dict[str, NDArray[Any]]:
    """Inputs of one row from scratch, its first token at position `start`, for all its logits."""
    count = len(row)
    fed = fed_tokens(row[None], np.arange(count)[None]) | {READS_PROMPT.name: np.array(True)}
    fed["position_ids"] += start
    sizes = {"rows": 1, "capacity": count, "prompt_rows": 1, "prompt_capacity": count}
    specs = [
        TensorSpec.declared(declared.name, declared.type, declared.shape)
        for declared in session.get_inputs()
    ]
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
