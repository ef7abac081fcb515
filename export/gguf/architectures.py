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
from fastgen.export.build.decoder import Decoder, Experts, Part, Rotary, Stack
from fastgen.export.build.families_mixture import YARN
from fastgen.export.build.weights import Tensor
from fastgen.export.gguf.file import File
from fastgen.export.gguf.tensors import Lowered, Regrouped, Row, Stored, Unpermuted, library
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
    r"|expert_count"
    r"|rope\.scaling\.(type|factor|original_context_length|attn_factor|finetuned)"
)
OFF = {"expert_used_count": (0,), "attention.causal": (True,), "expert_weights_scale": (1.0,)}
EXPERTS = {"expert_used_count": "num_experts_per_tok"}


@dataclass(frozen=True)
class Architecture:
    """One of GGUF's architectures.

    Attributes:
        model_type: transformers' name of it.
        says: names of its values, and of config.json's fields.
        more: what it says of this one besides.
        permuted: whether queries and keys lie as llama's do (see `Unpermuted`).
        lowered: whether 1 was added to the weights of norms.
        part: the field for the part of a head that turns, where that may be less than all of it.
        lists: values that are told of each layer.
        experts: the field for the number of experts, which an architecture without one has not.
        with_experts: the same architecture's files of mixtures.
    """

    model_type: str
    says: dict[str, str]
    more: Callable[[File], dict[str, Any]] = lambda file: {}
    permuted: bool = False
    lowered: bool = False
    part: str = ""
    lists: tuple[str, ...] = ()
    experts: str = ""
    with_experts: Architecture | None = None


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


PATTERN = "attention.sliding_window_pattern"


def _exaone4(file: File) -> dict[str, Any]:
    """The layers that slide; without a window all see everything."""
    slides = file.get(PATTERN)
    if slides is None or file.get("attention.sliding_window") is None:
        if file.get("attention.sliding_window") is not None:
            return {"sliding_window_pattern": 4}  # llama.cpp's
        return {"sliding_window": None, "sliding_window_pattern": None}
    names = ("full_attention", "sliding_attention")
    return {"layer_types": [names[bool(one)] for one in slides]}


def _ernie4_5(file: File) -> dict[str, Any]:
    return {"use_bias": "blk.0.ffn_up.bias" in file.tensors}


def _qwen2_moe(file: File) -> dict[str, Any]:
    return {"qkv_bias": "blk.0.attn_q.bias" in file.tensors, "norm_topk_prob": False}


def _qwen3_moe(file: File) -> dict[str, Any]:
    return {**_attention_bias(file), "norm_topk_prob": True}


