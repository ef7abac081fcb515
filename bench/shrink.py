"""A tiny random model of any type that transformers has, from its own default configuration.

Nearly nothing here is written for a type. What an attribute of a configuration is, is told by its
name (`SIZES`) and by what it is to others: equal, a multiple, one entry a layer. Of layers one of
each kind stays, so each mechanism stays: windows, convolutions, experts, shared keys.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)

VOCAB, HIDDEN, HEADS, LAYERS, LENGTH, WINDOW, PICKED = 128, 64, 4, 2, 256, 8, 160
FIRST = 16  # tokens with lower ids may mean something to a model: those of `SPECIAL`

# An attribute's size is that of the first pattern found in its name; none is enlarged.
SIZES: list[tuple[str, int]] = [
    (r"vocab|^num_embeddings$", VOCAB),
    (r"indexer_kv", 1),
    (r"index_topk$|^indexer_budget$|keep_window", PICKED),
    (r"indexer_head_dim", 64),
    (r"max_.*position|max_seq_len|max_length|n_positions|n_ctx|context_length|extent|mem_len",
     LENGTH),
    (r"window_layers$|_offset$|first_k_dense|num_dense_layers|layer_start_index", 1),
    (r"window|_floor$|attention_chunk|attn_chunk_len|^local_attention$", WINDOW),
    (r"layers?_per_|mem_blocks$|_period$|_interval$|every_n|group_size$|_pattern$", 2),
    (r"layers?$|num_blocks|^depth$|layer_end_index", LAYERS),
    (r"(top_?k|per_tok|per_token|moe_k|compress_ratio)$|top_k_experts|topk_blocks", 2),
    (r"n_groups?$|topk_group|expert_group|o_groups", 2),
    (r"shared_experts?$", 1),
    (r"experts?$|expert_num", 4),
    (r"rank$|state_size|d_state|d_rel|chunk_?size|block_size|size_per_layer|position_emb", 16),
    (r"linear_num_value_heads|mamba_n(um)?_?heads|n_mamba_heads", 8),
    (r"kv_?(n_)?heads|key_value_heads|linear_num_key_heads", 2),
    (r"heads$|^n_head$|query_groups|heads_per_layer", HEADS),
    (r"qk_head_dim", 24),
    (r"rope_head_dim|rotary_dim", 8),
    (r"head_?dim|dim_head|d_head|head_size|kv_channels|d_kv|pre_attn_scalar", 16),
    (r"d_ssm", 2 * HIDDEN),
    (r"intermediate|ffn|dff|d_ff|dim_ff|d_inner|n_inner|feed_forward|mlp_dim|mid_dim", 96),
    (r"hidden|d_model|n_embd|emb_dim|embed_?dim|proj_dim|embedding_(size|dim)|dim_model|width"
     r"|(in|out)put.*_dim|channels?$", HIDDEN),
]  # fmt: skip
OTHER = re.compile(r"_token_id|_index$|multiplier|factor|transformers_|pretraining_tp|problem")
NEEDED = re.compile(r"head_dim$|heads$|per_tok$|^indexer_|_experts$")  # set where it is None
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 3,
           "cls_token_id": 4, "decoder_start_token_id": 1, "mask_token_id": 5}  # fmt: skip

# Mechanisms that a default configuration leaves out, by the attribute that switches them on.
ON: dict[str, dict[str, Any]] = {
    "is_decoder": {"is_decoder": True},
    "use_sliding_window": {"use_sliding_window": True, "sliding_window": WINDOW,
                           "layer_types": None},
    "attn_layer_indices": {"attn_layer_indices": [1]},
    "attention_types": {"attention_types": [[["global", "local"], 1]]},
    "block_auto_adjust_ff_dim": {"layer_types": ["conv", "full_attention"]},
    "use_expert_bias": {"layer_types": ["conv", "full_attention"]},
    "num_layers_per_stack": {"num_layers_per_stack": None, "num_hidden_layers": 1},
    "pooling": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                                    for kind in ("full_attention", "sliding_attention")}},
    "shared_experts_intermediate_size": {"head_dim": 32},
    "clip_qkv": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "enable_moe_block": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
                         "moe_intermediate_size": 32},
    "qk_dim_factor": {"qk_dim_factor": 1.0},
    "default_language": {"default_language": "en_XX"},
}  # fmt: skip


def class_of(config: PretrainedConfig) -> Any:
    """The class of models that write text from such a configuration, whatever they read."""
    classes = (AutoModelForCausalLM._model_mapping, AutoModelForMultimodalLM._model_mapping)
    return next(mapping[type(config)] for mapping in classes if type(config) in mapping)


def config_of(kind: str) -> PretrainedConfig:
    """The default configuration of a type, shrunk, as a decoder."""
    config = AutoConfig.for_model(kind)
    wanted = class_of(config).config_class
    if not isinstance(config, wanted):  # the type's decoder has a configuration of its own
        config = next((c for c in vars(config).values() if isinstance(c, wanted)), config)
    return shrunk(config)


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration with the same mechanisms and small sizes."""
    stored = {n: config.attribute_map.get(n, n) for n in type(config).__dataclass_fields__}
    old = {name: vars(config).get(place) for name, place in stored.items()}
    new = {name: _small(name, value) for name, value in old.items()}
    _keep_relations(old, new)
    new |= _few_layers(config, old, new)
    new |= {name: SPECIAL[name] for name in SPECIAL.keys() & old.keys()}
    for switch, settings in ON.items():
        if switch in old:
            new |= settings
    return type(config)(**{name: new[name] for name in new if new[name] is not old.get(name)})


