"""Token ids in, logits out: one onnxruntime session on a model directory.

A step of any kind (prefill, decode, verifying a guess, scoring) is one `forward`: new tokens of
some neighbouring rows, right-padded, written into a `Cache` in place.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fastgen.cache import Cache
from fastgen.cpu import int8_overflows
from fastgen.memory import page_out
from fastgen.tuning import Tuning, read

FORMAT = 1  # of the model directory; `fastgen.json` says which one a directory has
GRAPH = "model.onnx"
INFO = "fastgen.json"
SAMPLE, PAGE = 2**20, 4096  # bytes of a file that are hashed, and of a piece of a longer one
SPIN_US = "2000"  # microseconds that threads spin for more work
KEPT_BINDINGS = 16  # shapes of call that stay bound to a cache
SPARE_BYTES = 128 << 20  # of a cache that is kept for the next call, at most
SPARE_LOGITS = 16 << 20  # bytes of logits that stay bound to it
# How keys and values can be stored: numpy's name, and what the graph's inputs are then.
CACHE_DTYPES = {"float32": "tensor(float)", "int8": "tensor(int8)"}


class ModelError(ValueError):
    """A model directory that cannot be used: what was found and what was expected."""


@dataclass(frozen=True)
class ModelInfo:
    """What `fastgen.json` says of a model.

    Attributes:
        precision: "fp32", "int8" or "int4".
        model_type: transformers' name of the architecture.
        vocab_size: rows of the embedding; ids are below it.
        max_length: positions that the model was made for; None without limit.
        hard_limit: whether it cannot compute a position beyond them (learned positions).
        layers: (kv_heads, head_dim) of each layer.
        files: size in bytes of every file of the directory.
        cache_dtype: of the stored keys and values, "float32" or "int8".
    """

    precision: str
    model_type: str
    vocab_size: int
    max_length: int | None
    hard_limit: bool
    layers: tuple[tuple[int, int], ...]
    files: dict[str, int]
    cache_dtype: str = "float32"

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

    @staticmethod
    def read(directory: Path) -> ModelInfo:
        """Read and check `fastgen.json` and the sizes of the files that it lists.

        Raises:
            ModelError: not a model directory, another format, or a missing or truncated file.
        """
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
        try:
            found = json.loads(path.read_text())
            version = found["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is damaged: {error!r}") from error
        if version != FORMAT:
            raise ModelError(
                f"{path} has format {version}, this fastgen reads format {FORMAT}: "
                "export the model again"
            )
        try:
            info = ModelInfo(
                precision=found["precision"],
                model_type=found["model_type"],
                vocab_size=found["vocab_size"],
                max_length=found["max_length"],
                hard_limit=found["hard_limit"],
                layers=tuple((heads, dim) for heads, dim in found["layers"]),
                files=found["files"],
                cache_dtype=found.get("cache_dtype", "float32"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error!r}") from error
        if info.cache_dtype not in CACHE_DTYPES:
            raise ModelError(
                f"{path} has keys and values in {info.cache_dtype}, this fastgen stores "
                f"{' or '.join(CACHE_DTYPES)}: use a newer one"
            )
        for name, size in info.files.items():
            actual = (directory / name).stat().st_size if (directory / name).is_file() else None
            if actual is None:
                raise ModelError(f"{directory} lacks {name} ({size:,} bytes): copy it whole")
            if actual != size:
                raise ModelError(
                    f"{directory / name} has {actual:,} bytes where {size:,} were exported: "
                    "it is truncated or was changed; copy or export the model again"
                )
        return info


class Model:
    """A session and the shapes around it. Threads may share it, each with a cache of its own.

    Args:
        directory: a model directory (DESIGN: `fastgen.json`, `model.onnx` and its data).
        threads: how many threads a step may use; None for what was tuned, or the physical cores.
        tuning: how to run it; None for what `fastgen tune` found best on this machine.

    Raises:
        ModelError: see `ModelInfo.read`; or the graph's inputs are not those of this version.
    """

    def __init__(
        self, directory: Path, threads: int | None = None, tuning: Tuning | None = None
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be positive, got {threads}")
        self.directory = directory
        self.info = ModelInfo.read(directory)
        self.tuning = tuning or _tuned(directory)
        if threads is not None:
            self.tuning = replace(self.tuning, threads=threads)
        self.session = _session(directory / GRAPH, self.tuning)
        page_out(directory / (GRAPH + ".data"))
        self._spare: list[Cache] = []
        self._check_graph()

    def _check_graph(self) -> None:
        layers = range(len(self.info.layers))
        past = [f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")]
        present = [f"present.{i}.{kind}" for i in layers for kind in ("key", "value")]
        for what, found, expected in (
            ("inputs", self.session.get_inputs(), [*_Call.INPUTS, *past]),
            ("outputs", self.session.get_outputs(), ["logits", *present]),
        ):
            names = [value.name for value in found]
            if sorted(names) != sorted(expected):
                odd = sorted(set(names) ^ set(expected))
                raise ModelError(
                    f"{self.directory / GRAPH} has {len(names)} {what}, expected {len(expected)}; "
                    f"the difference: {', '.join(odd[:6])}"
                )
        kinds = {value.type for value in self.session.get_inputs() if value.name in past}
        expected_kind = CACHE_DTYPES[self.info.cache_dtype]
        if kinds != {expected_kind}:
            raise ModelError(
                f"{self.directory / GRAPH} takes keys and values as {', '.join(sorted(kinds))}, "
                f"expected {expected_kind}"
            )
        self.past_names, self.present_names = past, present

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this model from others, and what it computes from other versions' results.

        A hash of onnxruntime's version and of the directory's files: whole up to 1 MiB, else the
        size and 256 pages of them. (`report.json` says how long the export's steps took, so that
        even models that differ in few weights differ there.)
        """
        out = sha256(onnxruntime.__version__.encode())
        for name, size in sorted({**self.info.files, INFO: 0}.items()):
            out.update(f"{name} {size} ".encode())
            with (self.directory / name).open("rb") as file:
                if size <= SAMPLE:
                    out.update(file.read())
                for place in range(256 if size > SAMPLE else 0):
                    file.seek(place * (size - PAGE) // 255)
                    out.update(file.read(PAGE))
        return out.hexdigest()

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` rows of up to `capacity` tokens."""
        return Cache(self.info.layers, rows, capacity, self.info.cache_dtype)

    def borrow_cache(self, rows: int, capacity: int) -> Cache:
        """As `new_cache`, from memory (and bindings) of an earlier call where there is some."""
        try:
            cache = self._spare.pop()
        except IndexError:
            return self.new_cache(rows, capacity)
        cache.lengths[:] = 0
        cache.reserve(rows, capacity)
        return cache

    def give_back(self, cache: Cache) -> None:
        """Keep a cache for the next call: one, if it is not large, with what it is bound to."""
        if sum(call.logits.nbytes for call in cache.bindings.values()) > SPARE_LOGITS:
            cache.bindings.clear()
        if not self._spare and 0 < cache.size <= SPARE_BYTES:
            self._spare.append(cache)

    def forward(
        self,
        new: Sequence[NDArray[np.int64]],
        cache: Cache,
        first: int = 0,
        logits_positions: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Append new tokens to the rows in slots `first`, `first + 1`, ... and return logits.

        Args:
            new: int64 [count] for each row. Rows may differ in length; an empty one stays as it
                is (it must hold something), and its logits mean nothing.
            cache: holds the rows so far; it must have room for the longest of `new` in each row.
            logits_positions: int64 [rows, keep], which of the new tokens want logits; None for
                the last of each row.

        Returns:
            float32 [rows, keep, vocab]. It is the memory of the binding: valid until the next
            call of the same shape.
        """
        counts = [len(ids) for ids in new]
        width, keep = max(counts), 1 if logits_positions is None else logits_positions.shape[1]
        call = self._bound(cache, first, len(new), width, keep)
        held = cache.lengths[first : first + len(new)]
        for row, ids in enumerate(new):
            call.input_ids[row, : counts[row]] = ids
            call.input_ids[row, counts[row] :] = 0
        call.query_seqlens[:] = counts
        np.add(held[:, None], np.arange(width), out=call.position_ids)
        if min(counts) < width:  # a padded position is never read; it only has to be a legal one
            np.minimum(call.position_ids, held[:, None] + call.query_seqlens[:, None] - 1,
                       out=call.position_ids)  # fmt: skip
        held += call.query_seqlens
        call.seqlens_k[:] = held - 1
        call.total_sequence_length[...] = max(int(held.max()), width)
        if logits_positions is None:
            np.maximum(call.query_seqlens - 1, 0, out=call.logits_positions[:, 0])
        else:
            call.logits_positions[:] = logits_positions
        self.session.run_with_iobinding(call.binding)
        return call.logits

    def _bound(self, cache: Cache, first: int, rows: int, width: int, keep: int) -> _Call:
        key = (first, rows, width, keep)
        call = cache.bindings.pop(key, None) or _Call(self, cache, *key)
        cache.bindings[key] = call  # the latest comes last
        if len(cache.bindings) > KEPT_BINDINGS:
            del cache.bindings[next(iter(cache.bindings))]
        return call


class _Call:
    """One shape of call, bound once: a step writes into these arrays and runs."""

    INPUTS = (
        "input_ids", "position_ids", "query_seqlens", "seqlens_k", "total_sequence_length",
        "logits_positions",
    )  # fmt: skip

    def __init__(
        self, model: Model, cache: Cache, first: int, rows: int, width: int, keep: int
    ) -> None:
        self.input_ids = np.zeros((rows, width), np.int64)
        self.position_ids = np.zeros((rows, width), np.int64)
        self.query_seqlens = np.zeros(rows, np.int32)
        self.seqlens_k = np.zeros(rows, np.int32)
        self.total_sequence_length = np.zeros((), np.int32)
        self.logits_positions = np.zeros((rows, keep), np.int64)
        self.logits = np.zeros((rows, keep, model.info.vocab_size), np.float32)
        self.binding = model.session.io_binding()
        for name in self.INPUTS:
            _bind(self.binding.bind_input, name, getattr(self, name))
        _bind(self.binding.bind_output, "logits", self.logits)
        views = cache.slots(first, rows)
        for past, present, view in zip(model.past_names, model.present_names, views, strict=True):
            _bind(self.binding.bind_input, past, view)
            _bind(self.binding.bind_output, present, view)


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def session_options(tuning: Tuning) -> Any:
    """How every session of fastgen is set: see the comments for why."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = tuning.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Shapes differ from call to call: a memory plan for each would be kept and never used again.
    options.enable_mem_pattern = False
    # Threads spin within a step, where they are needed again at once, and from step to step, but
    # sleep soon after a call.
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    # Work is cut finer towards its end: where a core is shared, nobody waits long for the last.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    if int8_overflows():  # int8 weights become uint8 on loading: slower, and exact
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not tuning.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in tuning.entries.items():
        options.add_session_config_entry(name, value)
    return options


def _tuned(directory: Path) -> Tuning:
    try:
        return read(directory) or Tuning()
    except ValueError as error:
        raise ModelError(str(error)) from error


def open_session(path: Path, options: Any) -> Any:
    """A session of the graph of a model directory, as every one is opened that runs a model."""
    return onnxruntime.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        enable_fallback=False,
        # Sum and norm in one node are slower than in two: it has no vector code (bench/README.md).
        disabled_optimizers=["SkipLayerNormFusion"],
    )


def _session(path: Path, tuning: Tuning) -> Any:
    try:
        return open_session(path, session_options(tuning))
    except Exception as error:  # onnxruntime raises classes of its own, derived from Exception
        raise ModelError(f"onnxruntime cannot load {path}: {error}") from error
