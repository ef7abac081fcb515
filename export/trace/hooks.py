"""Models with code of their own for what others share, led to where all the others go.

Most models call transformers' `AttentionInterface`, and take `position_ids`. Some do not: here is
what stands in for their code while they are exported, a function for each kind of code. Where it
stands for attention, it says what the model's own function says, or the model is refused: both
run while the model is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from fastgen.errors import UnsupportedModel
from fastgen.export.trace import attention, sparse
from fastgen.export.trace.attention import CACHES, Bias, Turn, attend

CLOSE = 1e-4  # of the largest number that the model's own function gives

Patch = tuple[Any, str, Any]  # where a function stands, its name, and ours


@contextlib.contextmanager
def own_code(model: PreTrainedModel) -> Iterator[bool]:
    """Ours stands in for the model's own code; yields whether that is its attention, too."""
    config = model.config
    kept = config._attn_implementation
    patches = list(_attention_patches(model))
    with contextlib.ExitStack() as stack:
        for owner, name, ours in (*patches, *_other_patches(model)):
            stack.enter_context(_replaced(owner, name, ours))
        if any(owner is torch.nn.functional for owner, _, _ in patches):
            config._attn_implementation_internal = "sdpa"
        try:
            yield bool(patches)
        finally:
            config._attn_implementation_internal = kept


@contextlib.contextmanager
def positions(model: PreTrainedModel, position_ids: Tensor) -> Iterator[dict[str, Tensor]]:
    """Arguments that make the model use `position_ids` [rows, new].

    A model whose forward takes none looks positions up by how many tokens it has seen: while this
    lasts, it looks up these.
    """
    given = takes_positions(model)
    with contextlib.ExitStack() as stack:
        for module, table in _position_tables(model):
            if not given or hasattr(module, "make_weights"):  # which makes more of them
                index = position_ids + getattr(module, "offset", 0)
                lookup = functools.partial(_look_up, table, index)
                stack.enter_context(_replaced(module, "forward", lookup))
        yield {"position_ids": position_ids} if given else {}


def knows_positions(model: PreTrainedModel) -> bool:
    """True if positions can be given to the model, or attention alone needs them (ALiBi)."""
    return (
        takes_positions(model)
        or any(True for _ in _position_tables(model))
        or any(_kind(module) in _BIASES for module in model.modules())
    )


def takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _look_up(table: Tensor, index: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.nn.functional.embedding(index, table)


def _position_tables(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, Tensor]]:
    """The embeddings of positions, by the name that transformers gives their classes."""
    for module in model.modules():
        table = getattr(module, "weight", getattr(module, "weights", None))
        if table is not None and type(module).__name__.endswith("PositionalEmbedding"):
            yield module, table


