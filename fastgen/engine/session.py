"""Opening the session of a model's graph: its options, its two forms, and what is kept of both.

onnxruntime optimises a graph and packs its weights on every loading, into memory of the process.
It can also write both down. What it wrote (`store.packed`) loads sooner, since nothing is optimised
again, and processes share its pages. It packs all the same, a matrix at a time, and compares: a
matrix that its kernel would pack otherwise is an error, or is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import onnxruntime

from fastgen.engine.prefill_int8 import offer
from fastgen.errors import ModelError
from fastgen.store import files
from fastgen.store.model_info import GRAPH, UNPACK, WEIGHTS, ModelInfo
from fastgen.store.packed import Kept
from fastgen.store.tuning import Tuning
from fastgen.system import memory
from fastgen.system.cpu import int8_overflows

SPIN_US = "2000"  # microseconds that threads spin for more work
# Sum and norm in one node are slower than in two: it has no vector code (bench/README.md).
NOT_FUSED = ["SkipLayerNormFusion"]
# To run what is not run often: weights stay in the mapped file, and no packed copy is made of them.
UNPACKED = {"session.disable_prepacking": "1"}
# To write down the graph as it was optimised, with each matrix as it is and as it was packed.
SAVED = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}

# Where sessions that are opened now write what each node took; None for nowhere.
_profiles: ContextVar[Path | None] = ContextVar("profiles", default=None)


@contextmanager
def profiled(place: Path) -> Iterator[None]:
    """Have sessions that are opened meanwhile write what each of their nodes takes to a file in the
    directory `place`. `session.end_profiling()` ends that, and gives the file's path.
    """
    token = _profiles.set(place)
    try:
        yield
    finally:
        _profiles.reset(token)


def session_options(tuning: Tuning) -> Any:
    """The options of every session of fastgen; the comments say why."""
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
    # Matrices are packed side by side: a third of a load of float32 or 4 bits.
    options.add_session_config_entry("session.prepack.enable_parallel", "1")
    if not tuning.spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in _kernels(tuning).items():
        options.add_session_config_entry(name, value)
    place = _profiles.get()
    if place is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(place / "profile")
    return options


def _kernels(tuning: Tuning) -> dict[str, str]:
    """The entries that choose kernels: what is packed for some is not packed for others."""
    # int8 weights become uint8 on loading: slower, and exact
    exact = {"session.x64quantprecision": "1"} if int8_overflows() else {}
    return exact | tuning.entries


def open_session(path: Path, options: Any) -> Any:
    """Open a session of the graph of a model directory, as for every model that runs."""
    return onnxruntime.InferenceSession(
        str(path),
        options,
        providers=["CPUExecutionProvider"],
        enable_fallback=False,
        disabled_optimizers=NOT_FUSED,
    )


def open_graph(path: Path, tuning: Tuning) -> Any:
    """Open a graph of a model directory as it was exported, in one form or with both.

    Raises:
        ModelError: onnxruntime cannot load it.
    """
    options = session_options(tuning)
    offered = _offer(path, tuning, options)
    session = _session(path, options)
    offered.clear()
    return session


def place(path: Path, info: ModelInfo, tuning: Tuning) -> Kept:
    """The place of what is kept of a graph (see `open_kept`), which may be empty.

    Raises:
        ModelError: see `Kept.of`.
    """
    return Kept.of(info, path.name, {"entries": _kernels(tuning), "not fused": NOT_FUSED})


def open_kept(path: Path, info: ModelInfo, tuning: Tuning) -> tuple[Any, list[str]]:
    """Open what is kept of a graph for this machine; make it first, where there is nothing right.

    Args:
        path: of the graph in its model directory.

    Returns:
        The session, None where nothing can be kept; and what was wrong.
    """
    cautions: list[str] = []
    try:
        kept = place(path, info, tuning)
        try:
            return _opened(kept, tuning), []
        except ModelError as error:
            if kept.is_there:
                cautions.append(f"packed weights are made again: {error}")
        return _made(kept, path, info, tuning), cautions
    except (ModelError, OSError) as error:
        return None, [*cautions, f"{path.parent} runs without packed weights: {error}"]


def _made(kept: Kept, path: Path, info: ModelInfo, tuning: Tuning) -> Any:
    with files.locked(kept.lock):
        with suppress(ModelError):  # another process may have made it meanwhile
            return _opened(kept, tuning)
        info.check(path.parent, WEIGHTS)  # or a damaged copy would outlive its model's repair
        with kept.making(info.files.get(WEIGHTS, 0) + info.many_tokens_bytes) as new:
            options = session_options(tuning)
            options.optimized_model_filepath = str(new / GRAPH)
            for name, value in SAVED.items():
                options.add_session_config_entry(name, value)
            offered = _offer(path, tuning, options, saved=True)
            _session(path, options)
            offered.clear()
        memory.trim()
        return _opened(kept, tuning)


def _opened(kept: Kept, tuning: Tuning) -> Any:
    kept.check()
    options = session_options(tuning)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _session(kept.directory / GRAPH, options)


def _offer(path: Path, tuning: Tuning, options: Any, saved: bool = False) -> list[Any]:
    """Make the second form, where a graph has one (see `fastgen.engine.prefill_int8.offer`)."""
    if path.name == GRAPH:
        return []
    unpack = path.parent / UNPACK
    try:
        return offer(options, unpack, tuning.threads, int8_overflows(), saved)
    except Exception as error:  # as below
        raise ModelError(f"onnxruntime cannot run {unpack}: {error}") from error


def _session(path: Path, options: Any) -> Any:
    try:
        return open_session(path, options)
    except Exception as error:  # onnxruntime raises classes of its own, derived from Exception
        raise ModelError(f"onnxruntime cannot load {path}: {error}") from error
