"""Attention as one GroupQueryAttention node a layer, on shared buffers.

transformers routes nearly every decoder through `AttentionInterface` and
`AttentionMaskInterface`, and every new key and value through `Cache.update`. So three small
parts stand in for all models: an attention function, a mask function and a cache. transformers
finds the functions in registries of the process, by a name (hence the registration at the end), and
calls all three from within the model's code, which hands nothing of ours on. So the run that they
work for is a variable of this module, `_current`, for as long as `_running` lasts.

A model is run twice. `recording` runs it as it is and notes, for each layer, the shapes of its
keys and values and what its mask is (`Layer`); whatever GroupQueryAttention cannot express is
refused here, by name. `tracing` runs it again under torch's exporter and emits the nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache

from fastgen.errors import UnsupportedModel
from fastgen.export.rewrite.node import (
    BIAS,
    FURTHEST,
    HEAD_STEP,
    INPUTS,
    QUERIES,
    SEQLENS,
    SINK,
    TOTAL,
    attributes,
)

Bias = Callable[[torch.Tensor], torch.Tensor]  # positions [total] -> [num_heads, total]
# Whether a query sees a key, by their positions: bool of the two shapes, broadcast.
Seen = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NAME = "fastgen"  # what `attn_implementation` is while a model is exported

# What models call their cache: transformers up to 5.23 had a name for each kind.
CACHES = ("cache", "past_key_values", "cache_params", "layer_past")

# Keywords that models pass to every attention function and that do not change its result:
# what they mean is in the mask, in `layer`, or concerns training.
_HARMLESS = {
    "position_ids", "use_cache", "output_router_logits", "output_attentions", "cache_position",
    "sliding_window", "is_causal", "position_embeddings", "logits_to_keep",
    "output_hidden_states", "return_dict", "deterministic", "num_items_in_batch", *CACHES,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One attention layer that owns keys and values."""

    num_heads: int
    kv_heads: int
    head_dim: int  # of the buffers: queries, keys and values are padded to it
    scale: float
    window: int | None = None  # tokens a query sees, itself included; None for all
    seen: Seen | None = None  # which of them it sees, where that is no window
    softcap: float = 0.0
    sinks: bool = False


@dataclass
class Feed:
    """The graph's inputs that the attention nodes read."""

    past: list[tuple[torch.Tensor, torch.Tensor]]  # a layer: [rows, kv_heads, capacity, head_dim]
    seqlens_k: torch.Tensor
    total_sequence_length: torch.Tensor
    query_seqlens: torch.Tensor


@dataclass(frozen=True)
class Turn:
    """Attention in another space than the model's: that of latents, say.

    Attributes:
        query: [rows, num_heads, new, head_dim] into that space.
        output: [rows, new, num_heads, value_dim] from there.
    """

    query: Callable[[torch.Tensor], torch.Tensor]
    output: Callable[[torch.Tensor], torch.Tensor]


class All:
    """The pick of an index that picks all (`sparse`): of a mask, all that it shows."""

    def __rand__(self, mask: torch.Tensor) -> torch.Tensor:
        return mask


@dataclass
class Pass:
    """One run of the model: what was found (recording) and what was emitted (tracing)."""

    layers: list[Layer] = field(default_factory=list)
    feed: Feed | None = None  # None while recording
    present: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    pending: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values not attended yet
    turn: Turn | None = None  # of the next queries, and of what they find
    raised: torch.Tensor | None = None  # added to all scores of the next keys
    # By layer, what is attended where that is not what was written but made of it (recording).
    derived: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    # By the memory of a mask (parts of one are the same mask), its window, or why it has none.
    windows: dict[int, int | Seen | UnsupportedModel | None] = field(default_factory=dict)
    masks: list[torch.Tensor] = field(default_factory=list)  # kept alive: their memory stays theirs


_current: Pass | None = None


def _run() -> Pass:
    if _current is None:
        raise RuntimeError("attention 'fastgen' is only for exporting; use eager or sdpa to run")
    return _current


@contextlib.contextmanager
def _running(run: Pass) -> Iterator[Pass]:
    global _current
    if _current is not None:
        raise RuntimeError("another export is running in this process")
    _current = run
    try:
        yield run
    finally:
        _current = None


