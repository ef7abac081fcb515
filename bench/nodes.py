"""The nodes that a step of one row runs, as onnxruntime has them, and their time.

    python bench/nodes.py DIRECTORY [FOLDER]

DIRECTORY is a model directory, FOLDER one of onnxruntime-genai's builder: both are one runtime's
graphs, so what differs is in their nodes. Both decode with the same past, each in a session whose
profiler is on, which costs every node the same; the sums are no measurement of speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import shapes

CONTEXT = 1024  # tokens that the folder's keys and values have room for
Table = dict[str, tuple[int, float]]  # of each kind of node: how many a step, microseconds of all


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--past", type=int, default=64, help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    print(f"{shapes.machine(args.threads)}\n")
    tables = {"fastgen": of_directory(args)}
    if args.folder is not None:
        tables["genai"] = of_folder(args)
    kinds = sorted({kind for table in tables.values() for kind in table})
    kinds.sort(key=lambda kind: -max(table.get(kind, (0, 0.0))[1] for table in tables.values()))
    print("| node |" + "".join(f" {name}, nodes | µs |" for name in tables))
    print("|---|" + "---|---|" * len(tables))
    for kind in kinds:
        print(line(kind, [table.get(kind, (0, 0.0)) for table in tables.values()]))
    sums = [
        (sum(count for count, _ in table.values()), sum(time for _, time in table.values()))
        for table in tables.values()
    ]
    print(line("all", sums))


def line(kind: str, cells: list[tuple[int, float]]) -> str:
    return f"| {kind} |" + "".join(f" {count} | {time:,.0f} |" for count, time in cells)


def of_directory(args: argparse.Namespace) -> Table:
    """The nodes of a model directory, opened as fastgen opens it."""
    import fastgen
    from fastgen.engine.session import profiled

    with tempfile.TemporaryDirectory() as place:
        with profiled(Path(place)):
            model = fastgen.load(args.directory, threads=args.threads)
        ids = np.random.default_rng(0).integers(0, model.model.info.vocab_size, (1, args.past))
        model.generate(ids, max_new_tokens=args.steps + 1, eos_token_id=None)
        return table(Path(model.model.session.end_profiling()), args.steps)


def of_folder(args: argparse.Namespace) -> Table:
    """The nodes of a folder's graph; keys and values stay in one buffer, as in its own runtime."""
    model = json.loads((args.folder / "genai_config.json").read_text())["model"]
    config = model["decoder"]
    with tempfile.TemporaryDirectory() as place:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        options.enable_profiling, options.profile_file_prefix = True, str(Path(place) / "profile")
        for name, value in config["session_options"].items():
            if name.startswith(("session.", "mlas.")):
                options.add_session_config_entry(name, str(value))
        path = str(args.folder / config["filename"])
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        heads, size = config["num_key_value_heads"], config["head_size"]
        buffers = [
            np.zeros((1, heads, CONTEXT, size), np.float32)
            for _ in range(2 * config["num_hidden_layers"])
        ]
        logits = np.empty((1, 1, model["vocab_size"]), np.float32)
        for step in range(args.steps):
            run(session, args.past + step, buffers, logits)
        return table(Path(session.end_profiling()), args.steps)


def run(session: Any, past: int, buffers: list[Any], logits: Any) -> None:
    """A step of one row after `past` tokens."""
    given = {
        "input_ids": np.array([[past % 100]], np.int64),
        "attention_mask": np.ones((1, past + 1), np.int64),
        "position_ids": np.array([[past]], np.int64),
    }
    binding = session.io_binding()
    pasts = iter(buffers)
    for spec in session.get_inputs():
        array = given[spec.name] if spec.name in given else next(pasts)
        bind(binding.bind_input, spec.name, array)
    presents = iter(buffers)
    for spec in session.get_outputs():
        bind(binding.bind_output, spec.name, logits if spec.name == "logits" else next(presents))
    session.run_with_iobinding(binding)


def bind(to: Any, name: str, array: Any) -> None:
    to(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def table(profile: Path, steps: int) -> Table:
    """The nodes that the last `steps` runs of a profile share, and their median time."""
    events = json.loads(profile.read_text())
    runs = [event for event in events if event["name"] == "model_run"][-steps:]
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    found: list[dict[str, list[float]]] = []
    for one in runs:
        end = one["ts"] + one["dur"]
        kinds: dict[str, list[float]] = defaultdict(list)
        for event in kernels:
            if one["ts"] <= event["ts"] < end:
                kinds[event["args"]["op_name"]].append(event["dur"])
        found.append(kinds)
    names = {kind for kinds in found for kind in kinds}
    return {
        kind: (
            len(found[-1].get(kind, [])),
            statistics.median(sum(kinds.get(kind, [])) for kinds in found),
        )
        for kind in sorted(names)
    }


if __name__ == "__main__":
    main()
