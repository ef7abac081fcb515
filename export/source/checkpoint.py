"""The files of a checkpoint, looked at before transformers or peft reads them: whole, and all."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import Any, TypeGuard

from fastgen.errors import ModelError
from fastgen.store import jsonfile
from fastgen.store.jsonfile import some
from fastgen.store.model_info import TOKENIZER

ADVICE = "download the model again"
INDEX = ".index.json"
# Where weights are, the first that is there: what the libraries read.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors" + INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin" + INDEX,
)
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
SAID = re.compile(
    r"(config|generation_config|adapter_config|special_tokens_map|added_tokens)\.json"
    r"|tokenizer(_config)?\.json|chat_template.*"
)
VOCABULARY = re.compile(r".*vocab.*|(merges|tekken|spiece).*|.*\.(model|tiktoken|spm|bpe|codes)")


def check(directory: Path) -> None:
    """Look at the files that are read.

    Raises:
        ModelError: one is a Git-LFS pointer; or weights that an index names are not there, or
            end too early.
    """
    jsonfile.check_fetched(*_texts(directory))
    jsonfile.check_fetched(*(files := weights(directory)))
    for path in files:
        if path.suffix == ".safetensors":
            _check_whole(path)


def _texts(directory: Path) -> list[Path]:
    """Configurations, and the vocabulary where no tokenizer.json has it."""
    paths = [path for path in directory.iterdir() if path.is_file()]
    texts = [path for path in paths if SAID.fullmatch(path.name)]
    if not (directory / TOKENIZER).is_file():
        texts += [path for path in paths if VOCABULARY.fullmatch(path.name)]
    return texts


def weights(directory: Path) -> list[Path]:
    """The files of a directory that weights are read from; of an adapter too."""
    files = []
    for names in (WEIGHTS, ADAPTER):
        path = next((directory / name for name in names if (directory / name).is_file()), None)
        if path is not None:
            files += _shards(path) if path.name.endswith(INDEX) else [path]
    return files


def _shards(index: Path) -> list[Path]:
    """The files that an index names.

    Raises:
        ModelError: it names none, or some that are not there or not in its directory.
    """
    rule = "an object of weights and the files that they are in"
    content = jsonfile.read(index, ADVICE)
    weight_map = jsonfile.take(content, index, "weight_map", _is_map, rule, ADVICE)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {some(missing)}, which {index.name} names: {ADVICE}"
        )
    return [index.parent / name for name in names]


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_below, value.values()))


def _is_below(name: Any) -> bool:
    """True for the name of a file in the directory or below it."""
    if not jsonfile.is_text(name):
        return False
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _check_whole(path: Path) -> None:
    tensors = header(path)
    if tensors is None:
        raise jsonfile.damaged(path, "it is no safetensors file, or ends too early", ADVICE)
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    expected = begin + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    size = path.stat().st_size
    if size != expected:
        raise jsonfile.damaged(
            path, f"it has {size:,} bytes where its header tells of {expected:,}", ADVICE
        )


def header(path: Path) -> dict[str, dict[str, Any]] | None:
    """Read what a safetensors file says of each tensor: its "dtype", "shape" and "data_offsets".

    Its own format's: a length, then JSON. None for what is no such file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:
            return None
        try:
            entries = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return None
    if not isinstance(entries, dict):
        return None
    entries.pop("__metadata__", None)
    return entries if all(map(_is_tensor, entries.values())) else None


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(jsonfile.is_count(n, 2**62, 0) for n in value)
