"""Token ids in, logits out: one onnxruntime session on a model directory.

A step of any kind (prefill, decode, verifying a guess, scoring) is one `forward`: new tokens of
some neighbouring rows, right-padded, written into a `Cache` in place.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fastgen.engine.cache import Cache
from fastgen.engine.kv_int8 import Codes
from fastgen.engine.prefill_int8 import NEVER, pays_from
from fastgen.engine.session import UNPACKED, open_graph, open_kept
from fastgen.inputs import validators
from fastgen.store.graph_io import (
    GRAIN,
    MANY_TOKENS,
    TOKENS,
    GraphIO,
    Pair,
    TensorSpec,
    first_shown,
)
from fastgen.store.model_info import GRAPH, SCALES, WEIGHTS, ModelInfo, digest
from fastgen.store.tuning import PREFILL_PRECISIONS, Tuning, read
from fastgen.system.memory import page_out

THREADS_A_CPU = 8  # that may be asked for; more than one gains nothing
KEPT_BINDINGS = 16  # shapes of call that stay bound to a cache
SPARE_BYTES = 128 << 20  # of a cache that is kept for the next call, at most
LONG = 32  # tokens of a prompt that is read in the second form, at most: a prefix cache's block
SPARE_LOGITS = 16 << 20  # bytes of logits that stay bound to it


class Model:
    """A session and the shapes around it. Threads may share it, each with a cache of its own.

    Args:
        directory: a model directory: `fastgen.json` (see `ModelInfo`), `model.onnx` (see
            `fastgen.store.graph_io`) and the other files that an export writes.
        threads: how many threads a step may use, at most 8 for each CPU of the machine; None for
            what was tuned, or the physical cores.
        tuning: how to run it; None for what `fastgen tune` found best on this machine.
        prefill_precision: see `fastgen.load`; None for what was tuned, or "same".
        packed: see `fastgen.load`.

    Attributes:
        is_packed: whether it runs from packed weights that are kept.
        cautions: what whoever loads it should know.
        io: the inputs and outputs of its graph.
        many_from: new tokens of all rows from which a step takes the second form of the matrices
            (see `prefill_int8`); None where there is one form.
        grain: tokens by which it moves what layers with windows are shown first.

    Raises:
        ModelError: see `ModelInfo.read`; or the graph is not what `fastgen.json` says it is, or
            int8 for many tokens is asked of a model that has no such form.
        ValueError: threads, prefill_precision.
    """

    def __init__(
        self,
        directory: Path,
        threads: int | None = None,
        tuning: Tuning | None = None,
        prefill_precision: str | None = None,
        packed: bool = False,
    ) -> None:
        count = None if threads is None else _allowed(threads)
        if prefill_precision not in (None, *PREFILL_PRECISIONS):
            known = " or ".join(PREFILL_PRECISIONS)
            raise ValueError(f"prefill_precision must be {known}, got {prefill_precision!r}")
        self.directory = directory
        self.info = ModelInfo.read(directory)
        self.tuning = tuning or read(directory) or Tuning()
        if count is not None:
            self.tuning = replace(self.tuning, threads=count)
        if prefill_precision is not None:
            self.tuning = replace(self.tuning, prefill_precision=prefill_precision)
        if self.tuning.prefill_precision != "same":
            self.info.check_prompts(directory)
        two_forms = self.tuning.prefill_precision != "same"
        graph = directory / (self.info.many_tokens if two_forms else GRAPH)
        kept, self.cautions = open_kept(graph, self.info, self.tuning) if packed else (None, [])
        self.is_packed = kept is not None
        self.session = kept or open_graph(graph, self.tuning)
        unpacked = UNPACKED.items() <= self.tuning.entries.items()  # weights are read in their file
        if not self.is_packed and not unpacked:
            page_out(directory / WEIGHTS)
        self.codes: Codes | None = None
        if self.info.cache_dtype == "int8":
            self.codes = Codes(directory / SCALES, self.info.layers)
        self.grain = GRAIN
        self._spare: dict[str, Cache] = {}  # by the type of its keys
        self.io = GraphIO.of(self.info, two_forms)
        self.io.check(
            graph,
            *(
                [(value.name, value.type, value.shape) for value in values]
                for values in (self.session.get_inputs(), self.session.get_outputs())
            ),
        )
        self.many_from: int | None = None
        if two_forms:
            self.many_from = self.tuning.many_from or pays_from(self._seconds)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash that tells this model from others, and its results from other versions'.

        It is of onnxruntime's version and of what `fastgen.json` says, with the digests of all
        files; those that an older export did not write are computed.
        """
        missing = [name for name in self.info.files if name not in self.info.digests]
        computed = {name: digest(self.directory / name) for name in missing}
        known = f"{onnxruntime.__version__} {self.info} {computed} {self._long}"
        return hashlib.sha256(known.encode()).hexdigest()

    @property
    def _long(self) -> int | None:
        """Tokens from which a prompt is read in the second form; None where none is."""
        never = self.many_from is None or self.many_from == NEVER
        return None if never else min(self.many_from or LONG, LONG)

    def reads_as_many(self, length: int) -> bool:
        """Tell if a prompt of that length is read in the second form, from its first token on.

        What a prefix cache knows of it counts too: so a hit gives what a fresh prefill gives.
        """
        return self._long is not None and length >= self._long

    def _seconds(self, tokens: int, many: bool) -> float:
        """The time that so many new tokens take in a form, without their logits."""
        cache, ids = self.new_cache(1, tokens, reads_prompts=True), np.zeros(tokens, np.int64)
        start = time.perf_counter()
        self.forward([ids], cache, 0, np.zeros((1, 0), np.int64), many)
        return time.perf_counter() - start

    def new_cache(self, rows: int, capacity: int, reads_prompts: bool = False) -> Cache:
        """Make an empty cache for `rows` rows of up to `capacity` tokens.

        Args:
            reads_prompts: for texts that are read and not gone on with: float32 where the model
                can have it so (see `codes`).
        """
        info, dtype = self.info, self._dtype(reads_prompts)
        return Cache(info.layers, rows, capacity, dtype, info.states, info.windows)

    def _dtype(self, reads_prompts: bool) -> str:
        return "float32" if reads_prompts and self.codes is not None else self.info.cache_dtype

    def borrow_cache(self, rows: int, capacity: int, reads_prompts: bool = False) -> Cache:
        """As `new_cache`, from memory (and bindings) of an earlier call where there is some."""
        cache = self._spare.pop(self._dtype(reads_prompts), None)
        if cache is None:
            return self.new_cache(rows, capacity, reads_prompts)
        cache.lengths[:] = 0
        cache.reserve(rows, capacity)
        return cache

    def give_back(self, cache: Cache) -> None:
        """Keep a cache for the next call: one of a type, if it is not large, and its bindings."""
        if sys.is_finalizing():  # a stream that was held to the end: there is no next call
            return
        if sum(call.logits.nbytes for call in cache.bindings.values()) > SPARE_LOGITS:
            cache.bindings.clear()
        if 0 < cache.size <= SPARE_BYTES:
            self._spare.setdefault(cache.dtype.name, cache)

    def forward(
        self,
        new: Sequence[NDArray[np.int64]],
        cache: Cache,
        first: int = 0,
        logits_positions: NDArray[np.int64] | None = None,
        many: bool | None = None,
    ) -> NDArray[np.float32]:
        """Append new tokens to the rows in slots `first`, `first + 1`, ... and return logits.

        Args:
            new: int64 [count] for each row. Rows may differ in length; an empty one stays as it
                is (it must hold something), and its logits mean nothing.
            cache: holds the rows so far; it must have room for the longest of `new` in each row.
            logits_positions: int64 [rows, keep], which of the new tokens want logits; None for
                the last of each row.
            many: whether to take the second form of the matrices, where there is one; None for
                what the number of tokens says (see `many_from`).

        Returns:
            float32 [rows, keep, vocab]. It is the memory of the binding: valid until the next
            call of the same shape.
        """
        counts = [len(ids) for ids in new]
        width, keep = max(counts), 1 if logits_positions is None else logits_positions.shape[1]
        if self.many_from is None:
            many = False
        elif many is None:
            many = len(new) * width >= self.many_from
        step = self._bound(cache, StepShape(first, len(new), width, keep, many))
        held = cache.lengths[first : first + len(new)]
        for slot in np.flatnonzero(held == 0).tolist() if self.info.states else ():
            cache.begin(first + slot)
        for window in self.io.window_starts:
            step.show(window, first_shown(int(held.min()), window, self.grain))
        step.write(new, counts, held, logits_positions)
        self.session.run_with_iobinding(step.binding)
        return step.logits

    def _bound(self, cache: Cache, shape: StepShape) -> BoundStep:
        step = cache.bindings.pop(shape, None) or BoundStep(self, cache, shape)
        cache.bindings[shape] = step  # the latest comes last
        if len(cache.bindings) > KEPT_BINDINGS:
            del cache.bindings[next(iter(cache.bindings))]
        return step


