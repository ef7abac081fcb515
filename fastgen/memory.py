"""Memory that is mapped from a file and was read once: give it back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

MADV_PAGEOUT = 21  # Linux 5.4: drop clean pages now, read them again when they are wanted


def page_out(path: Path) -> int:
    """Page out what this process has mapped of `path`; returns the bytes, 0 off Linux.

    onnxruntime reads every weight to pack a copy of it, and a tied embedding stays mapped besides,
    though a step reads a few of its rows only. The advice changes no content: pages that are
    wanted again come back from the file.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return 0
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return 0
    name, total = str(path.resolve()), 0
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith(name):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            size = end - start
            if madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT) == 0:
                total += size
    return total
