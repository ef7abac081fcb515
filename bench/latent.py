"""Latents beside the keys and values made of them, in the sizes of DeepSeek-V2-Lite's attention.

    python bench/latent.py --past 512 2048 --rows 1 8

The same random model (two dense layers) is exported twice: with one latent and one rotated key a
token, as it is done, and with the keys and values of all heads. Both run the same tokens in
interleaved rounds; the table gives medians.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import shapes
from context import Context, summaries

SIZES = {
    "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 16, "first_k_dense_replace": 2,
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "max_position_embeddings": 8192, "n_routed_experts": 2,
}  # fmt: skip


def main(sizes: Mapping[str, Any] = SIZES) -> None:
    """Measure with a model of these sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--past", nargs="+", type=int, default=[512, 2048], help="tokens of a prompt"
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import fastgen
    from fastgen.export import export
    from fastgen.export.trace import hooks

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v2", **sizes)).eval()
    with tempfile.TemporaryDirectory() as home:
        loaded = {}
        for name, saves in (("latents", True), ("keys and values", False)):
            with mock.patch.object(hooks, "_saves", lambda _, saves=saves: saves):
                out = export(model, Path(home) / name, precision="fp32", progress=None)
            loaded[name] = fastgen.load(out, threads=options.threads).model
        print(f"{shapes.machine(options.threads)}\n")
        print("| rows | tokens | kept | MB | s to read | tokens a second | ms a step after |")
        print("|---|---|---|---|---|---|---|")
        for past in options.past:
            for rows in options.rows:
                args = argparse.Namespace(rows=rows, new=8)
                contexts = {name: Context(one, args, past) for name, one in loaded.items()}
                for name, told in summaries(contexts, options.rounds):
                    print(f"| {rows} | {past} | {name} | {told} |", flush=True)


if __name__ == "__main__":
    main()
