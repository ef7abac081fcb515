"""Token ids in, logits out: one onnxruntime session on a model directory.

A step of any kind (prefill, decode, verifying a guess, scoring) is one `forward`: new tokens of
some neighbouring rows, right-padded, written into a `Cache` in place.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from fastgen.engine.cache import Cache
from fastgen.engine.kv_int8 import Codes
from fastgen.engine.prefill_int8 import APART, offer
from fastgen.errors import ModelError
from fastgen.inputs import validators
from fastgen.store.graph_io import GRAIN, first_shown, window_start
from fastgen.store.model_info import (
    CACHE_DTYPES,
    GRAPH,
    INFO,
    PROMPTS,
    SCALES,
    UNPACK,
    WEIGHTS,
    ModelInfo,
    digest,
)
from fastgen.store.tuning import READ_AS, Tuning, read
from fastgen.system.cpu import int8_overflows
from fastgen.system.memory import page_out

THREADS_A_CPU = 8  # that may be asked for; more than one gains nothing
SPIN_US = "2000"  # microseconds that threads spin for more work
KEPT_BINDINGS = 16  # shapes of call that stay bound to a cache
SPARE_BYTES = 128 << 20  # of a cache that is kept for the next call, at most
SPARE_LOGITS = 16 << 20  # bytes of logits that stay bound to it
# To run what is not run often: weights stay in the mapped file, and no packed copy is made of them.
UNPACKED = {"session.disable_prepacking": "1"}


class Model:
    """A session and the shapes around it. Threads may share it, each with a cache of its own.

    Args:
        directory: a model directory (DESIGN: `fastgen.json`, `model.onnx` and its data).
        threads: how many threads a step may use, at most 8 for each CPU of the machine; None for
            what was tuned, or the physical cores.
        tuning: how to run it; None for what `fastgen tune` found best on this machine.
        prompts: see `fastgen.load`; None for what was tuned, or "same".

    Attributes:
        grain: tokens by which it moves what layers with windows are shown first.

    Raises:
        ModelError: see `ModelInfo.read`; or the graph is not what `fastgen.json` says it is, or
            prompts in int8 are asked of a model that has none.
        ValueError: threads, prompts.
    """

    def __init__(
        self,
        directory: Path,
        threads: int | None = None,
        tuning: Tuning | None = None,
        prompts: str | None = None,
    ) -> None:
        count = None if threads is None else _allowed(threads)
        if prompts not in (None, *READ_AS):
            raise ValueError(f"prompts must be {' or '.join(READ_AS)}, got {prompts!r}")
        self.directory = directory
        self.info = ModelInfo.read(directory)
        self.tuning = tuning or read(directory) or Tuning()
        if count is not None:
            self.tuning = replace(self.tuning, threads=count)
        if prompts is not None:
            self.tuning = replace(self.tuning, prompts=prompts)
        if self.tuning.prompts != "same":
            self.info.check_prompts(directory)
        self.session = _session(directory / GRAPH, self.tuning)
        self.reader: Any = None
        if self.tuning.prompts != "same":
            self.reader = _reader(directory, self.tuning)
        if not UNPACKED.items() <= self.tuning.entries.items():  # else they are read there
            page_out(directory / WEIGHTS)
        self.codes: Codes | None = None
        if self.info.cache_dtype == "int8":
            self.codes = Codes(directory / SCALES, self.info.layers)
        self.grain = GRAIN
        self._spare: dict[str, Cache] = {}  # by the type of its keys
        self._check_graph()

    def _check_graph(self) -> None:
        layers = range(len(self.info.layers))
        past, present = _names("past_key_values", layers), _names("present", layers)
        numbers = range(len(self.info.states))
        held, left = ([f"{when}_state.{i}" for i in numbers] for when in ("past", "present"))
        both = () if self.codes is None else layers  # attended in float32 too
        prompt, prompt_present = _names("prompt_key_values", both), _names("prompt_present", both)
        self.choices = ["reads_prompt"] if both else []
        self.windows = sorted({window for window in self.info.windows if window is not None})
        starts = map(window_start, self.windows)
        for what, found, expected in (
            (
                "inputs",
                self.session.get_inputs(),
                [*_Call.INPUTS, *self.choices, *starts, *past, *prompt, *held],
            ),
            ("outputs", self.session.get_outputs(), ["logits", *present, *prompt_present, *left]),
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
        if past and kinds != {expected_kind}:
            raise ModelError(
                f"{self.directory / GRAPH} takes keys and values as {', '.join(sorted(kinds))}, "
                f"expected {expected_kind}"
            )
        shapes: dict[str, tuple[int | None, ...]]
        shapes = {"logits": (None, None, self.info.vocab_size)}
        for i, (heads, dim) in enumerate(self.info.layers):
            pair = slice(2 * i, 2 * i + 2)
            shapes |= dict.fromkeys((*past[pair], *prompt[pair]), (None, heads, None, dim))
        for i, shape in enumerate(self.info.states):
            shapes |= dict.fromkeys((held[i], left[i]), (None, *shape))
        for value in (*self.session.get_inputs(), *self.session.get_outputs()):
            if not _fits(value.shape, shapes.get(value.name, ())):
                raise ModelError(
                    f"{self.directory / GRAPH} has {value.name} of shape {value.shape}, "
                    f"{INFO} says {shapes[value.name]}: copy or export the model again"
                )
        self.key_values = {self.info.cache_dtype: list(zip(past, present, strict=True))}
        if both:
            self.key_values["float32"] = list(zip(prompt, prompt_present, strict=True))
        self.states = list(zip(held, left, strict=True))

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells this model from others, and what it computes from other versions' results.

        A hash of onnxruntime's version and of what `fastgen.json` says, with the digests of all
        files; those that an older export did not write are computed.
        """
        missing = [name for name in self.info.files if name not in self.info.digests]
        computed = {name: digest(self.directory / name) for name in missing}
        known = f"{onnxruntime.__version__} {self.info} {computed} {self.tuning.prompts}"
        return hashlib.sha256(known.encode()).hexdigest()

    def reads_apart(self, length: int) -> bool:
        """Whether a prompt of that length is read by the second session, but for its last token.

        What a prefix cache knows of it counts too: so a hit gives what a fresh prefill gives.
        """
        return self.reader is not None and length >= APART

    def new_cache(self, rows: int, capacity: int, reads_prompts: bool = False) -> Cache:
        """An empty cache for `rows` rows of up to `capacity` tokens.

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
        apart: bool = False,
    ) -> NDArray[np.float32]:
        """Append new tokens to the rows in slots `first`, `first + 1`, ... and return logits.

        Args:
            new: int64 [count] for each row. Rows may differ in length; an empty one stays as it
                is (it must hold something), and its logits mean nothing.
            cache: holds the rows so far; it must have room for the longest of `new` in each row.
            logits_positions: int64 [rows, keep], which of the new tokens want logits; None for
                the last of each row.
            apart: by the second session (see `prefill_int8`), which has no logits to give.

        Returns:
            float32 [rows, keep, vocab]. It is the memory of the binding: valid until the next
            call of the same shape.
        """
        counts = [len(ids) for ids in new]
        width, keep = max(counts), 1 if logits_positions is None else logits_positions.shape[1]
        call = self._bound(cache, first, len(new), width, keep, apart)
        held = cache.lengths[first : first + len(new)]
        for slot in np.flatnonzero(held == 0).tolist() if self.info.states else ():
            cache.begin(first + slot)
        for row, ids in enumerate(new):
            call.input_ids[row, : counts[row]] = ids
            call.input_ids[row, counts[row] :] = 0
        call.query_seqlens[:] = counts
        np.add(held[:, None], np.arange(width), out=call.position_ids)
        for window in self.windows:
            call.show(window, first_shown(int(held.min()), window, self.grain))
        if min(counts) < width:  # a padded position is never read; it only has to be a legal one
            np.minimum(
                call.position_ids,
                held[:, None] + call.query_seqlens[:, None] - 1,
                out=call.position_ids,
            )
        held += call.query_seqlens
        call.seqlens_k[:] = held - 1
        call.total_sequence_length[...] = max(int(held.max()), width)
        if logits_positions is None:
            np.maximum(call.query_seqlens - 1, 0, out=call.logits_positions[:, 0])
        else:
            call.logits_positions[:] = logits_positions
        call.session.run_with_iobinding(call.binding)
        return call.logits

    def _bound(
        self, cache: Cache, first: int, rows: int, width: int, keep: int, apart: bool
    ) -> _Call:
        key = (first, rows, width, keep, apart)
        call = cache.bindings.pop(key, None) or _Call(self, cache, *key)
        cache.bindings[key] = call  # the latest comes last
        if len(cache.bindings) > KEPT_BINDINGS:
            del cache.bindings[next(iter(cache.bindings))]
        return call


def _names(kind: str, layers: Sequence[int]) -> list[str]:
    return [f"{kind}.{i}.{half}" for i in layers for half in ("key", "value")]


def _fits(stated: Sequence[Any], expected: Sequence[int | None]) -> bool:
    """Whether a graph's shape, some of it by name, can be another, some of it unknown (None)."""
    return all(
        one == other or not isinstance(one, int) or other is None
        for one, other in zip(stated, expected, strict=False)
    )


