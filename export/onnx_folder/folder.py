"""A folder that others exported: its graphs, their precisions, its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir as ir

from fastgen.errors import ModelError, UnsupportedModel
from fastgen.export.source import vocabulary
from fastgen.export.source.origin import name_of
from fastgen.store import jsonfile, onnx_folders
from fastgen.store.model_info import CONFIG, GENERATION_CONFIG

GENAI = "genai_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What makes a graph one of 8 or 4 bits.
QUANTISED = {
    "MatMulInteger": 8, "DynamicQuantizeMatMul": 8, "QLinearMatMul": 8, "DequantizeLinear": 8,
    "MatMulBnb4": 4, "MatMulIntegerToFloat": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A graph of a folder, and what is to be made of it.

    Attributes:
        folder: where config.json lies.
        graph: the file.
        name: of its precision, as the folder has it.
        first: our name of it: "fp32", "int8" or "int4".
        precision: what is to be made.
    """

    folder: Path
    graph: Path
    name: str
    first: str
    precision: str

    @property
    def files(self) -> list[Path]:
        """The graph's weights: X.onnx_data, X.onnx_data_1, X.onnx.data, and what else it names.

        Raises:
            UnsupportedModel: one is missing, or would lie outside the folder.
        ModelError: one is a Git-LFS pointer.
        """
        model = load(self.graph)
        names = {
            str(tensor.location)
            for graph in (model.graph, *model.graph.subgraphs())
            for value in graph.initializers.values()
            if isinstance(tensor := value.const_value, ir.ExternalTensor)
        }
        for name in names:
            if set(name) & set("\\:") or name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise UnsupportedModel(
                    f"{self.graph.name} wants weights from {name!r}: only files beside it are read"
                )
        files = sorted(self.graph.parent / name for name in names)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UnsupportedModel(f"{self.graph.name} lacks its weights: {', '.join(missing)}")
        jsonfile.check_fetched(*files)
        return files

    @cached_property
    def config(self) -> dict[str, Any]:
        """The folder's config.json, or what its genai_config.json says of the same."""
        path = self.folder / CONFIG
        config = jsonfile.read(path) if path.is_file() else {}
        return config if config else _configured(self.genai)

    @cached_property
    def genai(self) -> dict[str, Any]:
        path = self.graph.parent / GENAI
        return jsonfile.read(path) if path.is_file() else {}

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Of `generate`: generation_config.json, or the search of onnxruntime-genai."""
        path = self.folder / GENERATION_CONFIG
        if path.is_file():
            return jsonfile.read(path)
        known = {name: self.config[name] for name in IDS if self.config.get(name) is not None}
        return known | _searched(self.genai)


def load(path: Path) -> ir.Model:
    """A graph as it is.

    Raises:
        UnsupportedModel: the file is none.
        ModelError: it is a Git-LFS pointer.
    """
    jsonfile.check_fetched(path)
    try:
        return ir.load(path)
    except Exception as error:  # of protobuf, or of any kind where a graph contradicts itself
        message = (str(error).strip() or repr(error)).splitlines()[0]
        raise UnsupportedModel(f"{path.name} cannot be read as a graph: {message}") from error


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """An object within another; without content where it is something else."""
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _configured(genai: dict[str, Any]) -> dict[str, Any]:
    """A config.json of what onnxruntime-genai's says."""
    model = _part(genai, "model")
    decoder = _part(model, "decoder")
    config = {
        "model_type": model.get("type"),
        "vocab_size": model.get("vocab_size"),
        "max_position_embeddings": model.get("context_length"),
        "num_attention_heads": decoder.get("num_attention_heads"),
        "num_key_value_heads": decoder.get("num_key_value_heads"),
        "head_dim": decoder.get("head_size"),
        "hidden_size": decoder.get("hidden_size"),
        "num_hidden_layers": decoder.get("num_hidden_layers"),
        "sliding_window": _part(decoder, "sliding_window").get("window_size"),
    }
    config |= {name: model.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in config.items() if value is not None}


def _searched(genai: dict[str, Any]) -> dict[str, Any]:
    """Defaults of `generate`. Its max_length is the model's own limit, and no wish."""
    if not genai:
        return {}
    model, search = _part(genai, "model"), _part(genai, "search")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    defaults = {name: model[name] for name in names if model.get(name) is not None}
    if search.get("do_sample"):
        defaults["do_sample"] = True
        for name in ("temperature", "top_k", "top_p"):
            if search.get(name) is not None:
                defaults[name] = search[name]
    for name, neutral in (
        ("repetition_penalty", 1.0),
        ("no_repeat_ngram_size", 0),
        ("num_beams", 1),
        ("length_penalty", 1.0),
        ("min_length", 0),
    ):
        if search.get(name, neutral) not in (neutral, None):
            defaults[name] = search[name]
    return defaults


def choose(folder: Path, precision: str | None) -> Choice:
    """The graph of a folder for a precision.

    Args:
        folder: of config.json or genai_config.json.
        precision: a folder's own ("q4", "q8", "fp16", "q4f16", "bnb4", ...), or "int8" or "int4",
            which are made of its fp32; None for q4, else q8, else what there is.

    Raises:
        ModelError: it is no decoder of texts, or does not have that precision.
    """
    folder_name = name_of(folder)
    jsonfile.check_fetched(
        *(folder / name for name in (CONFIG, GENERATION_CONFIG, *vocabulary.FILES))
    )
    try:
        decoders = onnx_folders.decoders(onnx_folders.names_in(folder))
        plain = folder / decoders["fp32"] if "fp32" in decoders else None
        if plain and not jsonfile.is_pointer(plain) and (kind := kind_of(plain)) != "fp32":
            # The one without a suffix is quantised all the same (by onnxruntime-genai's builder).
            decoders.setdefault({"int4": "q4", "int8": "q8"}[kind], decoders.pop("fp32"))
        name = onnx_folders.chosen(decoders, precision)
    except ModelError as error:
        raise UnsupportedModel(f"{folder_name} cannot be opened: {error}") from error
    graph = folder / decoders[name]
    kind = kind_of(graph)
    written = precision if precision in onnx_folders.MADE and kind == "fp32" else kind
    return Choice(folder, graph, name, kind, written)


def kind_of(path: Path) -> str:
    """ "fp32", "int8" or "int4": what a graph's matrices are stored in."""
    bits = set()
    for node in load(path).graph.all_nodes():
        if node.op_type == "MatMulNBits":
            bits.add(node.attributes.get_int("bits", 4))
        elif node.op_type in QUANTISED:
            bits.add(QUANTISED[node.op_type])
    return f"int{min(bits)}" if bits & {4, 8} else "fp32"
