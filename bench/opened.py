"""GGUF files as they are opened: what their numbers become, and the speed beside llama.cpp's.

    python bench/opened.py make FILE OUT --llama PYTHON     # the same model in each type
    python bench/opened.py types FILE ...
    python bench/opened.py seconds FILE ...
    python bench/opened.py speed FILE ... --llama PYTHON

`make` has llama.cpp's own quantizer write files of one model. `types` exports each file as it is
opened by default (in its own numbers; files of floats as fp32) beside transformers' reading of it
in float32, and `seconds` without that, each in a process of its own. `speed` reads a prompt and
writes tokens, greedily, with both, in turns; medians. PYTHON is one that has llama-cpp-python, such
as the environment `llama` of `bench/peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TYPES = (
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "Q3_K_M",
    "Q2_K", "IQ4_NL",
)  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
PROMPT, NEW = 256, 64  # tokens

MAKE = """
import sys, llama_cpp
source, out, *types = sys.argv[1:]

def write(source, name, kind):
    given = llama_cpp.llama_model_quantize_default_params()
    given.ftype, given.allow_requantize = kind, True
    path = f"{out}/{name}.gguf"
    if llama_cpp.llama_model_quantize(source.encode(), path.encode(), given):
        raise SystemExit(f"llama.cpp did not write {path}")
    return path

full = write(source, "F32", llama_cpp.LLAMA_FTYPE_ALL_F32)
for name in types:
    write(full, name, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"))
"""

EXPORT = """
import json, sys, time
start = time.perf_counter()
import fastgen.export
wishes = json.loads(sys.argv[3])
made = fastgen.export.export(sys.argv[1], sys.argv[2], progress=None, **wishes)
exported = time.perf_counter() - start
import fastgen
start = time.perf_counter()
fastgen.load(made)
print(json.dumps({"exported": exported, "loaded": time.perf_counter() - start}))
"""


def make(source: Path, out: Path, python: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    subprocess.run([python, "-c", MAKE, source, out, *TYPES], check=True, capture_output=True)


def exported(file: Path, out: Path, **wishes: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The report of an export in a process of its own, and its seconds."""
    command = [sys.executable, "-c", EXPORT, file, out, json.dumps(wishes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report, json.loads(done.stdout.splitlines()[-1])


def size_of(directory: Path) -> float:
    """Megabytes of a model's directory."""
    return sum(path.stat().st_size for path in directory.iterdir()) / 1e6


def types(files: list[Path]) -> None:
    print("| file | MB | directory, MB | matrices | KL | perplexity, of the file's own numbers "
          "| float32 logits beside transformers' |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for file in files:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "out"
            report, _ = exported(file, out, prove=True, **usual(file))
            print(line(file, report, size_of(out)), flush=True)


def usual(file: Path) -> dict[str, Any]:
    return {"precision": "fp32"} if file.stem in FLOATS else {}


def line(file: Path, report: dict[str, Any], size: float) -> str:
    quality = report.get("quality")
    kl, text = "0", "the same"
    if quality:
        own = quality["perplexity"] / (1 + quality["more_perplexity"])
        kl, text = f"{quality['kl']:.1e}", f"{quality['perplexity']:.3f}, {own:.3f}"
    kernels = "; ".join(report.get("kernels") or ["float32"])
    cells = [file.stem, f"{file.stat().st_size / 1e6:,.0f}", f"{size:,.0f}", kernels, kl, text]
    cells.append(f"{report.get('fp32', report)['logits']['max_difference']:.1e}")
    return f"| {' | '.join(cells)} |"


def seconds(files: list[Path]) -> None:
    print("| file | export, s | load, s |\n|---|---|---|")
    for file in files:
        with tempfile.TemporaryDirectory() as place:
            _, spent = exported(file, Path(place) / "out", **usual(file))
        print(f"| {file.stem} | {spent['exported']:.1f} | {spent['loaded']:.2f} |", flush=True)


def speed(files: list[Path], python: str, threads: int, rounds: int) -> None:
    from fastgen.timing.rounds import in_rounds  # which the other engine's Python has not

    print(f"| file | engine | prompt of {PROMPT} tokens, a second | new tokens a second |")
    print("|---|---|---|---|")
    for file in files:
        with tempfile.TemporaryDirectory() as place:
            ours, theirs = Path(place) / "ours", Path(place) / "theirs"
            exported(file, ours)
            theirs.mkdir()
            (theirs / "model.gguf").symlink_to(file.resolve())
            calls = {
                "fastgen": lambda _, at=ours: timed(sys.executable, "ours", at, threads),
                "llama.cpp": lambda _, at=theirs: timed(python, "llama", at, threads),
            }
            found = in_rounds(calls, rounds, warm=0)  # each warms up by itself
        for title, times in found.items():
            print(paces(file, title, times), flush=True)


def paces(file: Path, title: str, times: Sequence[tuple[float, float]]) -> str:
    """The line of an engine: medians of the tokens a second, of a prompt and of new ones."""
    first, rest = (statistics.median(column) for column in zip(*times, strict=True))
    return f"| {file.stem} | {title} | {PROMPT / first:,.0f} | {(NEW - 1) / rest:,.1f} |"


def timed(python: str, engine: str, directory: Path, threads: int) -> tuple[float, float]:
    """Seconds of a prompt, and of the tokens after the first, in a process of its own."""
    command = [python, __file__, "worker", engine, directory, "--threads", str(threads)]
    quiet = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=quiet)
    first, rest = json.loads(done.stdout.splitlines()[-1])
    return first, rest


def work(engine: str, directory: Path, threads: int) -> None:
    """Time an engine, the second time that it does the same."""
    sys.path.insert(0, str(HERE))
    from peers.engines import adapter

    runner = adapter(engine)()
    runner.load(directory, "int8", threads)
    prompt = [(7 * i + 13) % 997 + 3 for i in range(PROMPT)]
    for _ in range(2):
        start = time.perf_counter()
        runner.generate([prompt], NEW, 1)
        end = time.perf_counter()
        assert runner.first is not None
    print(json.dumps([runner.first - start, end - runner.first]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["make", "types", "seconds", "speed", "worker"])
    parser.add_argument("names", nargs="+", help="files; see above")
    parser.add_argument("--llama", metavar="PYTHON", help="one that has llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    files = [Path(name) for name in args.names]
    if args.what in ("make", "speed") and args.llama is None:
        parser.error(f"{args.what} needs --llama")
    if args.what == "make":
        make(files[0], files[1], args.llama)
    elif args.what == "types":
        types(files)
    elif args.what == "seconds":
        seconds(files)
    elif args.what == "speed":
        speed(files, args.llama, args.threads, args.rounds)
    else:
        work(args.names[0], files[1], args.threads)


if __name__ == "__main__":
    main()
