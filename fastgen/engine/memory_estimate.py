"""An estimate of a call's memory, made before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping

from fastgen.engine.prefill import CHUNK, TOGETHER
from fastgen.inputs.params import Params
from fastgen.store.model_info import ModelInfo
from fastgen.system.cpu import memory_bytes

FLOAT = 4  # bytes
# Bytes of each row's each logit while a token is chosen: the model's logits, what processors make
# of them and two steps of their sums; and the random words of a draw.
CHOOSING, DRAWING = 4 * FLOAT, 8
LITTLE = 32 << 20  # bytes that are there if a model is: the system is not asked each time
PAIR = 100  # bytes of a token and its log-probability, as Python objects


def of_call(
    info: ModelInfo,
    params: Params,
    prompts: int,
    width: int,
    max_length: int,
    assistant: ModelInfo | None = None,
    chunk: int = CHUNK,
) -> dict[str, int]:
    """The bytes that a call of `generate` may come to hold, part by part.

    Args:
        prompts: how many there are.
        width: tokens of a prompt, padding included.
        max_length: tokens that a row may reach, prompt included.
        assistant: the model that guesses tokens, if one does.
        chunk: tokens of a prompt that are read at a time; the fewer, the more prompts together.
    """
    rows = prompts * max(params.num_beams, params.num_return_sequences)
    new, vocab = max_length - width, info.vocab_size
    guided = params.guidance_scale not in (None, 1.0)
    guesses = params.prompt_lookup_num_tokens or (params.num_assistant_tokens if assistant else 0)
    kept = params.return_dict_in_generate * (params.output_scores + params.output_logits)
    token = info.cache_bytes * (1 + guided) + (assistant.cache_bytes if assistant else 0)
    together = min(prompts, max(1, TOGETHER // chunk))
    step = vocab * (CHOOSING + params.do_sample * DRAWING)
    return {
        "keys and values": rows * max_length * token,
        "prompts being read": info.reading_bytes * together * max(width, TOGETHER),
        "states": rows * info.state_bytes * (1 + guided + (guesses > 0)),
        "logits": rows * (1 + min(guesses, new)) * step,
        "what is returned": rows * new * (kept * vocab * FLOAT + PAIR * params.top_logprobs),
        "ids": rows * max_length * 8,
    }


def of_second_form(info: ModelInfo) -> dict[str, int]:
    """The bytes that `prefill_precision="int8"` takes, and besides them while it is loaded."""
    size = info.many_tokens_bytes
    return {"form for many tokens": size, "the same before it is packed": size}


def check(parts: Mapping[str, int], instead: str, memory: int | None = None) -> None:
    """Raise a ValueError for what cannot fit into this machine.

    Args:
        parts: bytes of each part (see `of_call`).
        instead: what the caller may do.
        memory: bytes that there are; None for those of this machine.
    """
    needed = sum(parts.values())
    if memory is None and needed < LITTLE:
        return
    there = memory_bytes() if memory is None else memory
    if there is not None and needed > there:
        each = ", ".join(f"{name} {size / 1e9:,.1f}" for name, size in parts.items() if size)
        raise ValueError(
            f"this needs up to {needed / 1e9:,.1f} GB of memory ({each}), the machine has "
            f"{there / 1e9:,.1f}: {instead}"
        )