def _gpt_oss(file: File) -> dict[str, Any]:
    """YaRN, which a file tells the factor and the first length of."""
    told = {
        "factor": file.get("rope.scaling.factor"),
        "original_max_position_embeddings": file.get("rope.scaling.original_context_length"),
    }
    told = {name: _plain(value) for name, value in told.items() if value is not None}
    return {**_attention_bias(file), "rope_scaling": YARN | told}


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
    "ernie4_5": Architecture("ernie4_5", SIZES | ROPE | RMS | HEADS, more=_ernie4_5),
    "exaone4": Architecture(
        "exaone4", SIZES | ROPE | RMS | HEADS | WINDOW, more=_exaone4, lists=(PATTERN,)
    ),
    "glm4": Architecture(
        "glm4", SIZES | ROPE | RMS | HEADS, more=_attention_bias, part="partial_rotary_factor"
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        SIZES
        | ROPE
        | RMS
        | HEADS
        | WINDOW
        | EXPERTS
        | {"expert_feed_forward_length": "intermediate_size"},
        more=_gpt_oss,
        experts="num_local_experts",
    ),
    "gptneox": Architecture(
        "gpt_neox",
        SIZES
        | LAYER_NORM
        | {"rope.freq_base": "rotary_emb_base", "use_parallel_residual": "use_parallel_residual"},
        part="rotary_pct",
    ),
    "granite": Architecture("granite", SIZES | ROPE | RMS | SCALES, more=_biases, permuted=True),
    "granitemoe": Architecture(
        "granitemoe",
        SIZES | ROPE | RMS | SCALES | EXPERTS,
        more=_attention_bias,
        permuted=True,
        experts="num_local_experts",
    ),
    "hunyuan-dense": Architecture(
        "hunyuan_v1_dense", SIZES | ROPE | RMS | HEADS, more=_attention_bias
    ),
    "llama": Architecture(
        "llama",
        SIZES | ROPE | RMS | HEADS,
        more=_biases,
        permuted=True,
        with_experts=Architecture(
            "mixtral",
            SIZES | ROPE | RMS | HEADS | EXPERTS,
            permuted=True,
            experts="num_local_experts",
        ),
    ),
    "olmo2": Architecture("olmo2", SIZES | ROPE | RMS, more=_attention_bias),
    "olmoe": Architecture(
        "olmoe", SIZES | ROPE | RMS | EXPERTS, more=_attention_bias, experts="num_experts"
    ),
    "phi2": Architecture("phi", SIZES | ROPE | LAYER_NORM, part="partial_rotary_factor"),
    "phi3": Architecture(
        "phi3", SIZES | ROPE | RMS | WINDOW, more=_phi3, part="partial_rotary_factor"
    ),
    "qwen2": Architecture("qwen2", SIZES | ROPE | RMS),
    "qwen2moe": Architecture(
        "qwen2_moe",
        SIZES
        | ROPE
        | RMS
        | EXPERTS
        | {
            "expert_feed_forward_length": "moe_intermediate_size",
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        more=_qwen2_moe,
        experts="num_experts",
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        SIZES
        | ROPE
        | RMS
        | HEADS
        | EXPERTS
        | {"expert_feed_forward_length": "moe_intermediate_size"},
        more=_qwen3_moe,
        experts="num_experts",
    ),
    "qwen3": Architecture("qwen3", SIZES | ROPE | RMS | HEADS, more=_attention_bias),
    "smollm3": Architecture("smollm3", SIZES | ROPE | RMS, more=_biases, permuted=True),
    "stablelm": Architecture(
        "stablelm",
        SIZES | ROPE | LAYER_NORM | {"use_parallel_residual": "use_parallel_residual"},
        more=_stablelm,
        part="partial_rotary_factor",
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
    kind = _kind(file)
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
        **({kind.experts: file.get("expert_count")} if kind.experts else {}),
        **_rotation(file, kind),
        **kind.more(file),
    }
    _check_all_known(file, kind)
    return config


def _kind(file: File) -> Architecture:
    """The architecture of a file.

    Raises:
        UnsupportedModel: it is not known, or has experts where it should have none.
    """
    kind = ARCHITECTURES.get(file.architecture)
    if kind is None:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"its architecture is {file.architecture!r}, not one of {known}")
    if file.get("expert_count", 0) and not kind.experts:
        if kind.with_experts is None:
            raise UnsupportedModel(f"it says expert_count = {file.get('expert_count')}")
        return kind.with_experts
    return kind


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
    if kind.part:
        settings[kind.part] = turned / size
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
        and name not in kind.lists
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
    decoder: Decoder = _changed(families.describe(config), _as_stored)
    if FACTORS in file.tensors:
        factors = Stored(file.tensors[FACTORS]).read(slice(None))
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise UnsupportedModel(f"its {FACTORS} has numbers that are no factors")
        decoder = _changed(decoder, lambda part: _slowed(part, factors))
    return decoder


def _as_stored(part: Any) -> Any:
    """A part as files have it: matrices of GPT-2 upright as all others, the matrices of experts
    together, and halves of their first matrix apart.
    """
    if isinstance(part, Part) and part.flat:
        return replace(part, flat=False)
    if isinstance(part, Stack) and not part.together:
        return Stack((part.names[0].replace(".experts.0.", ".experts."),), together=True)
    if isinstance(part, Experts) and part.up is None:
        layer = re.sub(r"\.(mlp|block_sparse_moe)\..*", ".mlp.experts", part.gate.names[0])
        gate, up, down = (f"{layer}.{name}_proj" for name in ("gate", "up", "down"))
        biases = ((f"{gate}.bias", f"{up}.bias"), f"{down}.bias")
        return replace(
            part,
            gate=Stack((f"{gate}.weight",), together=True),
            up=Stack((f"{up}.weight",), together=True),
            down=Stack((f"{down}.weight",), together=True),
            biases=None if part.biases is None else biases,
        )
    return part


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
    kind = _kind(file)
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
        if suffix == "sinks":
            theirs = f"{known.get_name(name)}.weight"
        if theirs not in file.tensors:
            continue  # the graph's writer says what is missing
        used.add(theirs)
        tensor: Tensor = Stored(file.tensors[theirs])
        role = theirs.split(".")[-2]
        if role == "attn_qkv" and kind.model_type == "gpt_neox":
            tensor = Regrouped(tensor, heads.heads)
        if role == "ffn_gate_inp_shexp" and len(tensor.shape) == 1:
            tensor = Row(tensor)
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
        if isinstance(current, str) and current.endswith((".weight", ".bias", ".sinks")):
            if current not in seen:
                seen.add(current)
                yield current
        elif isinstance(current, list | tuple):
            waiting += current
        elif is_dataclass(current):
            waiting += [getattr(current, f.name) for f in fields(current)]
