"""Families with mixtures of experts, on attention that other families have."""

from __future__ import annotations

from typing import Any

from fastgen.errors import UnsupportedModel
from fastgen.export.build.configuration import Configuration, window_of
from fastgen.export.build.decoder import Decoder, Experts, FeedForward, Stack
from fastgen.export.build.families_llama import llama_like
from fastgen.export.build.pieces import gated_feed, linear

USUAL = ("gate_proj", "up_proj", "down_proj")  # the matrices of an expert


def _counts(config: Configuration, name: str, usual: int, chosen: int) -> tuple[int, int]:
    """The number of experts, and of those that a token goes to.

    Args:
        name: of the first in the family's configuration; others call it `num_local_experts`.
        usual, chosen: what these are where nothing is said.
    """
    config.suppose(**{name: config.get("num_local_experts") or usual})
    count, taken = config.number(name), config.number("num_experts_per_tok", chosen)
    if taken > count:
        raise UnsupportedModel(f"its tokens go to {taken} of {count} experts")
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise UnsupportedModel(f"the activation of its experts is {act!r}")
    return count, taken


def _experts(
    prefix: str,
    counts: tuple[int, int],
    width: int,
    *,
    names: tuple[str, str, str] = USUAL,
    **more: Any,
) -> Experts:
    """Experts with a tensor of their own for each matrix."""
    count, chosen = counts
    gate, up, down = (
        Stack(tuple(f"{prefix}.experts.{expert}.{name}.weight" for expert in range(count)))
        for name in names
    )
    router = linear(f"{prefix}.gate", count)
    return Experts(router, chosen, width, gate, up, down, **more)


def mixtral(config: Configuration) -> Decoder:
    config.suppose(num_key_value_heads=8)
    counts, inner = _counts(config, "num_local_experts", 8, 2), config.number("intermediate_size")
    window = window_of(config.get("sliding_window"))

    def feed(number: int, prefix: str) -> Experts:
        place, names = f"{prefix}.block_sparse_moe", ("w1", "w3", "w2")
        return _experts(place, counts, inner, names=names, sums_to_one=True)

    windows = [window] * len(config.layers())
    return llama_like(config, theta=1e6, eps=1e-5, windows=windows, feeds=feed)


def olmoe(config: Configuration) -> Decoder:
    counts, inner = _counts(config, "num_experts", 64, 8), config.number("intermediate_size")
    sums, clip = config.flag("norm_topk_prob"), config.get("clip_qkv")

    def feed(number: int, prefix: str) -> Experts:
        return _experts(f"{prefix}.mlp", counts, inner, sums_to_one=sums)

    return llama_like(
        config,
        eps=1e-5,
        bias=config.flag("attention_bias"),
        names=("q_norm", "k_norm"),
        norm_place="together",
        feeds=feed,
        attends=lambda prefix: {"clip": None if clip is None else config.real("clip_qkv", 0)},
    )


def qwen2_moe(config: Configuration) -> Decoder:
    """Every token goes to a shared expert besides; some layers have no other."""
    window = _window(config)
    before = config.get("max_window_layers", 28)
    usual = [
        "sliding_attention" if window is not None and at % 2 == 0 and at < before else FULL
        for at in config.layers()
    ]
    return llama_like(
        config,
        windows=config.windows(usual, window),
        bias=config.flag("qkv_bias", True),
        out_bias=False,
        feeds=_Qwen(config, _counts(config, "num_experts", 60, 4), shared=True).feed,
    )


FULL = "full_attention"


def _window(config: Configuration) -> int | None:
    size = config.get("sliding_window", 4096)
    return size if config.flag("use_sliding_window") else None


def qwen3_moe(config: Configuration) -> Decoder:
    window = _window(config)
    return llama_like(
        config,
        windows=[window_of(window)] * len(config.layers()),
        bias=config.flag("attention_bias"),
        names=("q_norm", "k_norm"),
        feeds=_Qwen(config, _counts(config, "num_experts", 128, 8)).feed,
    )


class _Qwen:
    """The feed-forward parts of Qwen's mixtures: some layers have experts, and some have none."""

    def __init__(
        self, config: Configuration, counts: tuple[int, int], shared: bool = False
    ) -> None:
        self.config, self.counts, self.shared = config, counts, shared
        self.width, self.inner = (
            config.number("hidden_size"),
            config.number("moe_intermediate_size"),
        )
        config.number("intermediate_size")  # of layers without experts, if there are any
        self.plain, self.step = (
            config.get("mlp_only_layers") or [],
            config.number("decoder_sparse_step", 1),
        )
        self.sums = config.flag("norm_topk_prob")

    def feed(self, number: int, prefix: str) -> FeedForward | Experts:
        place = f"{prefix}.mlp"
        if number in self.plain or (number + 1) % self.step:
            return gated_feed(place, self.config, self.width, "silu")
        more: dict[str, Any] = {}
        if self.shared:
            name, size = f"{place}.shared_expert", "shared_expert_intermediate_size"
            more = {
                "shared": gated_feed(name, self.config, self.width, "silu", size=size),
                "shared_gate": linear(f"{name}_gate", 1),
            }
        return _experts(place, self.counts, self.inner, sums_to_one=self.sums, **more)


def granitemoe(config: Configuration) -> Decoder:
    counts, inner = _counts(config, "num_local_experts", 8, 2), config.number("intermediate_size")
    scaling, times = (
        config.real("logits_scaling", 1.0),
        config.real("embedding_multiplier", 1.0),
    )

    def feed(number: int, prefix: str) -> Experts:
        place = f"{prefix}.block_sparse_moe"
        return Experts(
            router=linear(f"{place}.router.layer", counts[0]),
            chosen=counts[1],
            width=inner,
            gate=Stack((f"{place}.input_linear.weight",), together=True),
            up=None,
            down=Stack((f"{place}.output_linear.weight",), together=True),
            weighs="chosen",
        )

    return llama_like(
        config,
        bias=config.flag("attention_bias"),
        scale=config.real("attention_multiplier", 1.0),
        times=None if times == 1 else times,
        residual=config.real("residual_multiplier", 1.0),
        head={"divide": None if scaling == 1 else scaling},
        feeds=feed,
    )


YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096}  # fmt: skip


def gpt_oss(config: Configuration) -> Decoder:
    config.suppose(head_dim=64, num_key_value_heads=8, rope_parameters=YARN)
    count, chosen = _counts(config, "num_local_experts", 128, 4)
    inner, window = config.number("intermediate_size"), config.get("sliding_window", 128)
    alpha, limit = config.real("swiglu_alpha", 1.702), config.real("swiglu_limit", 7.0)
    usual = [("sliding_attention", FULL)[at % 2] for at in config.layers()]

    def feed(number: int, prefix: str) -> Experts:
        place = f"{prefix}.mlp.experts"
        first, second = f"{place}.gate_up_proj", f"{place}.down_proj"
        return Experts(
            router=linear(f"{prefix}.mlp.router", count, True),
            chosen=chosen,
            width=inner,
            gate=Stack((first,), together=True, flat=True),
            up=None,
            down=Stack((second,), together=True, flat=True),
            in_turns=True,
            biases=((f"{first}_bias",), f"{second}_bias"),
            weighs="chosen",
            softmax_axis=1,
            alpha=alpha,
            beta=1.0,
            limit=limit,
        )

    return llama_like(
        config,
        theta=150_000.0,
        eps=1e-5,
        windows=config.windows(usual, window),
        bias=config.flag("attention_bias", True),
        feeds=feed,
        attends=lambda prefix: {"sinks": f"{prefix}.sinks"},
    )
