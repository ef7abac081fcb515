"""From nothing to the first token of a model: an environment made anew, and what it takes.

    python bench/fresh.py HOME --checkpoint DIRECTORY --gguf FILE [--only NAME ...]
    python bench/fresh.py HOME --only llama --python llama=PYTHON ...

Each way has an environment of its own in HOME, with nothing in it but what it needs (fastgen from
this checkout; the others in the versions of `bench/peers/requirements`), and says one token,
greedily, in a process of its own: the seconds are those of that process, or of two where a way
converts first. An environment that is there is not made again, and PYTHON is of one that was made
otherwise.
`--install` makes environments and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "peers" / "requirements"
PROMPT = [1, 4093, 198, 504, 2644, 282]  # ids

# Before each: the place of the model in sys.argv[1], and one for what is made in sys.argv[2].
PEAK = """
import json, resource, sys
kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
print(json.dumps(max(resource.getrusage(kind).ru_maxrss for kind in kinds)))
"""
FASTGEN = """
import os, sys
os.environ["FASTGEN_CACHE"] = sys.argv[2]
import fastgen
model = fastgen.CausalLM.from_pretrained(sys.argv[1], precision=PRECISION)
print(model.generate([PROMPT], max_new_tokens=1))
assert not {"torch", "transformers"} & sys.modules.keys()
"""
TRANSFORMERS = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
place = Path(sys.argv[1])
more = {"gguf_file": place.name} if place.is_file() else {}
place = place.parent if place.is_file() else place
model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **more)
print(model.generate(torch.tensor([PROMPT]), max_new_tokens=1, do_sample=False))
"""
OPTIMUM = """
import sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], export=True)
ids = torch.tensor([PROMPT])
print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False))
"""
BUILDER = """
import runpy, sys
model, out = sys.argv[1:3]
sys.argv = ["builder", "-i", model, "-o", out, "-p", "PRECISION", "-e", "cpu", "-c", out]
runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
"""
GENAI = """
import sys
import onnxruntime_genai as genai
model = genai.Model(sys.argv[2])
settings = genai.GeneratorParams(model)
settings.set_search_options(max_length=len(PROMPT) + 1, do_sample=False)
generator = genai.Generator(model, settings)
generator.append_tokens(PROMPT)
generator.generate_next_token()
print(generator.get_sequence(0))
"""
LLAMA = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, verbose=False)
print(next(model.generate(PROMPT, temp=0)))
"""


@dataclass(frozen=True)
class Way:
    """A way from a model to its first token.

    Attributes:
        title: what it is called.
        environment: its name in HOME.
        installs: what pip is given.
        model: "checkpoint" or "gguf".
        programs: that are run, one after the other.
    """

    title: str
    environment: str
    installs: tuple[str, ...]
    model: str
    programs: tuple[str, ...] = field(repr=False)


class Failed(RuntimeError):
    """A way that does not come to a token."""


def frozen(*names: str) -> tuple[str, ...]:
    return tuple(f"-r{REQUIREMENTS / name}.txt" for name in names)


def with_precision(program: str, precision: str) -> str:
    return program.replace("PRECISION", precision)


OURS = str(HERE.parent)
READS_GGUF = (*frozen("transformers_eager"), "gguf", "accelerate")
GENAI_BOTH = frozen("ort_genai-convert")
WAYS = {
    "fp32": Way(
        "fastgen, float32", "onnx", (f"{OURS}[onnx]",), "checkpoint",
        (with_precision(FASTGEN, '"fp32"'),),
    ),
    "int8": Way(
        "fastgen, int8", "onnx", (f"{OURS}[onnx]",), "checkpoint",
        (with_precision(FASTGEN, "None"),),
    ),
    "gguf": Way(
        "fastgen", "gguf", (f"{OURS}[gguf]",), "gguf", (with_precision(FASTGEN, "None"),)
    ),
    "transformers": Way(
        "transformers", "transformers", READS_GGUF, "checkpoint", (TRANSFORMERS,)
    ),
    "transformers-gguf": Way(
        "transformers", "transformers", READS_GGUF, "gguf", (TRANSFORMERS,)
    ),
    "optimum": Way(
        "optimum-onnx", "optimum", frozen("optimum_onnx"), "checkpoint", (OPTIMUM,)
    ),
    "genai-fp32": Way(
        "onnxruntime-genai's builder, float32", "genai", GENAI_BOTH, "checkpoint",
        (with_precision(BUILDER, "fp32"), GENAI),
    ),
    "genai-int4": Way(
        "onnxruntime-genai's builder, int4", "genai", GENAI_BOTH, "checkpoint",
        (with_precision(BUILDER, "int4"), GENAI),
    ),
    "llama": Way("llama-cpp-python", "llama", frozen("llama"), "gguf", (LLAMA,)),
}  # fmt: skip


def made(way: Way, home: Path) -> Path:
    """The Python of a way's environment, which is made where it is not there."""
    place = home / way.environment
    python = place / "bin" / "python"
    stamp = place / "install.json"
    if stamp.is_file():
        return python
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", *way.installs]
    subprocess.run(command, check=True)
    stamp.write_text(json.dumps({"seconds": time.perf_counter() - start}))
    return python


