"""Refuse models that no graph can express, before they are run, and say why.

These are reasons that a user understands. Whatever passes here and still does not fit is found
while the model is recorded (`attention`), converted (`graph`) or compared (`check`). One kind is
only found here: a model that says the same on short texts and something else on long ones.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from fastgen.errors import UnsupportedModel
from fastgen.export.source import quantised
from fastgen.export.trace import hooks, rope
from fastgen.export.trace.attention import Layer

# The layers whose state is the keys and values of the tokens so far; others keep another one.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


@contextlib.contextmanager
def by_name(kind: str) -> Iterator[None]:
    """Put the model's type in front of the reason of an `UnsupportedModel`."""
    try:
        yield
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{kind} cannot be exported: {error}") from error


def configuration(config: PretrainedConfig) -> None:
    """Refuse what the configuration alone tells, before any weight is loaded.

    Raises:
        UnsupportedModel: with the reason.
    """
    if config.is_encoder_decoder:
        raise UnsupportedModel("it is an encoder-decoder model; fastgen runs decoder-only ones")
    quantised.method(quantisation(config))


def quantisation(config: PretrainedConfig) -> dict[str, Any] | None:
    """The `quantization_config` of a configuration, if it has one."""
    said = getattr(config, quantised.FIELD, None)
    if said is None or isinstance(said, dict):
        return said
    return dict(said.to_dict())


def model(model: PreTrainedModel) -> None:
    """Refuse what the model's configuration and modules tell.

    Raises:
        UnsupportedModel: with the reason.
    """
    configuration(model.config)
    if quantisation(model.config):
        raise UnsupportedModel("its weights are held quantised: load it with dequantize=True")
    if "shared_kv_states" in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(
            "it reads another model's keys and values: it is that model's assistant, and says "
            "nothing by itself"
        )
    config = model.config.get_text_config(decoder=True)
    if not hasattr(config, "num_hidden_layers"):
        raise UnsupportedModel(
            "its configuration has no number of layers: it is several models, one within another"
        )
    kinds = getattr(config, "layer_types", None) or ()
    picking = sorted({kind for kind in kinds if re.search("sparse|compressed", kind)})
    if picking:
        raise UnsupportedModel(
            f"its attention is sparse (layers of the kind {', '.join(picking)}): each token picks "
            "those that it sees, which the graph has no operator for"
        )
    if has_attention(model) and not hooks.knows_positions(model):
        raise UnsupportedModel(
            "its forward takes no position_ids, and rows of different lengths need them"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModel("it has no output embeddings (lm_head)")
    if not hasattr(head, "weight"):
        raise UnsupportedModel("it has several output embeddings: codes of sounds, no text")
    for kind in _rope_types(model):
        if kind == "longrope" or "dynamic" in kind:
            raise UnsupportedModel(
                f"its rotary embedding is of the type {kind!r}: it changes with the length of the "
                "text, also for keys that are in the cache already"
            )


def layers(model: PreTrainedModel, recorded: Sequence[Layer]) -> None:
    """Refuse a model whose cache forgets tokens that its attention sees.

    What it says then depends on where a text was cut: transformers' `forward` of a whole text and
    its `generate` differ.

    Raises:
        UnsupportedModel: with the reason.
    """
    forgets = any(DynamicCache(config=model.config.get_text_config(decoder=True)).is_sliding)
    if forgets and not any(layer.window or layer.seen for layer in recorded):
        raise UnsupportedModel(
            "its cache forgets what lies before a window, and its attention has none: what it says "
            "depends on where a text is cut"
        )


def has_attention(model: PreTrainedModel) -> bool:
    """True if the tokens of some layer look at each other; a recurrence needs no positions."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return bool(ATTENTION_LAYERS & set(kinds)) if kinds else not model._is_stateful


def _rope_types(model: PreTrainedModel) -> Iterator[str]:
    """The rotations that the modules use: one name, or one for each kind of layer.

    Without those that `rope` has settled.
    """
    for module in model.modules():
        kinds = None if rope.settled(module) else getattr(module, "rope_type", None)
        yield from (kinds,) if isinstance(kinds, str) else (kinds or {}).values()
