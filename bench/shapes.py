"""The models that are measured: well-known shapes with random weights, exported once a run."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "distilgpt2": ("gpt2", {"n_layer": 6, "n_head": 12, "n_embd": 768}),
    "smollm-135m": ("llama", {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "qwen-0.5b": ("qwen2", {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "rope_theta": 1e6,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "llama-0.5b": ("llama", {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 40960, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "bos_token_id": 1, "eos_token_id": 2,
    }),
    "gemma-270m": ("gemma3_text", {
        "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 256, "max_position_embeddings": 32768, "sliding_window": 512,
        "query_pre_attn_scalar": 256, "rope_theta": 1e6, "bos_token_id": 2, "eos_token_id": 1,
    }),
    "llama-3b": ("llama", {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "rope_theta": 500000.0, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }),
}  # fmt: skip
LARGE = {"llama-3b"}  # what is measured only when it is asked for


def build(shape: str) -> Any:
    """A transformers model of that shape, float32 where it names no type, eager attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = SHAPES[shape]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config.pad_token_id = 0
    return model


@contextmanager
def exported(
    shape: str, precisions: list[str], keep: Path | None, caches: Sequence[str] = ("fp32",)
) -> Iterator[dict[str, Path]]:
    """Model directories of a shape; made anew unless `keep` has them already.

    Their names are the precision, and that of keys and values where it is not fp32: int8-kv-int8.
    """
    from fastgen.export import export
    from fastgen.store.model_info import kind

    with tempfile.TemporaryDirectory() as temporary:
        home, paths = keep or Path(temporary), {}
        for precision in precisions:
            for cache in caches:
                name = kind(precision, cache)
                paths[name] = path = home / f"{shape}-{name}"
                if not path.exists():
                    export(
                        build(shape),
                        path,
                        precision=precision,
                        cache_precision=cache,
                        allow_mismatch=True,
                    )
        yield paths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every script of this folder has."""
    parser.add_argument("--shape", choices=SHAPES, default="distilgpt2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; medians count")
    parser.add_argument("--keep", type=Path, help="keep exported models here, and use those there")


def machine(threads: int) -> str:
    """One line that names what the numbers were measured on."""
    import numpy
    import onnxruntime

    names = re.findall(r"model name\s*: (.*)", _read("/proc/cpuinfo")) or [platform.processor()]
    flags = set(
        re.findall(r"\b(avx2|avx512f|avx512_vnni|avx_vnni|asimd)\b", _read("/proc/cpuinfo"))
    )
    return (
        f"{names[0]} ({', '.join(sorted(flags))}), {os.cpu_count()} CPUs, {threads} threads; "
        f"python {platform.python_version()}, numpy {numpy.__version__}, "
        f"onnxruntime {onnxruntime.__version__}"
    )


def resident(field: str = "VmRSS") -> float:
    """MB that this process holds in memory, by a field of the system's own account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1e3
    raise OSError(f"this system does not tell {field} in /proc/self/status")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit("this module is used by the others: run bench/generate.py or bench/startup.py")
