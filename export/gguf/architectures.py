"""GGUF's architectures: what their metadata mean, and what transformers calls their tensors.

An architecture becomes the config.json that transformers would have of the same model, and from
there on it is a family of `fastgen.export.build`. A value of the architecture that nobody asks for
is refused: it may change what the model says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastgen.errors import UnsupportedModel
from fastgen.export.build import families
from fastgen.export.build.decoder import Decoder, Part, Rotary
from fastgen.export.build.weights import Tensor
from fastgen.export.gguf.file import File
from fastgen.export.gguf.tensors import Lowered, Stored, Unpermuted, library
from fastgen.store.jsonfile import some

TABLE, HEAD = "token_embd.weight", "output.weight"
FACTORS = "rope_freqs.weight"  # by which the frequencies of llama 3 are divided
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # those of phi 3
OF_ROTATIONS = (FACTORS, LONG, SHORT)

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
ROPE = {"rope.freq_base": "rope_theta"}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
LAYER_NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}
HEADS = {"attention.key_length": "head_dim"}
WINDOW = {"attention.sliding_window": "sliding_window"}
# What says nothing, or is looked at besides.
READ_BESIDES = re.compile(
    r"vocab_size|rope\.dimension_count|attention\.(key|value)_length|tensor_data_layout"
    r"|rope\.scaling\.(type|factor|original_context_length|attn_factor|finetuned)"
)
OFF = {"expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,)}


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures.

    Attributes:
        model_type: transformers' name of it.
        says: names of its values, and of config.json's fields.
        more: what it says of this one besides.
        permuted: whether queries and keys lie as llama's do (see `Unpermuted`).
        lowered: whether 1 was added to the weights of norms.
        part_turns: whether only a part of a head may be turned.
    """

    model_type: str
    says: dict[str, str]
    more: Callable[[File], dict[str, Any]] = lambda file: {}
    permuted: bool = False
    lowered: bool = False
    part_turns: bool = False


def _attention_bias(file: File) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in file.tensors}


def _biases(file: File) -> dict[str, Any]:
    return {**_attention_bias(file), "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}


def _phi3(file: File) -> dict[str, Any]:
    if LONG not in file.tensors:
        return {}
    trained = int(file.get("rope.scaling.original_context_length", 4096))
    lists = {
        name: _numbers(file, tensor)
        for name, tensor in (("long_factor", LONG), ("short_factor", SHORT))
    }
    return {
        "original_max_position_embeddings": trained,
        "rope_scaling": {"rope_type": "longrope", **lists},
    }


def _numbers(file: File, name: str) -> list[float]:
    if name not in file.tensors:
        raise UnsupportedModel(f"it has no {name}")
    return [float(value) for value in Stored(file.tensors[name]).read(slice(None))]


def _gemma(largest: int) -> Callable[[File], dict[str, Any]]:
    """The scale of scores: by the size of a head, but in the largest model of a release."""

    def more(file: File) -> dict[str, Any]:
        scale = int(file.get("attention.key_length", 256))
        if file.get("block_count") == largest:
            scale = int(file.get("embedding_length")) // int(file.get("attention.head_count"))
        return {"query_pre_attn_scalar": scale}

    return more


def _stablelm(file: File) -> dict[str, Any]:
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in file.tensors,
    }


def _cohere(file: File) -> dict[str, Any]:
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors}


