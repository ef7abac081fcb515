"""A checkpoint whose family is known as the origin of an export, without torch.

Nothing runs the original. What proves the graph is the family, whose graphs are those that traces
give (tests/export/test_build.py), that every number of the checkpoint is read once, that the graph
says the same of rows together, as they are served, as of each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import tokenizers
from numpy.typing import NDArray

from fastgen.engine.output import GenerateOutput
from fastgen.engine.session import UNPACKED
from fastgen.errors import ModelError, UnsupportedModel
from fastgen.export.build import families, graph, unpacked, weights, writer
from fastgen.export.build.decoder import Decoder
from fastgen.export.build.weights import Tensor
from fastgen.export.prove import check, quality
from fastgen.export.quantize.parts import CHUNK, chunks
from fastgen.export.source import checkpoint, quantised, vocabulary
from fastgen.export.source.origin import NOTHING, Room, Tolerance, name_of
from fastgen.generator import CausalLM
from fastgen.sampling.softmax import log_softmax
from fastgen.store import jsonfile
from fastgen.store.model_info import CONFIG, GENERATION_CONFIG, TOKENIZER, ModelInfo
from fastgen.store.tuning import Tuning

COMPARED = 1 << 10  # rows of two tables that are compared at a time


def check_known(config: dict[str, Any], names: Iterable[str]) -> Decoder:
    """Read what a config.json describes, of a directory that holds files of these names.

    Raises:
        UnsupportedModel: why it cannot be built.
    """
    decoder = families.describe(config)
    names = list(names)
    if not any(name.endswith(".safetensors") for name in names):
        raise UnsupportedModel("it has no weights in safetensors")
    if "adapter_config.json" in names:
        raise UnsupportedModel("it is an adapter")
    vocabularies = [name for name in names if checkpoint.VOCABULARY.fullmatch(name)]
    if vocabularies and TOKENIZER not in names:
        raise UnsupportedModel(f"its tokenizer is {vocabularies[0]}, and no {TOKENIZER}")
    return decoder


def refused(directory: Path, names: Iterable[str]) -> str | None:
    """Say why a model whose config.json lies at `directory` cannot be built; None where it can.

    Args:
        names: of its files.

    Raises:
        quantised.Unreadable: nothing else can read its weights either.
    """
    names = list(names)
    if CONFIG not in names:
        return f"it has no {CONFIG}"
    try:
        check_known(jsonfile.read(directory / CONFIG, checkpoint.ADVICE), names)
    except quantised.Unreadable:
        raise
    except UnsupportedModel as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Parts:
    """Everything that a graph and its directory are made of, whatever file it was read from.

    Attributes:
        name: of the model.
        config: the content of its config.json.
        decoder: that this describes.
        weights: its tensors under transformers' names.
        tokenizer: None for a model of ids.
        note: why there is no tokenizer.
        defaults: the content of its generation_config.json.
        write_tokenizer: writes the tokenizer's files to a directory.
        about: what the file is, in a few words.
    """

    name: str
    config: dict[str, Any]
    decoder: Decoder
    weights: Mapping[str, Tensor]
    tokenizer: tokenizers.Tokenizer | None
    note: str
    defaults: dict[str, Any]
    write_tokenizer: Callable[[Path], None]
    about: str


def of_directory(directory: Path, name: str | None = None) -> Parts:
    """Read a checkpoint's directory: safetensors, config.json and tokenizer.json.

    Raises:
        ModelError: a file is missing or damaged.
        UnsupportedModel: its family is not known.
    """
    name = name or name_of(directory)
    checkpoint.check(directory)
    with naming(name):
        config = families.complete(jsonfile.read(directory / CONFIG, checkpoint.ADVICE))
        decoder = check_known(config, (path.name for path in directory.iterdir()))
        tensors = unpacked.of_directory(directory, config.pop(quantised.FIELD, None))
        held = _without_copy(decoder, tensors)
    tokenizer, note = vocabulary.read(directory)
    path = directory / GENERATION_CONFIG
    ids = {name: config[name] for name in families.IDS if name in config}
    return Parts(
        name=name,
        config=config,
        decoder=decoder,
        weights=held,
        tokenizer=tokenizer,
        note=note,
        defaults=jsonfile.read(path) if path.is_file() else ids,
        write_tokenizer=partial(vocabulary.write, directory),
        about="built of its tensors, without torch",
    )


class Built:
    """A model of a known family. See `origin.Origin`."""

    first = "fp32"
    tolerance = Tolerance()

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.name, self.config, self.decoder = parts.name, parts.config, parts.decoder
        self.weights, self.tokenizer, self.note = parts.weights, parts.tokenizer, parts.note
        self.directory: Path | None = None
        self.room: Room
        # By the bytes of each probe, nats of its tokens, once it was asked.
        self.spent: dict[bytes, NDArray[np.float32] | None] = {}

    @property
    def parameters(self) -> int:
        ignored = writer.ignored(self.decoder)
        return sum(
            weights.size(tensor)
            for name, tensor in self.weights.items()
            if not ignored.fullmatch(name)
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def about(self) -> list[str]:
        kind = f"{self.config['model_type']}, {self.parameters / 1e6:,.1f} M weights"
        about = [kind, self.parts.about]
        return about + ([f"for ids only: {self.note}"] if self.tokenizer is None else [])

    def probes(self) -> list[NDArray[np.int64]]:
        tokenizer: tokenizers.Tokenizer | None = self.tokenizer
        texts = [] if tokenizer is None else [tokenizer.encode(text).ids for text in check.TEXTS]
        windows = [layer.attention.window for layer in self.decoder.layers]
        limit = self.decoder.limit or 1 << 20
        shown = [window for window in windows if window is not None]
        rows = check.ragged(texts, self.decoder.vocabulary, limit, shown)
        self.spent = {row.tobytes(): None for row in rows}
        return rows

    def written(self, directory: Path, room: Room) -> None:
        self.directory, self.room = directory, room

    @cached_property
    def own(self) -> CausalLM:
        """The graph in float32: what there is to ask."""
        assert self.directory is not None
        return CausalLM(self.directory, tuning=Tuning(entries=UNPACKED))

    def logits(
        self, row: NDArray[np.int64], then: NDArray[np.int64] = NOTHING
    ) -> NDArray[np.float32]:
        """Of one row alone, read at once."""
        ids = np.concatenate([row, then])
        logits = self.room((len(ids), self.decoder.vocabulary), np.float32)
        for at, part in quality.read(self.own.model, ids, quality.EXACT // logits.shape[1]):
            logits[at : at + len(part)] = part
        if not all(np.isfinite(part).all() for part in chunks(logits)):
            raise check.Mismatch("its logits are not finite: the weights are damaged")
        if self.spent.get(row.tobytes(), 0) is None:
            self.spent[row.tobytes()] = _surprise(logits[: len(row)], row)
        return logits

    def continuation(self, row: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        out = self.own.without_defaults().generate(
            [row.tolist()], max_new_tokens=count, return_dict_in_generate=True
        )
        assert isinstance(out, GenerateOutput)
        return np.array(out.sequences[0][-count:], np.int64)

    def convert(self, whole: bool = False) -> tuple[ir.Model, list[str]]:
        with naming(self.name):
            model = graph.write(self.decoder, self.weights)
        shown = [f"{len(self.decoder.layers)} attention layers"]
        shown.append(f"all {len(self.weights)} tensors are read once")
        return model, shown

    def describe(self) -> ModelInfo:
        decoder = self.decoder
        layers = [layer.attention for layer in decoder.layers]
        return ModelInfo(
            precision=self.first,
            model_type=self.config["model_type"],
            name=self.name,
            parameters=self.parameters,
            vocab_size=decoder.vocabulary,
            max_length=decoder.limit,
            hard_limit=decoder.hard,
            layers=tuple((layer.kv_heads, layer.head_dim) for layer in layers),
        )

    def report(self) -> dict[str, Any]:
        spent = [nats for nats in self.spent.values() if nats is not None]
        lost = float(np.concatenate(spent).mean())
        return {
            "proof": f"family {self.config['model_type']} ({families.KNOWN_BY})",
            "beside": "its own graph in float32, which reads each row alone",
            "nats_a_token": {"probes": lost, "of chance": float(np.log(self.decoder.vocabulary))},
        }

    def versions(self) -> dict[str, str]:
        return {"onnx": onnx.__version__, "onnx_ir": ir.__version__}

    def write_configuration(self, to: Path) -> None:
        jsonfile.write(to / CONFIG, self.config)
        jsonfile.write(to / GENERATION_CONFIG, self.parts.defaults)
        if self.tokenizer is not None:
            self.parts.write_tokenizer(to)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors with the name of the model before them."""
    try:
        yield
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{name} cannot be built: {error}") from error
    except ModelError as error:
        raise ModelError(f"{name} cannot be built: {error}") from error


