"""Graphs that are built of a checkpoint, beside those that a trace of the model gives.

    python bench/built.py [FAMILY ...] [--markdown OUT]
    python bench/built.py --take DIRECTORY [--precision fp32]

Each family's tiny random model (`shrink`) is saved in several configurations, which a rule turns
on: every switch that the family asks for, every type of rotation, heads and lengths that the
attention node does not turn by itself. Each is built without torch and traced with it. Two graphs
are the same where operators, attributes, constants to the bit, and wiring are, but for names and
the order of sums; else their logits of ragged rows are compared.

`--take` exports a directory in a process of its own that has no torch, and says how long it takes
and the memory that the system could not have back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnx_ir as ir
import onnxruntime
import shrink
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from fastgen.errors import UnsupportedModel
from fastgen.export.build import configuration, families, weights
from fastgen.export.build import graph as built
from fastgen.export.rewrite import trim
from fastgen.export.torch_model import source
from fastgen.export.trace import graph

CLOSE = 5e-6  # of the largest logit: what two orders of the same sums differ by
SAME, CLOSE_LOGITS, REFUSED, WRONG = "the same graph", "the same logits", "refused", "WRONG"
ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"original_max_position_embeddings": 64, "factor": 4.0},
}  # fmt: skip
KEPT = {"rope_theta", "partial_rotary_factor"}  # whatever the type of the rotation is
COMMUTE = ("Add", "Mul")


@dataclass(frozen=True)
class Found:
    """The result of a configuration."""

    family: str
    what: str
    outcome: str
    reason: str = ""
    difference: float = 0.0
    nodes: tuple[int, int] = (0, 0)  # traced, built


def configurations(kind: str) -> Iterator[tuple[str, PretrainedConfig]]:
    """Configurations of a family, and what each turns on."""
    base = shrink.config_of(kind)
    yield "as it is", base
    said = configuration.Configuration(_written(base))
    families.FAMILIES[kind](said)
    for name in sorted(said.asked):
        if isinstance(getattr(base, name, None), bool):
            yield (
                f"{name} = {not getattr(base, name)}",
                changed(base, {name: not getattr(base, name)}),
            )
    if getattr(base, "num_key_value_heads", None) is not None:
        heads = base.num_attention_heads
        other = heads // 2 if base.num_key_value_heads == heads else heads
        yield f"num_key_value_heads = {other}", changed(base, {"num_key_value_heads": other})
    parameters = getattr(base, "rope_parameters", None)
    if not parameters:
        return
    yield "many positions", changed(base, {"max_position_embeddings": 1 << 17})
    if "head_dim" in type(base).__dataclass_fields__:
        yield "head_dim = 24", changed(base, {"head_dim": 24})
    for name, settings in ROTATIONS.items() if "rope_theta" in parameters else ():
        kept = {one: parameters[one] for one in KEPT & parameters.keys()}
        turned = {**kept, "rope_type": name, **settings}
        if name == "longrope":
            size = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
            count = int(size * (parameters.get("partial_rotary_factor") or 1)) // 2
            turned["short_factor"] = [1 + 0.1 * i for i in range(count)]
            turned["long_factor"] = [2 + 0.1 * i for i in range(count)]
        yield f"rope_type = {name}", changed(base, {"rope_parameters": turned})


def changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    return type(config).from_dict(config.to_dict() | changes)


def _written(config: PretrainedConfig) -> dict[str, Any]:
    return dict(json.loads(config.to_json_string(use_diff=False)))


def traced(model: PreTrainedModel) -> tuple[ir.Model, int | None]:
    """The trimmed graph of a trace, and the number of positions."""
    loaded = source.of_object(model, None).model
    made = graph.convert(loaded, graph.kept_by(loaded))
    limit = getattr(loaded.config, "max_position_embeddings", None)
    trim.trim(made, limit)
    return made, limit


def of_checkpoint(directory: Path) -> tuple[ir.Model, int | None]:
    """The trimmed graph that is built, and the number of positions."""
    decoder = families.describe(json.loads((directory / "config.json").read_text("utf-8")))
    made = built.write(decoder, weights.of_safetensors(directory))
    trim.trim(made, decoder.limit)
    return made, decoder.limit


def prints(model: ir.Model) -> list[str]:
    """Of each output of a graph, all that it is computed by, but for names."""
    known: dict[ir.Value, str] = {}
    for value in model.graph.inputs:
        known[value] = str(value.name)
    for value in model.graph.initializers.values():
        known[value] = _print_of(value.const_value.numpy())
    for node in model.graph:
        inputs = ["" if value is None else known[value] for value in node.inputs]
        inputs = sorted(inputs) if node.op_type in COMMUTE else inputs
        attributes = {
            name: f"{one.value:.6e}" if isinstance(one.value, float) else str(one.value)
            for name, one in sorted(node.attributes.items())
        }
        said = repr((node.domain, node.op_type, attributes, inputs))
        for place, value in enumerate(node.outputs):
            known[value] = hashlib.sha256(f"{place} {said}".encode()).hexdigest()
    return [f"{value.name} {known[value]}" for value in model.graph.outputs]


def _print_of(array: np.ndarray[Any, Any]) -> str:
    """Of a constant, to the bit."""
    array = np.ascontiguousarray(array) + array.dtype.type(0)  # no -0
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def logits(model: ir.Model, vocabulary: int) -> np.ndarray[Any, Any]:
    """A graph's logits of two ragged rows."""
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    held = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(held, providers=["CPUExecutionProvider"])
    lengths, random = np.array([40, 29], np.int32), np.random.default_rng(0)
    new = int(lengths.max())
    places = np.tile(np.arange(new), (2, 1))
    fed = {
        "input_ids": random.integers(0, vocabulary, (2, new)), "position_ids": places,
        "query_seqlens": lengths, "seqlens_k": lengths - 1,
        "total_sequence_length": np.array(new, np.int32), "logits_positions": places,
    }  # fmt: skip
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            fed[value.name] = np.zeros((2, value.shape[1], new, value.shape[3]), np.float32)
    said = session.run(["logits"], {v.name: fed[v.name] for v in session.get_inputs()})[0]
    return np.concatenate([row[:length] for row, length in zip(said, lengths, strict=True)])


