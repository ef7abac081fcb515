"""Families with norms behind attention and feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastgen.errors import UnsupportedModel
from fastgen.export.build.configuration import Configuration
from fastgen.export.build.decoder import Decoder, Layer, NormPlace
from fastgen.export.build.pieces import (
    attention_of,
    gate_up_feed,
    gated_feed,
    head_of,
    rms_norm,
    usual_decoder,
)


def olmo2(config: Configuration) -> Decoder:
    eps = config.real("rms_norm_eps", 1e-5)
    bias = config.flag("attention_bias")
    return _normed_after(config, eps, bias, "together")


def exaone4(config: Configuration) -> Decoder:
    """Layers that see everything are not told positions, where others see a window."""
    window, every = config.get("sliding_window", 4096), config.get("sliding_window_pattern", 4)
    if not config.get("layer_types") and window is not None and type(every) is not int:
        raise UnsupportedModel(f"its config.json has sliding_window_pattern = {every!r}")
    usual = [
        "sliding_attention"
        if window is not None and every and (at + 1) % every
        else "full_attention"
        for at in config.layers()
    ]
    kinds = config.get("layer_types") or usual
    return _normed_after(
        config,
        config.real("rms_norm_eps", 1e-5),
        False,
        "heads",
        config.windows(usual, window),
        lambda number: window is None or kinds[number] == "sliding_attention",
    )


def _normed_after(
    config: Configuration,
    eps: float,
    bias: bool,
    norm_place: NormPlace,
    windows: Sequence[int | None] | None = None,
    rotates: Callable[[int], bool] = lambda number: True,
) -> Decoder:
    """RMS norms behind attention and feed-forward, and of queries and keys."""
    width, heads, act = (
        config.number("hidden_size"),
        config.heads(),
        config.get("hidden_act", "silu"),
    )
    rotary, limit = config.rope(heads[2])
    layers = []
    for number in config.layers():
        prefix = f"model.layers.{number}"
        layers.append(
            Layer(
                attention=attention_of(
                    f"{prefix}.self_attn",
                    heads,
                    width,
                    bias,
                    rotary=rotary if rotates(number) else None,
                    window=None if windows is None else windows[number],
                    query_norm=rms_norm(f"{prefix}.self_attn.q_norm", eps),
                    key_norm=rms_norm(f"{prefix}.self_attn.k_norm", eps),
                    norm_place=norm_place,
                ),
                feed=gated_feed(f"{prefix}.mlp", config, width, act),
                after_attention=rms_norm(f"{prefix}.post_attention_layernorm", eps),
                after_feed=rms_norm(f"{prefix}.post_feedforward_layernorm", eps),
            )
        )
    return usual_decoder(config, layers, rms_norm("model.norm", eps), head_of(config, False), limit)


def glm4(config: Configuration) -> Decoder:
    config.suppose(head_dim=128, num_key_value_heads=2)
    width, heads = config.number("hidden_size"), config.heads()
    eps, act = config.real("rms_norm_eps", 0.00000015625), config.get("hidden_act", "silu")
    rotary, limit = config.rope(heads[2], part=0.5, interleaved=True)
    bias, layers = config.flag("attention_bias", True), []
    for number in config.layers():
        prefix = f"model.layers.{number}"
        layers.append(
            Layer(
                attention=attention_of(
                    f"{prefix}.self_attn", heads, width, bias, out_bias=False, rotary=rotary
                ),
                feed=gate_up_feed(f"{prefix}.mlp", config, width, act),
                before_attention=rms_norm(f"{prefix}.input_layernorm", eps),
                after_attention=rms_norm(f"{prefix}.post_self_attn_layernorm", eps),
                before_feed=rms_norm(f"{prefix}.post_attention_layernorm", eps),
                after_feed=rms_norm(f"{prefix}.post_mlp_layernorm", eps),
            )
        )
    return usual_decoder(config, layers, rms_norm("model.norm", eps), head_of(config, False), limit)
