"""Many tokens at once: a second form of the matrices, in 8 bits for each output channel.

An export in int8 or int4 has two small graphs besides, on the same weights file (see
`export.quantize.prefill_int8`): one makes the second form, and one has both forms in the branches
of an If. Long prompts take the second, and so does every step of so many tokens that it is faster.
(x86 processors without VNNI add products of uint8 and int8 in 16 bits, where they overflow. They
take the second form in uint8, by a graph of its own: slower than int8 elsewhere, and as exact.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

TRIED = (2, 4, 8, 16, 32, 64)  # tokens of a step that both forms are timed with
FIRST = 8  # of these
ROUNDS, AGREEING = 9, 3  # at most; at least, if all say the same: a busy moment hits one form
NEVER = 2**31 - 1  # tokens, where the second form is not faster with the most of these


def pays_from(seconds: Callable[[int, bool], float]) -> int:
    """The fewest of TRIED tokens that the second form takes less time for, or NEVER.

    Args:
        seconds: (tokens, whether in the second form) -> the time that they take.
    """

    def pays(tokens: int) -> bool:
        ratios: list[float] = []
        for many in (False, True):  # which touch the memory
            seconds(tokens, many)
        while len(ratios) < ROUNDS:
            few = seconds(tokens, False)
            ratios.append(seconds(tokens, True) / few)
            if len(ratios) >= AGREEING and (max(ratios) < 1 or min(ratios) > 1):
                break
        return statistics.median(ratios) < 1

    at = TRIED.index(FIRST)
    if pays(TRIED[at]):
        while at and pays(TRIED[at - 1]):
            at -= 1
        return TRIED[at]
    return next((tokens for tokens in TRIED[at + 1 :] if pays(tokens)), NEVER)


def offer(
    options: Any, unpack: Path, threads: int, unsigned: bool = False, saved: bool = False
) -> list[Any]:
    """Make the matrices, and let the session that is opened with `options` have them.

    Args:
        unpack: the graph that makes them.
        unsigned: whether codes are to be uint8, whose zero is 128, instead of int8.
        saved: whether that session saves its graph: it does so with what it knew before it
            optimised, and with the shapes alone of what came later.

    Returns:
        What must stay until it is open. It packs a copy of each matrix, and with the last of these
        references, that to the matrix itself goes; a matrix that it does not pack it keeps.
    """
    unpacking = onnxruntime.SessionOptions()
    unpacking.intra_op_num_threads = threads
    unpacking.log_severity_level = 3
    # Matrix after matrix, as a graph is run: what goes between is given back to the system, where
    # folding constants would keep all of it until the end.
    unpacking.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    unpacking.enable_cpu_mem_arena = False
    unpacking.enable_mem_pattern = False
    session = onnxruntime.InferenceSession(
        str(unpack), unpacking, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    arrays = session.run(names, {})
    if unsigned:
        arrays = [from_128(array) if array.dtype == np.int8 else array for array in arrays]
    made = dict(zip(names, map(onnxruntime.OrtValue.from_dlpack, arrays), strict=True))
    arrays.clear()
    # What is optimised on loading has to be known before, and then stays.
    early = {n: one for n, one in made.items() if saved or len(one.shape()) == 1}
    options.add_external_initializers(list(early), list(early.values()))
    for name, one in made.items():
        if name not in early:
            options.add_initializer(name, one)
    return list(made.values())


def from_128(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The same codes in the same memory as uint8, with 128 for zero."""
    return np.bitwise_xor(codes, np.int8(-128), out=codes).view(np.uint8)
