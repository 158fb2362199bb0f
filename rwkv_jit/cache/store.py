"""The cache of built kernels on disk. The only user of filelock and platformdirs.

An entry is a folder that is made complete in `staging` and then renamed, so what is under `entries`
is whole; locks only save double work. Look-ups create nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import platformdirs

from ..errors import CacheError
from ..settings import Settings
from .folders import (
    LAYOUT,
    abandoned,
    check_trusted,
    folder_bytes,
    has_flock,
    make_folders,
    process_scope,
    read_holder,
    seal,
    temporary_root,
    write_holder,
)
from .manifest import LOG_NAME, CacheEntry, ManifestError, read_manifest, verify_entry

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ANNOUNCE_SECONDS = 5.0
_POLL_SECONDS = 0.1
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
_OPEN_GUARD = threading.Lock()


class Cache:
    """The entries below one root, for any number of threads and processes at once.

    Where the root cannot be written, what is built goes to a private temporary folder that this
    process removes when it ends; what the root holds is still found. Methods raise CacheError
    where a folder belongs to another user or can be written by others.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._fallback: Path | None = None
        self._guard = threading.Lock()

    @staticmethod
    def open(settings: Settings) -> Cache:
        """The cache that the settings name; the same object for the same root and process."""
        root = settings.cache_dir or platformdirs.user_cache_path("rwkv_jit")
        with _OPEN_GUARD:
            return _cache_at(root.absolute(), os.getpid())

    def lookup(self, digest: str) -> CacheEntry | None:
        """The entry of this digest, verified. One that is not what its manifest says is moved to
        quarantine, with a warning, and counts as missing."""
        if _DIGEST.fullmatch(digest) is None:
            raise CacheError(f"{digest!r} is not the digest of a cache key")
        for base in self._bases():
            entry = self._verified(_entry_path(base, digest), digest)
            if entry is not None:
                return entry
        return None

    def find_meaning(self, meaning: str) -> CacheEntry | None:
        """The newest entry with this meaning, whichever compiler built it, verified."""
        found = [entry for entry in self.entries() if entry.manifest.meaning == meaning]
        for entry in sorted(found, key=lambda entry: entry.manifest.created, reverse=True):
            verified = self.lookup(entry.manifest.digest)
            if verified is not None:
                return verified
        return None

    def entries(self) -> list[CacheEntry]:
        """Every entry with a readable manifest, not verified further."""
        found = []
        for base in self._bases():
            for path in sorted((base / "entries").glob("??/*")):
                with contextlib.suppress(OSError, ManifestError):
                    found.append(CacheEntry(path, read_manifest(path)))
        return found

    @contextlib.contextmanager
    def lock(
        self,
        digest: str,
        timeout: float,
        announce: Callable[[float, str], None],
        stop: threading.Event | None = None,
    ) -> Iterator[bool]:
        """Hold the build lock of a digest; the value says whether it is held.

        Waits for at most `timeout` seconds or until `stop` is set, and then, or where the file
        system has no flock, goes on without it: publishing is safe either way. While it waits it
        calls `announce` every few seconds with the seconds waited and a description of the holder.
        """
        folder = self._writable() / "locks"
        holder = folder / f"{digest}.json"
        lock = filelock.UnixFileLock(folder / f"{digest}.lock", mode=0o600, thread_local=False)
        # Without flock filelock may turn to a lock that lives by existing, which would outlive a
        # killed process.
        stop = stop or threading.Event()
        held = has_flock(folder) and _acquire(
            lock, timeout, lambda waited: announce(waited, read_holder(holder)), stop
        )
        try:
            if held:
                write_holder(holder)
            yield held
        finally:
            if held:
                with contextlib.suppress(OSError):
                    holder.unlink()
                lock.release()

    def new_staging(self) -> Path:
        """A new private folder to build in. Those that dead processes left are removed."""
        staging = self._writable() / "staging"
        for folder in abandoned(staging):
            shutil.rmtree(folder, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f"{process_scope()}.{os.getpid()}.", dir=staging))

    def publish(self, staging: Path, digest: str, *, replace: bool = False) -> CacheEntry:
        """Make a complete staging folder the entry of a digest, by one rename. Where another was
        faster its entry is returned and ours dropped; with `replace` ours takes its place."""
        target = _entry_path(staging.parent.parent, digest)
        manifest = read_manifest(staging)
        seal(staging)
        target.parent.mkdir(mode=0o700, exist_ok=True)
        old = staging.with_name(f"{staging.name}.old")
        for _ in range(3):
            if replace:
                with contextlib.suppress(OSError):
                    target.rename(old)
            try:
                staging.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise CacheError(f"{target} cannot be written: {error.strerror}") from error
                winner = None if replace else self._verified(target, digest)
                if winner is not None:
                    shutil.rmtree(staging, ignore_errors=True)
                    return winner
                continue
            finally:
                shutil.rmtree(old, ignore_errors=True)
            seal(target.parent, files=False)
            return CacheEntry(target, manifest)
        raise CacheError(f"{target} is in the way and cannot be replaced; remove it")

    def quarantine(self, path: Path, reason: str) -> None:
        """Move a bad entry's folder out of the way, with a warning."""
        place = path.parents[2] / "quarantine" / f"{path.name}.{uuid.uuid4().hex[:8]}"
        try:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            path.rename(place)
            with contextlib.suppress(OSError):
                (place / "reason.txt").write_text(f"{reason}\n", encoding="utf-8")
            where = f"moved to {place}"
        except OSError as error:
            if error.errno in _GONE:
                return
            where = f"it cannot be moved away ({error.strerror})"
        warnings.warn(
            f"rwkv_jit: the cache entry {path} is not usable: {reason}; {where}",
            RuntimeWarning,
            stacklevel=2,
        )

    def keep_log(self, staging: Path, digest: str) -> Path:
        """Copy the log of a failed build to where it outlives its staging folder."""
        kept = self._writable() / "failed" / f"{digest}.log"
        try:
            shutil.copyfile(staging / LOG_NAME, kept)
        except OSError:
            return staging / LOG_NAME
        return kept

    def clear(self, dry_run: bool) -> list[tuple[Path, int]]:
        """Remove every entry, quarantined entry, kept log and abandoned staging folder; what was
        (or, with `dry_run`, would be) removed, with its bytes."""
        removed = []
        for base in self._bases():
            paths = [
                *(base / "entries").glob("??/*"),
                *(base / "quarantine").glob("*"),
                *(base / "failed").glob("*"),
                *abandoned(base / "staging"),
            ]
            removed += [(path, folder_bytes(path)) for path in sorted(paths)]
        if not dry_run:
            for path, _ in removed:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
        return removed

    def total_bytes(self) -> int:
        """Bytes of all files of this cache."""
        return sum(folder_bytes(base) for base in self._bases())

    def _bases(self) -> list[Path]:
        roots = [self.root] if self._fallback is None else [self.root, self._fallback]
        return [root / LAYOUT for root in roots]

    def _verified(self, path: Path, digest: str) -> CacheEntry | None:
        problem = ""
        # Twice: another process may replace the entry between two reads of it.
        for _ in range(2):
            try:
                if not stat.S_ISDIR(path.lstat().st_mode):
                    problem = "it is not a folder"
                    continue
                check_trusted(*path.parents[:4], path)
                return verify_entry(path, digest)
            except ManifestError as error:
                problem = str(error)
            except OSError as error:
                if error.errno in _GONE:
                    return None
                raise CacheError(f"{path} cannot be read: {error.strerror}") from error
        self.quarantine(path, problem)
        return None

    def _writable(self) -> Path:
        """The folder of this layout that can be written, made if need be."""
        with self._guard:
            if self._fallback is not None:
                return self._fallback / LAYOUT
            try:
                return make_folders(self.root)
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise CacheError(f"{self.root} cannot be used: {error.strerror}") from error
                self._fallback = temporary_root()
                warnings.warn(
                    f"rwkv_jit: the cache {self.root} cannot be written ({error.strerror}); "
                    "kernels are built for this process only. Set RWKV_JIT_CACHE_DIR to a folder "
                    "of yours",
                    RuntimeWarning,
                    stacklevel=3,
                )
                return make_folders(self._fallback)


@functools.cache
def _cache_at(root: Path, _pid: int) -> Cache:
    return Cache(root)


def _entry_path(base: Path, digest: str) -> Path:
    return base / "entries" / digest[:2] / digest


def _acquire(
    lock: filelock.BaseFileLock,
    timeout: float,
    waiting: Callable[[float], None],
    stop: threading.Event,
) -> bool:
    started = time.monotonic()
    announcement = _ANNOUNCE_SECONDS
    with contextlib.suppress(OSError, NotImplementedError):
        while True:
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=0)
                return True
            waited = time.monotonic() - started
            if waited >= announcement:
                waiting(waited)
                announcement = waited + _ANNOUNCE_SECONDS
            if waited >= timeout or stop.wait(min(_POLL_SECONDS, timeout - waited)):
                break
    return False
