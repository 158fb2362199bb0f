"""What a measurement was taken on, as plain data."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..arch import cuda_arch_of_capability, host_cpu_arch, is_cuda
from ..compilers import NVIDIA_DRIVER, torch_cuda_version
from ..errors import ToolchainError
from ..settings import Settings
from ..toolchain import find_toolchain


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe_machine(device: str, settings: Settings) -> dict[str, Any]:
    """Device, versions and compilers; None for what there is not."""
    on_gpu = device == "cuda"
    if on_gpu:
        arch = cuda_arch_of_capability(*torch.cuda.get_device_capability())
    else:
        arch = host_cpu_arch()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "arch": arch,
        "threads": torch.get_num_threads(),
        "rwkv_jit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch_cuda_version(),
        "driver": _driver_version(),
        **_compilers(arch, settings),
    }


def _compilers(arch: str, settings: Settings) -> dict[str, str | None]:
    """Those that build for `arch` here; kernels of a bundle came from elsewhere."""
    try:
        toolchain = find_toolchain(arch, settings)
    except ToolchainError:
        return {"host_compiler": None, "nvcc": None}
    nvcc = toolchain.nvcc_identity if is_cuda(arch) else None
    return {"host_compiler": toolchain.host_identity, "nvcc": nvcc}


def _cpu_name() -> str:
    return _first(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo")) or platform.machine()


def _driver_version() -> str | None:
    return _first(r"\s(\d+\.\d+(?:\.\d+)?)\s", NVIDIA_DRIVER)


def _first(pattern: str, path: Path) -> str | None:
    try:
        match = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None
