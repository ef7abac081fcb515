"""Llama and its kin: RMS norms in front of attention and a gated feed-forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from fastgen.errors import UnsupportedModel
from fastgen.export.build.configuration import Configuration, window_of
from fastgen.export.build.decoder import Attention, Decoder, Experts, FeedForward, Layer, NormPlace
from fastgen.export.build.pieces import (
    attention_of,
    fused_part,
    gate_up_feed,
    gated_feed,
    head_of,
    linear,
    rms_norm,
    usual_decoder,
)


def llama_like(
    config: Configuration,
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
    feeds: Callable[[int, str], FeedForward | Experts] | None = None,
    attends: Callable[[str], dict[str, Any]] = lambda prefix: {},
) -> Decoder:
    """RMS norms before each part, a gated feed-forward part: what most are.

    Args:
        names: of the norms of queries and keys.
        rotates: whether a layer tells positions.
        feeds: another feed-forward part, by a layer's number and the prefix of its tensors' names.
        attends: what else `Attention` has, by the prefix of its tensors' names.
    """
    width, heads = config.number("hidden_size"), config.heads()
    eps, act = config.real("rms_norm_eps", eps), config.get("hidden_act", "silu")
    rotary, limit = config.rope(heads[2], theta, interleaved=interleaved, adjust=adjust)
    layers = []
    for number in config.layers():
        prefix = f"model.layers.{number}"
        more = attends(f"{prefix}.self_attn")
        if names is not None:
            more |= {
                "query_norm": rms_norm(f"{prefix}.self_attn.{names[0]}", eps),
                "key_norm": rms_norm(f"{prefix}.self_attn.{names[1]}", eps),
                "norm_place": norm_place,
            }
        layers.append(
            Layer(
                attention=attention_of(
                    f"{prefix}.self_attn",
                    heads,
                    width,
                    bias,
                    out_bias=out_bias,
                    scale=scale,
                    rotary=rotary if rotates(number) else None,
                    window=None if windows is None else windows[number],
                    **more,
                ),
                feed=gated_feed(f"{prefix}.mlp", config, width, act, feed_bias)
                if feeds is None
                else feeds(number, prefix),
                before_attention=rms_norm(f"{prefix}.input_layernorm", eps),
                before_feed=rms_norm(f"{prefix}.post_attention_layernorm", eps),
                times=residual,
            )
        )
    made_head = head_of(config, tied, **(head or {}))
    return usual_decoder(config, layers, rms_norm("model.norm", eps), made_head, limit, times)


def llama(config: Configuration) -> Decoder:
    bias, feed = config.flag("attention_bias"), config.flag("mlp_bias")
    return llama_like(config, bias=bias, feed_bias=feed)


def mistral(config: Configuration) -> Decoder:
    config.number("num_key_value_heads", 8)
    window = window_of(config.get("sliding_window", 4096))
    return llama_like(config, windows=[window] * len(config.layers()))


def _qwen_windows(config: Configuration) -> list[int | None]:
    """The windows of layers, those from `max_window_layers` on; None for a layer without."""
    window = config.get("sliding_window", 4096)
    window = window if config.flag("use_sliding_window") else None
    first = config.get("max_window_layers", 28)
    usual = [
        "sliding_attention" if window is not None and number >= first else "full_attention"
        for number in config.layers()
    ]
    return config.windows(usual, window)


def qwen2(config: Configuration) -> Decoder:
    return llama_like(config, windows=_qwen_windows(config), bias=True, out_bias=False)


def qwen3(config: Configuration) -> Decoder:
    config.suppose(head_dim=128)
    bias = config.flag("attention_bias")
    return llama_like(config, windows=_qwen_windows(config), bias=bias, names=("q_norm", "k_norm"))


def smollm3(config: Configuration) -> Decoder:
    config.suppose(num_key_value_heads=4)
    every = config.number("no_rope_layer_interval", 4)
    usual = [int((number + 1) % every != 0) for number in config.layers()]
    turned = config.get("no_rope_layers") or usual
    if len(turned) != len(usual):
        raise UnsupportedModel(f"no_rope_layers are {len(turned)}, and its layers {len(usual)}")
    slides = config.flag("use_sliding_window") and config.get("sliding_window") is not None
    kinds = ["sliding_attention" if slides and not turns else "full_attention" for turns in turned]
    return llama_like(
        config,
        theta=2_000_000.0,
        windows=config.windows(kinds, config.get("sliding_window")),
        tied=True,
        bias=config.flag("attention_bias"),
        feed_bias=config.flag("mlp_bias"),
        rotates=lambda number: bool(turned[number]),
    )


def ernie4_5(config: Configuration) -> Decoder:
    config.suppose(head_dim=128, num_key_value_heads=2)
    bias = config.flag("use_bias")
    return llama_like(
        config, theta=500_000.0, bias=bias, feed_bias=bias, tied=True, eps=1e-5, interleaved=True
    )


def granite(config: Configuration) -> Decoder:
    scaling = config.real("logits_scaling", 1.0)
    times = config.real("embedding_multiplier", 1.0)
    return llama_like(
        config,
        bias=config.flag("attention_bias"),
        feed_bias=config.flag("mlp_bias"),
        scale=config.real("attention_multiplier", 1.0),
        times=None if times == 1 else times,
        residual=config.real("residual_multiplier", 1.0),
        head={"divide": None if scaling == 1 else scaling},
    )


def hunyuan(config: Configuration) -> Decoder:
    def adjust(parameters: dict[str, Any]) -> dict[str, Any]:
        if parameters["rope_type"] == "dynamic" and parameters.get("alpha"):
            return parameters | {"rope_type": "ntk_alpha"}
        return parameters

    return llama_like(
        config,
        bias=config.flag("attention_bias"),
        eps=1e-5,
        adjust=adjust,
        names=("query_layernorm", "key_layernorm"),
        norm_place="turned",
    )


def phi3(config: Configuration) -> Decoder:
    width, (count, kv_heads, size) = config.number("hidden_size"), config.heads()
    eps, act = config.real("rms_norm_eps", 1e-5), config.get("hidden_act", "silu")
    config.suppose(original_max_position_embeddings=4096)

    def adjust(parameters: dict[str, Any]) -> dict[str, Any]:
        kind = parameters["rope_type"]
        return parameters | ({"rope_type": "longrope"} if kind in ("su", "yarn") else {})

    rotary, limit = config.rope(size, part=1.0, adjust=adjust)
    window = window_of(config.get("sliding_window"))
    ends = [0, count * size, (count + kv_heads) * size, (count + 2 * kv_heads) * size]
    layers = []
    for number in config.layers():
        prefix = f"model.layers.{number}"
        query, key, value = (
            fused_part(f"{prefix}.self_attn.qkv_proj", first, last, ends[3], last - first)
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
                    linear(f"{prefix}.self_attn.o_proj", width),
                    rotary,
                    window,
                ),
                feed=gate_up_feed(f"{prefix}.mlp", config, width, act),
                before_attention=rms_norm(f"{prefix}.input_layernorm", eps),
                before_feed=rms_norm(f"{prefix}.post_attention_layernorm", eps),
            )
        )
    return usual_decoder(config, layers, rms_norm("model.norm", eps), head_of(config, False), limit)
