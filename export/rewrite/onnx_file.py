"""A graph as a file, with its weights beside it."""

from __future__ import annotations

from pathlib import Path

import onnx_ir
import onnx_ir.passes.common

INLINE = 256  # bytes of a constant that stays in the graph itself, at most
WRITERS = 2  # threads: one makes an array, another writes one
IN_FLIGHT = 128 << 20  # bytes of arrays that are made and not yet written, beside the largest


def save(graph: onnx_ir.Model, path: Path) -> None:
    """Write `path` and its weights beside it, as `<name>.data`: no size limit, memory-mapped.

    From now on `graph` reads its weights from that file, one after the other as they are wanted:
    the system can have back what memory they take.

    The exporter's notes (stack traces, the paths of this machine) stay out of the file.
    """
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(graph)
    onnx_ir.external_data.unload_from_model(
        graph,
        path.parent,
        path.name + ".data",
        size_threshold_bytes=INLINE,
        max_workers=WRITERS,
        max_in_flight_bytes=IN_FLIGHT,
    )
    onnx_ir.save(graph, path)
