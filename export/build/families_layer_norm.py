"""Families with layer norms, biases or a feed-forward without a gate, from GPT-2 to Cohere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgen.errors import UnsupportedModel
from fastgen.export.build.configuration import Configuration, window_of
from fastgen.export.build.decoder import (
    Attention,
    Decoder,
    Embedding,
    FeedForward,
    Layer,
    Linear,
    Norm,
    Part,
)
from fastgen.export.build.pieces import (
    attention_of,
    fused_part,
    gated_feed,
    head_of,
    layer_norm,
    linear,
    usual_decoder,
)


def gpt2(config: Configuration) -> Decoder:
    width, heads = config.number("n_embd", 768), config.number("n_head", 12)
    size, inner = width // heads, config.number("n_inner", 4 * width)
    eps, act = (
        config.real("layer_norm_epsilon", 1e-5),
        config.get("activation_function", "gelu_new"),
    )
    scaled, by_layer = (
        config.flag("scale_attn_weights", True),
        config.flag("scale_attn_by_inverse_layer_idx"),
    )

    def flat(name: str, out: int, rows: tuple[int, int, int] | None = None) -> Linear:
        bias = Part(f"{name}.bias", rows)
        return Linear(Part(f"{name}.weight", rows, flat=True), out, bias)

    layers = []
    for number in config.layers("n_layer", 12):
        prefix = f"transformer.h.{number}"
        query, key, value = (
            flat(f"{prefix}.attn.c_attn", width, (at * width, (at + 1) * width, 3 * width))
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
                    flat(f"{prefix}.attn.c_proj", width),
                ),
                feed=FeedForward(
                    flat(f"{prefix}.mlp.c_fc", inner), flat(f"{prefix}.mlp.c_proj", width), act
                ),
                before_attention=layer_norm(f"{prefix}.ln_1", eps),
                before_feed=layer_norm(f"{prefix}.ln_2", eps),
            )
        )
    limit = config.number("n_positions", 1024)
    return Decoder(
        vocabulary=config.number("vocab_size"),
        width=width,
        embedding=Embedding("transformer.wte.weight", width, positions="transformer.wpe.weight"),
        layers=layers,
        norm=layer_norm("transformer.ln_f", eps),
        head=head_of(config, True),
        limit=limit,
        hard=True,
        base="transformer.",
        ignored=(r".*attn\.(masked_)?bias",),
    )


def gpt_neox(config: Configuration) -> Decoder:
    width, heads = config.number("hidden_size"), config.number("num_attention_heads")
    size, inner = width // heads, config.number("intermediate_size")
    eps, act = config.real("layer_norm_eps", 1e-5), config.get("hidden_act", "gelu")
    bias, parallel = config.flag("attention_bias", True), config.flag("use_parallel_residual", True)
    rotary, limit = config.rope(size, part=0.25, names=("rotary_emb_base", "rotary_pct"))
    layers = []
    for number in config.layers():
        prefix = f"gpt_neox.layers.{number}"
        query, key, value = (
            fused_part(
                f"{prefix}.attention.query_key_value",
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
                    linear(f"{prefix}.attention.dense", width, bias),
                    rotary,
                ),
                feed=FeedForward(
                    linear(f"{prefix}.mlp.dense_h_to_4h", inner, True),
                    linear(f"{prefix}.mlp.dense_4h_to_h", width, True),
                    act,
                ),
                before_attention=layer_norm(f"{prefix}.input_layernorm", eps),
                before_feed=layer_norm(f"{prefix}.post_attention_layernorm", eps),
                parallel="attention feed stream" if parallel else "",
            )
        )
    return Decoder(
        vocabulary=config.number("vocab_size"),
        width=width,
        embedding=Embedding("gpt_neox.embed_in.weight", width),
        layers=layers,
        norm=layer_norm("gpt_neox.final_layer_norm", eps),
        head=head_of(config, False),
        limit=limit[0],
        hard=limit[1],
        base="gpt_neox.",
        ignored=(r".*rotary_emb\.inv_freq", r".*attention\.(masked_)?bias"),
        also={"lm_head.weight": "embed_out.weight"},
    )


def opt(config: Configuration) -> Decoder:
    width, heads = config.number("hidden_size"), config.number("num_attention_heads")
    size, inner = width // heads, config.number("ffn_dim")
    act, bias = config.get("activation_function", "relu"), config.flag("enable_bias", True)
    first = config.flag("do_layer_norm_before", True)
    outer = config.number("word_embed_proj_dim", width)
    if not config.flag("layer_norm_elementwise_affine", True):
        raise UnsupportedModel("its norms have no weights")
    removed, base = config.flag("_remove_final_layer_norm"), "model.decoder."
    layers = []
    for number in config.layers():
        prefix = f"{base}layers.{number}"
        norms = [layer_norm(f"{prefix}.{name}", 1e-5) for name in OPT_NORMS]
        before, after = (norms, [None, None]) if first else ([None, None], norms)
        layers.append(
            Layer(
                attention=attention_of(
                    f"{prefix}.self_attn", (heads, heads, size), width, bias, out="out_proj"
                ),
                feed=FeedForward(
                    linear(f"{prefix}.fc1", inner, bias), linear(f"{prefix}.fc2", width, bias), act
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
        vocabulary=config.number("vocab_size"),
        width=width,
        embedding=Embedding(
            f"{base}embed_tokens.weight",
            outer,
            positions=f"{base}embed_positions.weight",
            offset=2,
            project=linear(f"{base}project_in", width) if apart else None,
        ),
        layers=layers,
        norm=layer_norm(f"{base}final_layer_norm", 1e-5) if first and not removed else None,
        head=head_of(config, True, project=linear(f"{base}project_out", outer) if apart else None),
        limit=config.number("max_position_embeddings"),
        hard=True,
    )


OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def _biased(
    config: Configuration,
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
    width, heads = config.number("hidden_size"), config.heads()
    rotary, limit = config.rope(heads[2], theta, part=part, interleaved=interleaved)

    def norm(name: str) -> Norm:
        if kind == "centred":
            return Norm(f"{name}.weight", eps, "centred")
        return layer_norm(name, eps)

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
                    out=out,
                    out_bias=out_bias,
                    rotary=rotary,
                    window=window,
                ),
                feed=feeds(f"{prefix}.mlp", width),
                before_attention=norm(f"{prefix}.input_layernorm"),
                before_feed=None if parallel else norm(f"{prefix}.post_attention_layernorm"),
                parallel=parallel,
            )
        )
    made_head = head_of(config, tied, **(head or {}))
    return usual_decoder(config, layers, norm(last), made_head, limit)


def phi(config: Configuration) -> Decoder:
    if config.flag("qk_layernorm"):
        raise UnsupportedModel("its queries and keys are normed head by head")
    inner, act = config.number("intermediate_size"), config.get("hidden_act", "gelu_new")
    return _biased(
        config,
        lambda prefix, width: FeedForward(
            linear(f"{prefix}.fc1", inner, True), linear(f"{prefix}.fc2", width, True), act
        ),
        eps=config.real("layer_norm_eps", 1e-5),
        bias=True,
        out="dense",
        out_bias=True,
        part=0.5,
        last="model.final_layernorm",
        parallel="attention feed stream",
        head={"bias": "lm_head.bias"},
    )


def starcoder2(config: Configuration) -> Decoder:
    config.suppose(num_key_value_heads=2)
    inner, act = config.number("intermediate_size"), config.get("hidden_act", "gelu_pytorch_tanh")
    bias = config.flag("use_bias", True)
    return _biased(
        config,
        lambda prefix, width: FeedForward(
            linear(f"{prefix}.c_fc", inner, bias), linear(f"{prefix}.c_proj", width, bias), act
        ),
        eps=config.real("norm_epsilon", 1e-5),
        bias=bias,
        out_bias=bias,
        tied=True,
        window=window_of(config.get("sliding_window")),
    )


def stablelm(config: Configuration) -> Decoder:
    if config.flag("qk_layernorm"):
        raise UnsupportedModel("its queries and keys are normed head by head")
    act, parallel = config.get("hidden_act", "silu"), config.flag("use_parallel_residual")
    return _biased(
        config,
        lambda prefix, width: gated_feed(prefix, config, width, act),
        eps=config.real("layer_norm_eps", 1e-5),
        bias=config.flag("use_qkv_bias"),
        out_bias=False,
        part=0.25,
        parallel="stream attention feed" if parallel else "",
    )


def cohere(config: Configuration) -> Decoder:
    if config.flag("use_qk_norm"):
        raise UnsupportedModel("its queries and keys are normed head by head")
    act, bias = config.get("hidden_act", "silu"), config.flag("attention_bias")
    return _biased(
        config,
        lambda prefix, width: gated_feed(prefix, config, width, act),
        eps=config.real("layer_norm_eps", 1e-5),
        bias=bias,
        out_bias=bias,
        tied=True,
        parallel="stream attention feed",
        kind="centred",
        theta=500_000.0,
        interleaved=True,
        head={"times": config.real("logit_scale", 0.0625)},
    )
