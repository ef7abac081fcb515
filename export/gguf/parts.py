"""A GGUF file as the parts that a graph is built of."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from fastgen.errors import UnsupportedModel
from fastgen.export.build.origin import Parts, naming
from fastgen.export.gguf import architectures, tensors, vocabulary
from fastgen.export.gguf.file import File, read
from fastgen.store import jsonfile
from fastgen.store.model_info import TOKENIZER

FLOATS = ("F32", "F16", "BF16", "F64")
OF_4_BITS = ("Q4_0",)  # types that the kernel of 4 bits holds exactly


def opened(path: Path) -> File:
    """Read a file's metadata and map its tensors.

    Raises:
        ModelError: it is damaged, or one part of several.
        UnsupportedModel: a version, byte order or type that is not known.
    """
    return read(path, tensors.block_sizes())


def precision_of(file: File) -> str | None:
    """The precision that the file's own numbers need: "int4" or "int8"; None for floats."""
    weights = _weights_by_type(file)
    held = {kind: count for kind, count in weights.items() if kind not in FLOATS}
    if not held:
        return None
    four = sum(count for kind, count in held.items() if kind in OF_4_BITS)
    return "int4" if 2 * four > sum(held.values()) else "int8"


def _weights_by_type(file: File) -> Counter[str]:
    """Weights of matrices, but for the table of tokens, by the name of their type."""
    counts: Counter[str] = Counter()
    for name, held in file.tensors.items():
        if len(held.shape) > 1 and name != architectures.TABLE:
            counts[tensors.type_name(held.kind)] += held.shape[0] * held.shape[-1]
    return counts


def of_file(file: File) -> Parts:
    """Read a file whose architecture is known.

    Raises:
        UnsupportedModel: it is not, or the file says something that is not known.
    """
    name = file.path.stem
    with naming(name):
        config = architectures.configuration(file)
        decoder = architectures.described(file, config)
        weights = architectures.weights(file, decoder)
        tokenizer, settings, note = vocabulary.read(file)
        ids = vocabulary.special_ids(file, decoder.vocabulary)
        if tokenizer is not None and tokenizer.get_vocab_size() > decoder.vocabulary:
            raise UnsupportedModel(
                f"it has {tokenizer.get_vocab_size()} tokens, and vectors for {decoder.vocabulary}"
            )
        ends = vocabulary.end_ids(file, decoder.vocabulary)
    types = Counter(tensors.type_name(held.kind) for held in file.tensors.values())
    summary = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
    return Parts(
        name=name,
        config=config | ids,
        decoder=decoder,
        weights=weights,
        tokenizer=tokenizer,
        note=note,
        defaults={name: number for name, number in ids.items() if name != "unk_token_id"} | ends,
        write_tokenizer=partial(_write, tokenizer, settings),
        about=f"a GGUF file ({summary}), without torch",
    )


def _write(tokenizer: tokenizers.Tokenizer | None, settings: dict[str, Any], to: Path) -> None:
    if tokenizer is not None:
        (to / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    jsonfile.write(to / "tokenizer_config.json", settings)
