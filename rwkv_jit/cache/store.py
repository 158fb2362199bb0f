"""The cache of built kernels on disk. The only user of platformdirs.

An entry is a folder that is made complete in `staging` and then renamed, so what is under `entries`
is whole; locks only save double work. Look-ups create nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs

from ..errors import CacheError
from ..settings import DEFAULT_CACHE_MAX_BYTES, Settings
from .folders import (
    GONE,
    LAYOUT,
    abandoned,
    children,
    folder_bytes,
    make_folders,
    own_folders,
    private_name,
    seal,
    temporary_root,
)
from .growth import Removed, contents, excess, remove
from .locks import hold_lock, lock_place
from .manifest import (
    LOG_NAME,
    CacheEntry,
    ManifestError,
    read_manifest,
    verify_entry,
    verify_manifest,
)
from .trust import check_parents, check_trusted
from .usage import Uses, is_used, remove_unused

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DENIED = (errno.EACCES, errno.EPERM)
_UNWRITABLE = (*_DENIED, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, *NO_SPACE)
_TRIES = 5
# Nothing can be made there, whoever tries.
_NOWHERE = Path(os.devnull, "no-home-directory", "rwkv_jit")
# Look-ups and insertions of a dict are atomic; a lock could be held by a thread that a fork leaves
# behind.
_OPEN: dict[tuple[Path, int, int, bool], Cache] = {}


class Cache:
    """The entries below one root, for any number of threads and processes at once.

    max_bytes: what the cache is trimmed to after a build; 0 for no limit.
    shared: use it although others own it or can write to it.

    Where the root cannot be written, what is built goes to a private temporary folder that this
    process removes when it ends; what the root holds is still found. Methods raise CacheError
    where a folder belongs to another user or can be written by others.
    """

    def __init__(
        self, root: Path, *, max_bytes: int = DEFAULT_CACHE_MAX_BYTES, shared: bool = False
    ) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self.shared = shared
        self._fallback: Path | None = None
        self._guard = threading.Lock()
        self._uses = Uses()

    @staticmethod
    def open(settings: Settings) -> Cache:
        """The cache that the settings name; the same object for the same settings and process."""
        root = settings.cache_dir or _default_root()
        limit, shared = settings.cache_max_bytes, settings.allow_shared_cache
        key = (root.absolute(), os.getpid(), limit, shared)
        found = _OPEN.get(key)
        if found is None:
            found = _OPEN.setdefault(key, Cache(key[0], max_bytes=limit, shared=shared))
        return found

    def lookup(self, digest: str, *, repair: bool = True) -> CacheEntry | None:
        """The entry of this digest, verified, and safe from removal while this process runs.

        One that is not what its manifest says is moved to quarantine, with a warning, and counts
        as missing; without `repair` it is a CacheError.
        """
        if _DIGEST.fullmatch(digest) is None:
            raise CacheError(f"{digest!r} is not the digest of a cache key")
        for base in self._bases():
            entry = self._verified(_entry_path(base, digest), digest, repair)
            if entry is not None:
                return entry
        return None

    def find_meaning(self, meaning: str, *, repair: bool = True) -> CacheEntry | None:
        """The newest entry with this meaning, whichever compiler built it, verified."""
        found = [entry for entry in self.entries() if entry.manifest.meaning == meaning]
        for entry in sorted(found, key=lambda entry: entry.manifest.created, reverse=True):
            verified = self.lookup(entry.manifest.digest, repair=repair)
            if verified is not None:
                return verified
        return None

    def entries(self) -> list[CacheEntry]:
        """Every entry with a readable manifest, not verified further."""
        found = []
        for path in self._entry_folders():
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

        Waits for at most `timeout` seconds or until `stop` is set, and then, or where there are no
        locks, goes on without it: publishing is safe either way. While it waits it calls
        `announce` every few seconds with the seconds waited and a description of the holder.
        """
        root = self._writable().parent
        with hold_lock(root, digest, timeout, announce, stop or threading.Event()) as held:
            yield held

    def new_staging(self) -> Path:
        """A new private folder to build in. Those that dead processes left are removed."""
        staging = self._writable() / "staging"
        for folder in abandoned(staging):
            remove_unused(folder, staging)
        return Path(tempfile.mkdtemp(prefix=private_name(), dir=staging))

    def publish(self, staging: Path, digest: str, *, replace: bool = False) -> CacheEntry:
        """Make a complete staging folder the entry of a digest, by one rename, and trim the cache.
        Where another was faster its entry is returned and ours dropped; with `replace` ours takes
        its place. OSError where the file system fails."""
        base = staging.parent.parent
        target = _entry_path(base, digest)
        try:
            manifest = read_manifest(staging)
        except ManifestError as error:
            raise FileNotFoundError(errno.ENOENT, str(error), str(staging)) from error
        seal(staging)
        # In use before it can be seen: it must not be trimmed away on the way to its loading.
        self._take(staging)
        old = staging.with_name(f"{staging.name}.old")
        for _ in range(3):
            target.parent.mkdir(mode=0o700, exist_ok=True)
            if replace:
                # What this process has loaded stays loaded.
                self._uses.drop(target)
                with contextlib.suppress(OSError):
                    target.rename(old)
            try:
                staging.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                winner = None if replace else self._verified(target, digest, repair=True)
                if winner is not None:
                    self._uses.drop(staging)
                    shutil.rmtree(staging, ignore_errors=True)
                    return winner
                continue
            finally:
                remove_unused(old, staging.parent)
            with contextlib.suppress(OSError):
                seal(target.parent, files=False)
            self._uses.move(staging, target)
            if self.max_bytes:
                self.trim(self.max_bytes)
            return CacheEntry(target, manifest)
        raise CacheError(f"{target} is in the way and cannot be replaced; remove it")

    def quarantine(self, path: Path, reason: str) -> None:
        """Move a bad entry's folder out of the way, with a warning."""
        self._uses.drop(path)
        place = path.parents[2] / "quarantine" / f"{path.name}.{uuid.uuid4().hex[:8]}"
        try:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            path.rename(place)
            with contextlib.suppress(OSError):
                (place / "reason.txt").write_text(f"{reason}\n", encoding="utf-8")
            where = f"moved to {place}"
        except OSError as error:
            if error.errno in GONE and not path.is_symlink() and not path.exists():
                return
            where = f"it cannot be moved away ({error.strerror})"
        warnings.warn(
            f"rwkv_jit: the cache entry {path} is not usable: {reason}; {where}",
            RuntimeWarning,
            stacklevel=2,
        )

    def keep_log(self, staging: Path, digest: str) -> Path:
        """Copy the log of a failed build to where it outlives its staging folder."""
        try:
            kept = self._writable() / "failed" / f"{digest}.log"
            shutil.copyfile(staging / LOG_NAME, kept)
        except OSError:
            return staging / LOG_NAME
        return kept

    def verify(self, *, dry_run: bool) -> list[tuple[Path, str]]:
        """Every entry that is not what its manifest says, with the reason; moved to quarantine
        unless `dry_run`."""
        bad = []
        for path in self._entry_folders():
            try:
                _, reason = _inspect(path, path.name)
            except OSError as error:
                if error.errno in GONE:
                    continue
                raise CacheError(f"{path} cannot be read: {error.strerror}") from error
            if reason:
                bad.append((path, reason))
                if not dry_run:
                    self.quarantine(path, reason)
        return bad

    def trim(self, max_bytes: int, *, dry_run: bool = False) -> list[Removed]:
        """Remove what dead processes left in staging, then, while the cache has more than
        `max_bytes`, what is in quarantine, logs of failed builds, and entries that were not used
        for longest. Entries in use are spared. What was (or would be) removed, with its bytes."""
        removed: list[Removed] = []
        for base in self._bases():
            removed += remove(base, excess(base, max_bytes), dry_run=dry_run)
        return removed

    def clear(self, dry_run: bool) -> list[Removed]:
        """Remove every entry that is not in use, quarantined entry, kept log and abandoned staging
        folder; what was (or, with `dry_run`, would be) removed, with its bytes."""
        removed: list[Removed] = []
        for base in self._bases():
            removed += remove(base, contents(base), dry_run=dry_run)
        return removed

    def used(self) -> list[Path]:
        """The folders of the entries that some process uses now."""
        return [path for path in self._entry_folders() if is_used(path)]

    def info(self) -> dict[str, Any]:
        """What there is, in numbers: path, bytes, max_bytes, entries, in_use, quarantined,
        failed_logs, staging, abandoned; the folder of the build locks; and in `problem` why the
        cache cannot be used, if so."""
        bases = self._bases()
        problem = self.unreadable()
        try:
            self._check_trusted(*own_folders(self.root))
        except (CacheError, OSError) as error:
            problem = problem or str(error)
        return {
            "path": self.root,
            "bytes": self.total_bytes(),
            "max_bytes": self.max_bytes,
            "entries": len(self._entry_folders()),
            "in_use": len(self.used()),
            "quarantined": sum(len(children(base / "quarantine")) for base in bases),
            "failed_logs": sum(len(children(base / "failed")) for base in bases),
            "staging": sum(len(children(base / "staging")) for base in bases),
            "abandoned": sum(len(abandoned(base / "staging")) for base in bases),
            "locks": lock_place(self.root),
            "problem": problem,
        }

    def release(self) -> None:
        """Use no entry any longer: from now on others may remove them."""
        self._uses.drop_all()

    def total_bytes(self) -> int:
        """Bytes of all files of this cache."""
        return sum(folder_bytes(base) for base in self._bases())

    def use_temporary(self, reason: str) -> bool:
        """Build in a private temporary folder from now on, with a warning that tells the reason;
        False if that is so already."""
        with self._guard:
            if self._fallback is not None:
                return False
            self._fall_back(reason)
            return True

    def unreadable(self) -> str:
        """Why the entries below the root, or the first of those that no look-up by meaning can
        see, cannot be looked at; empty if they can, or if there are none."""
        try:
            os.scandir(self.root / LAYOUT / "entries").close()
        except OSError as error:
            if error.errno not in GONE:
                return f"{self.root} cannot be read: {error.strerror}"
        for path in self._entry_folders():
            problem = _manifest_problem(path)
            if problem:
                return f"the cache entry {path} is not usable: {problem}"
        return ""

    def _entry_folders(self) -> list[Path]:
        return [path for base in self._bases() for path in children(base / "entries", "??/*")]

    def _bases(self) -> list[Path]:
        roots = [self.root] if self._fallback is None else [self.root, self._fallback]
        return [root / LAYOUT for root in roots]

    def _verified(self, path: Path, digest: str, repair: bool) -> CacheEntry | None:
        problem, before_that = "", None
        # Another process may replace the entry between two reads of it, and a network file system
        # may have a hiccup: only what is seen twice is so.
        for _ in range(_TRIES):
            try:
                path.lstat()
                self._check_trusted(*path.parents[:4], path)
                # First of all, so that nobody removes what is about to be loaded.
                taken = self._take(path)
                before = path.lstat()
                entry, problem = _inspect(path, digest)
                same = _identity(before) == _identity(path.lstat())
            except OSError as error:
                if error.errno in GONE or error.errno in _DENIED:
                    return None
                raise CacheError(f"{path} cannot be read: {error.strerror}") from error
            if taken and entry is not None:
                return entry
            if problem and same and problem == before_that:
                break
            before_that = problem
        self._uses.drop(path)
        if not problem:
            return None
        if not repair:
            raise CacheError(f"the cache entry {path} is not usable: {problem}")
        self.quarantine(path, problem)
        return None

    def _take(self, path: Path) -> bool:
        try:
            return self._uses.take(path)
        except OSError as error:
            # What cannot be opened is looked at next, and its fault is told there.
            return error.errno not in GONE

    def _check_trusted(self, *folders: Path) -> None:
        if not self.shared:
            check_parents(self.root)
            check_trusted(*folders)

    def _writable(self) -> Path:
        """The folder of this layout that can be written, made if need be."""
        with self._guard:
            if self._fallback is not None:
                return self._fallback / LAYOUT
            try:
                try:
                    return self._make_folders()
                except OSError as error:
                    if error.errno not in (*GONE, errno.EEXIST):
                        raise
                # Another host may be making or removing them right now.
                return self._make_folders()
            except OSError as error:
                if error.errno not in _UNWRITABLE:
                    raise CacheError(f"{self.root} cannot be used: {error.strerror}") from error
                if self.root == _NOWHERE:
                    return self._fall_back("there is no home directory for a cache")
                return self._fall_back(
                    f"the cache {self.root} cannot be written ({error.strerror})"
                )

    def _make_folders(self) -> Path:
        if not self.shared:
            check_parents(self.root)
            check_trusted(*own_folders(self.root))
        return make_folders(self.root)

    def _fall_back(self, reason: str) -> Path:
        try:
            self._fallback = temporary_root()
        except OSError as error:
            raise CacheError(
                f"{reason}, and neither can a temporary folder be made ({error.strerror}); "
                "set RWKV_JIT_CACHE_DIR, or TMPDIR, to a folder of yours with some space"
            ) from error
        warnings.warn(
            f"rwkv_jit: {reason}; kernels are built for this process only. "
            "Set RWKV_JIT_CACHE_DIR to a folder of yours",
            RuntimeWarning,
            stacklevel=4,
        )
        return make_folders(self._fallback)


def _default_root() -> Path:
    """The user's cache directory. A user without a home has none."""
    # Without a home platformdirs gives a relative path, or raises, depending on its version.
    with contextlib.suppress(RuntimeError):
        root = platformdirs.user_cache_path("rwkv_jit")
        if root.is_absolute():
            return root
    return _NOWHERE


def _inspect(path: Path, digest: str) -> tuple[CacheEntry | None, str]:
    """The entry in a folder if it is whole, else what is wrong with it. OSError if that cannot be
    said."""
    try:
        return verify_entry(path, digest), ""
    except ManifestError as error:
        return None, str(error)


def _manifest_problem(path: Path) -> str:
    try:
        verify_manifest(path, path.name)
    except (ManifestError, OSError) as error:
        return str(error)
    return ""


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_ctime_ns


def _entry_path(base: Path, digest: str) -> Path:
    return base / "entries" / digest[:2] / digest
