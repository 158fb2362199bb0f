"""Settings from the environment: the only module that reads it, once, into a frozen value."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .errors import SettingsError

MODES = ("auto", "prebuilt", "rebuild", "reference")
LOG_LEVELS = ("debug", "info", "warning", "error", "quiet")
DEFAULT_CACHE_MAX_BYTES = 2 << 30
DEFAULT_BUILD_SECONDS = 900.0
_SIZE = re.compile(r"(\d+)\s*(?:([kmgt])(?:i?b)?|b)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment asks for.

    cache_dir: root of the kernel cache; None is the user's cache directory.
    cache_max_bytes: what the cache is trimmed to after a build; 0 for no limit.
    allow_shared_cache: use a cache that others own or can write to.
    build_timeout: seconds that the compilers of one kernel may take.
    lock_timeout: seconds to wait for another process's build before building it oneself; None is a
        minute longer than a build may take.
    mode: "auto" builds on a miss, "prebuilt" never builds, "rebuild" builds every kernel once
        per process, "reference" runs the PyTorch recurrence instead of kernels.
    cuda_arch_list: architectures to build for where none is asked for, e.g. ("8.0", "9.0a").
    log_level: "quiet" silences the build lines too.
    max_jobs: most compilers at once; None lets memory and cores decide.
    cuda_home: root of the CUDA toolkit, where it must be a certain one.
    cxx: name or path of the host compiler, where it must be a certain one.
    bundle_path: bundles of prebuilt kernels, in the order in which they are searched.
    bundle_keys: files of public keys; where there are any, a bundle must be signed with one.
    debug: look at values on a GPU that are otherwise not looked at, which waits for it.
    """

    cache_dir: Path | None = None
    cache_max_bytes: int = DEFAULT_CACHE_MAX_BYTES
    allow_shared_cache: bool = False
    build_timeout: float = DEFAULT_BUILD_SECONDS
    lock_timeout: float | None = None
    mode: str = "auto"
    cuda_arch_list: tuple[str, ...] = ()
    log_level: str = "info"
    max_jobs: int | None = None
    cuda_home: Path | None = None
    cxx: str | None = None
    bundle_path: tuple[Path, ...] = ()
    bundle_keys: tuple[Path, ...] = ()
    debug: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read and validate. Raises SettingsError with the variable, its value and the choices."""
        cache_dir = environment.get("RWKV_JIT_CACHE_DIR", "")
        arch_list = environment.get("RWKV_JIT_CUDA_ARCH_LIST") or environment.get(
            "TORCH_CUDA_ARCH_LIST", ""
        )
        cuda_home = environment.get("CUDA_HOME", "")
        return cls(
            cache_dir=_folder("RWKV_JIT_CACHE_DIR", cache_dir) if cache_dir else None,
            cache_max_bytes=_size(environment, "RWKV_JIT_CACHE_MAX_BYTES"),
            allow_shared_cache=_switch(environment, "RWKV_JIT_ALLOW_SHARED_CACHE"),
            build_timeout=(
                _seconds(environment, "RWKV_JIT_BUILD_TIMEOUT") or DEFAULT_BUILD_SECONDS
            ),
            lock_timeout=_seconds(environment, "RWKV_JIT_LOCK_TIMEOUT"),
            mode=_choice(environment, "RWKV_JIT_MODE", MODES, "auto"),
            cuda_arch_list=tuple(
                arch.removesuffix("+PTX")
                for arch in arch_list.replace(";", " ").replace(",", " ").split()
            ),
            log_level=_choice(environment, "RWKV_JIT_LOG_LEVEL", LOG_LEVELS, "info"),
            max_jobs=_positive(environment, "MAX_JOBS"),
            cuda_home=Path(cuda_home) if cuda_home else None,
            cxx=environment.get("CXX") or None,
            bundle_path=_paths(environment, "RWKV_JIT_BUNDLE_PATH"),
            bundle_keys=_paths(environment, "RWKV_JIT_BUNDLE_KEYS"),
            debug=_switch(environment, "RWKV_JIT_DEBUG"),
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


def _folder(variable: str, value: str) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise SettingsError(
            f"{variable}={value!r} begins with a home directory, and there is none; write it out"
        ) from error


def _paths(environment: Mapping[str, str], variable: str) -> tuple[Path, ...]:
    parts = environment.get(variable, "").split(os.pathsep)
    return tuple(_folder(variable, part) for part in parts if part)


def _switch(environment: Mapping[str, str], variable: str) -> bool:
    return _choice(environment, variable, ("0", "1"), "0") == "1"


def _seconds(environment: Mapping[str, str], variable: str) -> float | None:
    value = environment.get(variable, "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise SettingsError(f"{variable}={value!r} must be a number of seconds above 0")
    return seconds


def _size(environment: Mapping[str, str], variable: str) -> int:
    value = environment.get(variable, "").strip()
    if not value:
        return DEFAULT_CACHE_MAX_BYTES
    size = parse_size(value)
    if size is None:
        raise SettingsError(
            f"{variable}={value!r} must be a number of bytes, such as 500M or 2G, or 0 for no limit"
        )
    return size


def parse_size(text: str) -> int | None:
    """A number of bytes: "1000", "500M", "2GiB" (units are powers of 1024); None if it is none."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    return int(match[1]) << (10 * " kmgt".index((match[2] or " ").lower()))
