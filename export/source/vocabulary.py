"""A directory's tokenizer as transformers reads it, without transformers: its tokenizer.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from fastgen.store import jsonfile
from fastgen.store.model_info import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
)
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of added tokens


def write(directory: Path, to: Path) -> None:
    """Write the tokenizer's files of a directory to another."""
    for name in FILES:
        path = directory / name
        if name == TOKENIZER:
            # In one line: a large vocabulary takes seconds to indent.
            (to / name).write_text(json.dumps(_file(directory), ensure_ascii=False), "utf-8")
        elif path.is_file():
            shutil.copyfile(path, to / name)
    if not (to / TOKENIZER_CONFIG).exists():
        jsonfile.write(to / TOKENIZER_CONFIG, {})


def _file(directory: Path) -> dict[str, Any]:
    """A folder's tokenizer.json with what stands in its tokenizer_config.json alone.

    As transformers reads them: tokens that were added and their flags, and whether words at the
    beginning get a space before them.
    """
    tokenizer: dict[str, Any] = json.loads((directory / TOKENIZER).read_text("utf-8"))
    path = directory / TOKENIZER_CONFIG
    config = jsonfile.read(path) if path.is_file() else {}
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or []}
    for index, fields in (config.get("added_tokens_decoder") or {}).items():
        flags = {name: fields[name] for name in FLAGS if name in fields}
        bare = {**dict.fromkeys(FLAGS, False), "normalized": not fields.get("special", False)}
        added[int(index)] = {"id": int(index), **bare, **added.get(int(index), {}), **flags}
    tokenizer["added_tokens"] = [added[index] for index in sorted(added)]
    outer = tokenizer.get("pre_tokenizer") or {}
    for part in (outer, *outer.get("pretokenizers", ())):
        if part.get("type") == "ByteLevel" and config.get("add_prefix_space") is not None:
            part["add_prefix_space"] = bool(config["add_prefix_space"])
    return tokenizer


def read(directory: Path) -> tuple[tokenizers.Tokenizer | None, str]:
    """The tokenizer of a directory, or why there is none."""
    path = directory / TOKENIZER
    if not path.is_file():
        return None, "the folder has no tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_file(directory)))
    except Exception as error:  # tokenizers raises Exception itself
        return None, f"its tokenizer.json cannot be read: {error}"
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, ""