GEMMA = SIZES | RMS | HEADS
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
ARCHITECTURES = {
    "command-r": Architecture(
        "cohere", SIZES | ROPE | LAYER_NORM | {"logit_scale": "logit_scale"}, more=_cohere
    ),
    "gemma": Architecture("gemma", GEMMA | ROPE, lowered=True),
    "gemma2": Architecture(
        "gemma2", GEMMA | ROPE | WINDOW | CAPS, more=_gemma(largest=46), lowered=True
    ),
    "gemma3": Architecture(
        "gemma3_text", GEMMA | ROPE | WINDOW, more=_gemma(largest=62), lowered=True
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "attention.head_count": "n_head",
            "feed_forward_length": "n_inner",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
    ),
    "granite": Architecture("granite", SIZES | ROPE | RMS | SCALES, more=_biases, permuted=True),
    "llama": Architecture("llama", SIZES | ROPE | RMS | HEADS, more=_biases, permuted=True),
    "olmo2": Architecture("olmo2", SIZES | ROPE | RMS, more=_attention_bias),
    "phi3": Architecture("phi3", SIZES | ROPE | RMS | WINDOW, more=_phi3, part_turns=True),
    "qwen2": Architecture("qwen2", SIZES | ROPE | RMS),
    "qwen3": Architecture("qwen3", SIZES | ROPE | RMS | HEADS, more=_attention_bias),
    "smollm3": Architecture("smollm3", SIZES | ROPE | RMS, more=_biases, permuted=True),
    "stablelm": Architecture(
        "stablelm",
        SIZES | ROPE | LAYER_NORM | {"use_parallel_residual": "use_parallel_residual"},
        more=_stablelm,
        part_turns=True,
    ),
    "starcoder2": Architecture(
        "starcoder2", SIZES | ROPE | {"attention.layer_norm_epsilon": "norm_epsilon"}
    ),
}


def configuration(file: File) -> dict[str, Any]:
    """The content of the config.json that the model would have.

    Raises:
        UnsupportedModel: its architecture is not known, or says something that is not.
    """
    kind = ARCHITECTURES.get(file.architecture)
    if kind is None:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"its architecture is {file.architecture!r}, not one of {known}")
    if TABLE not in file.tensors:
        raise UnsupportedModel(f"it has no {TABLE}")
    metadata = {name: file.get(name) for name in kind.says if file.get(name) is not None}
    lists = [name for name, value in metadata.items() if isinstance(value, np.ndarray | list)]
    if lists:
        raise UnsupportedModel(f"its layers differ in {some(lists)}")
    config = {
        "model_type": kind.model_type,
        "vocab_size": file.tensors[TABLE].shape[0],
        "tie_word_embeddings": HEAD not in file.tensors,
        **{kind.says[name]: _plain(value) for name, value in metadata.items()},
        **_rotation(file, kind),
        **kind.more(file),
    }
    _check_all_known(file, kind)
    return config


