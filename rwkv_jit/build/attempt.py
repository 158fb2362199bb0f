"""One attempt at a build: lock, staging folder, worker, manifest, publication.

The compilers run in a worker process, so that they can be ended and leave nothing behind in this
one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ..cache import (
    LIBRARY_NAME,
    LOG_NAME,
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    Cache,
    CacheEntry,
    CacheKey,
    Manifest,
    hash_file,
)
from ..errors import KernelBuildError
from ..render import RenderedSource
from ..spec import LAUNCHER_ABI
from ..toolchain import Toolchain
from .progress import Progress
from .report import compile_command, failed_step, first_error, hint, kernel_resources
from .worker import WorkerStoppedError, run_worker

# A holder of the cache's lock ends its own build within its own limit.
LOCK_EXTRA_SECONDS = 60.0
_STOPPED = "the build was stopped"
_FULL = re.compile(r"No space left on device|Disk quota exceeded|\[Errno (28|122)\]")
# A linker that maps its output is killed by a bus error and does not say why.
_FULL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Attempt:
    """limit: seconds that the compilers may take. patience: seconds to wait for another process's
    build. replace: build even if the entry exists."""

    cache: Cache
    source: RenderedSource
    toolchain: Toolchain
    key: CacheKey
    log_level: str
    limit: float
    patience: float
    replace: bool

    def run(self, stop: threading.Event) -> CacheEntry:
        """Wait for other processes, look again, build. stop: ends waiting and building when set.
        Raises KernelBuildError if the build fails or was stopped, and OSError where the file
        system fails."""
        progress = Progress(self.source.identity, self.log_level)
        with self.cache.lock(self.key.digest, self.patience, progress.waiting, stop):
            entry = None if self.replace else self.cache.lookup(self.key.digest)
            if entry is not None:
                return entry
            if stop.is_set():
                raise KernelBuildError(f"{self.source.identity}: {_STOPPED}")
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
        name = f"source{self.source.suffix}"
        (staging / name).write_text(self.source.text, encoding="utf-8")
        # A second copy, where the compilers can reach it by a name without a path.
        (work / name).write_text(self.source.text, encoding="utf-8")
        log = staging / LOG_NAME
        started = time.monotonic()
        try:
            status = run_worker(
                self._request(staging, name, work),
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
                else _STOPPED
            )
            raise KernelBuildError(self._failure(staging, what, "")) from None
        seconds = time.monotonic() - started
        if status != 0:
            said = _read(log)
            if _is_full(staging, said):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(staging))
            step, code = failed_step(said, self.toolchain.compiler.name)
            code = status if code is None else code
            how = f"killed by signal {-code}" if code < 0 else f"exit {code}"
            killed = "Killed" if code in (-9, 137) else ""
            what = f"{step} failed ({how}): {first_error(said, staging)}"
            advice = hint(f"{said}\n{killed}")
            raise KernelBuildError(self._failure(staging, what, advice))
        shutil.rmtree(work, ignore_errors=True)
        return seconds

    def _request(self, staging: Path, name: str, work: Path) -> dict[str, object]:
        toolchain = self.toolchain
        return {
            "name": f"rwkv_jit_{self.key.digest[:32]}",
            "source": name,
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


def _is_full(folder: Path, log: str) -> bool:
    """Whether a build in a folder failed for want of space."""
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < _FULL_BYTES:
            return True
    return _FULL.search(log) is not None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
