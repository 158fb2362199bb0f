"""Doctor: can this machine build and run kernels, and if not, what would help?"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import fields

from .. import __version__
from ..arch import MIN_CUDA_ARCH, host_cpu_arch
from ..build import default_jobs, free_bytes
from ..cache import LAYOUT, Cache, check_trusted, folder_bytes
from ..compilers import NVIDIA_DRIVER, torch_cuda_version
from ..errors import ConfigError, RwkvJitError, SettingsError
from ..render import template_dir
from ..settings import Settings, current_settings
from .planning import gpu_archs
from .toolchain_checks import Check, host_compiler_check, ninja_check, nvcc_check
from .trial import run_trial

_LITTLE_DISK = 1 << 30
_LITTLE_MEMORY = 2 << 30


def examine(*, build: bool) -> Iterator[Check]:
    """Look at everything, one thing after another. build: also compile and run a small kernel."""
    settings, trouble = _read_settings()
    yield trouble or _settings_check(settings)
    yield Check(name="python", status="ok", value=platform.python_version())
    yield _package_check()
    torch_check = _torch_check()
    yield torch_check
    archs: tuple[str, ...] = ()
    if torch_check.status != "error":
        archs, checks = _gpu_checks()
        yield from checks
    yield _cpu_check(needed=not archs)
    yield ninja_check(settings)
    yield host_compiler_check(settings)
    yield nvcc_check(settings, archs)
    yield _memory_check(settings)
    yield _cache_check(settings)
    if build and torch_check.status != "error":
        yield _trial_check(settings, archs)


def _read_settings() -> tuple[Settings, Check | None]:
    try:
        return current_settings(), None
    except SettingsError as error:
        fix = f"{error}; or unset it"
        return Settings(), Check(name="settings", status="error", value="not valid", fix=fix)


def _settings_check(settings: Settings) -> Check:
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    shown = [
        f"{name}={' '.join(value) if isinstance(value, tuple) else value}"
        for name, value in values.items()
        if value not in (None, ())
    ]
    fix = ""
    if settings.mode == "reference":
        fix = "kernels are not used: unset RWKV_JIT_MODE to use them"
    return Check(
        name="settings", status="warning" if fix else "ok", value=", ".join(shown), fix=fix
    )


def _package_check() -> Check:
    try:
        folder = template_dir()
    except RwkvJitError as error:
        return Check(name="rwkv_jit", status="error", value=__version__, fix=str(error))
    return Check(name="rwkv_jit", status="ok", value=f"{__version__}, templates in {folder}")


def _torch_check() -> Check:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        fix = "install torch: pip install torch"
        return Check(name="torch", status="error", value=f"not usable: {error}", fix=fix)
    cuda = torch_cuda_version()
    kind = f"for CUDA {cuda}" if cuda else "CPU build"
    fix = ""
    if cuda is None and NVIDIA_DRIVER.exists():
        fix = "there is an NVIDIA driver: install a CUDA build of torch to use the GPU"
    return Check(
        name="torch",
        status="warning" if fix else "ok",
        value=f"{torch.__version__} ({kind})",
        fix=fix,
    )


def _gpu_checks() -> tuple[tuple[str, ...], list[Check]]:
    """The architectures of the GPUs, the current one first, and a check for each GPU."""
    import torch  # noqa: PLC0415

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        archs = gpu_archs()
    if not archs:
        said = " ".join(str(warning.message).partition("\n")[0] for warning in caught)
        if torch_cuda_version() is None or not NVIDIA_DRIVER.exists():
            return (), [Check(name="gpu", status="ok", value="none; kernels run on the CPU")]
        fix = said or "look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        return (), [Check(name="gpu", status="warning", value="torch cannot use it", fix=fix)]
    checks = []
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory
        old = major * 10 + minor < MIN_CUDA_ARCH
        status = "ok"
        if old:
            status = "error" if device == torch.cuda.current_device() else "warning"
        checks.append(
            Check(
                name=f"gpu {device}",
                status=status,
                value=f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, "
                f"{memory / 2**30:.0f} GiB",
                fix="kernels need compute capability 8.0 or later; use device='cpu'" if old else "",
            )
        )
    return archs, checks


def _cpu_check(*, needed: bool) -> Check:
    try:
        value = f"{host_cpu_arch()}, {len(os.sched_getaffinity(0))} cores"
    except ConfigError as error:
        status = "error" if needed else "warning"
        return Check(name="cpu", status=status, value=platform.machine(), fix=str(error))
    return Check(name="cpu", status="ok", value=value)


def _memory_check(settings: Settings) -> Check:
    free = free_bytes()
    jobs = default_jobs(settings.max_jobs)
    shown = "unknown" if free is None else f"{free / 2**30:.1f} GiB free"
    fix = ""
    if free is not None and free < _LITTLE_MEMORY:
        fix = "a compiler may need 2 GiB: free some memory before building"
    return Check(
        name="memory",
        status="warning" if fix else "ok",
        value=f"{shown}; {jobs} compiler{'s' if jobs > 1 else ''} at once",
        fix=fix,
    )


def _cache_check(settings: Settings) -> Check:
    try:
        cache = Cache.open(settings)
        folders = (cache.root, cache.root / LAYOUT, cache.root / LAYOUT / "entries")
        check_trusted(*(folder for folder in folders if folder.exists()))
        entries = cache.entries()
    except RwkvJitError as error:
        return Check(name="cache", status="error", value="not usable", fix=str(error))
    value = f"{cache.root}: {len(entries)} kernels, {folder_bytes(cache.root) / 1e6:.1f} MB"
    place = next(path for path in (cache.root, *cache.root.parents) if path.exists())
    fix = ""
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        fix = (
            f"{place} cannot be written, so kernels are built again in every process: set "
            "RWKV_JIT_CACHE_DIR to a folder of yours"
        )
    elif shutil.disk_usage(place).free < _LITTLE_DISK:
        fix = "less than 1 GB of disk is free: free some, or set RWKV_JIT_CACHE_DIR elsewhere"
    return Check(name="cache", status="warning" if fix else "ok", value=value, fix=fix)


def _trial_check(settings: Settings, archs: tuple[str, ...]) -> Check:
    name = "trial"
    if settings.mode == "reference":
        fix = "RWKV_JIT_MODE=reference uses no kernels: unset it to try one"
        return Check(name=name, status="warning", value="not done", fix=fix)
    try:
        trial = run_trial(archs[0] if archs else host_cpu_arch(), settings)
    except RwkvJitError as error:
        return Check(name=name, status="error", value="failed", fix=str(error))
    value = (
        f"{trial.slug} built in {trial.build_seconds:.1f} s; largest relative error "
        f"{trial.error:.1e} (of {trial.worst}; at most {trial.limit:.0e})"
    )
    if trial.passed:
        return Check(name=name, status="ok", value=value)
    fix = "the kernel computes something else than its formula: please report this output"
    return Check(name=name, status="error", value=value, fix=fix)
