"""Gemma: scaled embeddings, norms that add one, windows, and caps on scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastgen.errors import UnsupportedModel
from fastgen.export.build.configuration import Configuration
from fastgen.export.build.decoder import Decoder, Layer, Rotary
from fastgen.export.build.pieces import attention_of, gated_feed, head_of, rms_norm, usual_decoder
from fastgen.export.build.rotary import turning


def _gemma(
    config: Configuration,
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
    width, heads, eps = (
        config.number("hidden_size"),
        config.heads(),
        config.real("rms_norm_eps", 1e-6),
    )
    bias = config.flag("attention_bias")
    layers = []
    for number in config.layers():
        prefix = f"model.layers.{number}"
        more: dict[str, Any] = {}
        if norms:
            more = {
                "query_norm": rms_norm(f"{prefix}.self_attn.q_norm", eps, True),
                "key_norm": rms_norm(f"{prefix}.self_attn.k_norm", eps, True),
                "norm_place": "heads",
            }
        before = "pre_feedforward_layernorm" if posts else "post_attention_layernorm"
        layer = Layer(
            attention=attention_of(
                f"{prefix}.self_attn",
                heads,
                width,
                bias,
                scale=scale,
                rotary=rotaries[number],
                window=windows[number],
                softcap=softcap,
                **more,
            ),
            feed=gated_feed(f"{prefix}.mlp", config, width, act),
            before_attention=rms_norm(f"{prefix}.input_layernorm", eps, True),
            before_feed=rms_norm(f"{prefix}.{before}", eps, True),
        )
        if posts:
            layer = replace(
                layer,
                after_attention=rms_norm(f"{prefix}.post_attention_layernorm", eps, True),
                after_feed=rms_norm(f"{prefix}.post_feedforward_layernorm", eps, True),
            )
        layers.append(layer)
    head = head_of(config, True, cap=cap)
    return usual_decoder(config, layers, rms_norm("model.norm", eps, True), head, limit, width**0.5)


def gemma(config: Configuration) -> Decoder:
    config.suppose(head_dim=256, num_key_value_heads=16)
    act = config.get("hidden_act", "gelu_pytorch_tanh")
    act = "gelu_pytorch_tanh" if act == "gelu" else act  # what the first releases meant
    rotary, limit = config.rope(config.heads()[2])
    count = len(config.layers())
    return _gemma(config, act, [rotary] * count, [None] * count, limit)


def gemma2(config: Configuration) -> Decoder:
    config.suppose(
        head_dim=256,
        num_key_value_heads=4,
        sliding_window=4096,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )
    count = len(config.layers())
    usual = [("full_attention", "sliding_attention")[(at + 1) % 2] for at in range(count)]
    rotary, limit = config.rope(config.heads()[2])
    return _gemma(
        config,
        config.get("hidden_activation", "gelu_pytorch_tanh"),
        [rotary] * count,
        config.windows(usual, config.get("sliding_window")),
        limit,
        posts=True,
        scale=config.real("query_pre_attn_scalar", 256) ** -0.5,
        softcap=config.get("attn_logit_softcapping") or 0.0,
        cap=config.get("final_logit_softcapping"),
    )


def gemma3(config: Configuration) -> Decoder:
    config.suppose(head_dim=256, num_key_value_heads=4, sliding_window=4096)
    every, count = config.number("sliding_window_pattern", 6), len(config.layers())
    usual = ["sliding_attention" if (at + 1) % every else "full_attention" for at in range(count)]
    kinds = config.get("layer_types") or usual
    windows, size = config.windows(usual, config.get("sliding_window")), config.heads()[2]
    positions = config.number("max_position_embeddings")
    given = config.get("rope_parameters") or {}
    if {*given} - {"sliding_attention", "full_attention"}:
        raise UnsupportedModel("its rotations are not told apart by the layers' types")
    old = {
        "sliding_attention": ("rope_local_base_freq", 10_000.0),
        "full_attention": ("rope_theta", 1_000_000.0),
    }
    scaling = config.get("rope_scaling")
    rotaries, limits = {}, []
    for kind, (name, theta) in old.items():
        parameters = dict(given.get(kind) or {})
        if kind == "full_attention" and scaling:
            parameters |= scaling
        parameters.setdefault("rope_theta", config.get(name, theta))
        chosen = parameters.setdefault("rope_type", parameters.get("type") or "default")
        if chosen in ("llama3", "yarn", "longrope"):
            parameters.setdefault("original_max_position_embeddings", positions)
        turned = turning(parameters, size, positions)
        rotaries[kind] = turned.rotary
        limits += [turned.limit] if turned.limit is not None else []
    return _gemma(
        config,
        config.get("hidden_activation", "gelu_pytorch_tanh"),
        [rotaries[kind] for kind in kinds],
        windows,
        (min([positions, *limits]), bool(limits)),
        posts=True,
        norms=True,
        scale=config.real("query_pre_attn_scalar", 256) ** -0.5,
        softcap=config.get("attn_logit_softcapping") or 0.0,
        cap=config.get("final_logit_softcapping"),
    )
