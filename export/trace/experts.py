"""Mixtures of experts as one node a layer, whatever routes them, while a model is traced.

Nearly every mixture of transformers is a module that holds the matrices of all experts and is
given hidden states, which experts each token goes to, and with which weights. While a model is
exported (`as_nodes`) such a module emits one node, which `rewrite.mixture` lays out for the
kernels. The kernel's gate that a module has, and its alpha, beta and limit, are found by trying.

Experts that are more than that (a norm after each expert) gather each token's matrices, as
transformers' own `batched_mm` does: exact, slow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import batched_mm_experts_forward

from fastgen.errors import UnsupportedModel
from fastgen.export.rewrite.mixture import DOMAIN, LEAST, LOOPED, NEVER, PLAIN, Array, Gate

TRIED = 4000  # numbers that an activation is tried on
CLOSE = 1e-5  # what two ways to compute one differ by, of which 30 times as much is left


@contextlib.contextmanager
def as_nodes(model: PreTrainedModel) -> Iterator[None]:
    """Run the experts of `model` as one node a layer, then as they ran again."""
    forms = {module: form for module in model.modules() if (form := _form(module)) is not None}
    try:
        for module, form in forms.items():
            module.forward = partial(_experts, module, form)
        yield
    finally:
        for module in forms:
            del module.forward


Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _experts(
    module: nn.Module,
    form: Form,
    hidden_states: torch.Tensor,  # [tokens, hidden]
    top_k_index: torch.Tensor,  # [tokens, k]
    top_k_weights: torch.Tensor,  # [tokens, k]
) -> torch.Tensor:  # [tokens, hidden]
    """The forward of a module with experts: its own while recording, `form` in the graph."""
    if torch.compiler.is_exporting():
        return form(hidden_states, top_k_index, top_k_weights)
    if bool((top_k_weights < 0).any()):
        raise UnsupportedModel("it gives some experts a negative weight")
    return type(module).forward(module, hidden_states, top_k_index, top_k_weights)


def _form(module: Any) -> Form | None:
    """The function that stands for the forward of a module with experts; None for others.

    Most have transformers' `use_experts_implementation`. The others are told by what they hold:
    dbrx's three flat matrices, longcat_flash's experts that do nothing.
    """
    if hasattr(module, "_is_expert_parallel"):
        activation = activation_of(module)
        if activation is None:
            return partial(batched_mm_experts_forward, module)
        return partial(_interfaced, module, activation)
    flat: Any = getattr(module, "mlp", None)
    if all(hasattr(flat, name) for name in ("w1", "v1", "w2", "activation_fn")):
        return partial(_flat, module, _silu_gated(flat.activation_fn))
    if all(hasattr(module, name) for name in ("zero_expert_num", "gate_up_proj", "down_proj")):
        return partial(_some_idle, module, _silu_gated(module.act_fn))
    return None


def _interfaced(
    module: Any,
    activation: dict[str, Any],
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Experts under transformers' `use_experts_implementation`, which says how they are held."""
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    first, second = (getattr(module, name) for name in names)
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in names]
    return _emit(
        hidden_states,
        index,
        weights,
        [first, None],
        second,
        biases,
        activation,
        count=second.shape[0],
        transposed=(module.is_transposed, module.is_transposed),
        mixed=not module.is_concatenated,
    )


def _flat(
    module: Any,
    activation: dict[str, Any],
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Gate, linear half and last matrix, each [experts * out, hidden]."""
    mlp = module.mlp
    return _emit(
        hidden_states,
        index,
        weights,
        [mlp.w1, mlp.v1],
        mlp.w2,
        [None, None],
        activation,
        count=module.num_experts,
        transposed=(False, True),
    )


def _some_idle(
    module: Any,
    activation: dict[str, Any],
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Experts, and numbers beyond theirs that stand for the token itself."""
    mine = weights * (index < module.num_routed_experts)
    out = _emit(
        hidden_states,
        index,
        mine,
        [module.gate_up_proj, None],
        module.down_proj,
        [None, None],
        activation,
        count=module.num_routed_experts,
        others=module.zero_expert_num,
    )
    return out + hidden_states * (weights - mine).sum(-1, keepdim=True)


def _silu_gated(activation: nn.Module) -> dict[str, Any]:
    x = torch.linspace(-30, 30, TRIED)
    if not _equal(PLAIN["silu"](x.numpy()), activation(x)):
        raise UnsupportedModel("its experts have another activation than SiLU")
    return Gate(1.0, 0.0, None).attributes()


def activation_of(module: nn.Module) -> dict[str, Any] | None:
    """The kernel's attributes for what a module does between its matrices; None if it has none.

    Found by trying all that the kernel has, with the numbers that the module's attributes suggest,
    and what a Loop has (whose gate and linear half follow each other: `swiglu_fusion` is 2).
    """
    if module.has_post_expert_norm:
        return None
    x = torch.linspace(-30, 30, TRIED)[torch.randperm(TRIED, generator=_seeded())].reshape(-1, 8)
    with torch.no_grad():
        if not module.has_gate:
            expected = module.act_fn(x)
            forms = PLAIN | LOOPED
            names = (n for n, form in forms.items() if _equal(form(x.numpy()), expected))
            return next(({"activation_type": name} for name in names), None)
        expected = module._apply_gate(x)
        both = x.chunk(2, dim=-1) if module.is_concatenated else (x[..., ::2], x[..., 1::2])
        halves = [half.numpy() for half in both]
        alphas = {1.0} | _numbers(module, "alpha", "swiglu_alpha")
        limits = {None} | _numbers(module, "limit", "swiglu_limit")
        gates = (Gate(a, b, limit) for a in alphas for b in (0.0, 1.0) for limit in limits)
        gated = next((g.attributes() for g in gates if _equal(g(*halves), expected)), None)
        names = (n for n, f in LOOPED.items() if _equal(f(halves[0]) * halves[1], expected))
        return gated or next(({"activation_type": n, "swiglu_fusion": 2} for n in names), None)


def _equal(one: Array, other: torch.Tensor) -> bool:
    return one.shape == other.shape and np.allclose(one, other.numpy(), rtol=1e-5, atol=CLOSE)


def _numbers(module: nn.Module, *names: str) -> set[float]:
    values = (getattr(module, name, None) for name in names)
    return {float(value) for value in values if isinstance(value, float | int)}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _emit(
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    first: Sequence[torch.Tensor | None],
    second: torch.Tensor,
    biases: Sequence[torch.Tensor | None],
    activation: dict[str, Any],
    *,
    count: int,
    transposed: tuple[bool, bool] = (False, False),
    mixed: bool = False,
    others: int = 0,
) -> torch.Tensor:
    """The node, with the matrices as the model holds them, and how that is.

    Args:
        first: [experts, out, in], or its gate and its linear half.
        second: the other matrix of each expert.
        count: of experts.
        transposed: whether a matrix is [experts, in, out].
        mixed: whether gate and linear half are in turns already.
        others: that the index may name besides, and whose weight is zero.
    """
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = torch.full((tokens.shape[0], count + others), NEVER)
    logits = logits.scatter(1, index.long(), weights.clamp(min=LEAST).log())
    if others:
        logits = logits[:, :count]
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Experts",
        [tokens, logits, first[0], first[1], biases[0], second, biases[1]],
        activation
        | {
            "k": index.shape[-1],
            "mixed": int(mixed),
            "first_transposed": int(transposed[0]),
            "second_transposed": int(transposed[1]),
        },
        dtype=torch.float32,
        shape=tokens.shape,
        version=1,
    )
    return (out * weights.sum(-1, keepdim=True)).reshape(hidden_states.shape)
