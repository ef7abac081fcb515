"""Pieces of a decoder that many families share, under transformers' usual names of tensors."""

from __future__ import annotations

from typing import Any

from fastgen.export.build.configuration import Configuration
from fastgen.export.build.decoder import (
    Attention,
    Decoder,
    Embedding,
    FeedForward,
    Head,
    Layer,
    Linear,
    Norm,
    Part,
)


def linear(name: str, width: int, bias: bool = False) -> Linear:
    return Linear(Part(f"{name}.weight"), width, Part(f"{name}.bias") if bias else None)


def fused_part(name: str, first: int, last: int, of: int, width: int, bias: bool = False) -> Linear:
    """Outputs `first` to `last` of each `of` outputs of a fused matrix."""
    rows = (first, last, of)
    added = Part(f"{name}.bias", rows) if bias else None
    return Linear(Part(f"{name}.weight", rows), width, added)


def layer_norm(name: str, eps: float) -> Norm:
    return Norm(f"{name}.weight", eps, "layer", f"{name}.bias")


def rms_norm(name: str, eps: float, plus_one: bool = False) -> Norm:
    return Norm(f"{name}.weight", eps, plus_one=plus_one)


def gated_feed(
    prefix: str,
    config: Configuration,
    width: int,
    act: str,
    bias: bool = False,
    size: str = "intermediate_size",
) -> FeedForward:
    inner = config.number(size)
    return FeedForward(
        up=linear(f"{prefix}.up_proj", inner, bias),
        down=linear(f"{prefix}.down_proj", width, bias),
        activation=act,
        gate=linear(f"{prefix}.gate_proj", inner, bias),
    )


def gate_up_feed(prefix: str, config: Configuration, width: int, act: str) -> FeedForward:
    """Gate and up in one matrix, one after the other."""
    inner = config.number("intermediate_size")
    fused = f"{prefix}.gate_up_proj"
    return FeedForward(
        up=fused_part(fused, inner, 2 * inner, 2 * inner, inner),
        down=linear(f"{prefix}.down_proj", width),
        activation=act,
        gate=fused_part(fused, 0, inner, 2 * inner, inner),
    )


def attention_of(
    prefix: str,
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
        query=linear(f"{prefix}.q_proj", count * size, bias),
        key=linear(f"{prefix}.k_proj", kv_heads * size, bias),
        value=linear(f"{prefix}.v_proj", kv_heads * size, bias),
        out=linear(f"{prefix}.{out}", width, bias if out_bias is None else out_bias),
        **more,
    )


def head_of(config: Configuration, tied: bool, **more: Any) -> Head:
    """A head called lm_head, or the embedding."""
    return Head(None if config.flag("tie_word_embeddings", tied) else "lm_head.weight", **more)


def usual_decoder(
    config: Configuration,
    layers: list[Layer],
    norm: Norm | None,
    head: Head,
    limit: tuple[int, bool],
    times: float | None = None,
) -> Decoder:
    """A decoder under the usual names."""
    width = config.number("hidden_size")
    return Decoder(
        vocabulary=config.number("vocab_size"),
        width=width,
        embedding=Embedding("model.embed_tokens.weight", width, times),
        layers=layers,
        norm=norm,
        head=head,
        limit=limit[0],
        hard=limit[1],
    )
