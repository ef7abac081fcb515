"""What can be said of a model before it is run: which ones the graph cannot express, and why.

These are reasons that a user understands. Whatever passes here and still does not fit is found
while the model is recorded (`attention`), converted (`graph`) or compared (`check`). One kind is
only found here: a model that says the same on short texts and something else on long ones.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from fastgen.export import rope
from fastgen.export.attention import UnsupportedModel
from transformers import PretrainedConfig, PreTrainedModel

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
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = _get(quantized, "quant_method") or "unknown method"
        raise UnsupportedModel(
            f"its weights are quantised already ({getattr(method, 'value', method)}): "
            "export the model that it was made from"
        )


def model(model: PreTrainedModel) -> None:
    """Refuse what the model's configuration and modules tell.

    Raises:
        UnsupportedModel: with the reason.
    """
    configuration(model.config)
    config = model.config.get_text_config(decoder=True)
    kept = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if model._is_stateful or kept:
        layers = f" (layers of the kind {', '.join(sorted(kept))})" if kept else ""
        raise UnsupportedModel(
            f"it keeps recurrent state{layers}; the graph keeps keys and values only"
        )
    if not model._can_set_attn_implementation():
        raise UnsupportedModel(
            "it has attention code of its own, which does not go through transformers' "
            "AttentionInterface"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UnsupportedModel(
            "its forward takes no position_ids, and rows of different lengths need them"
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModel("it has no output embeddings (lm_head)")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModel(
            "its attention is multi-head latent attention (MLA), whose keys and values differ in "
            "size; GroupQueryAttention needs one size"
        )
    experts = next((m for m in model.modules() if hasattr(m, "_is_expert_parallel")), None)
    if experts is not None:
        raise UnsupportedModel(
            f"it is a mixture of experts ({type(experts).__name__}), which the graph has no "
            "operator for"
        )
    for kind in _rope_types(model):
        if kind == "longrope" or "dynamic" in kind:
            raise UnsupportedModel(
                f"its rotary embedding is of the type {kind!r}: it changes with the length of the "
                "text, also for keys that are in the cache already"
            )


def _rope_types(model: PreTrainedModel) -> Iterator[str]:
    """The rotations that the modules use: one name, or one for each kind of layer.

    Without those that `rope` has settled.
    """
    for module in model.modules():
        kinds = None if rope.settled(module) else getattr(module, "rope_type", None)
        yield from (kinds,) if isinstance(kinds, str) else (kinds or {}).values()


def _get(settings: Any, name: str) -> Any:
    return settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
