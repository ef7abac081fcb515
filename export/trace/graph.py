"""A transformers model in, the graph out, by the contract of `fastgen.store.graph_io`.

Two steps add inputs to it later: `window.bound`, where layers see a window only, and
`kv_int8.quantize`, which makes keys and values int8 and adds float32 ones for prompts.
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

import numpy as np
import onnx_ir
import onnxscript.rewriter
import torch
from transformers import PreTrainedModel

from fastgen.errors import UnsupportedModel
from fastgen.export.rewrite import mixture
from fastgen.export.trace import attention, experts, hooks, refuse, repeat, states, stored
from fastgen.export.trace.attention import Feed, Layer
from fastgen.export.trace.states import StatefulCache, StateKey, States
from fastgen.store.graph_io import TOKENS, GraphIO, TensorSpec, fed_tokens

OPSET = 23
SIZES = {"rows": 2, "new": 3, "keep": 2, "capacity": 7}  # of the step that is traced


@dataclass(frozen=True)
class Kept:
    """The keys, values and states that a model keeps of a row between steps.

    Attributes:
        layers: those with keys and values.
        states: shapes of all else.
    """

    layers: list[Layer]
    states: dict[StateKey, tuple[int, ...]]

    def io(self, vocab_size: int) -> GraphIO:
        """The inputs and outputs of the graph."""
        layers = tuple((layer.kv_heads, layer.head_dim) for layer in self.layers)
        return GraphIO(vocab_size, layers, tuple(self.states.values()))


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
        return logits, *present, *(left.present[key] for key in self.kept.states)


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
    io = kept.io(model.get_output_embeddings().weight.shape[0])
    inputs, shapes = _example(io)
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
                input_names=[spec.name for spec in io.inputs],
                output_names=[spec.name for spec in io.outputs],
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


def _example(io: GraphIO) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `Decoder.forward` for a step of `SIZES`, and the names of their dimensions."""
    ids = np.ones((SIZES["rows"], SIZES["new"]), np.int64)
    positions = np.zeros((SIZES["rows"], SIZES["keep"]), np.int64)
    names = {size: torch.export.Dim(size) for size in SIZES}

    def dimensions(spec: TensorSpec) -> dict[int, Any]:
        return {i: names[size] for i, size in enumerate(spec.shape) if isinstance(size, str)}

    inputs: dict[str, Any] = {
        name: torch.from_numpy(array) for name, array in fed_tokens(ids, positions).items()
    }
    shapes: dict[str, Any] = {spec.name: dimensions(spec) for spec in TOKENS}
    for name, pairs in (("past", io.key_values["float32"]), ("past_states", io.state_pairs)):
        if pairs:  # an empty list would make torch's exporter forget the names of all dimensions
            inputs[name] = [torch.from_numpy(pair.past.zeros(**SIZES)) for pair in pairs]
            shapes[name] = [dimensions(pair.past) for pair in pairs]
    return inputs, shapes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter, which talks to users about matters of its own."""
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