@contextlib.contextmanager
def _replaced(owner: Any, name: str, ours: Callable[..., Any]) -> Iterator[None]:
    """`owner.name` is `ours` for a while; on a module, for this one only."""
    kept = vars(owner).get(name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        if kept is None:
            delattr(owner, name)
        else:
            setattr(owner, name, kept)


# Attention


def _attention_patches(model: PreTrainedModel) -> Iterator[Patch]:
    """Functions of the model that compute attention in their own way, and their stand-ins."""
    for module in model.modules():
        kind = _kind(module)
        if kind in _INNER and hasattr(module, "_attn"):  # some lost it in transformers 5.24
            scale = _INNER[kind](module)
            yield _compared(module, "_attn", functools.partial(_inner, scale, _window(module)))
        elif kind in _WHOLE:
            bias = _BIASES[kind](module) if kind in _BIASES else None
            yield _compared(module, "forward", _by_name(module, _WHOLE[kind], bias))
        elif kind in _ON_TORCH:
            ours = functools.partial(_scaled_dot_product, _ON_TORCH[kind](module))
            yield _compared(torch.nn.functional, "scaled_dot_product_attention", ours)
            return


def _kind(module: torch.nn.Module) -> str:
    """File and class of a module, as transformers names them."""
    return f"{type(module).__module__.rpartition('.modeling_')[2]}.{type(module).__name__}"


def _compared(owner: Any, name: str, ours: Callable[..., Any]) -> Patch:
    """`ours` for `owner.name`, compared with it on what a recording pass calls it with."""
    own = getattr(owner, name)

    @functools.wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        result = ours(*args, **kwargs)
        if attention.is_recording():  # of a text from its start: without a cache it is the same
            args = tuple(None if isinstance(value, Cache) else value for value in args)
            kwargs = {key: value for key, value in kwargs.items() if key not in CACHES}
            expected, actual = (
                out if isinstance(out, Tensor) else out[0] for out in (own(*args, **kwargs), result)
            )
            if (
                expected.shape != actual.shape
                or (expected - actual).abs().max() > CLOSE * expected.abs().max()
            ):
                raise UnsupportedModel(f"its code ({name}) is not what fastgen knows of its kind")
        return result

    return owner, name, function


# `_attn(query, key, value, mask)` on heads, and the scale of its scores.
_INNER: dict[str, Callable[[Any], float]] = {
    "gptj.GPTJAttention": lambda module: 1 / float(module.scale_attn),
    "codegen.CodeGenAttention": lambda module: 1 / float(module.scale_attn),
    "gpt_neox_japanese.GPTNeoXJapaneseAttention": lambda module: 1 / module.norm_factor,
    "gpt_neo.GPTNeoSelfAttention": lambda module: 1.0,
    "openai.Attention": lambda module: (
        (module.split_size // module.n_head) ** -0.5 if module.scale else 1.0
    ),
}


def _inner(
    scale: float, window: int | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> list[Tensor]:
    if not attention.is_written():  # there is no cache: keys came transposed
        key = key.transpose(2, 3)
        attention.write(key, value)
    return [attend(query, key, value, scale, window).transpose(1, 2), value]


def _window(module: torch.nn.Module) -> int | None:
    """The window of a module with a mask of its own, [1, 1, positions, positions]."""
    mask = getattr(module, "bias", None)
    if mask is None:
        return None
    width = int(mask[0, 0, -1].sum())
    places = torch.arange(mask.shape[-1])
    distance = places[:, None] - places
    if not torch.equal(mask[0, 0].bool(), (distance >= 0) & (distance < width)):
        raise UnsupportedModel("its mask is neither causal nor a sliding window")
    return None if width == mask.shape[-1] else width


def _scaled_dot_product(
    bias: Bias | None, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Tensor:
    """torch's own function, where the model's masks are causal and `bias` is in them."""
    return attend(query, key, value, query.shape[-1] ** -0.5, bias=bias).transpose(1, 2)


def _slopes(module: Any, heads: int) -> Tensor:
    """ALiBi's (https://arxiv.org/abs/2108.12409), from the code that builds it: [heads, 1]."""
    build = vars(sys.modules[type(module).__module__])["build_alibi_tensor"]
    return build(torch.ones(1, 2), heads, torch.float32)[:, 0, 1:]


def _falcon_bias(module: Any) -> Bias | None:
    if not module.config.alibi:
        return None
    slopes, scale = _slopes(module, module.num_heads), module.head_dim**-0.5

    def bias(at: Tensor) -> Tensor:  # rounded where the model rounds
        return (slopes * at.bfloat16().float()).bfloat16().float() * scale

    return bias


_ON_TORCH: dict[str, Callable[[Any], Bias | None]] = {"falcon.FalconAttention": _falcon_bias}


def _bloom_bias(module: Any) -> Bias:
    slopes = _slopes(module, module.num_heads)
    return lambda at: slopes * at


def _by_name(
    module: Any, attends: Callable[..., Tensor], bias: Bias | None
) -> Callable[..., tuple[Tensor, None]]:
    """`attends` as the module's forward, whose arguments and cache have various names."""
    signature = inspect.signature(module.forward)

    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        named = signature.bind(*args, **kwargs).arguments
        cache = next(named[name] for name in CACHES if name in named)
        return attends(module, named, next(iter(named.values())), cache, bias), None

    return forward


def _bloom(module: Any, named: dict[str, Any], hidden: Tensor, cache: Cache, bias: Bias) -> Tensor:
    query, key, value = module._reshape(module.query_key_value(hidden))
    key, value = cache.update(key, value, module.layer_idx)
    out = attend(query, key, value, module.inv_norm_factor, bias=bias)
    return module.dense(out.flatten(2)) + named["residual"]


def _mpt_bias(module: Any) -> Bias:
    build = vars(sys.modules[type(module).__module__])["build_mpt_alibi_tensor"]
    slopes = -build(module.n_heads, 2)[:, 0, :1]
    return lambda at: slopes * (at - at[-1:])


def _mpt(module: Any, _: dict[str, Any], hidden: Tensor, cache: Cache, bias: Bias) -> Tensor:
    mixed = module.Wqkv(hidden)
    if module.clip_qkv:
        mixed = mixed.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (_heads(part, module.head_dim) for part in mixed.chunk(3, dim=2))
    key, value = cache.update(key, value, module.layer_idx)
    out = attend(query, key, value, module.softmax_scale, bias=bias)
    return module.out_proj(out.flatten(2))


def _as_bart(
    module: Any, named: dict[str, Any], hidden: Tensor, cache: Cache, bias: None
) -> Tensor:
    if named.get("attn_prompt") is not None:
        raise UnsupportedModel("its attention has prompts that were learned")
    products = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (_heads(product(hidden), module.head_dim) for product in products)
    key, value = cache.update(key, value, module.layer_idx)
    return module.out_proj(attend(query, key, value, module.scaling).flatten(2))


def _as_bert(module: Any, _: dict[str, Any], hidden: Tensor, cache: Cache, bias: None) -> Tensor:
    size, products = module.attention_head_size, (module.query, module.key, module.value)
    query, key, value = (_heads(product(hidden), size) for product in products)
    key, value = cache.update(key, value, module.layer_idx)
    return attend(query, key, value, size**-0.5).flatten(2)


def _as_roformer(
    module: Any, named: dict[str, Any], hidden: Tensor, cache: Cache, bias: None
) -> Tensor:
    size, products = module.attention_head_size, (module.query, module.key, module.value)
    query, key, value = (_heads(product(hidden), size) for product in products)
    turned = (query, key, value) if module.rotary_value else (query, key)
    turned = module.apply_rotary_position_embeddings(named["sinusoidal_pos"], *turned)
    query, key, value = (*turned, value)[:3]
    key, value = cache.update(key, value, module.layer_idx)
    return attend(query, key, value, size**-0.5).flatten(2)


def _of_rows(own: Callable[..., Any], *args: Any, sinusoidal_pos: Tensor, **kwargs: Any) -> Any:
    """Rotations [1, 1, rows, new, size] as [rows, 1, ...]: the model knows one row of positions."""
    angles = sinusoidal_pos.reshape(-1, 1, *sinusoidal_pos.shape[-2:])
    return own(*args, sinusoidal_pos=angles, **kwargs)


def _heads(states: Tensor, head_dim: int) -> Tensor:
    """[rows, new, heads * head_dim] to [rows, heads, new, head_dim]."""
    return states.unflatten(2, (-1, head_dim)).transpose(1, 2)


# The whole of an attention module, and what it adds to scores.
_WHOLE: dict[str, Callable[..., Tensor]] = {
    "big_bird.BigBirdSelfAttention": _as_bert,
    "bloom.BloomAttention": _bloom,
    "git.GitSelfAttention": _as_bert,
    "megatron_bert.MegatronBertSelfAttention": _as_bert,
    "mpt.MptAttention": _mpt,
    "mvp.MvpAttention": _as_bart,
    "rembert.RemBertSelfAttention": _as_bert,
    "roformer.RoFormerSelfAttention": _as_roformer,
    "trocr.TrOCRAttention": _as_bart,
    "xglm.XGLMAttention": _as_bart,
}
_BIASES: dict[str, Callable[[Any], Bias]] = {
    "bloom.BloomAttention": _bloom_bias,
    "mpt.MptAttention": _mpt_bias,
}


# Code that torch's exporter cannot follow


def _other_patches(model: PreTrainedModel) -> Iterator[Patch]:
    """Functions besides attention that no graph can hold, and their stand-ins."""
    yield from sparse.patches(model)
    turned = set()
    for module in model.modules():
        kind = _kind(module)
        if kind in _COMPLEX and kind not in turned:  # one function serves all layers
            turned.add(kind)
            file = sys.modules[type(module).__module__]
            yield _compared(file, "apply_rotary_emb", functools.partial(_turned, _COMPLEX[kind]))
        if hasattr(module, "rel_logits_proj"):
            profiles, floor = module.rel_logits_proj, module.config.log_scaling_n_floor
            ours = functools.partial(_by_distance, profiles.proj)
            owner, name, ours = _compared(profiles, "forward", ours)
            if floor is not None and not module.is_sliding:
                yield module.config, "log_scaling_n_floor", sys.maxsize
                growth = (floor, module.config.log_scaling_alpha)
                ours = functools.partial(_grown, ours, *growth)
            yield owner, name, ours
        elif hasattr(module, "rel_extent") and kind.endswith("RelativePositionBias"):
            yield _compared(module, "forward", functools.partial(_from_hidden, module))
        elif kind == "roformer.RoFormerAttention":
            yield module, "forward", functools.partial(_of_rows, module.forward)
        elif hasattr(module, "expand_kv") and _saves(module):
            yield (
                module,
                "expand_kv",
                functools.partial(_latent, module.expand_kv, *_spaces(module)),
            )
        elif getattr(module, "activation_sparsity", 0) and hasattr(module, "_gaussian_topk"):
            share = torch.tensor(module.activation_sparsity)
            cut = float(torch.distributions.Normal(0, 1).icdf(share))
            yield _compared(module, "_gaussian_topk", functools.partial(_largest, cut))


# Rotations by complex numbers, and the axis of their heads.
_COMPLEX = {"llama4.Llama4TextAttention": 2, "deepseek_v2.DeepseekV2Attention": 1}


def _turned(axis: int, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of neighbours, turned by complex numbers [rows, new, pairs]."""
    cos, sin = torch.view_as_real(angles).unsqueeze(axis).unbind(-1)

    def turn(states: Tensor) -> Tensor:
        even, odd = states[..., 0::2], states[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)

    return turn(query), turn(key)


def _by_distance(profiles: Tensor, states: Tensor, *_: Tensor) -> Tensor:
    """The sum that a query's state [rows, new, heads, size] adds to scores, by distance.

    Args:
        profiles: [size, extent], of distances from 0.
    """
    logits = (states @ profiles).transpose(1, 2)
    queries, keys = attention.places(states.shape[1])
    distance = (queries[:, :, None] - keys)[:, None].long()
    last = logits.shape[-1] - 1
    index = distance.clamp(0, last).expand(*logits.shape[:3], -1)
    return torch.where((distance >= 0) & (distance <= last), logits.gather(-1, index), 0.0)


def _from_hidden(module: Any, hidden: Tensor, distance: Tensor, position_ids: Tensor) -> Tensor:
    """The same from the tokens' hidden states [rows, new, channels]."""
    states = module.linear(hidden).unflatten(-1, (module.num_heads, -1))
    return _by_distance(module.proj, module.norm(states, position_ids))


def _grown(
    own: Callable[..., Tensor], floor: int, alpha: float, states: Tensor, *args: Tensor
) -> Tensor:
    """Scores that grow with the logarithm of the query's position, from `floor` on."""
    number = attention.places(states.shape[1])[0] + 1
    tau = 1 + alpha * (number / floor).clamp(min=1).log()[:, None, :, None]
    attention.turn_next(Turn(lambda query: query * tau, lambda output: output))
    return own(states, *args) * tau


def _largest(cut: float, inputs: Tensor) -> Tensor:
    """The part above `cut` standard deviations, less that."""
    deviation = inputs.std(dim=-1, keepdim=True, unbiased=False)
    return torch.relu(inputs - (inputs.mean(dim=-1, keepdim=True) + cut * deviation))


# Multi-head latent attention (https://arxiv.org/abs/2405.04434): keys and values of all heads are
# linear functions of one latent and one rotated key. So a head's query, taken back through its
# function of keys, finds the same in the latents: one head of keys for all queries is stored.


def _saves(module: Any) -> bool:
    """True if latents take less memory than the keys and values made of them."""
    heads = module.kv_b_proj.out_features // (module.qk_nope_head_dim + module.v_head_dim)
    each = max(module.qk_nope_head_dim + module.qk_rope_head_dim, module.v_head_dim)
    latent = module.kv_lora_rank + module.qk_rope_head_dim
    return module.kv_b_proj.bias is None and latent < heads * each


def _spaces(module: Any) -> tuple[Tensor, Tensor]:
    """Matrices to latents [heads, size, rank] for queries, and from them to values, turned."""
    sizes = (module.qk_nope_head_dim, module.v_head_dim)
    weight = module.kv_b_proj.weight.detach().unflatten(0, (-1, sum(sizes)))
    keys, values = weight.split(sizes, dim=1)
    return keys.contiguous(), values.transpose(1, 2).contiguous()


def _latent(
    own: Callable[..., Any], from_query: Tensor, to_value: Tensor, latent: Tensor, turned: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values [rows, 1, new, ...] for queries that are taken to where the latents are."""
    heads, size, _ = from_query.shape

    def query(states: Tensor) -> Tensor:
        return torch.cat((states[..., :size] @ from_query, states[..., size:]), dim=-1)

    def output(states: Tensor) -> Tensor:
        return (states.transpose(1, 2) @ to_value).transpose(1, 2)

    keys = torch.cat((latent, turned), dim=-1)
    if attention.is_recording():
        expected = own(latent, turned)
        some = torch.randn_like(expected[0])
        scores = query(some) @ keys.transpose(2, 3)
        values = output(latent.transpose(1, 2).expand(-1, -1, heads, -1)).transpose(1, 2)
        for one, two in ((some @ expected[0].transpose(2, 3), scores), (expected[1], values)):
            if one.shape != two.shape or (one - two).abs().max() > CLOSE * one.abs().max():
                raise UnsupportedModel("its keys are not what fastgen knows of latents")
    attention.turn_next(Turn(query, output))
    return keys, latent