def compare(model: PreTrainedModel, directory: Path) -> tuple[str, float, tuple[int, int]]:
    """A model as it is traced, and as it is built of what it saves: outcome, difference, nodes."""
    with torch.no_grad():
        model.save_pretrained(directory)
        ours, our_limit = of_checkpoint(directory)
        theirs, their_limit = traced(model)
    sizes = (len(theirs.graph), len(ours.graph))
    if our_limit != their_limit:
        return f"{WRONG}: {our_limit} positions, not {their_limit}", 1.0, sizes
    if prints(ours) == prints(theirs):
        return SAME, 0.0, sizes
    vocabulary = model.config.vocab_size
    one, other = logits(theirs, vocabulary), logits(ours, vocabulary)
    difference = float(np.abs(one - other).max() / np.abs(one).max())
    return (CLOSE_LOGITS if difference <= CLOSE else WRONG), difference, sizes


def examine(kind: str, what: str, config: PretrainedConfig, directory: Path) -> Found:
    try:
        model = shrink.build(kind, config=config)
        return Found(kind, what, *_ordered(compare(model, directory)))
    except UnsupportedModel as error:
        return Found(kind, what, REFUSED, str(error))


def _ordered(found: tuple[str, float, tuple[int, int]]) -> tuple[Any, ...]:
    outcome, difference, nodes = found
    return outcome, "", difference, nodes


def table(all_found: Sequence[Found]) -> str:
    """A line for each family: how many configurations became what."""
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}", "",
        "| family | the same graph | the same logits | nodes, traced and built | refused |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for kind in dict.fromkeys(one.family for one in all_found):
        mine = [one for one in all_found if one.family == kind]
        close = [one for one in mine if one.outcome == CLOSE_LOGITS]
        far = max(close, key=lambda one: one.difference) if close else None
        worst = f"{len(close)} (to {far.difference:.0e})" if far else ""
        refused = [one.what for one in mine if one.outcome == REFUSED]
        nodes = f"{far.nodes[0]}, {far.nodes[1]}" if far else ""
        same = sum(one.outcome == SAME for one in mine)
        lines.append(f"| {kind} | {same or ''} | {worst} | {nodes} | {', '.join(refused)} |")
    wrong = [one for one in all_found if one.outcome.startswith(WRONG)]
    lines += [f"\n{one.outcome}: {one.family}, {one.what}: {one.difference:.1e}" for one in wrong]
    return "\n".join(lines)


TAKE = """
import importlib.abc, json, sys, time

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"torch", "transformers", "onnxscript"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
start = time.perf_counter()
import fastgen.export
imported = time.perf_counter() - start
made = fastgen.export.export(sys.argv[1], sys.argv[2], precision=sys.argv[3])
report = json.loads((made / "report.json").read_text())
print(json.dumps({"imports": imported, "seconds": time.perf_counter() - start, "steps":
                  report["steps"], "peaks": report["peaks"]}))
"""


def take(directory: str, precision: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", TAKE, directory, out, precision],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        spent = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1])
    memory, floats = found["peaks"]["anonymous"], found["peaks"]["float32_weights"]
    print(f"{spent:.1f} s, {found['imports']:.1f} of them imports")
    print(f"{memory / 1e6:,.0f} MB of memory, {memory / floats:.2f} times the float32 weights")
    for step in found["steps"]:
        held = f"{step['anonymous'] / 1e6:,.0f} MB"
        print(f"    {step['step']:<28}{step['seconds']:6.1f} s  {held:>9}  {step['found']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="*", default=sorted(families.FAMILIES))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--take", help="a directory whose export is timed")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    if args.take:
        take(args.take, args.precision)
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = []
    for kind in args.families:
        for what, config in configurations(kind):
            with tempfile.TemporaryDirectory() as directory:
                one = examine(kind, what, config, Path(directory))
            print(one, file=sys.stderr, flush=True)
            found.append(one)
    text = table(found)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
