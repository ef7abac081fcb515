"""Families of models: the meaning of the fields of a config.json, and the names of tensors.

A family is a function from a `Configuration` to a `Decoder`. It asks for each field that it knows,
with transformers' default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastgen.errors import UnsupportedModel
from fastgen.export.build.configuration import Configuration
from fastgen.export.build.decoder import Decoder
from fastgen.export.build.families_gemma import gemma, gemma2, gemma3
from fastgen.export.build.families_layer_norm import (
    cohere,
    gpt2,
    gpt_neox,
    opt,
    phi,
    stablelm,
    starcoder2,
)
from fastgen.export.build.families_llama import (
    ernie4_5,
    granite,
    hunyuan,
    llama,
    mistral,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from fastgen.export.build.families_mixture import (
    gpt_oss,
    granitemoe,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from fastgen.export.build.families_post_norm import exaone4, glm4, olmo2
from fastgen.export.source import quantised

KNOWN_BY = "transformers 5.24"  # whose models the families are proved against

FAMILIES: dict[str, Callable[[Configuration], Decoder]] = {
    "cohere": cohere, "ernie4_5": ernie4_5, "exaone4": exaone4, "gemma": gemma, "gemma2": gemma2,
    "gemma3_text": gemma3, "glm4": glm4, "gpt2": gpt2, "gpt_neox": gpt_neox, "gpt_oss": gpt_oss,
    "granite": granite, "granitemoe": granitemoe, "hunyuan_v1_dense": hunyuan, "llama": llama,
    "mistral": mistral, "mixtral": mixtral, "olmo2": olmo2, "olmoe": olmoe, "opt": opt,
    "phi": phi, "phi3": phi3, "qwen2": qwen2, "qwen2_moe": qwen2_moe, "qwen3": qwen3,
    "qwen3_moe": qwen3_moe, "smollm3": smollm3, "stablelm": stablelm, "starcoder2": starcoder2,
}  # fmt: skip


IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What these are in each family where config.json does not say (None: nothing).
USUAL_IDS: dict[str, tuple[int | None, int | list[int] | None, int | None]] = {
    "cohere": (5, 255001, 0), "ernie4_5": (1, 2, 0), "exaone4": (0, 2, None), "gemma": (2, 1, 0),
    "gemma2": (2, 1, 0), "gemma3_text": (2, 1, 0),
    "glm4": (None, [151329, 151336, 151338], 151329), "gpt2": (50256, 50256, None),
    "gpt_neox": (0, 2, None), "gpt_oss": (None, None, None), "granite": (1, 2, None),
    "granitemoe": (1, 2, None), "hunyuan_v1_dense": (1, 2, 0), "llama": (1, 2, None),
    "mistral": (1, 2, None), "mixtral": (1, 2, None), "olmo2": (None, 50279, 1),
    "olmoe": (None, 50279, 1), "opt": (2, 2, 1), "phi": (1, 2, None), "phi3": (1, 32000, 32000),
    "qwen2": (None, None, None), "qwen2_moe": (None, None, None), "qwen3": (None, None, None),
    "qwen3_moe": (None, None, None), "smollm3": (128000, 128001, 128004),
    "stablelm": (0, 0, None), "starcoder2": (50256, 50256, None),
}  # fmt: skip


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the ids that its family has where it says nothing."""
    usual = USUAL_IDS.get(str(config.get("model_type")), ())
    ids = {name: value for name, value in zip(IDS, usual, strict=False) if value is not None}
    return ids | config


def describe(config: dict[str, Any]) -> Decoder:
    """The decoder that a config.json describes.

    Raises:
        UnsupportedModel: its type is none of `FAMILIES`, or it says what the family does not know.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise UnsupportedModel(f"its type {kind!r} is none that can be built")
    read = Configuration(dict(config))
    try:
        quantised.method(read.get(quantised.FIELD))
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            decoder = family(read)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UnsupportedModel):
            raise
        raise UnsupportedModel(f"its config.json contradicts itself: {error!r}") from error
    read.check()
    return decoder