class _Call:
    """One shape of call, bound once: a step writes into these arrays and runs."""

    INPUTS = (
        "input_ids",
        "position_ids",
        "query_seqlens",
        "seqlens_k",
        "total_sequence_length",
        "logits_positions",
    )

    def __init__(
        self,
        model: Model,
        cache: Cache,
        first: int,
        rows: int,
        width: int,
        keep: int,
        apart: bool,
    ) -> None:
        self.input_ids = np.zeros((rows, width), np.int64)
        self.position_ids = np.zeros((rows, width), np.int64)
        self.query_seqlens = np.zeros(rows, np.int32)
        self.seqlens_k = np.zeros(rows, np.int32)
        self.total_sequence_length = np.zeros((), np.int32)
        self.logits_positions = np.zeros((rows, keep), np.int64)
        self.logits = np.zeros((rows, keep, model.info.vocab_size), np.float32)
        self.session = model.reader if apart else model.session
        self.binding = self.session.io_binding()
        taken = {value.name for value in self.session.get_inputs()}
        for name in filter(taken.__contains__, self.INPUTS):
            _bind(self.binding.bind_input, name, getattr(self, name))
        if not apart:
            _bind(self.binding.bind_output, "logits", self.logits)
        names = (*model.key_values[cache.dtype.name], *model.states)
        views = (*cache.slots(first, rows), *cache.states(first, rows))
        for pair, view in zip(names, views, strict=True):
            self._bind_past(pair, view)
        self.starts = {window: np.zeros((), np.int32) for window in model.windows}
        for window, start in self.starts.items():
            if (name := window_start(window)) in taken:
                _bind(self.binding.bind_input, name, start)
        seen = np.repeat(np.array(model.info.windows, object), 2).tolist()
        self.windowed = [
            (window, pair, view)
            for window, pair, view in zip(seen, names, views, strict=False)
            if window is not None
        ]
        for name in model.choices:
            self.reads_prompt = np.array(cache.dtype == np.float32)
            _bind(self.binding.bind_input, name, self.reads_prompt)
        self.others = [
            self._pass_by(rows, *pair, np.dtype(dtype))
            for dtype, pairs in model.key_values.items()
            if dtype != cache.dtype.name
            for pair in zip(pairs, np.repeat(model.info.layers, 2, axis=0).tolist(), strict=True)
        ]

    def _bind_past(self, names: tuple[str, str], view: NDArray[Any], start: int = 0) -> None:
        """Bind keys or values, or a state, as they are and as they become.

        Args:
            start: of the tokens, which the graph takes for the first one. Rows and heads are as
                far apart as ever; the last of them would end after the buffer, and is never full.
        """
        place = view.ctypes.data + (start * view.strides[2] if start else 0)
        for bind, name in zip(
            (self.binding.bind_input, self.binding.bind_output), names, strict=True
        ):
            bind(name, "cpu", 0, view.dtype.type, view.shape, place)

    def show(self, window: int, start: int) -> None:
        """Let the layers with a window begin with token `start`."""
        if self.starts[window] == start:
            return
        self.starts[window][...] = start
        for other, pair, view in self.windowed:
            if other == window:
                self._bind_past(pair, view, start)

    def _pass_by(
        self, rows: int, names: tuple[str, str], layer: tuple[int, int], dtype: np.dtype[Any]
    ) -> NDArray[Any]:
        """Bind keys or values that are not attended to: a token, for a graph that asks for rows."""
        nothing = np.zeros((rows, layer[0], 1, layer[1]), dtype)
        self._bind_past(names, nothing)
        return nothing


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


def _allowed(threads: Any) -> int:
    """A number of threads, if this machine can be asked for it; a ValueError if not."""
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


def _reader(directory: Path, tuning: Tuning) -> Any:
    """The session that reads prompts; see `fastgen.engine.prefill_int8`."""
    options = session_options(tuning)
    try:
        offered = offer(options, directory, tuning.threads)
    except Exception as error:  # as below
        raise ModelError(f"onnxruntime cannot run {directory / UNPACK}: {error}") from error
    session = _session(directory / PROMPTS, tuning, options)
    offered.clear()
    return session


def _session(path: Path, tuning: Tuning, options: Any = None) -> Any:
    try:
        return open_session(path, options or session_options(tuning))
    except Exception as error:  # onnxruntime raises classes of its own, derived from Exception
        raise ModelError(f"onnxruntime cannot load {path}: {error}") from error