def _plain(value: Any) -> Any:
    """A value as config.json has it: the shortest number that is the same in float32."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rotation(file: File, kind: Architecture) -> dict[str, Any]:
    """The part of a head that turns, and the stretching of positions.

    Raises:
        UnsupportedModel: a part of a head, in an architecture that turns all of it; or a kind of
            stretching that is not known.
    """
    heads, width = file.get("attention.head_count"), file.get("embedding_length")
    if not all(isinstance(value, int) and value > 0 for value in (heads, width)):
        return {}  # the family says what is missing
    size = int(file.get("attention.key_length", width // heads))
    if file.get("attention.value_length", size) != size:
        raise UnsupportedModel("its values are of another size than its keys")
    settings: dict[str, Any] = {}
    turned = int(file.get("rope.dimension_count", size))
    if kind.part_turns and turned != size:
        settings["partial_rotary_factor"] = turned / size
    elif turned != size and kind.model_type != "gpt2":
        raise UnsupportedModel(f"it turns {turned} of the {size} numbers of a head")
    stretch = file.get("rope.scaling.type", "none")
    factor = _plain(file.get("rope.scaling.factor", 1.0))
    if stretch in ("none", "longrope") or factor in (0, 1):
        return settings
    if stretch not in ("linear", "yarn"):
        raise UnsupportedModel(f"its rope.scaling.type is {stretch!r}")
    settings["rope_scaling"] = {"rope_type": stretch, "factor": factor}
    trained = file.get("rope.scaling.original_context_length")
    if trained is not None:
        settings["rope_scaling"]["original_max_position_embeddings"] = int(trained)
    return settings


def _check_all_known(file: File, kind: Architecture) -> None:
    prefix = f"{file.architecture}."
    own = {n.removeprefix(prefix): v for n, v in file.metadata.items() if n.startswith(prefix)}
    unknown = [
        f"{name} = {str(value)[:40]}"
        for name, value in own.items()
        if name not in kind.says
        and not READ_BESIDES.fullmatch(name)
        and value not in OFF.get(name, ())
    ]
    if unknown:
        raise UnsupportedModel(f"it says {', '.join(unknown)}, which the builder does not know")


def described(file: File, config: dict[str, Any]) -> Decoder:
    """The model of a file whose `configuration` is this.

    Raises:
        UnsupportedModel: see `families.describe`.
    """
    decoder: Decoder = _changed(families.describe(config), _upright)
    if FACTORS in file.tensors:
        factors = Stored(file.tensors[FACTORS]).read(slice(None))
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise UnsupportedModel(f"its {FACTORS} has numbers that are no factors")
        decoder = _changed(decoder, lambda part: _slowed(part, factors))
    return decoder


def _upright(part: Any) -> Any:
    """A matrix of GPT-2, which lies in a file as all others do."""
    return replace(part, flat=False) if isinstance(part, Part) and part.flat else part


def _slowed(part: Any, factors: NDArray[np.float32]) -> Any:
    if not isinstance(part, Rotary):
        return part
    if part.inverse.shape != factors.shape:
        raise UnsupportedModel(f"its {FACTORS} has the shape {factors.shape}")
    return replace(part, inverse=part.inverse / factors)


def _changed(part: Any, change: Callable[[Any], Any]) -> Any:
    """A description, of which every part was changed, the inner ones first."""
    if isinstance(part, list):
        return [_changed(inner, change) for inner in part]
    if not is_dataclass(part) or isinstance(part, type):
        return part
    inner = {f.name: _changed(getattr(part, f.name), change) for f in fields(part)}
    return change(replace(part, **inner))


def weights(file: File, decoder: Decoder) -> dict[str, Tensor]:
    """The tensors under transformers' names; those of the rotation are in the description.

    Raises:
        UnsupportedModel: one is left whose meaning is not known.
    """
    kind = ARCHITECTURES[file.architecture]
    gguf = library()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = gguf.get_tensor_name_map(arch, len(decoder.layers))
    heads = decoder.layers[0].attention
    turned = {"attn_q": heads.heads, "attn_k": heads.kv_heads} if kind.permuted else {}
    tensors: dict[str, Tensor] = {}
    used = set(OF_ROTATIONS)
    for name in _tensor_names(decoder):
        stem, _, suffix = name.rpartition(".")
        theirs = f"{known.get_name(stem)}.{suffix}"
        if theirs not in file.tensors:
            continue  # the graph's writer says what is missing
        used.add(theirs)
        tensor: Tensor = Stored(file.tensors[theirs])
        role = theirs.split(".")[-2]
        if role in turned:
            tensor = Unpermuted(tensor, turned[role])
        if kind.lowered and role.endswith("_norm"):
            tensor = Lowered(tensor)
        tensors[name] = tensor
    left = sorted(file.tensors.keys() - used)
    if left:
        raise UnsupportedModel(f"it has {some(left)}, which the builder does not know")
    return tensors


def _tensor_names(part: Any) -> Iterator[str]:
    """Every name of a tensor that a description has, once."""
    seen: set[str] = set()
    waiting = [part]
    while waiting:
        current = waiting.pop()
        if isinstance(current, str) and current.endswith((".weight", ".bias")):
            if current not in seen:
                seen.add(current)
                yield current
        elif isinstance(current, list):
            waiting += current
        elif is_dataclass(current):
            waiting += [getattr(current, f.name) for f in fields(current)]
