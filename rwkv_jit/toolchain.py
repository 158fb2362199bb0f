"""Toolchain: which compilers build a kernel, what they call themselves, and with which flags."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from .arch import is_cuda
from .compilers import (
    cuda_major,
    find_cuda_home,
    find_host_compiler,
    host_identity,
    nvcc_identity,
    nvcc_release,
)
from .errors import ToolchainError
from .settings import Settings

_COMMON_FLAGS = ("-O3", "-std=c++17")
_CPU_FLAGS = (
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
)
# cpp_extension defines these four macros; kernels must not depend on how they are built.
_CUDA_FLAGS = (
    "-lineinfo",
    "-Xptxas=-v",
    "--expt-relaxed-constexpr",
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """The compilers for one architecture.

    host_identity, nvcc_identity: name, version and target as the compilers report them, without a
        path; nvcc_identity is empty for a CPU.
    cuda_home: root of the toolkit that nvcc belongs to.
    cuda_major: of the CUDA runtime that a kernel will need; 0 for a CPU.
    code_flags: flags that decide what code is generated, in order.
    """

    arch: str
    host_compiler: Path
    host_identity: str
    nvcc: Path | None
    nvcc_identity: str
    cuda_home: Path | None
    cuda_major: int
    code_flags: tuple[str, ...]

    @property
    def compiler(self) -> Path:
        """The compiler that reads the source."""
        return self.nvcc or self.host_compiler

    @property
    def library_dirs(self) -> tuple[Path, ...]:
        """Folders of the toolkit that may hold libcudart; empty for a CPU."""
        if self.cuda_home is None:
            return ()
        targets = sorted(self.cuda_home.glob("targets/*/lib"))
        return (self.cuda_home / "lib64", self.cuda_home / "lib", *targets)


def find_toolchain(arch: str, settings: Settings) -> Toolchain:
    """The compilers that build for `arch`, an architecture in slug form.

    The host compiler is `settings.cxx`, else c++, g++ or clang++ on PATH. nvcc is that of
    `settings.cuda_home`, of PATH, of /usr/local/cuda, or of NVIDIA's pip packages. Raises
    ToolchainError, with the ways out, if there is none or if it does not fit torch.
    """
    host = find_host_compiler(settings)
    identity = host_identity(host)
    if not is_cuda(arch):
        _check_target(arch, identity)
        flags = (*_COMMON_FLAGS, *_CPU_FLAGS, _march(arch))
        return Toolchain(
            arch=arch,
            host_compiler=host,
            host_identity=identity,
            nvcc=None,
            nvcc_identity="",
            cuda_home=None,
            cuda_major=0,
            code_flags=flags,
        )
    home = find_cuda_home(settings)
    nvcc = home / "bin" / "nvcc"
    number = arch.removeprefix("sm")
    return Toolchain(
        arch=arch,
        host_compiler=host,
        host_identity=identity,
        nvcc=nvcc,
        nvcc_identity=nvcc_identity(nvcc),
        cuda_home=home,
        cuda_major=cuda_major(nvcc_release(nvcc)),
        code_flags=(
            *_COMMON_FLAGS,
            *_CUDA_FLAGS,
            f"-gencode=arch=compute_{number},code=sm_{number}",
        ),
    )


def host_platform() -> str:
    """Operating system and machine that a kernel library is for."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def _check_target(arch: str, identity: str) -> None:
    machine = identity.rpartition(" ")[2].partition("-")[0]
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if not arch.startswith(machine):
        raise ToolchainError(
            f"arch={arch} cannot be built here: the compiler ({identity}) is for {machine}; "
            "name a compiler for it in CXX, or build on such a machine"
        )


def _march(arch: str) -> str:
    return "-march=armv8-a" if arch == "aarch64" else f"-march={arch.replace('_', '-')}"
