"""What flows through a graph on real text, and what quantising a product does to its output."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from fastgen.export.quantize import (
    Choice,
    Floats,
    Kernel,
    Product,
    block_codes,
    block_scales,
    channel_codes,
    codes_values,
)
from numpy.typing import NDArray
from tokenizers import Tokenizer

TEXT = Path(__file__).with_name("held_out.txt")  # documentation that the demo model has not seen
ROW = 128  # tokens of a row
TOKENS = 2048  # of calibration, at most
SHARE = 0.4  # of the weights in float32: activations that are held at a time
LEAST_BYTES = 64 << 20  # so much is held at any rate


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


def activations(
    model: ir.Model, products: Sequence[Product], rows: Sequence[NDArray[np.int64]]
) -> Iterator[dict[ir.Value, Floats]]:
    """float32 [tokens, in] of each distinct input of `products`, on `rows`, a few inputs at a time.

    See `values`.
    """
    inputs = dict.fromkeys(product.node.inputs[0] for product in products)
    weights = sum(product.weight.nbytes for product in products)
    return values(model, [(value,) for value in inputs], rows, weights)


def values(
    model: ir.Model,
    groups: Sequence[Sequence[ir.Value]],
    rows: Sequence[NDArray[np.int64]],
    weights: int,
) -> Iterator[dict[ir.Value, Floats]]:
    """float32 [tokens, size] of the values of a graph, on `rows`, a few groups at a time.

    The graph runs with these values as further outputs, one row at a time, and once for every
    part of them: together they can be larger than the model. What is yielded is the caller's to
    drop before the next part.

    Args:
        groups: values that are wanted at the same time.
        weights: bytes of the matrices that are quantised.
    """
    tokens = sum(map(len, rows))
    most = max(LEAST_BYTES, int(SHARE * weights))
    sizes = [sum(4 * tokens * _width(value) for value in group) for group in groups]
    with running(model, [value for group in groups for value in group]) as session:
        for part in parts(groups, sizes, most):
            wanted = [value for group in part for value in group]
            names = [str(value.name) for value in wanted]
            seen: dict[ir.Value, Floats] = {
                value: np.empty((tokens, _width(value)), np.float32) for value in wanted
            }
            at = 0
            for row in rows:
                for array, out in zip(session.run(names, feeds(session, row)), seen.values(),
                                      strict=True):  # fmt: skip
                    out[at : at + len(row)] = array.reshape(-1, array.shape[-1])
                at += len(row)
            yield seen


def parts(groups: Sequence[Any], sizes: Sequence[int], most: int) -> Iterator[list[Any]]:
    """Neighbours of `groups` whose sizes add up to `most` at most; each has one at least."""
    part: list[Any] = []
    size = 0
    for group, more in zip(groups, sizes, strict=True):
        if part and size + more > most:
            yield part
            part, size = [], 0
        part.append(group)
        size += more
    if part:
        yield part


def _width(value: ir.Value) -> int:
    width = None if value.shape is None else value.shape[-1]
    assert isinstance(width, int)
    return width


@contextmanager
def running(
    model: ir.Model, values: Sequence[ir.Value] = ()
) -> Iterator[onnxruntime.InferenceSession]:
    """A session of the graph, with `values` as further outputs."""
    graph = model.graph
    outputs = list(graph.outputs)
    with tempfile.TemporaryDirectory() as directory:
        graph.outputs.extend(values)
        try:
            path = Path(directory) / "model.onnx"
            ir.save(model, path, external_data="model.onnx.data")
        finally:
            del graph.outputs[len(outputs) :]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Weights stay in the file that is mapped: no packed copy of them beside torch's.
        options.add_session_config_entry("session.disable_prepacking", "1")
        yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


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
    }
    wanted = {value.name: value for value in session.get_inputs()}
    past = {
        name: np.zeros(
            (1, value.shape[1], count, value.shape[3]),
            np.int8 if value.type == "tensor(int8)" else np.float32,
        )
        for name, value in wanted.items()
        if name.startswith("past_key_values")
    }
    past |= {
        name: np.zeros((1, *value.shape[1:]), np.float32)
        for name, value in wanted.items()
        if name.startswith("past_state")
    }
    return {name: array for name, array in fed.items() if name in wanted} | past


def output_error(x: Floats, weight: Floats, choice: Choice) -> float:
    """|x W - x' W'| / |x W| of a quantised product, activations quantised as the kernel does."""
    exact = x @ weight
    approximate = quantized_input(x, choice.kernel) @ stored(weight, choice)
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(exact - approximate)) / norm if norm else 0.0


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
        return codes * per_channel
    scales = block_scales(weight, kernel) if choice.scales is None else choice.scales
    codes = block_codes(weight, kernel, scales) if choice.codes is None else choice.codes
    return codes_values(codes, kernel, scales, len(weight))
