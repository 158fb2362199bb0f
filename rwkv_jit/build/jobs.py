"""How many compilers this machine can run at once."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_COMPILER_BYTES = 2 << 30
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def default_jobs(max_jobs: int | None) -> int:
    """The most compilers at once: `max_jobs` if given, else what cores and free memory allow at
    about 2 GiB a compiler, inside the limits of this process's control group."""
    if max_jobs is not None:
        return max_jobs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [float(cores or 1)]
    quota = _cgroup_cores()
    if quota is not None:
        limits.append(quota)
    limits += [
        free / _COMPILER_BYTES for free in (free_bytes(), _cgroup_bytes()) if free is not None
    ]
    return max(1, int(min(limits)))


def free_bytes() -> int | None:
    """Memory that new processes can have, as the kernel estimates it; None if it does not say."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB", _read(_MEMINFO), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _cgroup_bytes() -> int | None:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        highest, current = _read(_CGROUP / limit).strip(), _read(_CGROUP / used).strip()
        if highest.isdecimal() and current.isdecimal():
            return max(0, int(highest) - int(current))
    return None


def _cgroup_cores() -> float | None:
    quota, _, period = _read(_CGROUP / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""
