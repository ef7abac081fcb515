"""Measure the loss of int8 and int4 on text: trained models, and their outlier twins.

    for recipe in demo larger mixture hybrid; do    # trained, once
        python -m fastgen.export.demo $recipe --recipe $recipe
    done
    python bench/quality.py demo larger mixture hybrid

A twin is mathematically the same model with large outliers: in every layer some channels of the
norms are scaled up and the matrices that read them down, and some channels of the feed-forward
part likewise, those that the first token of a text uses most, so that this token becomes huge.
Models of another kind than llama have none.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHANNELS = 4  # of each norm, and of each feed-forward part
NORM_TIMES = 60.0
FIRST_TIMES = 60.0  # the first token's largest activation becomes that of the others times this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="directories of export/demo.py")
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"])
    parser.add_argument("--keep", type=Path, help="keep the exported models here")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("| model | precision | perplexity | more | KL | top-1 | kept wider | smoothed | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for directory in args.models:
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        text = rows(tokenizer, model.config.vocab_size)
        several = {directory.name: model}
        if model.config.model_type == "llama":
            several[f"{directory.name}, twin"] = twin(model, text)
        for name, one in several.items():
            for precision in args.precision:
                keep = args.keep and args.keep / f"{name.replace(', ', '-')}-{precision}"
                print(line(name, precision, one, tokenizer, text, keep), flush=True)


def rows(tokenizer: Any, vocab_size: int) -> list[Any]:
    """Rows of held-out text that no export calibrates on: three times what its report measures."""
    from fastgen.export.prove import reader
    from fastgen.export.quantize import calibrate

    text = reader.TEXTS.with_name("held_out.txt").read_text(encoding="utf-8")
    found = reader.Reader(tokenizer.backend_tokenizer, vocab_size, calibrate.ROW).rows(text)
    return found[: 3 * calibrate.TOKENS // calibrate.ROW]


def line(
    name: str, precision: str, model: Any, tokenizer: Any, text: list[Any], keep: Path | None
) -> str:
    """Export, measure on `text`, and say it as a line of the table."""
    from fastgen.engine.model import Model
    from fastgen.export import export
    from fastgen.export.prove import quality
    from fastgen.export.torch_model import source
    from fastgen.export.torch_model.original import Original

    with tempfile.TemporaryDirectory() as temporary:
        out = keep or Path(temporary) / "model"
        export(
            model,
            out,
            tokenizer=tokenizer,
            precision=precision,
            allow_mismatch=True,
            force=True,
            progress=None,
        )
        found = quality.measure(Original(source.of_object(model, None)).logits, Model(out), text)
        report = json.loads((out / "report.json").read_text())
    return (
        f"| {name} | {precision} | {found.perplexity:.3f} against {found.reference_perplexity:.3f} "
        f"| {found.more_perplexity:+.2%} | {found.kl:.1e} | {found.top1:.1%} "
        f"| {len(report['wider'])} of {len(report['matrices'])} | {len(report['smoothed'])} "
        f"| {report['bytes'] / 1e6:.1f} |"
    )


def twin(model: Any, text: list[Any]) -> Any:
    """The same function of the ids with outlier channels and a huge first token."""
    import torch

    other = copy.deepcopy(model)
    random = np.random.default_rng(0)
    with torch.no_grad():
        for layer, (norm, first) in zip(other.model.layers, activations(model, text), strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            for scale, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                places = random.choice(len(scale.weight), CHANNELS, replace=False)
                scale.weight[places] *= NORM_TIMES
                for reader in readers:
                    reader.weight[:, places] /= NORM_TIMES
            places = torch.from_numpy(np.argsort(-first / norm)[:CHANNELS].copy())
            times = FIRST_TIMES * float(norm.max()) / torch.from_numpy(first)[places]
            mlp.up_proj.weight[places] *= times[:, None]
            mlp.down_proj.weight[:, places] /= times
    return other


def activations(model: Any, text: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Of each layer's feed-forward part: what other tokens reach, and what first ones do."""
    import torch

    for layer in model.model.layers:
        seen: list[Any] = []
        hook = layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.append(inputs[0][0].abs().numpy())
        )
        with torch.no_grad():
            for row in text[:8]:
                model(torch.from_numpy(row)[None])
        hook.remove()
        others = np.concatenate([one[1:] for one in seen])
        yield np.quantile(others, 0.999, axis=0), np.mean([one[0] for one in seen], axis=0)


if __name__ == "__main__":
    main()
