"""Measure exports: seconds, memory and disk, beside other tools' converters.

    python bench/export.py --home DIR --shapes smollm-135m llama-0.5b --precision int8 int4

Each export is a process of its own (fastgen's `fastgen export` in the driver's environment, the
others' in environments of their own, which `bench/peers` makes in DIR). It and its children are
looked at every few milliseconds: anonymous memory is what the system could not have back, since no
file has its content; resident memory has mapped files besides. Disk is what lies in the target's
directory at most. onnxruntime-genai's builder and llama.cpp's converter prove nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import shapes
from peers.engines import adapter
from peers.home import OFFLINE, WORKER, Home, Unavailable
from peers.home import size as bytes_below

from fastgen.export.progress import LOOKS, PAUSE, memory, on_disk

OURS, QUICK = "fastgen", "fastgen --quick"
ENGINES = (OURS, QUICK, "ort_genai", "llama")


@dataclass
class Found:
    """Of an export.

    Attributes:
        anonymous, resident, disk: bytes, at most.
        written: bytes, in the end.
    """

    seconds: float
    anonymous: int = 0
    resident: int = 0
    disk: int = 0
    written: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, help="where models and environments are kept")
    parser.add_argument("--shapes", nargs="+", choices=shapes.SHAPES, default=["smollm-135m"])
    parser.add_argument("--precision", nargs="+", default=["int8", "int4"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=[OURS])
    parser.add_argument("--json", type=Path, help="add a line for each export to this file")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        contextlib.closing(Home(args.home or Path(temporary))) as home,
    ):
        print(f"{shapes.machine(2)}\n")
        print(
            "| shape | precision | by | seconds | MB anonymous | of float32 | MB resident |"
            " MB of disk | MB written |\n|---|---|---|---|---|---|---|---|---|"
        )
        for shape in args.shapes:
            source = home.source(shape)
            floats = 4 * weights(source)
            for precision in args.precision:
                for engine in args.engines:
                    try:
                        found = export(home, shape, source, engine, precision)
                    except Unavailable as error:
                        print(f"{shape} {precision} {engine}: {error}", file=sys.stderr)
                        continue
                    print(row(shape, precision, engine, found, floats), flush=True)
                    if args.json:
                        line = {
                            "shape": shape,
                            "precision": precision,
                            "by": engine,
                            "float32": floats,
                        }
                        with args.json.open("a") as file:
                            file.write(json.dumps(line | vars(found)) + "\n")


def row(shape: str, precision: str, engine: str, found: Found, floats: int) -> str:
    title = engine if engine in (OURS, QUICK) else adapter(engine).title
    sizes = [
        f"{n / 1e6:,.0f}" for n in (found.anonymous, found.resident, found.disk, found.written)
    ]
    cells = [shape, precision, title, f"{found.seconds:.1f}", sizes[0]]
    cells += [f"{found.anonymous / floats:.2f}", *sizes[1:]]
    return f"| {' | '.join(cells)} |"


def weights(source: Path) -> int:
    """Count the numbers that the safetensors files of a model hold."""
    from fastgen.export import requirements

    size = requirements.of_checkpoint(source)
    assert size is not None
    return size.weights


def export(home: Home, shape: str, source: Path, engine: str, precision: str) -> Found:
    """Convert the model once, anew, and watch it."""
    with tempfile.TemporaryDirectory(dir=home.path) as temporary:
        target = Path(temporary) / "out"
        if engine in (OURS, QUICK):
            command = [sys.executable, "-m", "fastgen", "export", str(source), str(target)]
            command += ["--precision", precision, "--allow-mismatch"]
            command += ["--quick"] if engine == QUICK else []
        else:
            target.mkdir()
            python = home.python(adapter(engine).converter(shape))
            command = [
                str(python),
                str(WORKER),
                "prepare",
                engine,
                str(source),
                str(target),
                precision,
            ]
        with home.log(f"export-{shape}-{engine}-{precision}".replace(" ", "")).open("w") as log:
            found = watched(command, Path(temporary), log)
        if found is None:
            raise Unavailable(f"failed: see {log.name}")
        shutil.rmtree(target / "cache", ignore_errors=True)
        found.written = bytes_below(target)
        return found


def watched(command: list[str], directory: Path, log: object) -> Found | None:
    """Run a command; None if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | OFFLINE)
    found, looks = Found(0.0), 0
    while process.poll() is None:
        held = [memory(pid) for pid in family(process.pid)]
        found.anonymous = max(found.anonymous, sum(one.anonymous or 0 for one in held))
        found.resident = max(found.resident, sum(one.resident or 0 for one in held))
        if looks % LOOKS == 0:
            found.disk = max(found.disk, on_disk(directory))
        looks += 1
        time.sleep(PAUSE)
    found.seconds = time.perf_counter() - start
    return None if process.returncode else found


def family(pid: int) -> Iterator[int]:
    """A process and its children."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return
    for child in children:
        yield from family(int(child))


if __name__ == "__main__":
    main()
