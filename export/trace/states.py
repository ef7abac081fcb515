"""State that is no key or value: what convolutions and recurrences keep of a row, of a fixed size.

transformers leads all of it through `Cache.update_conv_state` and `update_recurrent_state`, and
every recurrence through one of a few functions (`SCANS`). So a cache and these functions stand in
for all models, as in `attention`: a state is an input and an output of the graph, and a scan is one
LinearAttention node. Its rules: `gated` S = exp(g) S + k v, `gated_delta` (Yang et al. 2024, arXiv
2412.06464). Mamba (Gu and Dao 2023, arXiv 2312.00752) and Mamba-2 (2405.21060) are `gated`, with C
as the query, B as the key and dt x as the value.

As in `attention`, the model's code calls them and hands nothing of ours on: the run that they work
for is a variable of this module, `_current`, for as long as `running` lasts.

Rows are padded on the right. A padded token leaves every state as it is: its decay is 0 (as a
logarithm) and so is what it adds; of a convolution's inputs the last real ones are kept.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.activations import ACT2FN

from fastgen.errors import UnsupportedModel
from fastgen.export.trace.attention import CACHES, PassingCache

StateKey = tuple[str, int, int]  # "conv", "shift" or "recurrent", the layer, which of its states


@dataclass
class States:
    """The states of a model, in the order of the graph's inputs, and one run with them.

    Attributes:
        shapes: of one row's state, by its key.
        past: float32 [rows, *shape] each; None while shapes are recorded.
        query_seqlens: int32 [rows], how many of the new tokens are real; None for all.
        present: what the run leaves, by key.
        begun: the state that the next scan starts from; several, one for each of its scans.
        scans: how many there were.
    """

    shapes: dict[StateKey, tuple[int, ...]] = field(default_factory=dict)
    past: dict[StateKey, Tensor] | None = None
    query_seqlens: Tensor | None = None
    present: dict[StateKey, Tensor] = field(default_factory=dict)
    begun: Tensor | None = None
    scans: int = 0

    def before(self, key: StateKey, inputs: Tensor, kept: int) -> Tensor:
        """A convolution's inputs [rows, channels, new] with the `kept` last ones in front."""
        rows, channels, _ = inputs.shape
        if self.past is None:
            self.leave(key, torch.zeros(rows, channels, kept))
            return F.pad(inputs, (kept, 0))
        full = torch.cat([self.past[key], inputs], dim=-1)
        assert self.query_seqlens is not None
        last = self.query_seqlens.long()[:, None] + torch.arange(kept)
        self.leave(key, full.gather(2, last[:, None].expand(-1, channels, -1)))
        return full

    def leave(self, key: StateKey, state: Tensor) -> None:
        if self.past is None:
            self.shapes[key] = tuple(state.shape[1:])
        self.present[key] = state

    def real(self, tokens: Tensor) -> Tensor:
        """float32 [rows, new]: 1 for tokens, 0 for padding, for values [rows, new, ...]."""
        rows, new = tokens.shape[:2]
        if self.query_seqlens is None:
            return torch.ones(rows, new)
        return (torch.arange(new) < self.query_seqlens[:, None]).float()


_current: States | None = None


def _run() -> States:
    if _current is None:
        raise RuntimeError("states are kept outside of an export")
    return _current


