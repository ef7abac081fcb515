"""A model directory: the names of its files, and what `fastgen.json` says of them and the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import ModelError
from fastgen.store import jsonfile
from fastgen.store.graph_io import first_shown
from fastgen.store.jsonfile import is_count, is_text
from fastgen.system.cpu import int8_overflows

# The files of a model directory.
INFO = "fastgen.json"
GRAPH = "model.onnx"
WEIGHTS = GRAPH + ".data"
SCALES = "cache_scales.npy"  # float32, flat: of each layer's keys, then values, by channel
MANY_TOKENS = "many_tokens.onnx"
MANY_TOKENS_UINT8 = "many_tokens.uint8.onnx"  # where products of uint8 and int8 overflow
UNPACK = "unpack.onnx"
SMALL = 0.1  # of a model: memory that need not be asked for
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
REPORT = "report.json"
TUNING = "tuned.json"  # which no export writes

FORMAT = 1  # of the model directory; `fastgen.json` says which one a directory has
PRECISIONS = ("fp32", "int8", "int4")
PRECISION = "int8"  # of an export where none is asked for
CACHE_PRECISION = "fp32"  # the same for keys and values
MOST_LAYERS = 2**12
CACHE_DTYPES = ("float32", "int8")  # of stored keys and values


@dataclass(frozen=True)
class ModelInfo:
    """The content of `fastgen.json`.

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
        files: size in bytes of every file of the directory; empty before it is written.
        cache_dtype: of the stored keys and values, "float32" or "int8".
        digests: sha256 of the files, hexadecimal; older exports wrote none.
        name: what was exported.
        parameters: of the original.
        exporter: the version of fastgen that wrote it.
        no_prompts: why a model in int8 or int4 has no second form for many tokens; empty where it
            has.
        many_tokens_bytes: of memory that the second form takes.
    """

    precision: str
    model_type: str
    vocab_size: int
    max_length: int | None
    hard_limit: bool
    layers: tuple[tuple[int, int], ...]
    files: dict[str, int] = field(default_factory=dict)
    cache_dtype: str = "float32"
    states: tuple[tuple[int, ...], ...] = ()
    windows: tuple[int | None, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)
    name: str = ""
    parameters: int = 0
    exporter: str = "?"
    no_prompts: str = ""
    many_tokens_bytes: int = 0

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
        """True if the model has its matrices in a second form too (see `fastgen.load`)."""
        return self.many_tokens in self.files and UNPACK in self.files

    @property
    def second_form_is_small(self) -> bool:
        """True if there is a second form, which takes a tenth of the model's size at most."""
        size = sum(self.files.values())
        return self.can_read_prompts and self.many_tokens_bytes <= SMALL * size

    @property
    def many_tokens(self) -> str:
        """The graph with both forms that this processor takes."""
        return MANY_TOKENS_UINT8 if int8_overflows() else MANY_TOKENS

    @staticmethod
    def parse(directory: Path) -> ModelInfo:
        """Read `fastgen.json` alone, each field of its type and within its range.

        Raises:
            ModelError: not a model directory, another format, or a file that is damaged.
        """
        path = directory / INFO
        _check_there(directory)
        content = OLDER | jsonfile.read(path)
        if newer := _newer(content):
            raise ModelError(f"{path} {newer}")
        if fault := _fault(content):
            raise jsonfile.damaged(path, fault)
        return _of_content(content)

    def write(self, directory: Path) -> None:
        """Write `fastgen.json`: from now on the directory is a model.

        Raises:
            ModelError: a field is not as `parse` wants it.
        """
        content = _content(self)
        if fault := _fault(OLDER | content):
            raise ModelError(f"{directory / INFO} cannot be written: {fault}")
        jsonfile.write(directory / INFO, content)

    @staticmethod
    def read(directory: Path) -> ModelInfo:
        """Read `fastgen.json` and compare the files with it: the size of all, and the digests of
        all but the weights. (A damaged graph can crash onnxruntime; it is not shown one.)

        Raises:
            ModelError: as of `parse`, or a file is missing, truncated or changed.
        """
        info = ModelInfo.parse(directory)
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
        info = ModelInfo.parse(directory)
        info.check(directory, *info.files)
        lacking = [name for name in info.files if name not in info.digests]
        if lacking:
            raise ModelError(
                f"{directory / INFO} has no digest of {', '.join(lacking)}, as exports of older "
                "versions: nothing is known to be wrong; export the model again to have them"
            )
        return info

    def check_prompts(self, directory: Path) -> None:
        """Raise a ModelError if the model has no second form; it says why."""
        if self.can_read_prompts:
            return
        if self.no_prompts:
            why = self.no_prompts
        elif self.precision == "fp32":
            why = "that is for models in int8 and int4, this one is in fp32"
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
        differences = [self._difference(directory, name) for name in names if name in self.files]
        if any(differences):
            raise ModelError("; ".join(filter(None, differences)))

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


def kind(precision: str, cache_precision: str) -> str:
    """The end of a directory's name: "int8", or "int8-kv-int8" where the cache has its own."""
    return precision if cache_precision == CACHE_PRECISION else f"{precision}-kv-{cache_precision}"


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_there(directory: Path) -> None:
    """Raise a ModelError for a directory that has no `fastgen.json`."""
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a directory")
    if (directory / INFO).is_file():
        return
    if (directory / CONFIG).is_file():
        raise ModelError(
            f"{directory} is a transformers model (it has no {INFO}): export it with "
            f"`fastgen export {directory} OUT`, or load it with CausalLM.from_pretrained"
        )
    raise ModelError(f"{directory} is not a fastgen model directory: it has no {INFO}")


