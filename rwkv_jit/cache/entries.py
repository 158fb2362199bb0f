"""Entries as a process takes them into use: verified, published, or put in quarantine."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
import warnings
from pathlib import Path

from ..errors import CacheError
from .folders import GONE, seal
from .manifest import CacheEntry, ManifestError, read_manifest, verify_entry
from .roots import DENIED, Roots
from .usage import Uses, remove_unused

_TRIES = 5


class Entries:
    """The entries that this process uses, of the cache below `roots`."""

    def __init__(self, roots: Roots) -> None:
        self._roots = roots
        self._uses = Uses()

    def verified(self, base: Path, digest: str, *, repair: bool) -> CacheEntry | None:
        """The entry of a digest below the folder of a layout, if it is whole; in use from now on.
        A bad one goes to quarantine and counts as missing; without `repair` it is a CacheError."""
        path = _entry_path(base, digest)
        problem, before_that = "", None
        # Another process may replace the entry between two reads of it, and a network file system
        # may have a hiccup: only what is seen twice is so.
        for _ in range(_TRIES):
            try:
                path.lstat()
                self._roots.check_trusted(*path.parents[:4], path)
                # First of all, so that nobody removes what is about to be loaded.
                taken = self._take(path)
                before = path.lstat()
                entry, problem = inspect_entry(path, digest)
                same = _identity(before) == _identity(path.lstat())
            except OSError as error:
                if error.errno in GONE or error.errno in DENIED:
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

    def publish(self, staging: Path, digest: str, *, replace: bool) -> tuple[CacheEntry, bool]:
        """Make a complete staging folder the entry of a digest, by one rename; the entry, and
        whether it is this one. Where another was faster it is that, and ours is dropped; with
        `replace` ours takes its place. OSError where the file system fails."""
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
                winner = None if replace else self.verified(base, digest, repair=True)
                if winner is not None:
                    self._uses.drop(staging)
                    shutil.rmtree(staging, ignore_errors=True)
                    return winner, False
                continue
            finally:
                remove_unused(old, staging.parent)
            with contextlib.suppress(OSError):
                seal(target.parent, files=False)
            self._uses.move(staging, target)
            return CacheEntry(target, manifest), True
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

    def release(self) -> None:
        """Use no entry any longer: from now on others may remove them."""
        self._uses.drop_all()

    def _take(self, path: Path) -> bool:
        try:
            return self._uses.take(path)
        except OSError as error:
            # What cannot be opened is looked at next, and its fault is told there.
            return error.errno not in GONE


def inspect_entry(path: Path, digest: str) -> tuple[CacheEntry | None, str]:
    """The entry in a folder if it is whole, else what is wrong with it. OSError if that cannot be
    said."""
    try:
        return verify_entry(path, digest), ""
    except ManifestError as error:
        return None, str(error)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_ctime_ns


def _entry_path(base: Path, digest: str) -> Path:
    return base / "entries" / digest[:2] / digest