def _without_copy(decoder: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without a tied head that is stored a second time.

    Raises:
        UnsupportedModel: it is not the same.
    """
    copy = next(
        (name for name in ("lm_head.weight", *decoder.also.values()) if name in tensors), None
    )
    if decoder.head.weight is not None or copy is None:
        return tensors
    table = decoder.embedding.table
    embedding = tensors.get(table, tensors.get(table.removeprefix(decoder.base)))
    if (
        embedding is None
        or embedding.shape != tensors[copy].shape
        or not _equal(embedding, tensors[copy])
    ):
        raise UnsupportedModel(f"its {copy} is not its embedding, which config.json says it is")
    return {name: tensor for name, tensor in tensors.items() if name != copy}


def _equal(one: Tensor, other: Tensor) -> bool:
    parts = (slice(at, at + COMPARED) for at in range(0, one.shape[0], COMPARED))
    return all(np.array_equal(one.read(part), other.read(part)) for part in parts)


def _surprise(logits: NDArray[np.float32], row: NDArray[np.int64]) -> NDArray[np.float32]:
    """Of each token of a row but the first: nats, by what was said before it."""
    targets = np.split(row[1:], range(CHUNK, len(row) - 1, CHUNK))
    pairs = zip(chunks(logits[:-1]), targets, strict=True)
    spent = [log_softmax(part)[np.arange(len(next_)), next_] for part, next_ in pairs]
    return -np.concatenate(spent)
