"""The machine that runs a session: physical cores, memory, and products of small integers."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from pathlib import Path


def physical_cores() -> int:
    """Physical cores among the CPUs of this process, within its cgroup's quota; at least one.

    A second hardware thread of a core adds nothing to work that is bound by memory or by the
    vector units, which is all that a language model does.
    """
    cpus = usable_cpus()
    cores = {_core_of(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota(len(cpus))))


def usable_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """The processor's own name; the kind of machine where the system does not say."""
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in about.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def cpu_features() -> str:
    """Features of the first processor, in the system's words; "" where it does not say."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as about:
        for line in about:
            name, _, said = line.partition(":")
            if name.strip() in ("flags", "Features"):  # of x86, of ARM
                return said.strip()
    return ""


@functools.cache
def _core_of(cpu: int) -> tuple[str, ...]:
    """A name for the core behind a logical CPU; the CPU itself where the system does not say."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return tuple((topology / name).read_text() for name in ("physical_package_id", "core_id"))
    except OSError:
        return (str(cpu),)


def _quota(cpus: int) -> int:
    """CPUs that the cgroup (version 2) grants, rounded up; `cpus` where there is no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cpus if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return cpus


def memory_bytes() -> int | None:
    """The memory that this process may have: the machine's, its cgroup's or its own limit.

    None where the system does not say.
    """
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max", or no such cgroup
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    with contextlib.suppress(ImportError):  # Windows has none
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        limits += [] if soft == resource.RLIM_INFINITY else [soft]
    return min(limits, default=None)


def int8_overflows() -> bool:
    """True if products of uint8 and int8 may overflow: x86 without VNNI, or one that cannot tell.

    AVX2 and AVX-512 add two such products in 16 bits; VNNI adds them in 32.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        about = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "avx512_vnni" not in about and "avx_vnni" not in about
