"""Memory of which only a part is used: what the system gives by the page, and takes back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

MADV_PAGEOUT = 21  # Linux 5.4: drop clean pages now, read them again when they are wanted


def lazy_zeros(shape: Sequence[int], dtype: DTypeLike) -> NDArray[np.generic]:
    """`np.zeros` of which what is never written takes no memory, but for a page at each end of
    what is.

    numpy asks for huge pages, where the first byte that is written takes two megabytes, and the
    time to zero them: a cache whose rows are half as long as they may become would be all there.
    """
    count = math.prod(shape)
    size = count * np.dtype(dtype).itemsize
    if not size:
        return np.zeros(shape, dtype)
    # Memory of this process alone, which can be given back; Windows has no other.
    private = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, count).reshape(shape)


def give_back(array: NDArray[Any], start: int, end: int) -> None:
    """Let the system have the whole pages of rows `start` to `end` of an array of `lazy_zeros`.

    They are zero from then on, and take no memory until they are written. Where there is no such
    advice (off Linux) nothing happens.

    Args:
        array: contiguous.
    """
    if (madvise := _madvise()) is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    address, row = array.ctypes.data, array.strides[0]
    first = -(-(address + start * row) // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + end * row) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The system's own; None off Linux, where it may mean something else."""
    if not Path("/proc/self/maps").is_file():
        return None
    madvise: Callable[..., int] | None = getattr(ctypes.CDLL(None), "madvise", None)
    return madvise


def page_out(path: Path) -> int:
    """Page out what this process has mapped of `path`; returns the bytes, 0 off Linux.

    onnxruntime reads every weight to pack a copy of it, and a tied embedding stays mapped besides,
    though a step reads a few of its rows only. The advice changes no content: pages that are
    wanted again come back from the file.
    """
    if (madvise := _madvise()) is None:
        return 0
    name, total = str(path.resolve()), 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith(name):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            size = end - start
            if madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_PAGEOUT) == 0:
                total += size
    return total


def trim() -> None:
    """Let the system have what the allocator keeps of what was freed: glibc keeps most of it."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
