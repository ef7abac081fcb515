"""fastgen export: a transformers model, an ONNX folder or a GGUF file becomes a directory."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastgen.commands.say import clear_errors
from fastgen.store.model_info import CACHE_PRECISION
from fastgen.system import extras
from fastgen.system.interrupt import ended_at_once


@click.command()
@click.argument("model")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option(
    "--precision",
    help="fp32, int8 or int4 [default: int8]; of an ONNX folder also its own: q4, q8, fp16, q4f16, "
    "bnb4 ... [default: q4, else q8, else fp32]",
)
@click.option(
    "--cache-precision",
    default=CACHE_PRECISION,
    show_default=True,
    help="of keys and values: fp32, or int8 in a quarter of the memory, where what a prefix cache "
    "knew, and who else is served, may change a token",
)
@click.option("--force", is_flag=True, help="replace OUT if it is a model directory")
@click.option("--allow-mismatch", is_flag=True, help="keep an export that differs too much")
@click.option(
    "--max-kl",
    type=float,
    help="KL divergence that kernels are chosen for [default: int8 0.006, int4 0.1]",
)
@click.option(
    "--min-top1", type=float, help="share of equal likeliest tokens that is asked, if any"
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="a file of your own text to calibrate and judge on: plain, or JSON lines with text, ids "
    "or messages; may be given several times",
)
@click.option("--calibration", type=click.Path(path_type=Path), hidden=True)
@click.option(
    "--quick", is_flag=True, help="leave out the comparison on text (not the proof in float32)"
)
@click.option(
    "--build/--no-build",
    default=None,
    help="make the graph of the checkpoint's tensors without torch, or trace the model with torch "
    "[default: build where its family is known, and run the original beside it if torch is here]",
)
@click.option("--prove", is_flag=True, help="build, and run the original in torch beside it")
@click.option("--revision", help="branch, tag or commit of a hub repository")
@click.option("--adapter", help="merge this adapter (PEFT) first: a directory or a hub id")
def export(
    model: str,
    out: Path | None,
    precision: str | None,
    cache_precision: str,
    force: bool,
    allow_mismatch: bool,
    max_kl: float | None,
    min_top1: float | None,
    texts: tuple[Path, ...],
    calibration: Path | None,
    quick: bool,
    build: bool | None,
    prove: bool,
    revision: str | None,
    adapter: str | None,
) -> None:
    """Export MODEL to the model directory OUT.

    MODEL is a directory, a hub id or a file. It may be an adapter (PEFT), which is merged into the
    model that it belongs to; or what others exported to ONNX (onnxruntime-genai's builder, optimum,
    transformers.js), whose graph is rewritten and compared with itself as it was.

    It may be a GGUF file of llama.cpp's too (the extra `gguf`): a path, or ID:FILE on the hub. Its
    weights stay in their own numbers unless a precision is asked for.

    A transformers model of a known family (safetensors, with a tokenizer.json) and an ONNX folder
    need onnx and onnx_ir (the extra `onnx`), all other models torch and transformers (the extra
    `export`); running the result needs none of them. Where the family is known, the graph is built
    of the checkpoint's tensors, else the model is traced. Where torch is here, it is compared with
    the original. The report says which.

    Where a repository has an ONNX folder too, and torch is here, the transformers model is
    exported; --precision q4, q8, fp16 and so on take what the folder has. Of its fp32, int8 and
    int4 are made without torch.

    OUT is by default the model's name and its precisions, such as distilgpt2-int8, or
    distilgpt2-int8-kv-int8. What was compared and found is printed as a table, which
    `fastgen info OUT` shows again.
    """
    with clear_errors():
        try:
            with ended_at_once():
                from fastgen.export import pipeline
        except ImportError as error:
            raise ValueError(
                f"exporting needs torch and transformers: {extras.install('export')}; of a known "
                f"family or an ONNX folder, onnx and onnx_ir: {extras.install('onnx')}; of a GGUF "
                f"file, gguf besides: {extras.install('gguf')} ({error})"
            ) from error
        from fastgen.store.model_info import REPORT
        from fastgen.store.report import table

        made = pipeline.export(
            model,
            out,
            precision=precision,
            cache_precision=cache_precision,
            force=force,
            allow_mismatch=allow_mismatch,
            revision=revision,
            adapter=adapter,
            text=texts,
            calibration=calibration,
            max_kl=max_kl,
            min_top1=min_top1,
            quick=quick,
            build=build,
            prove=prove,
        )
        click.echo(table(json.loads((made / REPORT).read_text(encoding="utf-8"))))
