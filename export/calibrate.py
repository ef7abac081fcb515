"""What flows through a graph on real text, and what quantising a product does to its output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from fastgen.export import bundle
from fastgen.export.quantize import (
    Choice,
    Floats,
    Kernel,
    Product,
    block_codes,
    block_scales,
    channel_codes,
    codes_values,
    multiplied,
)
from numpy.typing import NDArray
from tokenizers import Tokenizer

TEXT = Path(__file__).with_name("held_out.txt")  # documentation that the demo model has not seen
ROW = 128  # tokens of a row
TOKENS = 2048  # of calibration, at most


def rows_of_text(
    text: str, tokenizer: Tokenizer | None, vocab_size: int, limit: int | None
) -> list[NDArray[np.int64]]:
    """int64 rows of ROW tokens (or what the model takes); random ids without a tokenizer."""
    length = min(ROW, limit or ROW)
    if tokenizer is None:
        return list(np.random.default_rng(0).integers(0, vocab_size, (2 * TOKENS // ROW, length)))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    ids = ids[ids < vocab_size]
    rows = [ids[i : i + length] for i in range(0, len(ids), length)]
    return [row for row in rows if len(row) > 1]


def halves(rows: Sequence[NDArray[np.int64]]) -> tuple[list[NDArray[np.int64]], ...]:
    """Rows to calibrate on, and others to evaluate on, in turn: both see the whole text."""
    return list(rows[0::2]), list(rows[1::2])


@contextmanager
def activations(
    model: ir.Model, products: Sequence[Product], rows: Sequence[NDArray[np.int64]]
) -> Iterator[dict[ir.Value, Floats]]:
    """float32 [tokens, in] of each distinct input of `products`, on `rows`. See `values`."""
    with values(model, [product.node.inputs[0] for product in products], rows) as seen:
        yield seen


@contextmanager
def values(
    model: ir.Model, wanted: Sequence[ir.Value], rows: Sequence[NDArray[np.int64]]
) -> Iterator[dict[ir.Value, Floats]]:
    """float32 [tokens, size] of some values of a graph, on `rows`.

    The graph runs once, a row at a time. What is seen can be larger than the model: it goes to a
    file, where it takes no memory that the system could not have back.
    """
    wanted = list(dict.fromkeys(wanted))
    tokens = sum(map(len, rows))
    with place(model) as directory, _spool(directory, tokens, wanted) as seen:
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
        binding = session.io_binding()
        for name, array in feeds(session, row).items():
            binding.bind_cpu_input(name, array)
        for value, out in seen.items():  # they are written where they stay
            assert value.shape is not None
            shape = [*[1] * (len(value.shape) - 2), len(row), out.shape[1]]
            place = out[at:].ctypes.data
            binding.bind_output(str(value.name), "cpu", 0, np.float32, shape, place)
        session.run_with_iobinding(binding)
        at += len(row)


@contextmanager
def _spool(
    directory: Path, tokens: int, wanted: Sequence[ir.Value]
) -> Iterator[dict[ir.Value, Floats]]:
    """Arrays [tokens, size] in a file that nobody else sees and that goes with them."""
    sizes = [tokens * _width(value) for value in wanted]
    with tempfile.TemporaryFile(dir=directory) as file:
        held = np.asarray(np.memmap(file, np.float32, "w+", shape=(max(1, sum(sizes)),)))
        ends = np.cumsum([0, *sizes])
        yield {
            value: held[start : start + size].reshape(tokens, -1)
            for value, start, size in zip(wanted, ends, sizes, strict=False)
        }


def _width(value: ir.Value) -> int:
    width = None if value.shape is None else value.shape[-1]
    assert isinstance(width, int)
    return width


@contextmanager
def place(model: ir.Model) -> Iterator[Path]:
    """The directory of the file that a graph's weights are in, or a temporary one."""
    found = {_directory(tensor) for tensor in _large(model)}
    if len(found) == 1 and None not in found:
        yield found.pop() or Path()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _large(model: ir.Model) -> list[ir.TensorProtocol]:
    """Constants that no graph holds itself."""
    held = [value.const_value for value in model.graph.initializers.values()]
    return [one for one in held if one is not None and one.nbytes > bundle.INLINE]


def _directory(tensor: ir.TensorProtocol) -> Path | None:
    return Path(tensor.base_dir) if isinstance(tensor, ir.ExternalTensor) else None


def running(model: ir.Model, names: Sequence[str], directory: Path) -> onnxruntime.InferenceSession:
    """A session of the part of the graph that gives the values of these names, and no other.

    Args:
        directory: see `place`.
    """
    part = model.clone()
    made = {value.name: value for node in part.graph for value in node.outputs}
    part.graph.outputs[:] = [made[name] for name in names]
    ir.passes.common.RemoveUnusedNodesPass()(part)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weights stay in the file that is mapped: no packed copy of them.
    options.add_session_config_entry("session.disable_prepacking", "1")
    path = directory / "calibration.onnx"
    try:
        there = all(_directory(tensor) == directory for tensor in _large(part))
        ir.save(part, path, external_data=None if there else f"{path.name}.data")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    finally:
        path.unlink(missing_ok=True)


def feeds(
    session: onnxruntime.InferenceSession, row: NDArray[np.int64], start: int = 0
) -> dict[str, object]:
    """One row from scratch whose first token is at position `start`, logits wanted everywhere."""
    count = len(row)
    fed = {
        "input_ids": row[None],
        "position_ids": np.arange(start, start + count)[None],
        "query_seqlens": np.array([count], np.int32),
        "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32),
        "logits_positions": np.arange(count)[None],
        "reads_prompt": np.array(True),
    }
    wanted = {value.name: value for value in session.get_inputs()}
    past = {
        name: np.zeros(
            (1, value.shape[1], count, value.shape[3]),
            np.int8 if value.type == "tensor(int8)" else np.float32,
        )
        for name, value in wanted.items()
        if name.startswith(("past_key_values", "prompt_key_values"))
    }
    past |= {name: np.array(0, np.int32) for name in wanted if name.startswith("window_start")}
    past |= {
        name: np.zeros((1, *value.shape[1:]), np.float32)
        for name, value in wanted.items()
        if name.startswith("past_state")
    }
    return {name: array for name, array in fed.items() if name in wanted} | past


def output_error(x: Floats, weight: Floats, choice: Choice, exact: Floats | None = None) -> float:
    """|x W - x' W'| / |x W| of a quantised product, activations quantised as the kernel does.

    Args:
        x: float32 [tokens, in].
        weight: float32 [in, out].
        exact: x W, where it is known.
    """
    exact = x @ weight if exact is None else exact
    approximate = quantized_input(x, choice.kernel) @ stored(weight, choice)
    norm = float(np.linalg.norm(exact))
    approximate -= exact
    return float(np.linalg.norm(approximate)) / norm if norm else 0.0


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
        codes, per_channel = channel_codes(weight)
        return multiplied(codes, per_channel)
    scales = block_scales(weight, kernel) if choice.scales is None else choice.scales
    codes = block_codes(weight, kernel, scales) if choice.codes is None else choice.codes
    return codes_values(codes, kernel, scales, len(weight))
