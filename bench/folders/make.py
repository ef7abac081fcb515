"""Folders as people make them: run inside the environment of the tool that makes them.

    python make.py TOOL

Each line of what it reads is a request in JSON: `kind` a type of a model, `source` a directory that
it is made in if there is none, `target` a directory, and `whats`, each of which becomes a folder of
that name there. What a tool does not make has its last words in `WHAT.json` instead. Each request
is answered by a line. This file imports nothing but what its environment has.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def source(kind: str, target: Path) -> None:
    """A tiny random model of a type, with a tokenizer, as this environment's transformers saves it.

    Its logits spread enough that the likeliest token is clear.
    """
    import torch
    from peers.models import make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    from folders import kinds

    config = AutoConfig.for_model(kind, **kinds.settings(kind))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(0.1 * noise if weight.ndim > 1 else weight + 0.1 * noise)
    model.save_pretrained(target)
    make_tokenizer(target, kinds.VOCAB, 2)


# onnxruntime-genai's builder: what it is asked for, by the name of the folder.
BUILDER: dict[str, list[str]] = {
    "fp32": ["-p", "fp32", "-e", "cpu"],
    "int8": ["-p", "int8", "-e", "cpu"],
    "int4": ["-p", "int4", "-e", "cpu"],
    "fp32-pruned": ["-p", "fp32", "-e", "cpu", "--extra_options", "prune_lm_head=true"],
    "fp16-cpu": ["-p", "fp16", "-e", "cpu"],
    "fp16-cuda": ["-p", "fp16", "-e", "cuda"],
    "fp16-dml": ["-p", "fp16", "-e", "dml"],
    "int4-cuda": ["-p", "int4", "-e", "cuda"],
    "int4-webgpu": ["-p", "int4", "-e", "webgpu"],
}


def builder(model: Path, target: Path) -> None:
    """By `python -m onnxruntime_genai.models.builder`."""
    name = "onnxruntime_genai.models.builder"
    cache = target / "cache"
    sys.argv = [name, "-m", str(model), "-o", str(target), "-c", str(cache), *BUILDER[target.name]]
    runpy.run_module(name, run_name="__main__")
    shutil.rmtree(target / "cache", ignore_errors=True)


def optimum(model: Path, target: Path) -> None:
    """By optimum-onnx, laid out as transformers.js has it: graphs in `onnx`, the rest above."""
    from optimum.onnxruntime import ORTModelForCausalLM

    ORTModelForCausalLM.from_pretrained(model, export=True).save_pretrained(target)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, target)
    (target / "onnx").mkdir()
    for path in target.glob("model.onnx*"):
        path.rename(target / "onnx" / path.name)


def merged(model: Path, target: Path) -> None:
    """By optimum before it wrote one graph for both: `legacy` is two decoders, and one of both."""
    import functools

    import torch
    from optimum.exporters.onnx import main_export

    # What torch's exporter was when this optimum was written.
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    legacy = target.name != "one"
    main_export(
        str(model),
        str(target),
        task="text-generation-with-past",
        legacy=legacy,
        do_validation=False,
        no_post_process=target.name == "two",
    )
    for path in model.glob("tokenizer*"):  # which its transformers may be too old to read
        shutil.copy(path, target)


def quantised(graph: Path, target: Path) -> None:
    """One of transformers.js's precisions of a graph, by the tools of onnxruntime that it uses."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    name = target.stem.removeprefix(f"{graph.stem}_")
    if name in ("quantized", "int8", "uint8"):
        kind = QuantType.QUInt8 if name == "uint8" else QuantType.QInt8
        extra = {"EnableSubgraph": True, "MatMulConstBOnly": True}
        quantize_dynamic(graph, target, weight_type=kind, extra_options=extra)
        return
    model = onnx.load(graph)
    if name.startswith("q4"):
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        four = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True)
        four.process()
        model = four.model.model
    elif name == "bnb4":
        from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

        normal = MatMulBnb4Quantizer(model, MatMulBnb4Quantizer.NF4, block_size=64)
        normal.process()
        model = normal.model.model
    if name.endswith("f16") or name == "fp16":
        model = _halved(model, keep_cache=name == "fp16")
    onnx.save(model, target)


def _halved(model: Any, keep_cache: bool) -> Any:
    """In half precision, with keys and values in single precision, or in half as well."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    kept = [value.name for value in (*model.graph.input, *model.graph.output)]
    if not keep_cache:
        kept = [name for name in kept if not name.startswith(("past", "present"))]
    return convert_float_to_float16(model, keep_io_types=kept, disable_shape_infer=False)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    "builder": builder, "optimum": optimum, "merged": merged, "quantised": quantised,
}  # fmt: skip


def answer(does: str, request: dict[str, Any]) -> dict[str, str]:
    """Make what is asked for; the answer is empty, or says why there is no model."""
    model, target = Path(request["source"]), Path(request["target"])
    try:
        if not model.exists():
            source(request["kind"], model)
    except Exception as error:
        return _said(error, request)
    for name in request["whats"]:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            TOOLS[does](model, place)
        except (Exception, SystemExit) as error:
            shutil.rmtree(place, ignore_errors=True)
            place.with_name(f"{place.name}.json").write_text(json.dumps(_said(error, request)))
    return {}


def _said(error: BaseException, request: dict[str, Any]) -> dict[str, str]:
    """An error's last line, with the model's name instead of where it lies."""
    traceback.print_exception(error)
    lines = str(error).strip().splitlines() or [""]
    last = lines[-1].replace(request["source"], request["kind"])
    return {"error": f"{type(error).__name__}: {last}"}


def main() -> None:
    # Tools write to stdout: keep it for answers, and give them stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    does = sys.argv[1]
    for line in sys.stdin:
        answers.write(json.dumps(answer(does, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    # The folder above: ours are `folders.something`, so that none can hide a tool's package.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    main()
