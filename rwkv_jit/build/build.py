"""Obtaining kernels: what the cache holds, or a build of it, once per key whoever asks.

Threads of this process wait for each other per key, processes on the cache's lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..arch import display_arch, is_cuda
from ..cache import NO_SPACE, Cache, CacheEntry, cache_key, meaning_key
from ..compilers import torch_cuda_major
from ..config import DEFAULT_CHUNK_LENGTH, OpConfig, bounded_from, default_state_dtype
from ..errors import CacheError, KernelMissingError, RwkvJitError, ToolchainError
from ..render import RenderedSource
from ..settings import Settings
from ..toolchain import find_toolchain
from .attempt import LOCK_EXTRA_SECONDS, Attempt
from .jobs import default_jobs

POLICIES = ("auto", "never", "always")
# What a file operation meets where another host has just removed or replaced something.
_TRANSIENT = (errno.ENOENT, errno.ESTALE)
_TRIES = 3
# Look-ups and insertions of a dict are atomic; a lock could be held by a thread that a fork leaves
# behind.
_KEYS: dict[tuple[str, Path, int], _KeyState] = {}

BuildResult = CacheEntry | RwkvJitError


def obtain(
    source: RenderedSource,
    settings: Settings,
    *,
    policy: str = "auto",
    limit: float | None = None,
    stop: threading.Event | None = None,
) -> CacheEntry:
    """The cache entry of a source, built if need be.

    policy: "auto" builds on a miss, "never" does not, "always" builds and replaces what is there.
        Mode "prebuilt" of the settings is as "never"; mode "rebuild" is as "always" for the first
        time in a process.
    limit: seconds that the compilers may take; None is what the settings say.
    stop: ends the build, or the wait for another process's, when set.

    Raises KernelMissingError where nothing is found and building is forbidden, ToolchainError
    where nothing is found and there is no compiler, KernelBuildError where one failed, and
    CacheError where the cache cannot be used.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is not known; choose from {', '.join(POLICIES)}")
    cache = Cache.open(settings)
    if policy == "never" or settings.mode == "prebuilt":
        entry = _find(cache, source, settings)
        if entry is None:
            raise KernelMissingError(_missing(source, settings, cache.unreadable()))
        return entry
    try:
        toolchain = find_toolchain(source.config.arch, settings)
    except ToolchainError:
        entry = _find(cache, source, settings)
        if entry is None:
            raise
        return entry
    key = cache_key(source, toolchain)
    state = _state_of(key.digest, cache.root)
    with state.lock:
        replace = policy == "always" or (settings.mode == "rebuild" and not state.built)
        entry = None if replace else cache.lookup(key.digest)
        if entry is None:
            limit = settings.build_timeout if limit is None else limit
            attempt = Attempt(
                cache,
                source,
                toolchain,
                key,
                settings.log_level,
                limit,
                settings.lock_timeout or limit + LOCK_EXTRA_SECONDS,
                replace,
            )
            entry = _run(attempt, stop or threading.Event())
            state.built = True
        return entry


def build_many(
    sources: Sequence[RenderedSource],
    settings: Settings,
    *,
    policy: str = "auto",
    jobs: int | None = None,
    on_result: Callable[[int, BuildResult], None] | None = None,
) -> list[BuildResult]:
    """`obtain` for many sources at once; an entry or an error for each, in their order.

    jobs: most compilers at once; None lets the settings, cores and memory decide.
    on_result: called with each source's place and result as it comes, from several threads.
    An interrupt ends the builds that run.
    """
    stop = threading.Event()

    def one(index: int) -> BuildResult:
        result: BuildResult
        try:
            result = obtain(sources[index], settings, policy=policy, stop=stop)
        except RwkvJitError as error:
            result = error
        if on_result is not None:
            on_result(index, result)
        return result

    most = jobs or default_jobs(settings.max_jobs)
    with ThreadPoolExecutor(max_workers=max(1, min(most, len(sources)))) as pool:
        try:
            return list(pool.map(one, range(len(sources))))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclass(slots=True)
class _KeyState:
    lock: threading.Lock
    built: bool = False


def _state_of(digest: str, root: Path) -> _KeyState:
    key = (digest, root, os.getpid())
    found = _KEYS.get(key)
    return _KEYS.setdefault(key, _KeyState(threading.Lock())) if found is None else found


def _run(attempt: Attempt, stop: threading.Event) -> CacheEntry:
    """Build, again where the file system had a hiccup, and elsewhere where it is full."""
    cache, what = attempt.cache, attempt.source.identity
    tries = _TRIES
    while True:
        tries -= 1
        try:
            return attempt.run(stop)
        except OSError as error:
            full = error.errno in NO_SPACE and cache.use_temporary(
                f"the cache {cache.root} has no space left ({error.strerror})"
            )
            if not full and (error.errno not in _TRANSIENT or tries <= 0):
                raise CacheError(
                    f"{what} cannot be built in the cache {cache.root}: {error}; "
                    "free some space, or set RWKV_JIT_CACHE_DIR to another folder"
                ) from error


def _find(cache: Cache, source: RenderedSource, settings: Settings) -> CacheEntry | None:
    """An entry for a source that must not be built: this toolchain's, else any with its meaning.
    Where everything is prebuilt no compiler is started, not even to ask what it is."""
    prebuilt = settings.mode == "prebuilt"
    major = torch_cuda_major()
    if not prebuilt:
        with contextlib.suppress(ToolchainError):
            toolchain = find_toolchain(source.config.arch, settings)
            entry = cache.lookup(cache_key(source, toolchain).digest)
            if entry is not None:
                return entry
            major = toolchain.cuda_major
    if not is_cuda(source.config.arch):
        majors = {0}
    elif major is not None:
        majors = {major}
    else:
        found = {entry.manifest.fields.get("cuda_major", "") for entry in cache.entries()}
        majors = {int(text) for text in found if text.isdecimal()}
    for number in sorted(majors, reverse=True):
        entry = cache.find_meaning(meaning_key(source, number), repair=not prebuilt)
        if entry is not None:
            return entry
    return None


def _missing(source: RenderedSource, settings: Settings, unreadable: str) -> str:
    why = (
        "RWKV_JIT_MODE=prebuilt forbids building"
        if settings.mode == "prebuilt"
        else "the caller forbids building"
    )
    note = f" ({unreadable})" if unreadable else ""
    return (
        f"{source.identity} is not in any bundle or cache{note}, and {why}. "
        f"Build it with: {warm_command(source.config)}"
    )


def warm_command(config: OpConfig) -> str:
    """The command that builds a configuration, with options only where they are not defaults."""
    options = [
        f"rwkv-jit warm {config.op}",
        *([f"--head-size {config.head_size}"] if config.head_size else []),
        f"--dtype {config.dtype} --arch {display_arch(config.arch)}",
    ]
    if config.chunk_length not in (0, DEFAULT_CHUNK_LENGTH):
        options.append(f"--chunk-length {config.chunk_length}")
    if config.decay != "loglog":
        options.append(f"--decay {config.decay}")
    if config.state_dtype != default_state_dtype(config.dtype):
        options.append(f"--state-dtype {config.state_dtype}")
    if config.state_layout != "vk":
        options.append(f"--state-layout {config.state_layout}")
    if config.checkpoint_dtype != "auto":
        options.append(f"--checkpoint-dtype {config.checkpoint_dtype}")
    if config.precision != "float32":
        options.append(f"--precision {config.precision}")
    if config.bounded:
        options.append(f"--lower-bound {bounded_from(config.dtype):g}")
    return " ".join(options)