def _are_layers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST_LAYERS and all(map(_is_layer, value))


def _are_windows(value: Any) -> bool:
    return isinstance(value, list) and all(n is None or is_count(n, 2**31) for n in value)


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
    """True for the name of a file in the directory itself, on any system."""
    return (
        is_text(name)
        and name.strip(".") != ""
        and not set(name) & set("/\\:")
        and len(name.encode()) <= 255
    )


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


WINDOWS = "a list with a positive integer or null for each layer"
# The fields of `fastgen.json` in the order of the file: what each must be, as a test and in words.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda v: is_count(v, 2**31), f"a number such as {FORMAT}"),
    "fastgen": (is_text, "text"),
    "precision": (lambda v: v in PRECISIONS, " or ".join(PRECISIONS)),
    "model_type": (is_text, "text"),
    "name": (_is_string, "text"),
    "parameters": (lambda v: is_count(v, 2**60, 0), "an integer"),
    "vocab_size": (lambda v: is_count(v, 2**26), "a positive integer"),
    "max_length": (lambda v: v is None or is_count(v, 2**40), "a positive integer or null"),
    "hard_limit": (lambda v: isinstance(v, bool), "true or false"),
    "layers": (_are_layers, "a list of [heads, size of a head]"),
    "states": (_are_states, "a list of lists of sizes"),
    "cache_dtype": (lambda v: v in tuple(CACHE_DTYPES), " or ".join(CACHE_DTYPES)),
    "windows": (_are_windows, WINDOWS),
    "no_prompts": (_is_string, "text"),
    "many_tokens_bytes": (lambda v: is_count(v, 2**60, 0), "an integer"),
    "files": (_are_files, "an object of names in the directory and their sizes"),
}
# Fields that older versions did not write, or that are left out where they hold nothing.
OLDER: dict[str, Any] = {
    "fastgen": "?", "name": "", "parameters": 0, "states": [], "cache_dtype": "float32",
    "windows": [], "no_prompts": "", "many_tokens_bytes": 0,
}  # fmt: skip


def _newer(content: Mapping[str, Any]) -> str | None:
    """The reason why only another fastgen can use a directory; None where this one can."""
    version, dtype = content.get("format"), content["cache_dtype"]
    if is_count(version, 2**31) and version != FORMAT:
        return f"has format {version}, this fastgen reads format {FORMAT}: export the model again"
    if is_text(dtype) and dtype not in CACHE_DTYPES:
        stored = " or ".join(CACHE_DTYPES)
        return f"has keys and values in {dtype}, this fastgen stores {stored}: use a newer one"
    return None


def _fault(content: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with the content of `fastgen.json`; None where all is right."""
    for name, (is_right, expected) in FIELDS.items():
        if fault := jsonfile.fault(content, name, is_right, expected):
            return fault
    layers, windows = content["layers"], content["windows"]
    if not layers and not content["states"]:
        return "it has neither layers nor states"
    if len(windows) not in (0, len(layers)):
        return f"windows must be {WINDOWS}, got {len(windows)} of them for {len(layers)} layers"
    return None


def _of_content(content: Mapping[str, Any]) -> ModelInfo:
    files = content["files"]
    return ModelInfo(
        precision=content["precision"],
        model_type=content["model_type"],
        vocab_size=content["vocab_size"],
        max_length=content["max_length"],
        hard_limit=content["hard_limit"],
        layers=tuple((heads, dim) for heads, dim in content["layers"]),
        windows=tuple(content["windows"]),
        files={n: one["bytes"] if isinstance(one, dict) else one for n, one in files.items()},
        cache_dtype=content["cache_dtype"],
        states=tuple(map(tuple, content["states"])),
        digests={n: one["sha256"] for n, one in files.items() if isinstance(one, dict)},
        name=content["name"],
        parameters=content["parameters"],
        exporter=content["fastgen"],
        no_prompts=content["no_prompts"],
        many_tokens_bytes=content["many_tokens_bytes"],
    )


def _content(info: ModelInfo) -> dict[str, Any]:
    """The object that `fastgen.json` holds, its fields in the order of `FIELDS`."""
    content = {
        "format": FORMAT,
        "fastgen": info.exporter,
        "precision": info.precision,
        "model_type": info.model_type,
        "name": info.name,
        "parameters": info.parameters,
        "vocab_size": info.vocab_size,
        "max_length": info.max_length,
        "hard_limit": info.hard_limit,
        "layers": [list(layer) for layer in info.layers],
        "states": [list(shape) for shape in info.states],
        "cache_dtype": info.cache_dtype,
        "windows": list(info.windows),
        "no_prompts": info.no_prompts,
        "many_tokens_bytes": info.many_tokens_bytes,
        "files": {
            name: {"bytes": size, "sha256": info.digests[name]} if name in info.digests else size
            for name, size in info.files.items()
        },
    }
    for name in ("no_prompts", "many_tokens_bytes"):  # where they hold something
        if not content[name]:
            del content[name]
    return content
