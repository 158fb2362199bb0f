"""Settings from the environment: the only module that reads it, once, into a frozen value."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import SettingsError

MODES = ("auto", "prebuilt", "rebuild", "reference")
LOG_LEVELS = ("debug", "info", "warning", "error", "quiet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment asks for.

    cache_dir: root of the kernel cache; None is the user's cache directory.
    mode: "auto" builds on a miss, "prebuilt" never builds, "rebuild" builds every kernel once
        per process, "reference" runs the PyTorch recurrence instead of kernels.
    cuda_arch_list: architectures to build for where none is asked for, e.g. ("8.0", "9.0a").
    log_level: "quiet" silences the build lines too.
    max_jobs: most compilers at once; None lets memory and cores decide.
    cuda_home: root of the CUDA toolkit, where it must be a certain one.
    cxx: name or path of the host compiler, where it must be a certain one.
    """

    cache_dir: Path | None = None
    mode: str = "auto"
    cuda_arch_list: tuple[str, ...] = ()
    log_level: str = "info"
    max_jobs: int | None = None
    cuda_home: Path | None = None
    cxx: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read and validate. Raises SettingsError with the variable, its value and the choices."""
        cache_dir = environment.get("RWKV_JIT_CACHE_DIR", "")
        arch_list = environment.get("RWKV_JIT_CUDA_ARCH_LIST") or environment.get(
            "TORCH_CUDA_ARCH_LIST", ""
        )
        cuda_home = environment.get("CUDA_HOME", "")
        return cls(
            cache_dir=Path(cache_dir).expanduser() if cache_dir else None,
            mode=_choice(environment, "RWKV_JIT_MODE", MODES, "auto"),
            cuda_arch_list=tuple(
                arch.removesuffix("+PTX")
                for arch in arch_list.replace(";", " ").replace(",", " ").split()
            ),
            log_level=_choice(environment, "RWKV_JIT_LOG_LEVEL", LOG_LEVELS, "info"),
            max_jobs=_positive(environment, "MAX_JOBS"),
            cuda_home=Path(cuda_home) if cuda_home else None,
            cxx=environment.get("CXX") or None,
        )


@functools.cache
def current_settings() -> Settings:
    """The settings of this process, read from the environment at the first call."""
    return Settings.from_environment(os.environ)


def _choice(
    environment: Mapping[str, str], variable: str, choices: tuple[str, ...], default: str
) -> str:
    value = environment.get(variable, "").strip().lower() or default
    if value not in choices:
        raise SettingsError(f"{variable}={value!r} is not known; choose from {', '.join(choices)}")
    return value


def _positive(environment: Mapping[str, str], variable: str) -> int | None:
    value = environment.get(variable, "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise SettingsError(f"{variable}={value!r} must be a whole number of at least 1")
    return int(value)
