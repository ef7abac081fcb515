"""The text part of a model that reads more than text, as a causal language model of its own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

# Where the classes of models stand that write text, by the type of their configuration.
CLASSES = (AutoModelForCausalLM, AutoModelForMultimodalLM)


def known(config: PretrainedConfig) -> Any:
    """transformers' door to a model that writes text, whatever it reads; None if it has none."""
    return next((auto for auto in CLASSES if type(config) in auto._model_mapping), None)


def alone(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model within `model`, on the same weights; itself if there is none.

    Towers for images and sounds, which text does not pass, are left behind. Where transformers has
    no such class, or it says something else, the model is run as it is, on text.
    """
    if "shared_kv_states" in inspect.signature(model.forward).parameters:  # another model's
        return model
    decoder = model.get_decoder()
    mapping = AutoModelForCausalLM._model_mapping
    if decoder is model or not isinstance(decoder, PreTrainedModel):  # a head may have that name
        return model
    if type(decoder.config) not in mapping:
        return model
    kind = mapping[type(decoder.config)]
    if isinstance(model, kind):
        return model
    if isinstance(decoder, kind):
        return decoder
    with torch.device("meta"):
        text = kind(decoder.config)
    if type(text.base_model) is not type(decoder):
        return model
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(model.get_output_embeddings())
    text.generation_config = model.generation_config
    devices = {tensor.device.type for tensor in (*text.parameters(), *text.buffers())}
    return text if "meta" not in devices and _say_the_same(model, text) else model


def _say_the_same(model: PreTrainedModel, text: PreTrainedModel) -> bool:
    ids = torch.arange(7)[None] % model.get_output_embeddings().weight.shape[0]
    training = [m for each in (model, text) for m in each.modules() if m.training]
    text.eval()
    model.eval()
    try:
        with torch.no_grad():
            expected, actual = (each(input_ids=ids).logits.float() for each in (model, text))
    except (TypeError, ValueError):  # it wants an image: there is nothing to compare with
        return True
    finally:
        for module in training:
            module.training = True
    return torch.allclose(expected, actual, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