class StepShape(NamedTuple):
    """The shape of a step.

    Attributes:
        first, rows: its slots of the cache.
        width: new tokens of the longest row.
        keep: logits of each row.
        many: whether it takes the second form of the matrices.
    """

    first: int
    rows: int
    width: int
    keep: int
    many: bool


class BoundStep:
    """A step of one shape, bound once: `Model.forward` writes into these arrays and runs it."""

    def __init__(self, model: Model, cache: Cache, shape: StepShape) -> None:
        io, dtype = model.io, cache.dtype.name
        self._shape, self._new = shape, np.arange(shape.width)
        self.binding = model.session.io_binding()
        sizes = {"rows": shape.rows, "new": shape.width, "keep": shape.keep}
        (
            self.input_ids,
            self.position_ids,
            self.query_seqlens,
            self.seqlens_k,
            self.total_sequence_length,
            self.logits_positions,
        ) = (self._bind_input(spec, spec.zeros(**sizes)) for spec in TOKENS)
        self.logits = io.logits.zeros(**sizes)
        _bind(self.binding.bind_output, io.logits.name, self.logits)
        self._many = np.array(shape.many)
        if io.two_forms:
            self._bind_input(MANY_TOKENS, self._many)
        self._windowed = self._bind_key_values(
            io.key_values[dtype], cache.slots(shape.first, shape.rows)
        )
        for state, view in zip(io.state_pairs, cache.states(shape.first, shape.rows), strict=True):
            self._bind_pair(state, view)
        self._starts = {
            window: self._bind_input(spec, spec.zeros())
            for window, spec in io.window_starts.items()
        }
        self._choice: NDArray[Any] | None = None
        if io.reads_prompt is not None:
            self._choice = self._bind_input(io.reads_prompt, np.array(dtype == "float32"))
        self._unread = [
            self._bind_unread(pair, shape.rows)
            for other, pairs in io.key_values.items()
            if other != dtype
            for pair in pairs
        ]

    def write(
        self,
        new: Sequence[NDArray[np.int64]],
        counts: Sequence[int],
        held: NDArray[np.int64],
        logits_positions: NDArray[np.int64] | None,
    ) -> None:
        """Write new tokens into the inputs.

        Args:
            counts: of each row.
            held: int64 [rows], what the cache holds of each; gets what it holds then.
            logits_positions: see `Model.forward`.
        """
        width = self._shape.width
        np.add(held[:, None], self._new, out=self.position_ids)
        if min(counts) == width:  # nothing is padded: a step of any rows
            np.concatenate(new, out=self.input_ids.reshape(-1))
            self.query_seqlens.fill(width)
            self.logits_positions.fill(width - 1)
            held += width
        else:
            self._write_padded(new, counts, held)
        np.subtract(held, 1, out=self.seqlens_k, casting="same_kind")
        self.total_sequence_length.fill(max(int(held.max()), width))
        if logits_positions is not None:
            self.logits_positions[:] = logits_positions

    def _write_padded(
        self, new: Sequence[NDArray[np.int64]], counts: Sequence[int], held: NDArray[np.int64]
    ) -> None:
        for row, (ids, count) in enumerate(zip(new, counts, strict=True)):
            self.input_ids[row, :count] = ids
            self.input_ids[row, count:] = 0
        self.query_seqlens[:] = counts
        held += self.query_seqlens
        # A padded position is never read; it only has to be a legal one.
        np.minimum(self.position_ids, held[:, None] - 1, out=self.position_ids)
        np.maximum(self.query_seqlens[:, None] - 1, 0, out=self.logits_positions)

    def show(self, window: int, start: int) -> None:
        """Let the layers with a window begin with token `start`."""
        if self._starts[window] == start:
            return
        self._starts[window][...] = start
        for pair, view in self._windowed:
            if pair.window == window:
                self._bind_pair(pair, view, start)

    def _bind_input(self, spec: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
        """Bind an array to an input."""
        _bind(self.binding.bind_input, spec.name, array)
        return array

    def _bind_key_values(
        self, pairs: Sequence[Pair], views: Iterable[NDArray[Any]]
    ) -> list[tuple[Pair, NDArray[Any]]]:
        """Bind the keys and values that are attended to; give those of layers with windows."""
        windowed = []
        for pair, view in zip(pairs, views, strict=True):
            self._bind_pair(pair, view)
            if pair.window is not None:
                windowed.append((pair, view))
        return windowed

    def _bind_pair(self, pair: Pair, view: NDArray[Any], start: int = 0) -> None:
        """Bind keys or values, or a state, as they are and as they become.

        Args:
            start: of the tokens, which the graph takes for the first one. Rows and heads are as
                far apart as ever; the last of them would end after the buffer, and is never full.
        """
        address = view.ctypes.data + (start * view.strides[2] if start else 0)
        for bind, spec in (
            (self.binding.bind_input, pair.past),
            (self.binding.bind_output, pair.present),
        ):
            bind(spec.name, "cpu", 0, view.dtype.type, view.shape, address)

    def _bind_unread(self, pair: Pair, rows: int) -> NDArray[Any]:
        """Bind keys or values that are not attended to: a token, for a graph that asks for rows."""
        nothing = pair.past.zeros(rows=rows, capacity=1, prompt_rows=rows, prompt_capacity=1)
        self._bind_pair(pair, nothing)
        return nothing


def _bind(bind: Any, name: str, array: NDArray[Any]) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _allowed(threads: Any) -> int:
    """Check a number of threads; raise a ValueError if this machine cannot be asked for it."""
    count = validators.integer("threads", threads)
    if count < 1:
        raise ValueError(f"threads must be positive, got {count}")
    cpus = os.cpu_count() or 1
    if count > THREADS_A_CPU * cpus:
        raise ValueError(
            f"threads must be at most {THREADS_A_CPU * cpus}, {THREADS_A_CPU} for each of this "
            f"machine's {cpus} CPUs, got {count}"
        )
    return count
