"""ONNX folders that others exported, by the names of their files: what is a decoder, and of which
precision. What is in the files is read by `fastgen.export.onnx_folder`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from fastgen.errors import ModelError

STEMS = ("model", "decoder_model_merged", "decoder_with_past_model")  # the best first
SUFFIXES = ("q4", "int4", "q8", "int8", "uint8", "quantized", "fp32", "q4f16", "fp16", "bnb4")
NAME = re.compile(rf"^({'|'.join(STEMS)})(?:_({'|'.join(SUFFIXES)}))?\.onnx$")
# Files that say a model has more parts than a decoder.
ENCODER = re.compile(r"(^|[-_])encoder([-_]|$)")
PICTURES = re.compile(
    r"(^|[-_])(vision|audio|speech|images?|embed_tokens|embeds|embedding)([-_]|$)"
)
ALIKE = {"q4": ("q4", "int4"), "q8": ("q8", "int8", "uint8", "quantized")}
MADE = ("int8", "int4")  # precisions that are made of a wider one
WIDE = ("fp32", "fp16")
WEIGHTS = re.compile(r"\.safetensors$|model.*\.(bin|pt|pth)$")
ALONE = "fp32"  # what a graph without a suffix is called
GENAI = "genai_config.json"


def place_of(names: Iterable[str]) -> str | None:
    """The place of the graphs: "" for the folder itself, "onnx" or another in it; None for none.

    Raises:
        ModelError: there are several such places, none of them for a CPU.
    """
    paths = [PurePosixPath(name) for name in names if name.endswith(".onnx")]
    folders = sorted({"" if str(path.parent) == "." else str(path.parent) for path in paths})
    if not folders:
        return None
    for folder in ("", "onnx"):
        if folder in folders:
            return folder
    usable = [folder for folder in folders if "cpu" in folder.lower()] or folders
    if len(usable) > 1:
        raise ModelError(
            f"there are graphs in {', '.join(usable)}: download one of these folders and name it"
        )
    return usable[0]


def decoders(names: Iterable[str]) -> dict[str, str]:
    """The graph of a decoder for each precision, by the names of all files.

    Raises:
        ModelError: the graphs are those of an encoder-decoder, or of a model of pictures or
            sounds, or none is a decoder.
    """
    folder = place_of(names := list(names))
    files = [PurePosixPath(name) for name in names if name.endswith(".onnx")]
    files = [file for file in files if str(file.parent) == (folder or ".")]
    if parts := [file.name for file in files if PICTURES.search(file.stem)]:
        raise ModelError(
            f"it is a model of pictures or sounds ({parts[0]}), whose text part alone is not "
            "whole: only decoders are opened"
        )
    if parts := [file.name for file in files if ENCODER.search(file.stem)]:
        raise ModelError(f"it is an encoder-decoder ({parts[0]}): only decoders are opened")
    graphs: dict[str, tuple[int, str]] = {}
    for file in files:
        if match := NAME.match(file.name):
            known = (STEMS.index(match[1]), str(file))
            precision = match[2] or ALONE
            graphs[precision] = min(graphs.get(precision, known), known)
    if files and not graphs:
        raise ModelError(
            f"none of {', '.join(file.name for file in files)} is a decoder: expected "
            f"{', '.join(f'{stem}.onnx' for stem in STEMS)}"
        )
    return {precision: name for precision, (_, name) in graphs.items()}


def chosen(graphs: Mapping[str, str], precision: str | None) -> str:
    """Choose the precision, of those that are there, that serves for one that is asked for.

    Args:
        graphs: of `decoders`.
        precision: one of theirs, or "int8" or "int4", which are made of the widest; None for q4,
            else q8, else fp32, else what there is.

    Raises:
        ModelError: there is none such.
    """
    if precision in MADE:
        order: Sequence[str] = (*WIDE, precision, *ALIKE[f"q{precision[-1]}"])
    elif precision is None:
        order = SUFFIXES
    elif precision == "fp32":
        order = WIDE
    else:
        order = ALIKE.get(precision, (precision,))
    for name in order:
        if name in graphs:
            return name
    raise ModelError(f"it has no precision {precision!r}, but {', '.join(sorted(graphs))}")


def wanted(names: Iterable[str], precision: str | None) -> list[str]:
    """The files of a repository that a precision needs: its graph, weights, and what is said."""
    names, graphs = list(names), decoders(names)
    graph = PurePosixPath(graphs[ALONE if _is_alone(names, graphs) else chosen(graphs, precision)])
    folders = {".", str(graph.parent)}
    needed = []
    for name in names:
        path = PurePosixPath(name)
        mine = str(path.parent) == str(graph.parent) and path.name.startswith(graph.name)
        described = path.suffix in (".json", ".jinja") and "tokenizer.model" not in path.name
        if mine or (described and str(path.parent) in folders):
            needed.append(name)
    return needed


def usual(names: Iterable[str]) -> str | None:
    """The precision that is opened where none is asked for; None where only its graph can say."""
    names = list(names)
    graphs = decoders(names)
    return None if _is_alone(names, graphs) else chosen(graphs, None)


def _is_alone(names: Iterable[str], graphs: Mapping[str, str]) -> bool:
    """True if the one graph is of any precision: onnxruntime-genai's builder says it nowhere."""
    return [*graphs] == [ALONE] and any(PurePosixPath(name).name == GENAI for name in names)


def names_in(directory: Path) -> list[str]:
    """The files of a directory that can be of an ONNX folder, two levels deep."""
    return [
        path.relative_to(directory).as_posix()
        for pattern in ("*", "*/*")
        for path in sorted(directory.glob(pattern))
        if path.is_file()
    ]


def holds_torch(names: Iterable[str]) -> bool:
    """True if there are weights that torch reads, beside the configuration."""
    return any("/" not in name and WEIGHTS.search(name) for name in names)
