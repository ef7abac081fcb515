"""Tiny random models of every architecture that the tests run, built from their configurations."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastgen import CausalLM

if TYPE_CHECKING:  # they take seconds to import, and the core tests do without
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 99


def ragged(seed: int, lengths: tuple[int, ...] = (3, 11, 18)) -> list[list[int]]:
    """Rows of random ids of these lengths."""
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB, length).tolist() for length in lengths]


def left_padded(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def some(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Parameters: those besides the quick ones, which share their mechanisms, with -m slow."""
    return [one if one in quick else pytest.param(one, marks=pytest.mark.slow) for one in names]


def core(*kinds: str) -> list[Any]:
    """Parameters that are run with -m core: kinds of `pair` that need no export."""
    return [pytest.param(kind, marks=pytest.mark.core) for kind in kinds]


_WIDE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_WINDOW = {"sliding_window": 8}

# Every architecture that fastgen promises, and what its configuration needs besides the usual.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "llama": {},
    "mistral": _WINDOW,
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, **_WINDOW, "query_pre_attn_scalar": 16, "num_hidden_layers": 4},
    "gemma3_text": {"head_dim": 16, **_WINDOW, "num_hidden_layers": 6,
                    "query_pre_attn_scalar": 16, "sliding_window_pattern": 3},
    "phi": {},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "stablelm": {},
    "starcoder2": _WINDOW,
    "olmo2": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.3},
    "cohere": {},
    "nemotron": {},
    "glm4": {"head_dim": 8},
    "ernie4_5": {"head_dim": 8},
}  # fmt: skip


def config_of(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    settings = {**_WIDE, **ARCHITECTURES.get(kind, {}), **changes}
    known = set(AutoConfig.for_model(kind).to_dict()) | {"num_hidden_layers", "vocab_size"}
    if kind in ("gpt2", "gpt_bigcode"):
        settings = {k: v for k, v in settings.items() if k in known or k.startswith("n_")}
    if kind == "opt":
        settings.pop("intermediate_size")
    return AutoConfig.for_model(kind, **settings)


def build(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose logits spread enough that its likeliest token is clear."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.12 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    model.generation_config.pad_token_id = 0
    return model


def exported(kind: str, directory: Path, **changes: Any) -> tuple[PreTrainedModel, CausalLM]:
    """A model and its export, loaded; made unless it is there."""
    from fastgen.export import export

    model = build(kind, **changes)
    if not directory.is_dir():
        export(model, directory, tokenizer=tokenizer(), precision="fp32", progress=None)
    return model, CausalLM(directory)


TEXT = """The quick brown fox jumps over the lazy dog. import numpy as np; return the value of x.
Every good boy deserves fudge; naïve café 你好 🙂 and so it goes, on and on, one by one."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose ids all lie in a tiny model's vocabulary but not all are reached."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 2, special_tokens=["<pad>", "<s>", "</s>"])
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