def installed(python: Path) -> tuple[float, int]:
    """Megabytes of an environment's packages, and how many there are, but for pip."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    place = Path(done.stdout.strip())
    mine = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
    parts = [part for part in place.iterdir() if not part.name.startswith(mine)]
    files = [path for part in parts for path in ([part] if part.is_file() else part.rglob("*"))]
    size = sum(
        path.stat().st_size for path in files if path.is_file() and "__pycache__" not in path.parts
    )
    return size / 1e6, sum(part.name.endswith(".dist-info") for part in parts)


def measure(way: Way, python: Path, model: Path) -> tuple[float, float]:
    """Seconds until the first token, and the largest resident memory in MB.

    Raises:
        Failed: with the last words of a program.
    """
    seconds, peak = 0.0, 0.0
    with tempfile.TemporaryDirectory() as out:
        for program in way.programs:
            code = program.replace("PROMPT", str(PROMPT)) + PEAK
            start = time.perf_counter()
            done = subprocess.run(
                [python, "-c", code, model, f"{out}/made"], capture_output=True, text=True
            )
            seconds += time.perf_counter() - start
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                said = [line for line in done.stderr.splitlines() if line.strip()]
                raise Failed(said[-1] if said else f"exit {done.returncode}")
            peak = max(peak, json.loads(done.stdout.splitlines()[-1]) / 1e3)
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("home", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="a directory with safetensors")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--python", nargs="+", default=[], metavar="ENVIRONMENT=PYTHON")
    parser.add_argument("--install", action="store_true")
    args = parser.parse_args()
    pythons = {name: Path(path) for name, _, path in (one.partition("=") for one in args.python)}
    args.home.mkdir(parents=True, exist_ok=True)
    print("| way | from | installed, MB | packages | install, s | first token, s | memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for name in args.only:
        way = WAYS[name]
        python = pythons.get(way.environment) or made(way, args.home.resolve())
        if args.install:
            continue
        stamp = args.home / way.environment / "install.json"
        spent = f"{json.loads(stamp.read_text())['seconds']:.0f}" if stamp.is_file() else ""
        size, packages = installed(python)
        model = args.checkpoint if way.model == "checkpoint" else args.gguf
        try:
            seconds, peak = measure(way, python, model.resolve())
            found = [f"{seconds:.1f}", f"{peak:,.0f}"]
        except Failed as error:
            found = [f"fails: {error}", ""]
        kind = "safetensors" if way.model == "checkpoint" else "GGUF"
        cells = [way.title, kind, f"{size:,.0f}", packages, spent, *found]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
