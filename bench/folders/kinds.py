"""The models whose folders are made: tiny and random, one of each type, by plain configurations.

Configurations are written as transformers 4 writes them, which all versions read.
"""

from __future__ import annotations

from typing import Any

VOCAB, WINDOW, LENGTH = 320, 16, 256

_WIDE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_ALONE = {"num_key_value_heads": 4}  # each head of queries has keys of its own
_GPT = {
    "vocab_size": VOCAB, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": LENGTH,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_GEMMA = {"head_dim": 32, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}

# A type's settings; whole ones have a size of their own for everything.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10000.0},
    "mistral": {"sliding_window": WINDOW, "head_dim": 32, "rope_theta": 10000.0},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "phi": {**_ALONE, "partial_rotary_factor": 0.5},
    "phi3": {"original_max_position_embeddings": LENGTH},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "sliding_window": WINDOW, "query_pre_attn_scalar": 32},
    "gemma3_text": {**_GEMMA, "sliding_window": WINDOW, "query_pre_attn_scalar": 32,
                    "sliding_window_pattern": 2},
    "olmo": _ALONE,
    "olmo2": _ALONE,
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5,
                "attention_multiplier": 0.3},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "stablelm": {"partial_rotary_factor": 0.5},
    "cohere": {},
    "helium": {"head_dim": 32},
    "nemotron": {"head_dim": 32, "partial_rotary_factor": 0.5},
    "gpt2": _GPT,
    "gpt_neo": {
        "vocab_size": VOCAB, "hidden_size": 128, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "window_size": WINDOW,
        "max_position_embeddings": LENGTH, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    },
    "gptj": {**_GPT, "rotary_dim": 16},
    "codegen": {**_GPT, "rotary_dim": 16},
    "gpt_bigcode": {**_GPT, "multi_query": True},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128},
    "falcon": {"multi_query": False, "new_decoder_architecture": False, "alibi": False},
    "bloom": {"n_layer": 2, "n_head": 4},
}  # fmt: skip
WHOLE = ("gpt2", "gpt_neo", "gptj", "codegen", "gpt_bigcode")


def settings(kind: str) -> dict[str, Any]:
    """The settings that the configuration of a type is made from."""
    return KINDS[kind] if kind in WHOLE else _WIDE | KINDS[kind]