def _small(name: str, value: Any) -> Any:
    if isinstance(value, PretrainedConfig):
        return shrunk(value)
    if isinstance(value, dict):
        return {key: _small(str(key), one) for key, one in value.items()}
    if isinstance(value, bool) or OTHER.search(name):
        return value
    size = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
    if value is None and NEEDED.search(name):
        return size
    return min(size, value) if isinstance(value, int) and size else value


def _few_layers(
    config: PretrainedConfig, old: dict[str, Any], new: dict[str, Any]
) -> dict[str, Any]:
    """One layer of each kind, two at least, and what is said of each layer for those."""
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = old.get(name)
    lists = {n: list(v) for n, v in old.items() if isinstance(v, list | tuple) and v}
    if not count or not lists:
        return {}
    chosen = {n: v for n, v in lists.items() if _ascending(v) and v[-1] < count}  # layers' numbers
    each = {n: v for n, v in lists.items() if len(v) == count and n not in chosen}
    kinds = [
        repr([v[i] for v in each.values()] + [i in v for v in chosen.values()])
        for i in range(count)
    ]
    kept = {kinds.index(kind) for kind in kinds}
    if any("hybrid" in kind for kind in kinds):  # which may share their weights
        kept |= {i for i in range(count) if kinds[:i].count(kinds[i]) == 1}
    cycle = max(
        (len(v) for n, v in lists.items() if n.endswith("_types") and n not in each), default=0
    )
    parts = [n for n, v in old.items() if re.search("^n_.*_layers$", n) and type(v) is int]
    if sum(old[n] for n in parts) == count:  # one after the other
        new |= dict.fromkeys(parts, 1)
    else:
        parts = []
    rest = [i for i in range(count) if i not in kept]
    kept = sorted(
        kept | set(rest[: max(LAYERS, len(parts), min(cycle, count), len(kept)) - len(kept)])
    )
    if "num_kv_shared_layers" in old:  # each kind twice: once with keys of its own
        kept, new["num_kv_shared_layers"] = kept * 2, len(kept)
    out: dict[str, Any] = {n: [_small(n, v[i]) for i in kept] for n, v in each.items()}
    kinds = out.get("layer_types", [])
    if set(kinds) == {"linear_attention"} and "num_attention_heads" in old:  # what others mix
        kinds[-1] = "full_attention"
    if set(kinds) == {"full_attention"} and old.get("sliding_window"):
        kinds[0] = "sliding_attention"
    out |= {n: [at for at, i in enumerate(kept) if i in v] for n, v in chosen.items()}
    out |= {n: len(kept) for n, v in old.items() if v == count and re.search("layers?$|blocks$", n)}
    spec = getattr(config, "_heterogeneity_spec", None)
    if spec is not None:  # attributes that some layers have otherwise
        out["per_layer_config"] = {
            at: {n: new[n] * v // old[n] for n, v in spec.per_layer_overrides[i].items()}
            for at, i in enumerate(kept)
            if i in spec.per_layer_overrides
        }
    return out


def _ascending(values: list[Any]) -> bool:
    return all(type(v) is int for v in values) and all(a < b for a, b in itertools.pairwise(values))


def _keep_relations(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Keep what was equal, a multiple or a product that way."""
    sizes = {n for n, v in old.items() if type(v) is int and v > 1 and type(new.get(n)) is int}
    wide = next((n for n in ("hidden_size", "d_model", "n_embd") if n in sizes), None)
    heads = sorted(n for n in sizes if n.endswith("heads") or n == "n_head")
    for one in heads:  # where keys are not shared, they are not
        for other in heads:
            family = [re.match(r"linear|mamba|index|", name)[0] for name in (one, other)]
            if family[0] == family[1] and old[one] == old[other] and new[one] < new[other]:
                new[one] = new[other]
    if wide is None:
        return
    for name in sizes:
        times, rest = divmod(old[name], old[wide])
        if new[name] == HIDDEN and times > 1 and not rest:
            new[name] = times * HIDDEN
        if re.search(r"head_dim|d_head|headdim", name) and not re.search(r"qk|^v_", name):
            of = [n for n in heads if old[n] * old[name] in (old[wide], 2 * old[wide])]
            if of and HIDDEN % new[of[0]] == 0:
                new[name] = old[of[0]] * old[name] // old[wide] * HIDDEN // new[of[0]]
    if old.get("qk_rope_head_dim") == old.get("head_dim") is not None:
        new["head_dim"] = new["qk_rope_head_dim"]
    for name, value in old.items():
        if isinstance(value, list | tuple) and _ascending(list(value)) and sum(value) == old[wide]:
            new[name] = [one * HIDDEN // old[wide] for one in value]


@contextmanager
def _towers_may_lack() -> Iterator[None]:
    """A tower for images whose library is not there is empty: text does not pass it."""
    real = AutoModel.from_config

    def from_config(config: PretrainedConfig, **settings: Any) -> torch.nn.Module:
        try:
            return real(config, **settings)
        except ImportError:
            return torch.nn.Identity()

    AutoModel.from_config = from_config
    try:
        yield
    finally:
        AutoModel.from_config = real


def build(kind: str, seed: int = 0, config: PretrainedConfig | None = None) -> PreTrainedModel:
    """A tiny random model whose logits spread enough that its likeliest token is clear."""
    torch.manual_seed(seed)
    whole = AutoConfig.for_model(kind)
    with _towers_may_lack():
        model = class_of(whole)._from_config(config or config_of(kind)).eval()
    # (GPT's first model keeps its causal mask, of four dimensions, under that name.)
    biases = [one for name, one in model.named_buffers() if name.endswith("bias") and one.ndim < 4]
    with torch.no_grad():
        for weight in (*model.parameters(), *(one for one in biases if one.is_floating_point())):
            noise = torch.randn_like(weight)
            weight.copy_(0.12 * noise if weight.ndim > 1 else weight + 0.1 * noise)
    model.generation_config.pad_token_id = 0
    return model
