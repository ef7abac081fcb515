"""A transformers model in, the graph out: names, shapes and what is computed where.

| input | shape | |
|---|---|---|
| `input_ids`, `position_ids` | int64 [rows, new] | new tokens, right-padded |
| `query_seqlens` | int32 [rows] | how many of them are real |
| `seqlens_k` | int32 [rows] | tokens in the cache after this step, less 1 |
| `total_sequence_length` | int32 [] | the largest of those, plus 1 |
| `logits_positions` | int64 [rows, keep] | the new positions that want logits |
| `past_key_values.{i}.key/value` | float32 [rows, kv_heads, capacity, head_dim] | buffers |
| `past_state.{i}` | float32 [rows, ...] | what convolutions and recurrences keep |

Outputs: `logits` float32 [rows, keep, vocab], and `present.{i}.key/value` and `present_state.{i}`,
which the runtime binds to the memory of the inputs. Two steps add inputs to it later: `window`,
where layers see a window only; and `cache.quantize`, which makes keys and values int8 and adds
float32 ones into which prompts are read.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir
import onnx_ir.passes.common
import onnxscript.rewriter
import torch
from transformers import PreTrainedModel

from fastgen.errors import UnsupportedModel
from fastgen.export.rewrite import mixture
from fastgen.export.rewrite.onnx_file import save
from fastgen.export.trace import attention, experts, hooks, refuse, repeat, states, stored
from fastgen.export.trace.attention import Feed, Layer
from fastgen.export.trace.states import Place, StatefulCache, States

OPSET = 23
INPUTS = (
    "input_ids",
    "position_ids",
    "query_seqlens",
    "seqlens_k",
    "total_sequence_length",
    "logits_positions",
)


def past_names(layers: int) -> list[str]:
    return [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


def present_names(layers: int) -> list[str]:
    return [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]


@dataclass(frozen=True)
class Kept:
    """What a model keeps of a row between steps.

    Attributes:
        layers: those with keys and values.
        states: shapes of all else.
    """

    layers: list[Layer]
    states: dict[Place, tuple[int, ...]]

    def inputs(self) -> list[str]:
        numbers = range(len(self.states))
        return [*past_names(len(self.layers)), *(f"past_state.{i}" for i in numbers)]

    def outputs(self) -> list[str]:
        numbers = range(len(self.states))
        return [*present_names(len(self.layers)), *(f"present_state.{i}" for i in numbers)]


class Decoder(torch.nn.Module):
    """The model with the graph's signature."""

    def __init__(self, model: PreTrainedModel, kept: Kept) -> None:
        super().__init__()
        self.model = model
        self.kept = kept

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        query_seqlens: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logits_positions: torch.Tensor,
        past: Sequence[torch.Tensor] = (),
        past_states: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, ...]:
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        feed = Feed(pairs, seqlens_k, total_sequence_length, query_seqlens)
        held = dict(zip(self.kept.states, past_states, strict=True))
        with (
            attention.tracing(self.kept.layers, feed) as run,
            states.running(self.model, States(self.kept.states, held, query_seqlens)) as left,
            gathered(self.model, logits_positions),
        ):
            logits = call(self.model, input_ids, position_ids)
        present = [tensor for pair in run.present for tensor in pair]
        return logits, *present, *(left.present[place] for place in self.kept.states)


