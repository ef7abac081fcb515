"""Make environments, models and converted models once, and keep them."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import real
import shapes

from peers import models
from peers.engines import NAMES, OURS, adapter

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
WORKER = HERE / "worker.py"
STAMP = "stamp.json"
BESIDE = ("commands", "serve", "jobs", "timing")  # areas of fastgen that no export depends on


class Unavailable(RuntimeError):
    """An engine that cannot be installed, or a model that it cannot convert: why."""


class Home:
    """A directory with all that, and the log of what made it.

    Each thing is made beside its place, then moved there, with a stamp of what it was made from:
    a run that was stopped, or a changed requirements file, never leaves a wrong one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.lock = claim(self.path)
        self.failed: dict[Path, str] = {}
        self.package = digest(package_text())
        self.exporter = digest(package_text(BESIDE))

    def close(self) -> None:
        """Let others have it."""
        if self.lock is not None:
            self.lock.close()

    def log(self, name: str) -> Path:
        """The file that a step or a worker writes its messages to."""
        path = self.path / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def source(self, shape: str) -> Path:
        """The transformers model of a shape, or a real one."""
        what = shapes.SHAPES.get(shape) or real.MODELS[shape]
        made_from = repr(what) + inspect.getsource(models)

        def make(path: Path) -> None:
            command = [sys.executable, str(HERE / "models.py"), shape, str(path)]
            self.run(command, f"model-{shape}", {"PYTHONPATH": str(HERE.parent)})

        return self.kept(self.path / "models" / shape, made_from, make)

    def python(self, name: str | None) -> Path:
        """The interpreter of the environment of a requirements file; None is the driver's own."""
        if name is None:
            return Path(sys.executable)
        return python_in(self.environment(name))

    def environment(self, name: str, folder: Path = HERE / "requirements") -> Path:
        """The environment of a requirements file in `folder`."""
        requirements = folder / f"{name}.txt"

        def make(path: Path) -> None:
            self.run([sys.executable, "-m", "venv", str(path)], f"venv-{name}")
            (path / "empty").write_text(str(size(path)))
            engine = name.removesuffix("-convert")
            build = adapter(engine).build if engine in NAMES else None
            self._install(path, ["--no-deps", "-r", str(requirements)], f"pip-{name}", build)

        # Environments cannot be moved: their scripts name their place.
        place = self.path / "environments" / name
        place = self.kept(place, requirements.read_text(), make, in_place=True)
        if name in OURS:
            self._install_checkout(place)
        return place

    def _install_checkout(self, environment: Path) -> None:
        """Install the fastgen of this checkout, unless it is there."""
        stamp = environment / "checkout"
        if stamp.exists() and stamp.read_text() == self.package:
            return
        with tempfile.TemporaryDirectory() as copy:
            copy_package(Path(copy))
            again = ["--no-deps", "--force-reinstall", copy]
            self._install(environment, again, "pip-ours-checkout")
        stamp.write_text(self.package)

    def _install(
        self, environment: Path, what: list[str], name: str, build: dict[str, str] | None = None
    ) -> None:
        self.run([str(python_in(environment)), "-m", "pip", "install", *what], name, build)

    def megabytes(self, name: str) -> float:
        """The time and space that installing an environment's packages took."""
        environment = self.environment(name)
        return (size(environment) - int((environment / "empty").read_text())) / 2**20

    def converted(self, shape: str, name: str, precision: str) -> Path:
        """A model of a shape, or a real one, as an engine wants it."""
        name = adapter(name).model_of or name
        engine = adapter(name)
        source, converter = self.source(shape), engine.converter(shape)
        made_from = (source / STAMP).read_text() + inspect.getsource(engine.prepare)
        if name in OURS:
            made_from += self.exporter
        elif converter:
            made_from += (self.environment(converter) / STAMP).read_text()

        def make(path: Path) -> None:
            path.mkdir()
            python = self.python(converter)
            # Ours reads the tokenizer's settings, which the others' older versions could not.
            ours = name in OURS and shape in real.MODELS
            of = real.directory(shape) if ours else source
            command = [str(python), str(WORKER), "prepare", name, str(of), str(path), precision]
            self.run(command, f"convert-{shape}-{name}-{precision}", OFFLINE)

        place = self.path / "converted" / f"{shape}-{name}-{precision}"
        return self.kept(place, made_from, make)

    def kept(
        self, place: Path, made_from: str, make: Callable[[Path], None], in_place: bool = False
    ) -> Path:
        """`place`, made anew unless it has the stamp of what it would be made from."""
        stamp = {"made_from": digest(made_from)}
        if _read(place / STAMP) == stamp:
            return place
        if place in self.failed:
            raise Unavailable(self.failed[place])
        part = place if in_place else place.with_name(place.name + ".part")
        for path in (place, part):
            shutil.rmtree(path, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        print(f"making {place.relative_to(self.path)} ...", end=" ", file=sys.stderr, flush=True)
        try:
            make(part)
        except Unavailable as error:
            print(error, file=sys.stderr)
            self.failed[place] = str(error)
            raise
        (part / STAMP).write_text(json.dumps(stamp))
        if not in_place:
            part.rename(place)
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
        return place

    def run(self, command: list[str], name: str, more: dict[str, str] | None = None) -> None:
        """Run a step, with a log of that name.

        Raises:
            Unavailable: it failed; the message has its last words.
        """
        log = self.log(name)
        with log.open("w") as out:
            env = os.environ | (more or {})
            code = subprocess.run(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=env
            ).returncode
        if code:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise Unavailable(f"{name} failed: {said[-1] if said else f'exit {code}'}")


OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ORT_DISABLE_TELEMETRY": "1",
}


def claim(path: Path) -> TextIO | None:
    """Keep others from a home until this process ends; on Windows nothing does.

    Raises:
        BlockingIOError: another run has it. Two would spoil each other's numbers too.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ModuleNotFoundError:
        return None
    file = (path / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise BlockingIOError(f"another run uses {path}") from error
    return file


def digest(text: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def size(path: Path) -> int:
    """Bytes of the files below a directory."""
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())


def package_text(without: tuple[str, ...] = ()) -> str:
    """All that fastgen is made of, but for some areas."""
    files = [CHECKOUT / "pyproject.toml"]
    for folder in ("fastgen", "export"):
        files += sorted((CHECKOUT / folder).rglob("*.py"))
    skipped = [CHECKOUT / "fastgen" / area for area in without]
    files = [file for file in files if not any(area in file.parents for area in skipped)]
    return "".join(file.read_text() for file in files)


def copy_package(target: Path) -> None:
    """Copy the parts of the checkout that `pip install` needs: building there would litter it."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, target)
    for name in ("fastgen", "export"):
        shutil.copytree(
            CHECKOUT / name, target / name, ignore=shutil.ignore_patterns("__pycache__")
        )


def python_in(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
