"""Checks of what builds kernels: can it be found, and does it fit?"""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from ..arch import MIN_CUDA_ARCH, display_arch, host_cpu_arch
from ..compilers import torch_cuda_version
from ..errors import ConfigError, ToolchainError
from ..settings import Settings
from ..toolchain import Toolchain, find_toolchain


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at.

    status: "ok", "warning", or "error" where the device at hand cannot build or run.
    fix: what would help; empty where nothing need be done.
    """

    name: str
    status: str
    value: str
    fix: str = ""


def ninja_check(settings: Settings) -> Check:
    """Whether there is the program that runs the compilers."""
    try:
        ninja = importlib.import_module("ninja")
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR)
    if found is None:
        fix = "pip install ninja"
        return Check(name="ninja", status=_blocks(settings), value="not found", fix=fix)
    return Check(name="ninja", status="ok", value=found)


def host_compiler_check(settings: Settings) -> Check:
    """Whether there is a C++ compiler."""

    def describe(toolchain: Toolchain) -> str:
        return f"{toolchain.host_identity} ({toolchain.host_compiler})"

    return _compiler_check("host compiler", host_cpu_arch, settings, describe, _blocks(settings))


def nvcc_check(settings: Settings, archs: tuple[str, ...]) -> Check:
    """Whether there is a CUDA compiler that fits torch and the first GPU; fine where there is no
    GPU."""

    def describe(toolchain: Toolchain) -> str:
        cuda = torch_cuda_version()
        against = f"torch's is {cuda}" if cuda else "torch is a CPU build"
        return f"CUDA {toolchain.cuda_major} of {toolchain.cuda_home}; {against}"

    arch = archs[0] if archs else f"sm{MIN_CUDA_ARCH}"
    if not archs:
        check = _compiler_check("nvcc", lambda: arch, settings, describe, "ok")
        if check.fix:
            return Check(name="nvcc", status="ok", value="none; needed only to build for a GPU")
        return check
    check = _compiler_check("nvcc", lambda: arch, settings, describe, _blocks(settings))
    if check.status == "ok" and not _nvcc_knows(arch, settings):
        fix = f"this nvcc does not know {display_arch(arch)}: install a newer CUDA toolkit"
        return Check(name="nvcc", status=_blocks(settings), value=check.value, fix=fix)
    return check


def _compiler_check(
    name: str,
    arch: Callable[[], str],
    settings: Settings,
    describe: Callable[[Toolchain], str],
    trouble: str,
) -> Check:
    try:
        return Check(name=name, status="ok", value=describe(find_toolchain(arch(), settings)))
    except (ToolchainError, ConfigError) as error:
        return Check(name=name, status=trouble, value="none that can be used", fix=str(error))


def _nvcc_knows(arch: str, settings: Settings) -> bool:
    nvcc = find_toolchain(arch, settings).compiler
    done = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode != 0 or f"sm_{arch[2:].rstrip('af')}" in done.stdout.split()


def _blocks(settings: Settings) -> str:
    """What a missing compiler means: nothing can be built, which only some modes need."""
    return "warning" if settings.mode in ("prebuilt", "reference") else "error"
