"""What `fastgen.json` says of a model directory, and whether the files are as it says."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import ModelError
from fastgen.store import jsonfile
from fastgen.store.graph_io import first_shown
from fastgen.store.jsonfile import is_count, is_text, take

FORMAT = 1  # of the model directory; `fastgen.json` says which one a directory has
GRAPH = "model.onnx"
INFO = "fastgen.json"
WEIGHTS = GRAPH + ".data"
PROMPTS = "prompts.onnx"
UNPACK = "unpack.onnx"
PRECISIONS = ("fp32", "int8", "int4")
MOST_LAYERS = 2**12
CACHE_DTYPES = ("float32", "int8")  # of stored keys and values


@dataclass(frozen=True)
class ModelInfo:
    """What `fastgen.json` says of a model.

    Attributes:
        precision: "fp32", "int8" or "int4".
        model_type: transformers' name of the architecture.
        vocab_size: rows of the embedding; ids are below it.
        max_length: positions that the model was made for; None without limit.
        hard_limit: whether it cannot compute a position beyond them (learned positions).
        layers: (kv_heads, head_dim) of each layer with keys and values.
        windows: of each layer, the tokens that a query sees, itself included; None for all. Empty
            where there is none, and of older exports.
        states: shapes of what else is kept of a row, float32.
        files: size in bytes of every file of the directory.
        cache_dtype: of the stored keys and values, "float32" or "int8".
        digests: sha256 of the files, hexadecimal; older exports wrote none.
        name: what was exported.
        parameters: of the original.
        exporter: the version of fastgen that wrote it.
        no_prompts: why a model in int4 cannot read prompts in int8; empty where it can.
    """

    precision: str
    model_type: str
    vocab_size: int
    max_length: int | None
    hard_limit: bool
    layers: tuple[tuple[int, int], ...]
    files: dict[str, int]
    cache_dtype: str = "float32"
    states: tuple[tuple[int, ...], ...] = ()
    windows: tuple[int | None, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)
    name: str = ""
    parameters: int = 0
    exporter: str = "?"
    no_prompts: str = ""

    @property
    def cache_precision(self) -> str:
        """Of the stored keys and values, as an export is asked for it: "fp32" or "int8"."""
        return "fp32" if self.cache_dtype == "float32" else self.cache_dtype

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of one token."""
        return (
            sum(2 * heads * dim for heads, dim in self.layers) * np.dtype(self.cache_dtype).itemsize
        )

    def row_bytes(self, tokens: int) -> int:
        """Of the keys and values of a row of so many tokens, where what is not shown any more goes
        back to the system (on Linux)."""
        windows = self.windows or (None,) * len(self.layers)
        shown = [tokens - (0 if w is None else first_shown(tokens, w)) for w in windows]
        sizes = (2 * heads * dim for heads, dim in self.layers)
        return int(np.dtype(self.cache_dtype).itemsize * np.dot(shown, list(sizes)))

    @property
    def reading_bytes(self) -> int:
        """Of the float32 keys and values beside those of a token that is being read."""
        floats = np.dtype(np.float32).itemsize * self.cache_bytes
        return floats if self.cache_dtype == "int8" else 0

    @property
    def state_bytes(self) -> int:
        """Of the states of one row, however long it is."""
        return sum(math.prod(shape) for shape in self.states) * np.dtype(np.float32).itemsize

    @property
    def can_read_prompts(self) -> bool:
        """Whether the model can read them in int8 (see `fastgen.load`)."""
        return PROMPTS in self.files and UNPACK in self.files

    @staticmethod
    def read(directory: Path) -> ModelInfo:
        """Read `fastgen.json` and compare the files with it: the size of all, and the digests of
        all but the weights. (A damaged graph can crash onnxruntime; it is not shown one.)

        Raises:
            ModelError: not a model directory, another format, or a file that is missing, truncated
                or changed.
        """
        info = _described(directory)
        known = {name: said for name, said in info.digests.items() if name != WEIGHTS}
        replace(info, digests=known).check(directory, *info.files)
        return info

    @staticmethod
    def verify(directory: Path) -> ModelInfo:
        """As `read`, with the weights: 0.7 seconds for each GB where the file is in memory.

        Raises:
            ModelError: as of `read`, naming every file that differs; or an older fastgen wrote no
                digests to compare with.
        """
        info = _described(directory)
        info.check(directory, *info.files)
        lacking = [name for name in info.files if name not in info.digests]
        if lacking:
            raise ModelError(
                f"{directory / INFO} has no digest of {', '.join(lacking)}, as exports of older "
                "versions: nothing is known to be wrong; export the model again to have them"
            )
        return info

    def check_prompts(self, directory: Path) -> None:
        """Raise a ModelError if prompts cannot be read in int8; it says why."""
        if self.can_read_prompts:
            return
        if self.no_prompts:
            why = self.no_prompts
        elif self.precision != "int4":
            why = f"they are for models in int4, it is in {self.precision}"
        else:
            why = "an older fastgen exported it: export the model again"
        raise ModelError(f'{directory} cannot be loaded with prefill_precision="int8": {why}')

    def check(self, directory: Path, *names: str) -> None:
        """Compare files with what was exported: size and digest, where there is one.

        Args:
            names: of the files; one that no export wrote is right as it is.

        Raises:
            ModelError: some are missing, truncated or changed; it names them all.
        """
        jsonfile.check_fetched(*(directory / name for name in names))
        found = [self._difference(directory, name) for name in names if name in self.files]
        if any(found):
            raise ModelError("; ".join(filter(None, found)))

    def _difference(self, directory: Path, name: str) -> str | None:
        path, size = directory / name, self.files[name]
        if not path.is_file():
            return f"{directory} lacks {name} ({size:,} bytes): copy it whole"
        changed = "it is truncated or was changed; copy or export the model again"
        actual = path.stat().st_size
        if actual != size:
            return f"{path} has {actual:,} bytes where {size:,} were exported: {changed}"
        if name in self.digests and self.digests[name] != digest(path):
            return f"{path} has not the {size:,} bytes that were exported: {changed}"
        return None


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(directory: Path) -> ModelInfo:
    """What `fastgen.json` says, each field of its type and within its range."""
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory")
    path = directory / INFO
    if not path.is_file():
        if (directory / "config.json").is_file():
            raise ModelError(
                f"{directory} is a transformers model (it has no {INFO}): export it with "
                f"`fastgen export {directory} OUT`, or load it with CausalLM.from_pretrained"
            )
        raise ModelError(f"{directory} is not a fastgen model directory: it has no {INFO}")
    found = {"cache_dtype": "float32", "name": "", "parameters": 0, "fastgen": "?", "states": []}
    found |= {"no_prompts": "", "windows": []}
    found |= jsonfile.read(path)
    field = functools.partial(take, found, path)
    version = field("format", lambda v: is_count(v, 2**31), f"a number such as {FORMAT}")
    if version != FORMAT:
        raise ModelError(
            f"{path} has format {version}, this fastgen reads format {FORMAT}: "
            "export the model again"
        )
    cache_dtype = field("cache_dtype", is_text, "a type's name")
    if cache_dtype not in CACHE_DTYPES:
        raise ModelError(
            f"{path} has keys and values in {cache_dtype}, this fastgen stores "
            f"{' or '.join(CACHE_DTYPES)}: use a newer one"
        )
    if not found.get("layers") and not found["states"]:
        raise jsonfile.damaged(path, "it has neither layers nor states")
    layers = field("layers", _are_layers, "a list of [heads, size of a head]")
    files = field("files", _are_files, "an object of names in the directory and their sizes")
    return ModelInfo(
        precision=field("precision", lambda v: v in PRECISIONS, " or ".join(PRECISIONS)),
        model_type=field("model_type", is_text, "text"),
        vocab_size=field("vocab_size", lambda v: is_count(v, 2**26), "a positive integer"),
        max_length=field(
            "max_length", lambda v: v is None or is_count(v, 2**40), "a positive integer or null"
        ),
        hard_limit=field("hard_limit", lambda v: isinstance(v, bool), "true or false"),
        layers=tuple(map(tuple, layers)),
        windows=tuple(
            field(
                "windows",
                lambda value: _are_windows(value, len(layers)),
                "a list with a positive integer or null for each layer",
            )
        ),
        files={n: one["bytes"] if isinstance(one, dict) else one for n, one in files.items()},
        cache_dtype=cache_dtype,
        states=tuple(map(tuple, field("states", _are_states, "a list of lists of sizes"))),
        digests={n: one["sha256"] for n, one in files.items() if isinstance(one, dict)},
        name=field("name", lambda v: isinstance(v, str), "text"),
        parameters=field("parameters", lambda v: is_count(v, 2**60, 0), "an integer"),
        exporter=field("fastgen", is_text, "text"),
        no_prompts=field("no_prompts", lambda v: isinstance(v, str), "text"),
    )


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_LAYERS and all(map(_is_layer, value))


def _are_windows(value: Any, layers: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (0, layers)
        and all(window is None or is_count(window, 2**31) for window in value)
    )


def _are_states(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 4 * MOST_LAYERS
        and all(isinstance(one, list) and 0 < len(one) <= 4 for one in value)
        and all(is_count(n, 2**20) for one in value for n in one)
        and all(math.prod(one) < 2**31 for one in value)
    )


def _is_layer(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_count(n, 2**16) for n in value)


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and GRAPH in value and all(map(_is_file, value.items()))


def _is_file(named: tuple[str, Any]) -> bool:
    """A plain name with {"bytes": size, "sha256": digest}, or the size as older versions had it."""
    name, said = named
    size = said.get("bytes") if isinstance(said, dict) else said
    known = not isinstance(said, dict) or isinstance(said.get("sha256"), str)
    return _is_plain(name) and is_count(size, 2**60, 0) and known


def _is_plain(name: str) -> bool:
    """Whether a name means a file in the directory itself, on any system."""
    return (
        is_text(name)
        and name.strip(".") != ""
        and not set(name) & set("/\\:")
        and len(name.encode()) <= 255
    )
