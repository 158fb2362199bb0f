"""Building: a rendered source becomes an entry of the cache, once.

Threads of this process wait for each other per key, processes on the cache's lock. The compilers
run in a worker process, so that they can be ended and leave nothing behind in this one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from .arch import display_arch, is_cuda
from .cache import Cache, CacheEntry, CacheKey, Manifest, cache_key, meaning_key
from .config import DEFAULT_CHUNK_LENGTH, OpConfig, default_state_dtype
from .errors import (
    CacheError,
    KernelBuildError,
    KernelMissingError,
    RwkvJitError,
    ToolchainError,
)
from .jobs import default_jobs
from .manifest import LIBRARY_NAME, LOG_NAME, MANIFEST_NAME, MANIFEST_SCHEMA, hash_file
from .progress import Progress
from .render import RenderedSource
from .report import compile_command, failed_step, first_error, hint, kernel_resources
from .settings import Settings
from .spec import LAUNCHER_ABI
from .toolchain import Toolchain, find_toolchain, torch_cuda_major
from .worker import WorkerStoppedError, run_worker

POLICIES = ("auto", "never", "always")
BUILD_SECONDS = 900.0
# A holder of the cache's lock ends its own build after BUILD_SECONDS.
_LOCK_EXTRA_SECONDS = 60.0
_KEYS_GUARD = threading.Lock()

BuildResult = CacheEntry | RwkvJitError


def obtain(
    source: RenderedSource,
    settings: Settings,
    *,
    policy: str = "auto",
    limit: float = BUILD_SECONDS,
    stop: threading.Event | None = None,
) -> CacheEntry:
    """The cache entry of a source, built if need be.

    policy: "auto" builds on a miss, "never" does not, "always" builds and replaces what is there.
        Mode "prebuilt" of the settings is as "never"; mode "rebuild" is as "always" for the first
        time in a process.
    limit: seconds that the compilers may take.
    stop: ends the build when set.

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
            raise KernelMissingError(_missing(source, settings))
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
            job = _Job(cache, source, toolchain, key, settings.log_level, limit, replace)
            try:
                entry = job.build(stop or threading.Event())
            except OSError as error:
                raise CacheError(
                    f"{source.identity} cannot be built in the cache {cache.root}: {error}; "
                    "free some space, or set RWKV_JIT_CACHE_DIR to another folder"
                ) from error
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
    with _KEYS_GUARD:
        return _make_state(digest, root, os.getpid())


@functools.cache
def _make_state(_digest: str, _root: Path, _pid: int) -> _KeyState:
    return _KeyState(threading.Lock())