def call(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Logits of the model under attention 'fastgen'."""
    cache = StatefulCache(config=model.config.get_text_config(decoder=True))
    with hooks.positions(model, position_ids) as given:
        given |= states.cache_argument(model, cache)
        known = inspect.signature(model.forward).parameters
        given = {name: value for name, value in given.items() if name in known}
        return model(input_ids=input_ids, **given).logits


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


def kept_by(model: PreTrainedModel) -> Kept:
    """Record what the model keeps; raise for what the graph cannot express.

    Raises:
        UnsupportedModel: with the model's type and the reason.
    """
    with refuse.by_name(model.config.model_type):
        return _record(model)


def _record(model: PreTrainedModel) -> Kept:
    refuse.model(model)
    rows, new = 2, 5
    ids = torch.arange(rows * new).reshape(rows, new) % model.config.get_text_config().vocab_size
    run, left = _run(model, ids)
    if run.derived:
        attention.check_kept(run, _run(model, ids[:, : new // 2])[0])
    refuse.layers(model, run.layers)
    return Kept(run.layers, left.shapes)


def _run(model: PreTrainedModel, ids: torch.Tensor) -> tuple[attention.Pass, States]:
    """Record `ids` [rows, new] from scratch."""
    rows, new = ids.shape
    positions = torch.arange(new).expand(rows, new)
    with (
        torch.no_grad(),
        using_attention(model),
        attention.recording() as run,
        states.running(model, States()) as left,
        gathered(model, torch.zeros(rows, 1, dtype=torch.long)) as heads,
    ):
        try:
            call(model, ids, positions)
        except UnsupportedModel:
            raise
        except Exception as error:
            if isinstance(error, AttributeError) and isinstance(error.obj, StatefulCache):
                raise UnsupportedModel(
                    f"it keeps state of its own ({error.name}), which does not go through "
                    "transformers' Cache"
                ) from error
            raise UnsupportedModel(
                f"running it under fastgen's cache failed: {type(error).__name__}: {error}"
            ) from error
    if model._is_stateful and not left.shapes:
        raise UnsupportedModel(
            "it keeps recurrent state of its own, which does not go through transformers' Cache"
        )
    if not (run.layers or left.shapes) or run.pending is not None:
        raise UnsupportedModel("its attention does not go through transformers' AttentionInterface")
    if len(heads) != 1:
        raise UnsupportedModel(f"its lm_head runs {len(heads)} times in a step")
    return run, left


@contextlib.contextmanager
def using_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` with attention 'fastgen', then with its own again."""
    with hooks.own_code(model) as attends, experts.as_nodes(model):
        if attends:
            yield
            return
        own = model.config._attn_implementation
        try:
            model.set_attn_implementation(attention.NAME)
        except (KeyError, ValueError) as error:
            raise UnsupportedModel(f"it has attention code of its own ({error})") from error
        try:
            yield
        finally:
            model.set_attn_implementation(own)


def convert(model: PreTrainedModel, kept: Kept, whole: bool = False) -> onnx_ir.Model:
    """The graph of `model`, which must be in float32 and in eval mode; weights are shared with it.

    Args:
        whole: trace all layers, also where they are alike. Otherwise `meta["repeated"]` of the
            graph says whether some were not traced.

    Raises:
        UnsupportedModel: torch's exporter cannot follow the model's code.
    """
    repeated = None if whole or kept.states else _by_repeating(model, kept)
    converted, stand_ins = repeated or _traced(model, kept)
    stored.settle(converted.graph, stand_ins)
    mixture.lay_out(converted)
    converted.meta["repeated"] = repeated is not None
    return converted


Traced = tuple[onnx_ir.Model, list[stored.StandIn]]  # as torch exports it, and what settles it


def _by_repeating(model: PreTrainedModel, kept: Kept) -> Traced | None:
    """The graph by a trace of the first layers; None where they do not tell what the others are."""
    layers = repeat.find(model, kept.layers)
    if layers is None:
        return None
    try:
        with repeat.shortened(model, layers):
            traced = _traced(model, Kept(kept.layers[: repeat.TRACED], {}), layers.traced)
    except UnsupportedModel:  # it may be the number of layers that is wrong
        return None
    return traced if repeat.unroll(traced[0], layers, traced[1]) else None


def _traced(
    model: PreTrainedModel, kept: Kept, known_again: Sequence[torch.nn.Module] = ()
) -> Traced:
    rows, new, keep, capacity = 2, 3, 2, 7
    past = [
        torch.zeros(rows, layer.kv_heads, capacity, layer.head_dim)
        for layer in kept.layers
        for _ in ("key", "value")
    ]
    held = [torch.zeros(rows, *shape) for shape in kept.states.values()]
    inputs = {
        "input_ids": torch.ones(rows, new, dtype=torch.long),
        "position_ids": torch.arange(new).expand(rows, new).contiguous(),
        "query_seqlens": torch.full((rows,), new, dtype=torch.int32),
        "seqlens_k": torch.full((rows,), new - 1, dtype=torch.int32),
        "total_sequence_length": torch.tensor(new, dtype=torch.int32),
        "logits_positions": torch.zeros(rows, keep, dtype=torch.long),
    }
    dim = torch.export.Dim
    r, n, k, c = dim("rows"), dim("new"), dim("keep"), dim("capacity")
    shapes: dict[str, Any] = {
        "input_ids": {0: r, 1: n},
        "position_ids": {0: r, 1: n},
        "query_seqlens": {0: r},
        "seqlens_k": {0: r},
        "total_sequence_length": {},
        "logits_positions": {0: r, 1: k},
    }
    # An empty list would make torch's exporter forget the names of all dimensions.
    for name, some, shape in (("past", past, {0: r, 2: c}), ("past_states", held, {0: r})):
        if some:
            inputs[name], shapes[name] = some, [shape] * len(some)
    with (
        _quiet(),
        _pairs_of_slices(),
        _uncollected(),
        torch.no_grad(),
        using_attention(model),
        stored.standing_in(model, known_again) as stand_ins,
    ):
        try:
            program = torch.onnx.export(
                Decoder(model, kept),
                kwargs=inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=[*INPUTS, *kept.inputs()],
                output_names=["logits", *kept.outputs()],
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
    return program.model, stand_ins


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


@contextlib.contextmanager
def _pairs_of_slices() -> Iterator[None]:
    """onnxscript's rule for two slices that are a split is tried at slices only.

    It is tried at every node, and goes through all others each time: two fifths of the time that a
    model of 30 layers takes.
    """
    rules = getattr(onnxscript.rewriter, "_DEFAULT_REWRITE_RULES", ())
    slow = [rule for rule in rules if rule.name == "SlicesSplit"]
    for rule in slow:
        rule.try_rewrite = functools.partial(_at_slices, rule.try_rewrite)
    try:
        yield
    finally:
        for rule in slow:
            del rule.try_rewrite


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Tracing makes objects by the million, all of which stay: looking for garbage among them
    would take a sixth of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _at_slices(
    rewrite: Callable[..., Any], model: Any, graph: Any, node: onnx_ir.Node, **kwargs: Any
) -> Any:
    return rewrite(model, graph, node, **kwargs) if node.op_type == "Slice" else None


__all__ = ["INPUTS", "Any", "Kept", "convert", "kept_by", "save"]
