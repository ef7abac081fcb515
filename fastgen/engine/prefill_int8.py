"""Prompts of a 4-bit model, read in 8 bits: the matrices that the second session multiplies.

An export in int4 has two small graphs besides, on the same weights file (see
`export.quantize.prefill_int8`): one makes every matrix of the layers int8, to the nearest code, and
one reads prompts with these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from fastgen.store.model_info import UNPACK
from fastgen.system.cpu import int8_overflows

# Prompts of so many tokens are read apart, all but their last token. For shorter ones the step that
# follows for it costs more than is gained (bench/README.md). A prefix cache keeps nothing of those,
# so that what it knows was always read apart.
APART = 32


def offer(options: Any, directory: Path, threads: int) -> list[Any]:
    """Make the matrices, and let the session that is opened with `options` have them.

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
        str(directory / UNPACK), unpacking, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    made = dict(
        zip(names, map(onnxruntime.OrtValue.from_dlpack, session.run(names, {})), strict=True)
    )
    # What is optimised on loading has to be known before, and then stays.
    early = {n: one for n, one in made.items() if int8_overflows() or len(one.shape()) == 1}
    options.add_external_initializers(list(early), list(early.values()))
    for name, one in made.items():
        if name not in early:
            options.add_initializer(name, one)
    return list(made.values())