@dataclass(frozen=True, slots=True)
class _Job:
    """One build. replace: even if the entry exists."""

    cache: Cache
    source: RenderedSource
    toolchain: Toolchain
    key: CacheKey
    log_level: str
    limit: float
    replace: bool

    def build(self, stop: threading.Event) -> CacheEntry:
        """Wait for other processes, look again, build."""
        progress = Progress(self.source.identity, self.log_level)
        timeout = self.limit + _LOCK_EXTRA_SECONDS
        with self.cache.lock(self.key.digest, timeout, progress.waiting):
            entry = None if self.replace else self.cache.lookup(self.key.digest)
            if entry is not None:
                return entry
            with self._staging() as staging:
                seconds = self._compile(staging, progress, stop)
                self._describe(staging, seconds)
                entry = self.cache.publish(staging, self.key.digest, replace=self.replace)
            progress.done(seconds)
            return entry

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        staging = self.cache.new_staging()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _compile(self, staging: Path, progress: Progress, stop: threading.Event) -> float:
        """Fill a staging folder with source, log and library; the seconds that it took."""
        work = staging / "build"
        work.mkdir()
        text = staging / f"source{self.source.suffix}"
        text.write_text(self.source.text, encoding="utf-8")
        log = staging / LOG_NAME
        started = time.monotonic()
        try:
            status = run_worker(
                self._request(staging, text, work),
                work,
                log,
                limit=self.limit,
                tick=progress.tick,
                stop=stop,
            )
        except WorkerStoppedError as stopped:
            what = (
                f"the build took more than {self.limit:.0f} s and was ended"
                if stopped.timed_out
                else "the build was stopped"
            )
            raise KernelBuildError(self._failure(staging, what, "")) from None
        seconds = time.monotonic() - started
        if status != 0 or not (staging / LIBRARY_NAME).is_file():
            said = _read(log)
            step, code = failed_step(said, self.toolchain.compiler.name)
            code = status if code is None else code
            how = f"killed by signal {-code}" if code < 0 else f"exit {code}"
            killed = "Killed" if code in (-9, 137) else ""
            what = f"{step} failed ({how}): {first_error(said, staging)}"
            advice = hint(f"{said}\n{killed}")
            raise KernelBuildError(self._failure(staging, what, advice))
        shutil.rmtree(work, ignore_errors=True)
        return seconds

    def _request(self, staging: Path, text: Path, work: Path) -> dict[str, object]:
        toolchain = self.toolchain
        return {
            "name": f"rwkv_jit_{self.key.digest[:32]}",
            "source": str(text),
            "build_directory": str(work),
            "library": str(staging / LIBRARY_NAME),
            "host_compiler": str(toolchain.host_compiler),
            "cuda_home": str(toolchain.cuda_home) if toolchain.cuda_home else None,
            "cuda_major": toolchain.cuda_major,
            "library_dirs": [str(folder) for folder in toolchain.library_dirs],
            "code_flags": list(toolchain.code_flags),
            "abi": LAUNCHER_ABI,
            "identity": self.source.identity,
        }

    def _describe(self, staging: Path, seconds: float) -> None:
        library = staging / LIBRARY_NAME
        log = _read(staging / LOG_NAME)
        manifest = Manifest(
            schema=MANIFEST_SCHEMA,
            digest=self.key.digest,
            meaning=self.key.meaning,
            identity=self.source.identity,
            fields=self.key.fields,
            size=library.stat().st_size,
            sha256=hash_file(library),
            build_seconds=round(seconds, 3),
            created=datetime.now(timezone.utc).isoformat(),
            command=compile_command(log),
            resources=kernel_resources(log),
        )
        (staging / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")

    def _failure(self, staging: Path, what: str, advice: str) -> str:
        kept = self.cache.keep_log(staging, self.key.digest)
        command = compile_command(_read(kept))
        parts = [
            f"{self.source.identity}: {what.rstrip('.')}. Full log: {kept}",
            advice,
            f"Command: {command}" if command else "",
        ]
        return "\n".join(part for part in parts if part)


def _find(cache: Cache, source: RenderedSource, settings: Settings) -> CacheEntry | None:
    """An entry for a source that must not be built: this toolchain's, else any with its meaning."""
    major = torch_cuda_major() or 0
    with contextlib.suppress(ToolchainError):
        toolchain = find_toolchain(source.config.arch, settings)
        entry = cache.lookup(cache_key(source, toolchain).digest)
        if entry is not None:
            return entry
        major = toolchain.cuda_major
    return cache.find_meaning(meaning_key(source, major if is_cuda(source.config.arch) else 0))


def _missing(source: RenderedSource, settings: Settings) -> str:
    why = (
        "RWKV_JIT_MODE=prebuilt forbids building"
        if settings.mode == "prebuilt"
        else "the caller forbids building"
    )
    return (
        f"{source.identity} is not in any bundle or cache, and {why}. "
        f"Build it with: {warm_command(source.config)}"
    )


def warm_command(config: OpConfig) -> str:
    """The command that builds a configuration, with options only where they are not defaults."""
    options = [
        f"rwkv-jit warm {config.op} --head-size {config.head_size} --dtype {config.dtype}",
        f"--arch {display_arch(config.arch)}",
    ]
    if config.chunk_length != DEFAULT_CHUNK_LENGTH:
        options.append(f"--chunk-length {config.chunk_length}")
    if config.decay != "loglog":
        options.append(f"--decay {config.decay}")
    if config.state_dtype != default_state_dtype(config.dtype):
        options.append(f"--state-dtype {config.state_dtype}")
    if config.state_layout != "vk":
        options.append(f"--state-layout {config.state_layout}")
    return " ".join(options)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