class StatefulCache(PassingCache):
    """A `PassingCache` whose states come from the graph's inputs and go to its outputs."""

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None  # `update_conv_state` puts it in front

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        run = _run()
        run.begun = None if run.past is None else run.past["recurrent", layer_idx, state_idx]
        run.scans = 0
        return run.begun

    def update_conv_state(
        self,
        conv_states: Tensor,  # [rows, channels, new]
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if conv_kernel_size is None:
            raise UnsupportedModel("it keeps the inputs of a convolution of an unknown width")
        return _run().before(("conv", layer_idx, state_idx), conv_states, conv_kernel_size - 1)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        _run().leave(("recurrent", layer_idx, state_idx), recurrent_states)
        return recurrent_states

    def has_previous_state(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def is_recording_past(self, *args: Any, **kwargs: Any) -> bool:
        return False


def _convolution(
    hidden_states: Tensor,  # [rows, channels, kernel - 1 + new], as `update_conv_state` gives it
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:  # [rows, channels, new]
    out = F.conv1d(hidden_states, weight[:, None], bias, groups=weight.shape[0])
    return out if activation is None else ACT2FN[activation](out)


def _scan(
    rule: str,
    query: Tensor,  # [rows, new, heads, d_k]
    key: Tensor,
    value: Tensor,  # [rows, new, heads, d_v]
    decay: Tensor,  # [rows, new, heads] or [rows, new, heads, d_k], logarithms
    beta: Tensor | None = None,  # [rows, new, heads]
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One LinearAttention node: what it says [rows, new, heads, d_v], and the state that it leaves.

    The query may have one head for all.
    """
    run = _run()
    rows, new, heads, size = value.shape
    past = run.begun if run.begun is not None else torch.zeros(rows, heads, key.shape[-1], size)
    if past.dim() == 5:  # a layer that scans part after part
        past = past[:, run.scans]
    run.scans += 1
    inputs = [tensor.reshape(rows, new, -1) for tensor in (query, key, value)]
    out, present = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        [*inputs, past, decay.reshape(rows, new, -1), beta],
        {
            "q_num_heads": query.shape[2],
            "kv_num_heads": heads,
            "update_rule": rule,
            "scale": scale,
        },
        dtypes=[torch.float32] * 2,
        shapes=[[rows, new, heads * size], past.shape],
        version=1,
    )
    return out.reshape(rows, new, heads, size), present


def _gated(number: int, query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Tensor:
    """A scan by the rule `gated` of a model that has no place of its own for the state."""
    run = _run()
    at = ("recurrent", number, 0)
    run.begun = None if run.past is None else run.past[at]
    out, state = _scan("gated", query, key, value, decay)
    run.leave(at, state)
    return out


def _gated_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """torch_chunk_gated_delta_rule, and chunk_kimi_delta_attention, whose g is [..., d_k]."""
    query, key, value = query.float(), key.float(), value.float()
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    shared = value.shape[2] // key.shape[2]
    if shared > 1:
        query, key = (x.repeat_interleave(shared, dim=2) for x in (query, key))
    real = _run().real(value)[..., None]
    decay = g.float() * (real if g.dim() == 3 else real[..., None])
    beta = beta.float() * real
    return _scan("gated_delta", query, key, value, decay, beta, key.shape[-1] ** -0.5)


def _mamba2(
    hidden_states: Tensor,  # [rows, new, heads, head_dim]
    dt: Tensor,  # [rows, new, heads]
    A: Tensor,  # [heads]
    B: Tensor,  # [rows, new, groups, state]
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Any:
    """mamba2_chunk_scan."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    dt = torch.clamp(dt, *dt_limit) * _run().real(hidden_states)[..., None]
    key, query = (x.repeat_interleave(dt.shape[2] // x.shape[2], dim=2) for x in (B, C))
    out, state = _scan("gated", query, key, hidden_states * dt[..., None], A * dt)
    out = out if D is None else out + D[..., None] * hidden_states
    return (out, state) if return_final_states else out


def _mamba(
    hidden_states: Tensor,  # [rows, channels, new]
    dt: Tensor,
    A: Tensor,  # [channels, state]
    B: Tensor,  # [rows, state, new]
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Any:
    """mamba_selective_scan: every channel is a head of its own, with values of one number."""
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    dt = dt.transpose(1, 2)
    dt = dt * _run().real(dt)[..., None]
    key = B.transpose(1, 2)[:, :, None].expand(-1, -1, A.shape[0], -1)
    query = C.transpose(1, 2)[:, :, None]
    value = (hidden_states.transpose(1, 2) * dt)[..., None]
    out, state = _scan("gated", query, key, value, A * dt[..., None])
    out = out[..., 0].transpose(1, 2)
    out = out if D is None else out + hidden_states * D[:, None]
    out = out if z is None else out * F.silu(z)
    return (out, state) if return_last_state else out


def _wkv(
    time_decay: Tensor,  # [channels]
    time_first: Tensor,
    key: Tensor,  # [rows, new, channels]
    value: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """rwkv_linear_attention: a token sees the state before it, and itself with a weight of its own.

    (Peng et al. 2023, arXiv 2305.13048.) The scan begins with a token that changes nothing, and so
    says at each place what was before the next. The weights are exp(key) without the running
    maximum that transformers keeps: a key beyond 88 would be infinite.
    """
    run = _run()
    number = run.scans
    weight = key.exp()
    real = run.real(key)[..., None]
    numbers = torch.stack([value, torch.ones_like(value)], dim=-1)
    decay = (-time_decay.exp() * torch.ones_like(key)) * real
    keys, values, decay = (
        F.pad(x, (0, 0) * (x.dim() - 2) + (1, 0))
        for x in ((weight * real)[..., None], numbers, decay)
    )
    out = _gated(number, torch.ones_like(keys[:, :, :1]), keys, values, decay)
    own = (time_first + key).exp()
    above, below = out[:, :-1].unbind(-1)
    return (above + own * value) / (below + own), None


def _shift(number: int, module: Any, inputs: Tensor) -> Tensor:
    """Each token is shown the one before it, [rows, new, channels]."""
    if tuple(module.padding) != (0, 0, 1, -1):
        return F.pad(inputs, module.padding)
    full = _run().before(("shift", number, 0), inputs.transpose(1, 2), 1)
    return full[:, :, :-1].transpose(1, 2)


def _lightning(
    number: int, module: Any, hidden_states: Tensor, **kwargs: Any
) -> tuple[Tensor, None]:
    """Lightning attention (Qin et al. 2024, arXiv 2405.17381): a head forgets at its own rate."""
    mixed = module.act_fn(module.qkv_proj(hidden_states))
    query, key, value = mixed.unflatten(-1, (module.num_attention_heads, -1)).chunk(3, dim=-1)
    real = _run().real(value)[..., None]
    decay = -module.slope_rate.flatten() * real
    out = _gated(number, query, key * real[..., None], value, decay)
    out = F.sigmoid(module.output_gate(hidden_states)) * module.norm(out.flatten(2))
    return module.out_proj(out), None


def _griffin(
    number: int, module: Any, input_states: Tensor, position_ids: Tensor, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """A convolution and a linear recurrence with gates (De et al. 2024, arXiv 2402.19427)."""
    conv, branch = module.conv_1d, module.linear_x(input_states).transpose(1, 2)
    full = _run().before(("conv", number, 0), branch, conv.kernel_size[0] - 1)
    mixed = F.conv1d(full, conv.weight, conv.bias, groups=conv.groups).transpose(1, 2)
    mixed = module.rg_lru(mixed, position_ids)
    return module.linear_out(mixed * module.act_fn(module.linear_y(input_states))), None


def _lru(
    number: int,
    module: Any,
    hidden_states: Tensor,  # [rows, new, channels]
    recurrent_gate: Tensor,
    reset: Tensor,  # [rows, new, 1], where a text begins
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Every channel is a head of its own, with keys and values of one number."""
    real = _run().real(hidden_states)[..., None]
    decay = (recurrent_gate * ~reset).clamp(min=torch.finfo(torch.float32).tiny).log() * real
    key = (real * torch.ones_like(decay))[..., None]
    return _gated(number, key[:, :, :1], key, hidden_states[..., None], decay)[..., 0], None


def _compressed(
    number: int, module: Any, hidden_states: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [rows, new, heads, head_dim] of compressed convolutional attention.

    (Figliolia et al. 2025, arXiv 2510.04476.) Half of each value is that of the token before.
    """
    heads, shared = (-1, module.head_dim), module.num_key_value_groups
    query, key = module.q_proj(hidden_states), module.k_proj(hidden_states)
    mixed = torch.cat([query, key], dim=-1).transpose(1, 2)
    full = _run().before(("conv", number, 0), mixed, module.conv_kernel_size)
    mixed = module.conv_qk_grouped(module.conv_qk_depthwise(full)).transpose(1, 2)
    both = query.unflatten(2, heads) + key.unflatten(2, heads).repeat_interleave(shared, dim=2)
    both = both * 0.5
    mean = both.unflatten(2, (-1, shared)).mean(dim=3)
    width = query.shape[-1]
    before = _run().before(("shift", number, 0), hidden_states.transpose(1, 2), 1)[:, :, :-1]
    delayed = module.v_proj_delayed(before.transpose(1, 2))
    value = torch.cat([module.v_proj_current(hidden_states), delayed], dim=-1)
    return (
        mixed[..., :width].unflatten(2, heads) + both,
        mixed[..., width:].unflatten(2, heads) + mean,
        value.unflatten(2, heads),
    )


SCANS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _gated_delta,
    "chunk_kimi_delta_attention": _gated_delta,
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba,
    "rwkv_linear_attention": _wkv,
}


# What stands in for a module's function, by the names of its class and of the function.
MODULES: dict[tuple[str, str], Callable[..., Any]] = {
    ("MiniMaxLightningAttention", "forward"): _lightning,
    ("RecurrentGemmaRecurrentBlock", "forward"): _griffin,
    ("RecurrentGemmaRglru", "_rnn_scan"): _lru,
    ("ZayaCCAProjection", "forward"): _compressed,
    ("ZeroPad2d", "forward"): _shift,
}


@contextlib.contextmanager
def running(model: PreTrainedModel, run: States) -> Iterator[States]:
    """Run the model's code with the functions of `SCANS`, and its states with `run`'s."""
    run.scans = 0
    global _current
    modules = list(model.modules())
    files = [vars(sys.modules[home]) for home in {type(module).__module__ for module in modules}]
    ours = [(names, name, SCANS[name]) for names in files for name in SCANS.keys() & names.keys()]
    ours += [  # a model with a cache of its own asks whether it has got one
        (names, name, StatefulCache)
        for names in files
        for name, value in names.items()
        if isinstance(value, type)
        and issubclass(value, Cache)
        and value.__module__ == names["__name__"]
    ]
    theirs = [(names, name, names[name]) for names, name, _ in ours]
    led = [
        (module, name, functools.partial(function, number, module))
        for number, module in enumerate(modules)
        for (kind, name), function in MODULES.items()
        if type(module).__name__ == kind
    ]
    try:
        _current = run
        for names, name, replacement in ours:
            names[name] = replacement
        for module, name, function in led:
            setattr(module, name, function)
        yield run
    finally:
        _current = None
        for names, name, original in theirs:
            names[name] = original
        for module, name, _ in led:
            delattr(module, name)


def cache_argument(model: PreTrainedModel, cache: StatefulCache) -> dict[str, Any]:
    """The cache as the model's forward takes it; a model without one keeps nothing by itself."""
    names = inspect.signature(model.forward).parameters
    name = next((name for name in CACHES if name in names), None)
    return {"use_cache": False} if name is None else {"use_cache": True, name: cache}
