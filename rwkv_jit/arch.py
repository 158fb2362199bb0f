"""Architectures that kernels are built for: CUDA compute capabilities and CPU feature levels.

A CUDA architecture is written "9.0a" by users and `sm90a` in slugs. A CPU architecture is a level
(`x86_64_v3`), never "native": an entry on a shared disk must not crash another machine.
"""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

from .errors import ConfigError

CPU_ARCHES = ("x86_64_v2", "x86_64_v3", "x86_64_v4", "aarch64")
MIN_CUDA_ARCH = 80
# The architectures that every CUDA template is compiled for in the tests.
CUDA_ARCHES = ("sm80", "sm86", "sm89", "sm90a", "sm100", "sm120")

# Embedded GPUs run no binaries of the others of their major version, nor the others theirs.
_EMBEDDED = (87, 88, 101, 110)
# Shared memory that a block may have, in KiB, where it is not what data-centre parts have had since
# compute capability 9.0 (CUDA C++ Programming Guide, technical specifications).
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 120: 99, 121: 99}

_CUDA_PATTERN = re.compile(r"(?:sm_?)?(\d+)\.?(\d)([af]?)", re.ASCII)
# Flags of /proc/cpuinfo that each level adds to the one before it.
_X86_LEVELS = (
    ("x86_64_v2", {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}),
    ("x86_64_v3", {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}),
    ("x86_64_v4", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
)


def parse_arch(text: str) -> str:
    """Return the slug form of an architecture: "9.0a", "sm_90a" and "sm90a" are `sm90a`,
    "cpu" is this machine's level. Raises ConfigError for anything else."""
    name = text.strip().lower()
    if name == "cpu":
        return host_cpu_arch()
    if name in CPU_ARCHES:
        return name
    match = _CUDA_PATTERN.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"arch={text!r} is not an architecture; write a CUDA one as 8.0, 9.0a or sm_90a, "
            f"or one of cpu, {', '.join(CPU_ARCHES)}"
        )
    number = int(match[1]) * 10 + int(match[2])
    if number < MIN_CUDA_ARCH:
        raise ConfigError(f"arch={text!r} is too old; kernels need compute capability 8.0 or later")
    return f"sm{number}{match[3]}"


def cuda_arch_of_capability(major: int, minor: int) -> str:
    """Slug form of the best architecture for a device of this compute capability."""
    return f"sm{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def is_cuda(arch: str) -> bool:
    """Whether an architecture in slug form is a CUDA one."""
    return arch.startswith("sm")


def arch_number(arch: str) -> int:
    """Compute capability of a CUDA architecture as major * 10 + minor; 0 for a CPU."""
    return int(arch[2:].rstrip("af")) if is_cuda(arch) else 0


def shared_memory(arch: str) -> int:
    """Bytes of shared memory that a block may have; 0 for a CPU."""
    return _SHARED_KIB.get(arch_number(arch), 227) * 1024 if is_cuda(arch) else 0


def display_arch(arch: str) -> str:
    """The form that users write: `sm90a` as "9.0a"; CPU architectures as they are."""
    if not is_cuda(arch):
        return arch
    number, suffix = arch_number(arch), arch[len(arch.rstrip("af")) :]
    return f"{number // 10}.{number % 10}{suffix}"


def binary_runs_on(built: str, arch: str) -> bool:
    """Whether a binary built for one architecture runs where `arch` is asked for, without being
    compiled again: on a CPU of the same or a higher level; on a GPU of the same major version and
    the same or a higher minor one, but one built for an "a" architecture nowhere else."""
    if built == arch:
        return True
    if is_cuda(built) != is_cuda(arch):
        return False
    if not is_cuda(arch):
        levels = [name for name, _ in _X86_LEVELS]
        return built in levels and arch in levels and levels.index(built) < levels.index(arch)
    have, need = arch_number(built), arch_number(arch)
    if built.endswith("a") or have // 10 != need // 10 or have > need:
        return False
    return have == need or not {have, need} & set(_EMBEDDED)


@functools.cache
def host_cpu_arch() -> str:
    """The highest CPU level that this machine has. Raises ConfigError on an unknown CPU."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return "aarch64"
    if machine not in ("x86_64", "amd64"):
        raise ConfigError(f"this machine's CPU ({machine}) is not supported; run with a GPU")
    return x86_level(_cpu_flags())


def x86_level(flags: frozenset[str]) -> str:
    """The highest x86-64 level whose features are all among `flags`."""
    level = None
    for name, needed in _X86_LEVELS:
        if not needed <= flags:
            break
        level = name
    if level is None:
        raise ConfigError("this machine's CPU is older than x86-64-v2; kernels need SSE4.2")
    return level


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset(_X86_LEVELS[0][1])
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()