def recording() -> contextlib.AbstractContextManager[Pass]:
    """A pass that notes the layers; plain causal attention of float tensors is computed."""
    return _running(Pass())


def tracing(layers: list[Layer], feed: Feed) -> contextlib.AbstractContextManager[Pass]:
    """A pass that emits one GroupQueryAttention node for each of `layers`, in their order."""
    return _running(Pass(layers=layers, feed=feed))


class PassingCache(DynamicCache):
    """Hands the new keys and values through: the past lives in the attention node's buffers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.layers:  # models that loop copy them; nothing is in them
            layer.__deepcopy__ = lambda _, layer=layer: layer

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # type: ignore[no-untyped-def]
        write(key_states, value_states)
        return key_states, value_states

    def __getattribute__(self, name: str) -> Any:
        if name == "update_indexer":
            raise UnsupportedModel(
                f"it keeps state besides keys and values (Cache.{name}), which the graph does not"
            )
        return super().__getattribute__(name)


def write(key: torch.Tensor, value: torch.Tensor) -> None:
    """Note the keys and values of the new tokens, which are to be attended next."""
    run = _run()
    if run.pending is not None:
        raise UnsupportedModel(
            f"layer {len(run.layers)} writes keys and values that are not attended before "
            "others are: its attention does not go through transformers' AttentionInterface"
        )
    run.pending = (key, value)


def turn_next(turn: Turn) -> None:
    """The next attention is in the space of `turn`, as its keys and values are."""
    _run().turn = turn


def raise_next(scores: torch.Tensor) -> None:
    """Add `scores` [rows, kv_heads, new] to all that queries give to the next keys."""
    _run().raised = scores


def places(new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of queries [rows or 1, new], and of keys [total], in their texts."""
    feed = _run().feed
    if feed is None:
        return torch.arange(new)[None], torch.arange(new)
    total = feed.total_sequence_length.item()
    torch._check(total >= 0)
    first = feed.seqlens_k + 1 - feed.query_seqlens
    return first[:, None] + torch.arange(new), torch.arange(total)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [rows, num_heads, new, head_dim]
    key: torch.Tensor,  # [rows, kv_heads, new, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [rows, new, num_heads, head_dim]
    """The function that stands behind `attn_implementation="fastgen"`."""
    run = _run()
    softcap = float(kwargs.pop("softcap", None) or 0.0)
    sinks = kwargs.pop("s_aux", None)
    added = kwargs.pop("position_bias", None)
    of_queries = kwargs.pop("sinks", None)  # [rows, num_heads, new, 1]
    if of_queries is not None:  # the same as less for all keys, and 0 for the sink
        added = -of_queries if added is None else added - of_queries
        sinks = torch.zeros(query.shape[1])
    for name, extra in kwargs.items():
        if extra is not None and name not in _HARMLESS and not isinstance(extra, All):
            raise UnsupportedModel(
                f"its attention takes {name!r}, which the graph has no place for"
            )
    window = None
    if attention_mask is not None and run.feed is None:
        address = attention_mask.untyped_storage().data_ptr()
        if address not in run.windows:
            raise UnsupportedModel(
                f"layer {len(run.layers)}: its mask is not one of transformers' causal or "
                "sliding-window masks"
            )
        window = run.windows[address]
    if isinstance(window, UnsupportedModel):
        raise window
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if (
        attention_mask is None and run.pending is None and not getattr(module, "is_causal", True)
    ):  # not to tokens: to what the layers before said of one, say
        weights = (query @ key.transpose(-1, -2) * scale).softmax(-1)
        return (weights @ value).transpose(1, 2), None
    return attend(query, key, value, float(scale), window, softcap, sinks, added=added), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | Seen | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    bias: Bias | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention whose meaning is known: [rows, new, num_heads, value_dim].

    Args:
        query: [rows, num_heads, new, head_dim], as `attention` takes it; key and value too.
        bias: of a score, which depends on the head and the key's position alone.
        added: to the scores, [rows, num_heads, new, total], by `places`.
    """
    run = _run()
    turn, run.turn = run.turn, None
    if turn is not None:
        return turn.output(
            attend(turn.query(query), key, value, scale, window, softcap, sinks, bias, added)
        )
    raised, run.raised = run.raised, None
    if raised is not None:  # by one more number of each key, which is kept with it
        key = torch.cat((key, raised[..., None]), dim=-1)
        query = torch.cat((query, torch.full_like(query[..., :1], 1 / scale)), dim=-1)
    written, run.pending = run.pending, None
    if run.feed is not None:
        return _emit(query, key, value, sinks, bias, added)
    layer = _describe(query, key, value, scale, window, softcap, sinks is not None)
    if written is None or written[0] is not key or written[1] is not value:
        run.derived[len(run.layers)] = (key, value)
    run.layers.append(layer)
    return _reference(query, key, value, layer, bias)


def is_recording() -> bool:
    return _current is not None and _current.feed is None


def is_written() -> bool:
    """True if keys and values wait to be attended."""
    return _current is not None and _current.pending is not None


def check_kept(whole: Pass, shorter: Pass) -> None:
    """Refuse a model whose keys and values of a token change as more tokens come.

    A buffer keeps what is attended when a token is new. Where that is made of what the model
    writes (the heads of a latent, say), it must be made of each token by itself.

    Args:
        whole: of some tokens.
        shorter: of the first of them.

    Raises:
        UnsupportedModel: some key or value of the first tokens is another one in `whole`.
    """
    for number, kept in shorter.derived.items():
        for before, after in zip(kept, whole.derived[number], strict=True):
            if not torch.allclose(before, after[:, :, : before.shape[2]], rtol=1e-3, atol=1e-5):
                raise UnsupportedModel(
                    f"layer {number}: what it attends to is not what it wrote, and changes as "
                    "more tokens come"
                )


def _describe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | Seen | None,
    softcap: float,
    sinks: bool,
) -> Layer:
    number = len(_run().layers)
    rows, num_heads, new, head_dim = query.shape
    for states in (key, value):
        if states.shape[0] != rows or states.shape[2] != new:
            raise UnsupportedModel(
                f"layer {number}: it attends to keys and values besides those of the tokens"
            )
    if key.shape[-1] != head_dim:
        raise UnsupportedModel(
            f"layer {number}: queries of size {head_dim} for keys of size {key.shape[-1]}"
        )
    if key.shape[1] != value.shape[1] or num_heads % key.shape[1]:
        raise UnsupportedModel(
            f"layer {number}: {num_heads} query heads over {key.shape[1]} key heads"
        )
    return Layer(
        num_heads=num_heads,
        kv_heads=key.shape[1],
        head_dim=-(-max(head_dim, value.shape[-1]) // HEAD_STEP) * HEAD_STEP,
        scale=scale,
        window=window if isinstance(window, int) else None,
        seen=window if callable(window) else None,
        softcap=softcap,
        sinks=sinks,
    )


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer: Layer,
    bias: Bias | None,
) -> torch.Tensor:
    """Plain attention, so that a recording pass runs on sensible numbers."""
    groups = layer.num_heads // layer.kv_heads
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = query @ key.transpose(-1, -2) * layer.scale
    if bias is not None:
        scores = scores + bias(torch.arange(key.shape[2]))[:, None]
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous()


def _emit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: Bias | None,
    added: torch.Tensor | None,
) -> torch.Tensor:
    run = _run()
    assert run.feed is not None
    feed, number = run.feed, len(run.present)
    layer, (past_key, past_value) = run.layers[number], feed.past[number]
    rows, _, new, _ = query.shape
    width = layer.num_heads * layer.head_dim

    def flat(states: torch.Tensor) -> torch.Tensor:  # to [rows, new, heads * head_dim]
        lacking = layer.head_dim - states.shape[-1]
        if lacking:  # zeros add nothing to a product, and what they give is cut off below
            states = torch.nn.functional.pad(states, (0, lacking))
        return states.transpose(1, 2).reshape(rows, new, -1)

    head_sink = None if sinks is None else sinks.reshape(-1)
    if bias is not None or layer.seen is not None:
        added = _added(new, bias, layer.seen, added)
    inputs: list[torch.Tensor | None] = [None] * INPUTS
    inputs[:5] = flat(query), flat(key), flat(value), past_key, past_value
    inputs[SEQLENS], inputs[TOTAL] = feed.seqlens_k, feed.total_sequence_length
    inputs[BIAS], inputs[SINK], inputs[QUERIES] = added, head_sink, feed.query_seqlens
    out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes(layer.num_heads, layer.kv_heads, layer.scale, layer.window, layer.softcap),
        dtypes=[torch.float32] * 3,
        shapes=[[rows, new, width], past_key.shape, past_value.shape],
        version=1,
    )
    run.present.append((present_key, present_value))
    out = out.reshape(rows, new, layer.num_heads, layer.head_dim)
    return out if value.shape[-1] == layer.head_dim else out[..., : value.shape[-1]]


def _added(
    new: int, bias: Bias | None, seen: Seen | None, added: torch.Tensor | None
) -> torch.Tensor:
    """The sum that is added to the scores: float32 [rows or 1, num_heads or 1, new, total].

    The key of position j is the buffer's key j. What the kernel masks is anything here.
    """
    queries, keys = places(new)
    if added is None:
        added = torch.zeros(1, 1, new, 1)
    if bias is not None:
        added = added + bias(keys)[None, :, None]
    if seen is not None:
        shown = seen(queries[:, None, :, None], keys)
        added = torch.where(shown, added, torch.finfo(torch.float32).min)
    return added


def mask(**kwargs: Any) -> torch.Tensor | None:
    """The mask function beside `attention`: a token while recording, nothing in the graph.

    GroupQueryAttention masks by itself. While recording, each mask is an empty tensor whose
    identity tells `attention` which window it stands for. A model that cannot do without one
    (it has an index, see `sparse`) gets one that is not used.
    """
    needed = not kwargs.get("allow_is_causal_skip", True)
    run = _current
    if run is None or (run.feed is not None and not needed):
        return None
    dtype = torch.bool if needed else torch.float32
    token = torch.empty(
        kwargs["batch_size"], 1, kwargs["q_length"], kwargs["kv_length"], dtype=dtype
    )
    if run.feed is not None:
        return token
    run.masks.append(token)
    address = token.untyped_storage().data_ptr()
    try:
        positions = getattr(kwargs.get("config"), "max_position_embeddings", None)
        run.windows[address] = window_of(kwargs["mask_function"], positions)
    except UnsupportedModel as error:  # it may be for layers that the model does not have
        run.windows[address] = error
    return token


def window_of(mask_function: Any, positions: int | None = None) -> int | Seen | None:
    """Count the tokens that a query sees, itself included, by asking the mask; None for all.

    Where these are not just the last ones (it is chunked, say), the mask as a function.

    Args:
        mask_function: whether a query's position sees a key's.
        positions: how many the model has, if it says so. A mask that cannot say more is asked up
            to there.

    Raises:
        UnsupportedModel: the mask is not causal, or depends on more than positions.
    """
    for length in (FURTHEST, positions):
        if length is not None:
            with contextlib.suppress(IndexError):  # it has tables, of positions if not of tokens
                return _window_within(mask_function, length)
    raise UnsupportedModel("its mask depends on more than positions")


def _window_within(mask_function: Any, length: int) -> int | Seen | None:
    first = torch.tensor(0)
    last = length - 1
    seen = {}
    for position in (last, last - 1, last // 2):
        keys = torch.arange(position, -1, -1)
        if position < last:
            keys = torch.cat([torch.tensor([position + 1]), keys])
        allowed = torch.as_tensor(mask_function(first, first, torch.tensor(position), keys))
        allowed = allowed.expand(keys.shape[0])
        if position < last:
            if bool(allowed[0]):
                raise UnsupportedModel("its mask is not causal")
            allowed = allowed[1:]
        seen[position] = int(allowed.sum())
        if not bool(allowed[: seen[position]].all()):
            return partial(mask_function, first, first)
    window = seen[last]
    if any(count != min(window, position + 1) for position, count in seen.items()):
        return partial(mask_function, first, first)
    return None if window == length else window


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
