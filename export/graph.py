"""A transformers model in, the graph out: names, shapes and what is computed where.

| input | shape | |
|---|---|---|
| `input_ids`, `position_ids` | int64 [rows, new] | new tokens, right-padded |
| `query_seqlens` | int32 [rows] | how many of them are real |
| `seqlens_k` | int32 [rows] | tokens in the cache after this step, less 1 |
| `total_sequence_length` | int32 [] | the largest of those, plus 1 |
| `logits_positions` | int64 [rows, keep] | the new positions that want logits |
| `past_key_values.{i}.key/value` | float32 [rows, kv_heads, capacity, head_dim] | buffers |

Outputs: `logits` float32 [rows, keep, vocab], and `present.{i}.key/value`, which the runtime
binds to the memory of the inputs. `cache.quantize` makes both int8.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir
import onnx_ir.passes.common
import torch
from fastgen.export import attention, refuse
from fastgen.export.attention import Feed, Layer, PassingCache, UnsupportedModel
from transformers import PreTrainedModel

OPSET = 23
INPUTS = (
    "input_ids", "position_ids", "query_seqlens", "seqlens_k", "total_sequence_length",
    "logits_positions",
)  # fmt: skip


def past_names(layers: int) -> list[str]:
    return [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def present_names(layers: int) -> list[str]:
    return [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


class Decoder(torch.nn.Module):
    """The model with the graph's signature."""

    def __init__(self, model: PreTrainedModel, layers: list[Layer]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        query_seqlens: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logits_positions: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        feed = Feed(pairs, seqlens_k, total_sequence_length, query_seqlens)
        with attention.tracing(self.layers, feed) as run, gathered(self.model, logits_positions):
            logits = call(self.model, input_ids, position_ids)
        return logits, *(tensor for pair in run.present for tensor in pair)


def call(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Logits of the model under attention 'fastgen'."""
    out = model(
        input_ids=input_ids,
        position_ids=position_ids,
        past_key_values=PassingCache(config=model.config.get_text_config(decoder=True)),
        use_cache=True,
    )
    return out.logits


@contextlib.contextmanager
def gathered(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[list[int]]:
    """`lm_head` runs only at `positions` [rows, keep] of the hidden states [rows, new, hidden]."""
    calls: list[int] = []

    def gather(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        calls.append(1)
        hidden = args[0]
        index = positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return (hidden.gather(1, index), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield calls
    finally:
        handle.remove()


def layers_of(model: PreTrainedModel) -> list[Layer]:
    """Record the model's layers; raise for what the graph cannot express.

    Raises:
        UnsupportedModel: with the model's type and the reason.
    """
    with refuse.by_name(model.config.model_type):
        return _record(model)


def _record(model: PreTrainedModel) -> list[Layer]:
    refuse.model(model)
    rows, new = 2, 5
    ids = torch.arange(rows * new).reshape(rows, new) % model.config.get_text_config().vocab_size
    positions = torch.arange(new).expand(rows, new)
    with (
        torch.no_grad(),
        using_attention(model),
        attention.recording() as run,
        gathered(model, torch.zeros(rows, 1, dtype=torch.long)) as heads,
    ):
        try:
            call(model, ids, positions)
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"running it under fastgen's cache failed: {type(error).__name__}: {error}"
            ) from error
    if not run.layers or run.pending is not None:
        raise UnsupportedModel("its attention does not go through transformers' AttentionInterface")
    if len(heads) != 1:
        raise UnsupportedModel(f"its lm_head runs {len(heads)} times in a step")
    return run.layers


@contextlib.contextmanager
def using_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` with attention 'fastgen', then with its own again."""
    own = model.config._attn_implementation
    try:
        model.set_attn_implementation(attention.NAME)
    except (KeyError, ValueError) as error:
        raise UnsupportedModel(f"it has attention code of its own ({error})") from error
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def convert(model: PreTrainedModel, layers: list[Layer]) -> onnx_ir.Model:
    """The graph of `model`, which must be in float32 and in eval mode; weights are shared with it.

    Raises:
        UnsupportedModel: torch's exporter cannot follow the model's code.
    """
    rows, new, keep, capacity = 2, 3, 2, 7
    past = [
        torch.zeros(rows, layer.kv_heads, capacity, layer.head_dim)
        for layer in layers
        for _ in ("key", "value")
    ]
    inputs = {
        "input_ids": torch.ones(rows, new, dtype=torch.long),
        "position_ids": torch.arange(new).expand(rows, new).contiguous(),
        "query_seqlens": torch.full((rows,), new, dtype=torch.int32),
        "seqlens_k": torch.full((rows,), new - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(new, dtype=torch.int32),
        "logits_positions": torch.zeros(rows, keep, dtype=torch.long),
        "past": past,
    }
    dim = torch.export.Dim
    r, n, k, c = dim("rows"), dim("new"), dim("keep"), dim("capacity")
    shapes = {
        "input_ids": {0: r, 1: n},
        "position_ids": {0: r, 1: n},
        "query_seqlens": {0: r},
        "seqlens_k": {0: r},
        "total_sequence_length": {},
        "logits_positions": {0: r, 1: k},
        "past": [{0: r, 2: c}] * len(past),
    }
    with _quiet(), torch.no_grad(), using_attention(model):
        try:
            program = torch.onnx.export(
                Decoder(model, layers),
                kwargs=inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=[*INPUTS, *past_names(len(layers))],
                output_names=["logits", *present_names(len(layers))],
                optimize=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            raise UnsupportedModel(
                f"{model.config.model_type} cannot be exported: torch's exporter cannot follow "
                f"its code: {type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
            ) from error
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter talks to users about matters of its own."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def save(graph: onnx_ir.Model, path: Path) -> None:
    """Write `path` and its weights beside it, as `<name>.data`: no size limit, memory-mapped.

    The exporter's notes (stack traces, the paths of this machine) stay out of the file.
    """
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(graph)
    onnx_ir.save(graph, path, external_data=path.name + ".data")


__all__ = ["INPUTS", "Any", "convert", "layers_of", "save"]
