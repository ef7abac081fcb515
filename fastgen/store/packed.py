"""Optimised graphs and packed weights, kept for this machine (see `engine.session`).

`FASTGEN_CACHE/packed/MODEL/KEY` holds the graph as it was optimised, with a weights file that has
each matrix as it was exported and as its kernel wants it, and `packed.json`, which says what that
holds for: MODEL is a digest of the model's files, KEY one of what is in `Kept.key`. A model
directory may be read by others, or copied to another machine; so nothing of this is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from fastgen.errors import ModelError
from fastgen.store import files, jsonfile
from fastgen.store.jsonfile import is_object, is_text, take
from fastgen.store.model_info import GRAPH, UNPACK, WEIGHTS, ModelInfo, digest
from fastgen.system.cpu import cpu_features, cpu_name

KEY = "packed.json"
LAYOUT = 1  # of such a directory
MORE = 2.2  # times the weights: what is written, at most


@dataclass(frozen=True)
class Kept:
    """The place of one graph of a model, packed for this machine, which may be empty.

    Attributes:
        home: of all that is kept of the model.
        key: what it holds for. Another value of any of these is another place.
    """

    home: Path
    key: dict[str, Any]

    @classmethod
    def of(cls, info: ModelInfo, graph: str, optimised: Mapping[str, Any]) -> Kept:
        """The place for a graph of a model.

        Args:
            graph: the name of its file.
            optimised: what makes onnxruntime choose other nodes or kernels, as JSON can hold it.

        Raises:
            ModelError: `fastgen.json` has no digests: what is kept could be another model's.
        """
        names = [name for name in (graph, WEIGHTS, UNPACK) if name in info.files]
        if not info.digests.keys() >= set(names):
            raise ModelError("an older fastgen exported it, without digests: export it again")
        made_of = {name: info.digests[name] for name in names}
        return cls(home(info), {"files": made_of, "optimised": dict(optimised)} | here())

    @property
    def directory(self) -> Path:
        return self.home / _short(self.key)

    @property
    def lock(self) -> Path:
        """The file that whoever makes it holds."""
        return self.directory.with_suffix(".lock")

    @property
    def is_there(self) -> bool:
        """True if something has been kept here, right or not."""
        return self.directory.exists()

    def check(self) -> None:
        """Raise a ModelError unless what is kept here can be opened (see `check`)."""
        check(self.directory, self.key)

    @contextmanager
    def making(self, weights: int) -> Iterator[Path]:
        """Give a directory to write the graph and its weights into; it takes the place at the end.

        What is kept for this processor and another onnxruntime goes.

        Args:
            weights: bytes of those that are packed.

        Raises:
            ModelError: the disk has too little room.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        room, needed = shutil.disk_usage(self.home).free, int(MORE * weights)
        if room < needed:
            raise ModelError(
                f"it takes up to {needed / 1e6:,.0f} MB, {self.home} has {room / 1e6:,.0f} MB left"
            )
        with files.atomic_directory(self.directory) as new:
            yield new
            made = {path.name: _about(path) | {"sha256": digest(path)} for path in new.iterdir()}
            jsonfile.write(new / KEY, {"key": self.key, "files": made})
            for path in new.iterdir():  # or a name may outlive a crash, and its content not
                _write_out(path)
        for directory in _directories(self.home):
            if self._replaces(directory):
                shutil.rmtree(directory, ignore_errors=True)

    def _replaces(self, directory: Path) -> bool:
        """True for what is kept for this processor and another onnxruntime, or another fastgen."""
        with contextlib.suppress(ModelError):
            key = jsonfile.read(directory / KEY).get("key")
            if isinstance(key, dict) and "processor" in key:
                mine = key["processor"] == self.key["processor"]
                return mine and any(
                    key.get(name) != self.key[name] for name in ("onnxruntime", "layout")
                )
        return False


def here() -> dict[str, Any]:
    """The machine that packed weights hold for: this processor and this onnxruntime."""
    return {
        "layout": LAYOUT,
        "onnxruntime": f"{onnxruntime.__version__} ({onnxruntime.get_build_info()})",
        "processor": f"{platform.machine()}, {cpu_name()}, {_short(cpu_features())}",
    }


def home(info: ModelInfo) -> Path:
    """The place of all that is kept of a model, by the digests of its files."""
    return files.cache_directory() / "packed" / _short(info.digests)


def check(directory: Path, key: Mapping[str, Any] | None = None, whole: bool = False) -> None:
    """Compare what is kept with what was written: sizes and times, and the digest of the graph.

    Args:
        key: what it must hold for; None for this machine.
        whole: compare the digest of the weights as well.

    Raises:
        ModelError: it is damaged, or holds for something else; the message says what.
    """
    path, advice = directory / KEY, "it is made again"
    if not path.is_file():
        raise ModelError(f"{directory} has no {KEY}")
    content = jsonfile.read(path, advice)
    holds = take(content, path, "key", is_object, "an object", advice)
    wanted = here() if key is None else key
    for name in wanted:
        if holds.get(name) != wanted[name]:
            raise ModelError(f"{directory} is for {name} {holds.get(name)}, not {wanted[name]}")
    made = take(content, path, "files", is_object, "an object", advice)
    if set(made) != {GRAPH, WEIGHTS}:
        raise jsonfile.damaged(path, f"files must be {GRAPH} and {WEIGHTS}", advice)
    for name in made:
        said = take(made, path, name, is_object, "an object", advice)
        expected = take(said, path, "sha256", is_text, "text", advice)
        file = directory / name
        if not file.is_file():
            raise ModelError(f"{file} is not there")
        changed = any(said.get(key) != value for key, value in _about(file).items())
        if changed or ((whole or name == GRAPH) and digest(file) != expected):
            raise ModelError(f"{file} was changed since it was written")


def fault(directory: Path, whole: bool = False) -> str | None:
    """The reason why what is kept cannot be used here (see `check`); None where it can."""
    try:
        check(directory, whole=whole)
    except ModelError as error:
        return str(error)
    return None


def kept(info: ModelInfo) -> list[Path]:
    """The directories that are kept of a model, for this machine or not."""
    return _directories(home(info))


def remove(info: ModelInfo) -> int:
    """Remove all that is kept of a model; returns its bytes. Who runs it goes on."""
    size = sum(path.stat().st_size for path in home(info).rglob("*") if path.is_file())
    if home(info).exists():
        shutil.rmtree(home(info))
    return size


def _about(path: Path) -> dict[str, int]:
    """A file's size and the time of its last change, which soon tell that it is another one."""
    said = path.stat()
    return {"bytes": said.st_size, "modified": said.st_mtime_ns}


def _directories(place: Path) -> list[Path]:
    """Those in `place` that are whole: what is being made begins with a dot."""
    if not place.is_dir():
        return []
    return sorted(p for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))


def _short(content: Any) -> str:
    """The beginning of a digest of what JSON can hold."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_out(path: Path) -> None:
    """Have the system write a file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
