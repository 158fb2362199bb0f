"""Reading what compilers say: the resources of kernels, the first error, and what may help."""

from __future__ import annotations

import re
from pathlib import Path

_KERNEL = re.compile(r"Compiling entry function '([^']+)' for '[^']+'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_ERROR = re.compile(
    r"\berror\s*:|\bfatal error\b|\bfatal\s*:|undefined reference|undefined symbol"
    r"|No space left|Killed|rwkv_jit worker:"
)
_FAILED = re.compile(r"^FAILED: (?:\[code=(\d+)\] )?(\S+)", re.MULTILINE)
_COMMAND = re.compile(r"^\[1/\d+\] (.+)$", re.MULTILINE)
_HINTS = (
    (
        r"No space left on device",
        "The disk is full: free some space, or set RWKV_JIT_CACHE_DIR (and TMPDIR) elsewhere",
    ),
    (
        r"Killed|out of memory|virtual memory exhausted|Cannot allocate memory|code=137",
        "The compiler may have run out of memory: lower MAX_JOBS",
    ),
    (
        r"Unsupported gpu architecture|Value '?sm_\w+'? is not defined",
        "This nvcc does not know the architecture: install a newer toolkit or choose another arch",
    ),
    (
        r"unsupported GNU version|unsupported clang version",
        "This nvcc does not accept the host compiler: name an older one in CXX",
    ),
    (
        r"(bad value|unknown target CPU|unsupported argument)[^\n]*(march|x86-64-v)",
        "This host compiler does not know the CPU level: install gcc 11 or clang 12, or later",
    ),
    (
        r"fatal error: [^\n]*No such file or directory|(could not|cannot) open source file",
        "A header is missing: the toolkit or the C++ standard library is installed in part",
    ),
    (
        r"Ninja is required",
        "ninja is missing: pip install ninja",
    ),
    (
        r"cannot find -lcudart",
        "libcudart is missing: install the CUDA runtime (pip install 'rwkv_jit[cuda]')",
    ),
)


def kernel_resources(log: str) -> dict[str, dict[str, int]]:
    """For each kernel that ptxas reported on, by its mangled name: registers, and bytes of
    spill_stores, spill_loads, shared (static) and stack."""
    resources: dict[str, dict[str, int]] = {}
    parts = _KERNEL.split(log)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        spills = _SPILLS.search(text)
        registers = _REGISTERS.search(text)
        if spills is None or registers is None:
            continue
        shared = _SHARED.search(text[registers.start() :].partition("\n")[0])
        resources[name] = {
            "registers": int(registers[1]),
            "spill_stores": int(spills[2]),
            "spill_loads": int(spills[3]),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(spills[1]),
        }
    return resources


def first_error(log: str, folder: Path) -> str:
    """The first line of a log that tells an error, without the folder's path; else its last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    found = next((line for line in lines if _ERROR.search(line)), lines[-1] if lines else "")
    for place in (folder, "/proc/self/cwd"):
        found = found.replace(f"{place}/", "")
    return found


def compile_command(log: str) -> str:
    """The command that compiled the source; empty if the build did not get that far."""
    match = _COMMAND.search(log) or re.search(r"^FAILED: .*\n(.+)$", log, re.MULTILINE)
    return match[1] if match else ""


def failed_step(log: str, compiler: str) -> tuple[str, int | None]:
    """Which program failed, and with which exit status: the compiler, or "the linker"."""
    match = _FAILED.search(log)
    if match is None:
        return "the build worker", None
    program = "the linker" if match[2].endswith(".so") else compiler
    return program, int(match[1]) if match[1] else None


def hint(log: str) -> str:
    """What may help against the error in a log; empty if nothing is known."""
    for pattern, text in _HINTS:
        if re.search(pattern, log):
            return text
    return ""
