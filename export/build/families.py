"""Families of models: which fields of a configuration mean what, and what their tensors are called.

A family is a function from what a config.json says to a `Decoder`. It asks for each field that it
knows, with transformers' default; what nobody asked for and is not `HARMLESS` is refused: it may
change what the model says. A field that is null says nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastgen.errors import UnsupportedModel
from fastgen.export.build.decoder import (
    Attention,
    Decoder,
    Embedding,
    FeedForward,
    Head,
    Layer,
    Linear,
    Norm,
    NormPlace,
    Part,
    Rotary,
)
from fastgen.export.build.rotary import turning
from fastgen.export.rewrite.node import FURTHEST

KNOWN_BY = "transformers 5.24"  # whose models the families are proved against

# What concerns training, where a model comes from, how it is loaded, and other tasks.
HARMLESS = re.compile(
    r"architectures|model_type|(torch_)?dtype|transformers_version|use_cache|auto_map"
    r"|\w+_token_id|\w*dropout\w*|\w+_pdrop|layerdrop|initializer_range|init_std|_name_or_path"
    r"|_?model_name_or_path|_commit_hash|_attn_implementation\w*|attn_implementation|task"
    r"|return_dict|output_\w+|is_encoder_decoder|problem_type|id2label|label2id|num_labels"
    r"|chunk_size_feed_forward|gradient_checkpointing|pretraining_tp|tokenizer_class"
    r"|transformers\.js_config|task_specific_params|finetuning_task|unsloth_\w+|prefix"
    r"|is_llama_config|_sliding_window_pattern|_num_labels|cache_implementation|is_decoder"
)
# Fields that only mean what transformers does anyway, at these values.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False, "tie_encoder_decoder": False, "torchscript": False,
    "pruned_heads": {}, "use_bidirectional_attention": False, "rope_interleaved": False,
    "use_mrope": False,
}  # fmt: skip
ANY = object()  # of a field that a family's model does not read, whatever it says
# The same in a family.
NEUTRAL_IN: dict[str, dict[str, Any]] = {
    "cohere": {
        "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True,
        "use_parallel_embedding": ANY, "model_max_length": ANY, "position_embedding_type": ANY,
    },
    "gemma": {"hidden_activation": ANY},
    "gemma2": {"hidden_act": ANY},
    "gemma3_text": {"hidden_act": ANY},
    "gpt2": dict.fromkeys(
        ("reorder_and_upcast_attn", "n_ctx", "summary_activation", "summary_first_dropout",
         "summary_proj_to_labels", "summary_type", "summary_use_proj"), ANY
    ),
    "hunyuan_v1_dense": {
        "use_qk_norm": True, "use_cla": False, "use_rotary_pos_emb": True, "norm_type": "rms",
        "add_classification_head": False, "position_embedding_xdrope": False,
    } | dict.fromkeys(
        ("attention_head_dim", "class_num", "cla_share_factor", "mask_init_id", "im_start_id",
         "im_end_id", "im_newline_id", "org_vocab_size", "pool_type", "text_start_id",
         "text_end_id", "dense_list"), ANY
    ),
    "mistral": {"layer_types": ANY},
    "phi3": {
        "attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
    "smollm3": {"max_window_layers": ANY},
    "starcoder2": {"activation_function": ANY, "mlp_type": "default", "norm_type": "layer_norm"},
}  # fmt: skip
MOST_LAYERS = 1024


class Said:
    """What a configuration says, and which of it was asked for."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """A field; the default where it is not there at all."""
        self.asked.add(name)
        return self.config.get(name, default)

    def suppose(self, **usual: Any) -> None:
        """Take fields to say this where they are not there."""
        self.config = usual | self.config

    def number(self, name: str, default: int | None = None) -> int:
        """A field that is a positive number."""
        found = self.get(name, default)
        found = default if found is None else found
        if type(found) is not int or not 0 < found < 2**31:
            raise UnsupportedModel(f"its config.json has {name} = {found!r}, which is no size")
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.get(name, default))

    def real(self, name: str, default: float) -> float:
        found = self.get(name, default)
        found = default if found is None else found
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise UnsupportedModel(f"its config.json has {name} = {found!r}, which is no number")
        return float(found)

    def check(self) -> None:
        """Refuse what nobody asked for.

        Raises:
            UnsupportedModel: naming the fields.
        """
        neutral = NEUTRAL | NEUTRAL_IN.get(str(self.config.get("model_type")), {})
        unknown = {
            name: value
            for name, value in self.config.items()
            if not (
                value is None
                or name in self.asked
                or (name in neutral and neutral[name] in (ANY, value))
                or (name not in neutral and HARMLESS.fullmatch(name))
            )
        }
        if unknown:
            told = ", ".join(f"{name} = {str(value)[:40]}" for name, value in unknown.items())
            raise UnsupportedModel(f"its config.json says {told}, which the builder does not know")

    # What many families say alike

    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads and their size."""
        heads = self.number("num_attention_heads")
        kv_heads = self.number("num_key_value_heads", heads)
        size = self.number("head_dim", self.number("hidden_size") // heads)
        if heads % kv_heads:
            raise UnsupportedModel(f"it has {heads} query heads over {kv_heads} key heads")
        return heads, kv_heads, size

    def layers(self, name: str = "num_hidden_layers", usual: int | None = None) -> range:
        count = self.number(name, usual)
        if count > MOST_LAYERS:
            raise UnsupportedModel(f"its config.json has {name} = {count}")
        return range(count)

    def rope(
        self,
        size: int,
        theta: float = 10_000.0,
        *,
        part: float | None = None,
        interleaved: bool = False,
        names: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
        adjust: Callable[[dict[str, Any]], dict[str, Any]] = lambda said: said,
    ) -> tuple[Rotary, int, bool]:
        """The rotation, and the number of positions: whether that is a hard limit.

        Args:
            part: how much of a head turns where nothing is said; None where all of it must.
            names: of older fields for what `rope_parameters` say.
            adjust: what the family makes of these.
        """
        positions = self.number("max_position_embeddings")
        said = dict(self.get("rope_scaling") or {}) or dict(self.get("rope_parameters") or {})
        self.asked.add("rope_parameters")
        old_theta, old_part = self.get(names[0]), self.get(names[1])
        said.setdefault("rope_theta", theta if old_theta is None else old_theta)
        if part is not None or old_part is not None:
            said.setdefault("partial_rotary_factor", part if old_part is None else old_part)
        kind = said.setdefault("rope_type", said.get("type") or "default")
        trained = self.get("original_max_position_embeddings")
        if kind in ("llama3", "yarn", "longrope", "su"):
            if trained is not None:
                said["original_max_position_embeddings"] = trained
            said.setdefault("original_max_position_embeddings", positions)
        said = adjust(said)
        if part is None and said.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UnsupportedModel("only a part of its heads turns")
        made = turning(said, size, positions, interleaved)
        if made.limit is None:
            return made.rotary, positions, False
        return made.rotary, min(made.limit, positions), True

    def windows(self, usual: Sequence[str], window: int | None) -> list[int | None]:
        """Of each layer what it sees, by `layer_types`, or as is usual."""
        kinds = self.get("layer_types") or list(usual)
        if len(kinds) != len(usual) or {*kinds} - {"sliding_attention", "full_attention"}:
            raise UnsupportedModel(f"its layers are of the types {sorted(map(str, {*kinds}))}")
        if window is None and "sliding_attention" in kinds:
            raise UnsupportedModel("its layers slide, and sliding_window says nothing")
        return [_window(window) if kind == "sliding_attention" else None for kind in kinds]


def _window(said: int | None) -> int | None:
    if said is not None and (type(said) is not int or said < 1):
        raise UnsupportedModel(f"its config.json has sliding_window = {said!r}")
    return said if said is not None and said < FURTHEST else None


def _linear(name: str, width: int, bias: bool = False) -> Linear:
    return Linear(Part(f"{name}.weight"), width, Part(f"{name}.bias") if bias else None)


def _part(name: str, first: int, last: int, of: int, width: int, bias: bool = False) -> Linear:
    """Of each `of` outputs of a fused matrix those from `first` on."""
    rows = (first, last, of)
    added = Part(f"{name}.bias", rows) if bias else None
    return Linear(Part(f"{name}.weight", rows), width, added)


def _layer_norm(name: str, eps: float) -> Norm:
    return Norm(f"{name}.weight", eps, "layer", f"{name}.bias")


def _rms(name: str, eps: float, plus_one: bool = False) -> Norm:
    return Norm(f"{name}.weight", eps, plus_one=plus_one)


def _gated(place: str, said: Said, width: int, act: str, bias: bool = False) -> FeedForward:
    inner = said.number("intermediate_size")
    return FeedForward(
        up=_linear(f"{place}.up_proj", inner, bias),
        down=_linear(f"{place}.down_proj", width, bias),
        activation=act,
        gate=_linear(f"{place}.gate_proj", inner, bias),
    )


def _gate_up(place: str, said: Said, width: int, act: str) -> FeedForward:
    """Gate and up in one matrix, one after the other."""
    inner = said.number("intermediate_size")
    fused = f"{place}.gate_up_proj"
    return FeedForward(
        up=_part(fused, inner, 2 * inner, 2 * inner, inner),
        down=_linear(f"{place}.down_proj", width),
        activation=act,
        gate=_part(fused, 0, inner, 2 * inner, inner),
    )


def _attention(
    place: str,
    heads: tuple[int, int, int],
    width: int,
    bias: bool = False,
    *,
    out_bias: bool | None = None,
    out: str = "o_proj",
    scale: float | None = None,
    **more: Any,
) -> Attention:
    """Separate matrices under the usual names."""
    count, kv_heads, size = heads
    return Attention(
        heads=count,
        kv_heads=kv_heads,
        head_dim=size,
        scale=size**-0.5 if scale is None else scale,
        query=_linear(f"{place}.q_proj", count * size, bias),
        key=_linear(f"{place}.k_proj", kv_heads * size, bias),
        value=_linear(f"{place}.v_proj", kv_heads * size, bias),
        out=_linear(f"{place}.{out}", width, bias if out_bias is None else out_bias),
        **more,
    )


def _head(said: Said, tied: bool, **more: Any) -> Head:
    """A head called lm_head, or the embedding."""
    return Head(None if said.flag("tie_word_embeddings", tied) else "lm_head.weight", **more)


def _alike(
    said: Said,
    layers: list[Layer],
    norm: Norm | None,
    head: Head,
    limit: tuple[int, bool],
    times: float | None = None,
) -> Decoder:
    """A decoder under the usual names."""
    width = said.number("hidden_size")
    return Decoder(
        vocabulary=said.number("vocab_size"),
        width=width,
        embedding=Embedding("model.embed_tokens.weight", width, times),
        layers=layers,
        norm=norm,
        head=head,
        limit=limit[0],
        hard=limit[1],
    )


def _llama(
    said: Said,
    *,
    theta: float = 10_000.0,
    windows: Sequence[int | None] | None = None,
    bias: bool = False,
    out_bias: bool | None = None,
    feed_bias: bool = False,
    tied: bool = False,
    eps: float = 1e-6,
    names: tuple[str, str] | None = None,
    norm_place: NormPlace = "split",
    rotates: Callable[[int], bool] = lambda number: True,
    interleaved: bool = False,
    adjust: Callable[[dict[str, Any]], dict[str, Any]] = lambda parameters: parameters,
    head: dict[str, Any] | None = None,
    scale: float | None = None,
    times: float | None = None,
    residual: float = 1.0,
) -> Decoder:
    """RMS norms before each part, a gated feed-forward part: what most are.

    Args:
        names: of the norms of queries and keys.
        rotates: whether a layer tells positions.
    """
    width, heads = said.number("hidden_size"), said.heads()
    eps, act = said.real("rms_norm_eps", eps), said.get("hidden_act", "silu")
    rotary, *limit = said.rope(heads[2], theta, interleaved=interleaved, adjust=adjust)
    layers = []
    for number in said.layers():
        place = f"model.layers.{number}"
        more: dict[str, Any] = {}
        if names is not None:
            more = {
                "query_norm": _rms(f"{place}.self_attn.{names[0]}", eps),
                "key_norm": _rms(f"{place}.self_attn.{names[1]}", eps),
                "norm_place": norm_place,
            }
        layers.append(
            Layer(
                attention=_attention(
                    f"{place}.self_attn",
                    heads,
                    width,
                    bias,
                    out_bias=out_bias,
                    scale=scale,
                    rotary=rotary if rotates(number) else None,
                    window=None if windows is None else windows[number],
                    **more,
                ),
                feed=_gated(f"{place}.mlp", said, width, act, feed_bias),
                before_attention=_rms(f"{place}.input_layernorm", eps),
                before_feed=_rms(f"{place}.post_attention_layernorm", eps),
                times=residual,
            )
        )
    made_head = _head(said, tied, **(head or {}))
    return _alike(said, layers, _rms("model.norm", eps), made_head, (limit[0], limit[1]), times)


def llama(said: Said) -> Decoder:
    bias, feed = said.flag("attention_bias"), said.flag("mlp_bias")
    return _llama(said, bias=bias, feed_bias=feed)


def mistral(said: Said) -> Decoder:
    said.number("num_key_value_heads", 8)
    window = _window(said.get("sliding_window", 4096))
    return _llama(said, windows=[window] * len(said.layers()))


def _qwen_windows(said: Said) -> list[int | None]:
    """Of all layers from `max_window_layers` on, if any."""
    window = said.get("sliding_window", 4096)
    window = window if said.flag("use_sliding_window") else None
    first = said.get("max_window_layers", 28)
    usual = [
        "sliding_attention" if window is not None and number >= first else "full_attention"
        for number in said.layers()
    ]
    return said.windows(usual, window)


def qwen2(said: Said) -> Decoder:
    return _llama(said, windows=_qwen_windows(said), bias=True, out_bias=False)


def qwen3(said: Said) -> Decoder:
    said.suppose(head_dim=128)
    bias = said.flag("attention_bias")
    return _llama(said, windows=_qwen_windows(said), bias=bias, names=("q_norm", "k_norm"))


def smollm3(said: Said) -> Decoder:
    said.suppose(num_key_value_heads=4)
    every = said.number("no_rope_layer_interval", 4)
    usual = [int((number + 1) % every != 0) for number in said.layers()]
    turned = said.get("no_rope_layers") or usual
    if len(turned) != len(usual):
        raise UnsupportedModel(f"no_rope_layers are {len(turned)}, and its layers {len(usual)}")
    slides = said.flag("use_sliding_window") and said.get("sliding_window") is not None
    kinds = ["sliding_attention" if slides and not one else "full_attention" for one in turned]
    return _llama(
        said,
        theta=2_000_000.0,
        windows=said.windows(kinds, said.get("sliding_window")),
        tied=True,
        bias=said.flag("attention_bias"),
        feed_bias=said.flag("mlp_bias"),
        rotates=lambda number: bool(turned[number]),
    )


def ernie4_5(said: Said) -> Decoder:
    said.suppose(head_dim=128, num_key_value_heads=2)
    bias = said.flag("use_bias")
    return _llama(
        said, theta=500_000.0, bias=bias, feed_bias=bias, tied=True, eps=1e-5, interleaved=True
    )


def granite(said: Said) -> Decoder:
    scaling = said.real("logits_scaling", 1.0)
    times = said.real("embedding_multiplier", 1.0)
    return _llama(
        said,
        bias=said.flag("attention_bias"),
        feed_bias=said.flag("mlp_bias"),
        scale=said.real("attention_multiplier", 1.0),
        times=None if times == 1 else times,
        residual=said.real("residual_multiplier", 1.0),
        head={"divide": None if scaling == 1 else scaling},
    )


def hunyuan(said: Said) -> Decoder:
    def adjust(parameters: dict[str, Any]) -> dict[str, Any]:
        if parameters["rope_type"] == "dynamic" and parameters.get("alpha"):
            return parameters | {"rope_type": "ntk_alpha"}
        return parameters

    return _llama(
        said,
        bias=said.flag("attention_bias"),
        eps=1e-5,
        adjust=adjust,
        names=("query_layernorm", "key_layernorm"),
        norm_place="turned",
    )


def phi3(said: Said) -> Decoder:
    width, (count, kv_heads, size) = said.number("hidden_size"), said.heads()
    eps, act = said.real("rms_norm_eps", 1e-5), said.get("hidden_act", "silu")
    said.suppose(original_max_position_embeddings=4096)

    def adjust(parameters: dict[str, Any]) -> dict[str, Any]:
        kind = parameters["rope_type"]
        return parameters | ({"rope_type": "longrope"} if kind in ("su", "yarn") else {})

    rotary, *limit = said.rope(size, part=1.0, adjust=adjust)
    window = _window(said.get("sliding_window"))
    ends = [0, count * size, (count + kv_heads) * size, (count + 2 * kv_heads) * size]
    layers = []
    for number in said.layers():
        place = f"model.layers.{number}"
        query, key, value = (
            _part(f"{place}.self_attn.qkv_proj", first, last, ends[3], last - first)
            for first, last in itertools.pairwise(ends)
        )
        layers.append(
            Layer(
                attention=Attention(
                    count,
                    kv_heads,
                    size,
                    size**-0.5,
                    query,
                    key,
                    value,
                    _linear(f"{place}.self_attn.o_proj", width),
                    rotary,
                    window,
                ),
                feed=_gate_up(f"{place}.mlp", said, width, act),
                before_attention=_rms(f"{place}.input_layernorm", eps),
                before_feed=_rms(f"{place}.post_attention_layernorm", eps),
            )
        )
    return _alike(said, layers, _rms("model.norm", eps), _head(said, False), (limit[0], limit[1]))


def _gemma(
    said: Said,
    act: str,
    rotaries: Sequence[Rotary],
    windows: Sequence[int | None],
    limit: tuple[int, bool],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    cap: float | None = None,
    posts: bool = False,
    norms: bool = False,
) -> Decoder:
    """RMS norms to whose weights 1 is added, embeddings that are scaled."""
    width, heads, eps = said.number("hidden_size"), said.heads(), said.real("rms_norm_eps", 1e-6)
    bias = said.flag("attention_bias")
    layers = []
    for number in said.layers():
        place = f"model.layers.{number}"
        more: dict[str, Any] = {}
        if norms:
            more = {
                "query_norm": _rms(f"{place}.self_attn.q_norm", eps, True),
                "key_norm": _rms(f"{place}.self_attn.k_norm", eps, True),
                "norm_place": "heads",
            }
        before = "pre_feedforward_layernorm" if posts else "post_attention_layernorm"
        layer = Layer(
            attention=_attention(
                f"{place}.self_attn",
                heads,
                width,
                bias,
                scale=scale,
                rotary=rotaries[number],
                window=windows[number],
                softcap=softcap,
                **more,
            ),
            feed=_gated(f"{place}.mlp", said, width, act),
            before_attention=_rms(f"{place}.input_layernorm", eps, True),
            before_feed=_rms(f"{place}.{before}", eps, True),
        )
        if posts:
            layer = replace(
                layer,
                after_attention=_rms(f"{place}.post_attention_layernorm", eps, True),
                after_feed=_rms(f"{place}.post_feedforward_layernorm", eps, True),
            )
        layers.append(layer)
    head = _head(said, True, cap=cap)
    return _alike(said, layers, _rms("model.norm", eps, True), head, limit, width**0.5)


def gemma(said: Said) -> Decoder:
    said.suppose(head_dim=256, num_key_value_heads=16)
    act = said.get("hidden_act", "gelu_pytorch_tanh")
    act = "gelu_pytorch_tanh" if act == "gelu" else act  # what the first releases meant
    rotary, *limit = said.rope(said.heads()[2])
    count = len(said.layers())
    return _gemma(said, act, [rotary] * count, [None] * count, (limit[0], limit[1]))


def gemma2(said: Said) -> Decoder:
    said.suppose(
        head_dim=256,
        num_key_value_heads=4,
        sliding_window=4096,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )
    count = len(said.layers())
    usual = [("full_attention", "sliding_attention")[(at + 1) % 2] for at in range(count)]
    rotary, *limit = said.rope(said.heads()[2])
    return _gemma(
        said,
        said.get("hidden_activation", "gelu_pytorch_tanh"),
        [rotary] * count,
        said.windows(usual, said.get("sliding_window")),
        (limit[0], limit[1]),
        posts=True,
        scale=said.real("query_pre_attn_scalar", 256) ** -0.5,
        softcap=said.get("attn_logit_softcapping") or 0.0,
        cap=said.get("final_logit_softcapping"),
    )


def gemma3(said: Said) -> Decoder:
    said.suppose(head_dim=256, num_key_value_heads=4, sliding_window=4096)
    every, count = said.number("sliding_window_pattern", 6), len(said.layers())
    usual = ["sliding_attention" if (at + 1) % every else "full_attention" for at in range(count)]
    kinds = said.get("layer_types") or usual
    windows, size = said.windows(usual, said.get("sliding_window")), said.heads()[2]
    positions = said.number("max_position_embeddings")
    given = said.get("rope_parameters") or {}
    if {*given} - {"sliding_attention", "full_attention"}:
        raise UnsupportedModel("its rotations are not told apart by the layers' types")
    old = {
        "sliding_attention": ("rope_local_base_freq", 10_000.0),
        "full_attention": ("rope_theta", 1_000_000.0),
    }
    scaling = said.get("rope_scaling")
    rotaries, limits = {}, []
    for kind, (name, theta) in old.items():
        parameters = dict(given.get(kind) or {})
        if kind == "full_attention" and scaling:
            parameters |= scaling
        parameters.setdefault("rope_theta", said.get(name, theta))
        chosen = parameters.setdefault("rope_type", parameters.get("type") or "default")
        if chosen in ("llama3", "yarn", "longrope"):
            parameters.setdefault("original_max_position_embeddings", positions)
        made = turning(parameters, size, positions)
        rotaries[kind] = made.rotary
        limits += [made.limit] if made.limit is not None else []
    return _gemma(
        said,
        said.get("hidden_activation", "gelu_pytorch_tanh"),
        [rotaries[kind] for kind in kinds],
        windows,
        (min([positions, *limits]), bool(limits)),
        posts=True,
        norms=True,
        scale=said.real("query_pre_attn_scalar", 256) ** -0.5,
        softcap=said.get("attn_logit_softcapping") or 0.0,
        cap=said.get("final_logit_softcapping"),
    )


def gpt2(said: Said) -> Decoder:
    width, heads = said.number("n_embd", 768), said.number("n_head", 12)
    size, inner = width // heads, said.number("n_inner", 4 * width)
    eps, act = said.real("layer_norm_epsilon", 1e-5), said.get("activation_function", "gelu_new")
    scaled, by_layer = (
        said.flag("scale_attn_weights", True),
        said.flag("scale_attn_by_inverse_layer_idx"),
    )

    def flat(place: str, out: int, rows: tuple[int, int, int] | None = None) -> Linear:
        bias = Part(f"{place}.bias", rows)
        return Linear(Part(f"{place}.weight", rows, flat=True), out, bias)

    layers = []
    for number in said.layers("n_layer", 12):
        place = f"transformer.h.{number}"
        query, key, value = (
            flat(f"{place}.attn.c_attn", width, (at * width, (at + 1) * width, 3 * width))
            for at in range(3)
        )
        scale = (size**-0.5 if scaled else 1.0) / (number + 1 if by_layer else 1)
        layers.append(
            Layer(
                attention=Attention(
                    heads,
                    heads,
                    size,
                    scale,
                    query,
                    key,
                    value,
                    flat(f"{place}.attn.c_proj", width),
                ),
                feed=FeedForward(
                    flat(f"{place}.mlp.c_fc", inner), flat(f"{place}.mlp.c_proj", width), act
                ),
                before_attention=_layer_norm(f"{place}.ln_1", eps),
                before_feed=_layer_norm(f"{place}.ln_2", eps),
            )
        )
    limit = said.number("n_positions", 1024)
    return Decoder(
        vocabulary=said.number("vocab_size"),
        width=width,
        embedding=Embedding("transformer.wte.weight", width, positions="transformer.wpe.weight"),
        layers=layers,
        norm=_layer_norm("transformer.ln_f", eps),
        head=_head(said, True),
        limit=limit,
        hard=True,
        base="transformer.",
        ignored=(r".*attn\.(masked_)?bias",),
    )


def gpt_neox(said: Said) -> Decoder:
    width, heads = said.number("hidden_size"), said.number("num_attention_heads")
    size, inner = width // heads, said.number("intermediate_size")
    eps, act = said.real("layer_norm_eps", 1e-5), said.get("hidden_act", "gelu")
    bias, parallel = said.flag("attention_bias", True), said.flag("use_parallel_residual", True)
    rotary, *limit = said.rope(size, part=0.25, names=("rotary_emb_base", "rotary_pct"))
    layers = []
    for number in said.layers():
        place = f"gpt_neox.layers.{number}"
        query, key, value = (
            _part(
                f"{place}.attention.query_key_value",
                at * size,
                (at + 1) * size,
                3 * size,
                width,
                bias,
            )
            for at in range(3)
        )
        layers.append(
            Layer(
                attention=Attention(
                    heads,
                    heads,
                    size,
                    size**-0.5,
                    query,
                    key,
                    value,
                    _linear(f"{place}.attention.dense", width, bias),
                    rotary,
                ),
                feed=FeedForward(
                    _linear(f"{place}.mlp.dense_h_to_4h", inner, True),
                    _linear(f"{place}.mlp.dense_4h_to_h", width, True),
                    act,
                ),
                before_attention=_layer_norm(f"{place}.input_layernorm", eps),
                before_feed=_layer_norm(f"{place}.post_attention_layernorm", eps),
                parallel="attention feed stream" if parallel else "",
            )
        )
    return Decoder(
        vocabulary=said.number("vocab_size"),
        width=width,
        embedding=Embedding("gpt_neox.embed_in.weight", width),
        layers=layers,
        norm=_layer_norm("gpt_neox.final_layer_norm", eps),
        head=_head(said, False),
        limit=limit[0],
        hard=limit[1],
        base="gpt_neox.",
        ignored=(r".*rotary_emb\.inv_freq", r".*attention\.(masked_)?bias"),
        also={"lm_head.weight": "embed_out.weight"},
    )


def opt(said: Said) -> Decoder:
    width, heads = said.number("hidden_size"), said.number("num_attention_heads")
    size, inner = width // heads, said.number("ffn_dim")
    act, bias = said.get("activation_function", "relu"), said.flag("enable_bias", True)
    first = said.flag("do_layer_norm_before", True)
    outer = said.number("word_embed_proj_dim", width)
    if not said.flag("layer_norm_elementwise_affine", True):
        raise UnsupportedModel("its norms have no weights")
    removed, base = said.flag("_remove_final_layer_norm"), "model.decoder."
    layers = []
    for number in said.layers():
        place = f"{base}layers.{number}"
        norms = [_layer_norm(f"{place}.{name}", 1e-5) for name in OPT_NORMS]
        before, after = (norms, [None, None]) if first else ([None, None], norms)
        layers.append(
            Layer(
                attention=_attention(
                    f"{place}.self_attn", (heads, heads, size), width, bias, out="out_proj"
                ),
                feed=FeedForward(
                    _linear(f"{place}.fc1", inner, bias), _linear(f"{place}.fc2", width, bias), act
                ),
                before_attention=before[0],
                before_feed=before[1],
                after_attention=after[0],
                after_feed=after[1],
                norms_stream=True,
            )
        )
    apart = outer != width
    return Decoder(
        vocabulary=said.number("vocab_size"),
        width=width,
        embedding=Embedding(
            f"{base}embed_tokens.weight",
            outer,
            positions=f"{base}embed_positions.weight",
            offset=2,
            project=_linear(f"{base}project_in", width) if apart else None,
        ),
        layers=layers,
        norm=_layer_norm(f"{base}final_layer_norm", 1e-5) if first and not removed else None,
        head=_head(said, True, project=_linear(f"{base}project_out", outer) if apart else None),
        limit=said.number("max_position_embeddings"),
        hard=True,
    )


OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def _biased(
    said: Said,
    feeds: Callable[[str, int], FeedForward],
    *,
    eps: float,
    bias: bool,
    out: str = "o_proj",
    out_bias: bool,
    last: str = "model.norm",
    part: float | None = None,
    window: int | None = None,
    parallel: Any = "",
    tied: bool = False,
    head: dict[str, Any] | None = None,
    theta: float = 10_000.0,
    kind: Any = "layer",
    interleaved: bool = False,
) -> Decoder:
    """LayerNorms, with rotations: of a part of each head, say."""
    width, heads = said.number("hidden_size"), said.heads()
    rotary, *limit = said.rope(heads[2], theta, part=part, interleaved=interleaved)

    def norm(name: str) -> Norm:
        if kind == "centred":
            return Norm(f"{name}.weight", eps, "centred")
        return _layer_norm(name, eps)

    layers = []
    for number in said.layers():
        place = f"model.layers.{number}"
        layers.append(
            Layer(
                attention=_attention(
                    f"{place}.self_attn",
                    heads,
                    width,
                    bias,
                    out=out,
                    out_bias=out_bias,
                    rotary=rotary,
                    window=window,
                ),
                feed=feeds(f"{place}.mlp", width),
                before_attention=norm(f"{place}.input_layernorm"),
                before_feed=None if parallel else norm(f"{place}.post_attention_layernorm"),
                parallel=parallel,
            )
        )
    made_head = _head(said, tied, **(head or {}))
    return _alike(said, layers, norm(last), made_head, (limit[0], limit[1]))


def phi(said: Said) -> Decoder:
    if said.flag("qk_layernorm"):
        raise UnsupportedModel("its queries and keys are normed head by head")
    inner, act = said.number("intermediate_size"), said.get("hidden_act", "gelu_new")
    return _biased(
        said,
        lambda place, width: FeedForward(
            _linear(f"{place}.fc1", inner, True), _linear(f"{place}.fc2", width, True), act
        ),
        eps=said.real("layer_norm_eps", 1e-5),
        bias=True,
        out="dense",
        out_bias=True,
        part=0.5,
        last="model.final_layernorm",
        parallel="attention feed stream",
        head={"bias": "lm_head.bias"},
    )


def starcoder2(said: Said) -> Decoder:
    said.suppose(num_key_value_heads=2)
    inner, act = said.number("intermediate_size"), said.get("hidden_act", "gelu_pytorch_tanh")
    bias = said.flag("use_bias", True)
    return _biased(
        said,
        lambda place, width: FeedForward(
            _linear(f"{place}.c_fc", inner, bias), _linear(f"{place}.c_proj", width, bias), act
        ),
        eps=said.real("norm_epsilon", 1e-5),
        bias=bias,
        out_bias=bias,
        tied=True,
        window=_window(said.get("sliding_window")),
    )


def stablelm(said: Said) -> Decoder:
    if said.flag("qk_layernorm"):
        raise UnsupportedModel("its queries and keys are normed head by head")
    act, parallel = said.get("hidden_act", "silu"), said.flag("use_parallel_residual")
    return _biased(
        said,
        lambda place, width: _gated(place, said, width, act),
        eps=said.real("layer_norm_eps", 1e-5),
        bias=said.flag("use_qkv_bias"),
        out_bias=False,
        part=0.25,
        parallel="stream attention feed" if parallel else "",
    )


def cohere(said: Said) -> Decoder:
    if said.flag("use_qk_norm"):
        raise UnsupportedModel("its queries and keys are normed head by head")
    act, bias = said.get("hidden_act", "silu"), said.flag("attention_bias")
    return _biased(
        said,
        lambda place, width: _gated(place, said, width, act),
        eps=said.real("layer_norm_eps", 1e-5),
        bias=bias,
        out_bias=bias,
        tied=True,
        parallel="stream attention feed",
        kind="centred",
        theta=500_000.0,
        interleaved=True,
        head={"times": said.real("logit_scale", 0.0625)},
    )


def olmo2(said: Said) -> Decoder:
    eps = said.real("rms_norm_eps", 1e-5)
    bias = said.flag("attention_bias")
    return _normed_after(said, eps, bias, "together")


def exaone4(said: Said) -> Decoder:
    """Layers that see everything are not told positions, where others see a window."""
    window, every = said.get("sliding_window", 4096), said.get("sliding_window_pattern", 4)
    if not said.get("layer_types") and window is not None and type(every) is not int:
        raise UnsupportedModel(f"its config.json has sliding_window_pattern = {every!r}")
    usual = [
        "sliding_attention"
        if window is not None and every and (at + 1) % every
        else "full_attention"
        for at in said.layers()
    ]
    kinds = said.get("layer_types") or usual
    return _normed_after(
        said,
        said.real("rms_norm_eps", 1e-5),
        False,
        "heads",
        said.windows(usual, window),
        lambda number: window is None or kinds[number] == "sliding_attention",
    )


def _normed_after(
    said: Said,
    eps: float,
    bias: bool,
    place_of_norms: NormPlace,
    windows: Sequence[int | None] | None = None,
    rotates: Callable[[int], bool] = lambda number: True,
) -> Decoder:
    """RMS norms of what each part gives, and of queries and keys."""
    width, heads, act = said.number("hidden_size"), said.heads(), said.get("hidden_act", "silu")
    rotary, *limit = said.rope(heads[2])
    layers = []
    for number in said.layers():
        place = f"model.layers.{number}"
        layers.append(
            Layer(
                attention=_attention(
                    f"{place}.self_attn",
                    heads,
                    width,
                    bias,
                    rotary=rotary if rotates(number) else None,
                    window=None if windows is None else windows[number],
                    query_norm=_rms(f"{place}.self_attn.q_norm", eps),
                    key_norm=_rms(f"{place}.self_attn.k_norm", eps),
                    norm_place=place_of_norms,
                ),
                feed=_gated(f"{place}.mlp", said, width, act),
                after_attention=_rms(f"{place}.post_attention_layernorm", eps),
                after_feed=_rms(f"{place}.post_feedforward_layernorm", eps),
            )
        )
    return _alike(said, layers, _rms("model.norm", eps), _head(said, False), (limit[0], limit[1]))


def glm4(said: Said) -> Decoder:
    said.suppose(head_dim=128, num_key_value_heads=2)
    width, heads = said.number("hidden_size"), said.heads()
    eps, act = said.real("rms_norm_eps", 0.00000015625), said.get("hidden_act", "silu")
    rotary, *limit = said.rope(heads[2], part=0.5, interleaved=True)
    bias, layers = said.flag("attention_bias", True), []
    for number in said.layers():
        place = f"model.layers.{number}"
        layers.append(
            Layer(
                attention=_attention(
                    f"{place}.self_attn", heads, width, bias, out_bias=False, rotary=rotary
                ),
                feed=_gate_up(f"{place}.mlp", said, width, act),
                before_attention=_rms(f"{place}.input_layernorm", eps),
                after_attention=_rms(f"{place}.post_self_attn_layernorm", eps),
                before_feed=_rms(f"{place}.post_attention_layernorm", eps),
                after_feed=_rms(f"{place}.post_mlp_layernorm", eps),
            )
        )
    return _alike(said, layers, _rms("model.norm", eps), _head(said, False), (limit[0], limit[1]))


FAMILIES: dict[str, Callable[[Said], Decoder]] = {
    "cohere": cohere, "ernie4_5": ernie4_5, "exaone4": exaone4, "gemma": gemma, "gemma2": gemma2,
    "gemma3_text": gemma3, "glm4": glm4, "gpt2": gpt2, "gpt_neox": gpt_neox, "granite": granite,
    "hunyuan_v1_dense": hunyuan, "llama": llama, "mistral": mistral, "olmo2": olmo2, "opt": opt,
    "phi": phi, "phi3": phi3, "qwen2": qwen2, "qwen3": qwen3, "smollm3": smollm3,
    "stablelm": stablelm, "starcoder2": starcoder2,
}  # fmt: skip


IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What these are in each family where config.json does not say (None: nothing).
USUAL_IDS: dict[str, tuple[int | None, int | list[int] | None, int | None]] = {
    "cohere": (5, 255001, 0), "ernie4_5": (1, 2, 0), "exaone4": (0, 2, None), "gemma": (2, 1, 0),
    "gemma2": (2, 1, 0), "gemma3_text": (2, 1, 0), "glm4": (None, [151329, 151336, 151338], 151329),
    "gpt2": (50256, 50256, None), "gpt_neox": (0, 2, None), "granite": (1, 2, None),
    "hunyuan_v1_dense": (1, 2, 0), "llama": (1, 2, None), "mistral": (1, 2, None),
    "olmo2": (None, 50279, 1), "opt": (2, 2, 1), "phi": (1, 2, None), "phi3": (1, 32000, 32000),
    "qwen2": (None, None, None), "qwen3": (None, None, None), "smollm3": (128000, 128001, 128004),
    "stablelm": (0, 0, None), "starcoder2": (50256, 50256, None),
}  # fmt: skip


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the ids that its family has where it says nothing."""
    usual = USUAL_IDS.get(str(config.get("model_type")), ())
    ids = {name: one for name, one in zip(IDS, usual, strict=False) if one is not None}
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
    said = Said(dict(config))
    try:
        decoder = family(said)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UnsupportedModel):
            raise
        raise UnsupportedModel(f"its config.json contradicts itself: {error!r}") from error
    said.check()
    return decoder
