"""The cache of built kernels on disk.

An entry is a folder that is made complete in `staging` and then renamed, so what is under `entries`
is whole; locks only save double work. Look-ups create nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CacheError
from ..settings import DEFAULT_CACHE_MAX_BYTES, Settings
from .entries import Entries, inspect_entry
from .folders import GONE, LAYOUT, abandoned, children, folder_bytes, own_folders, private_name
from .growth import Removed, contents, excess, remove
from .locks import hold_lock, lock_place
from .manifest import LOG_NAME, CacheEntry, ManifestError, read_manifest, verify_manifest
from .roots import Roots, default_root
from .usage import is_used, remove_unused

_DIGEST = re.compile(r"[0-9a-f]{64}")
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
        self._roots = Roots(root, shared=shared)
        self._entries = Entries(self._roots)

    @staticmethod
    def open(settings: Settings) -> Cache:
        """The cache that the settings name; the same object for the same settings and process."""
        root = settings.cache_dir or default_root()
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
        for base in self._roots.bases():
            entry = self._entries.verified(base, digest, repair=repair)
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
        for path in self._roots.entry_folders():
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
        root = self._roots.writable().parent
        with hold_lock(root, digest, timeout, announce, stop or threading.Event()) as held:
            yield held

    def new_staging(self) -> Path:
        """A new private folder to build in. Those that dead processes left are removed."""
        staging = self._roots.writable() / "staging"
        for folder in abandoned(staging):
            remove_unused(folder, staging)
        return Path(tempfile.mkdtemp(prefix=private_name(), dir=staging))

    def publish(self, staging: Path, digest: str, *, replace: bool = False) -> CacheEntry:
        """Make a complete staging folder the entry of a digest, by one rename, and trim the cache.
        Where another was faster its entry is returned and ours dropped; with `replace` ours takes
        its place. OSError where the file system fails."""
        entry, is_ours = self._entries.publish(staging, digest, replace=replace)
        if is_ours and self.max_bytes:
            self.trim(self.max_bytes)
        return entry

    def keep_log(self, staging: Path, digest: str) -> Path:
        """Copy the log of a failed build to where it outlives its staging folder."""
        try:
            kept = self._roots.writable() / "failed" / f"{digest}.log"
            shutil.copyfile(staging / LOG_NAME, kept)
        except OSError:
            return staging / LOG_NAME
        return kept

    def verify(self, *, dry_run: bool) -> list[tuple[Path, str]]:
        """Every entry that is not what its manifest says, with the reason; moved to quarantine
        unless `dry_run`."""
        bad = []
        for path in self._roots.entry_folders():
            try:
                _, reason = inspect_entry(path, path.name)
            except OSError as error:
                if error.errno in GONE:
                    continue
                raise CacheError(f"{path} cannot be read: {error.strerror}") from error
            if reason:
                bad.append((path, reason))
                if not dry_run:
                    self._entries.quarantine(path, reason)
        return bad

    def trim(self, max_bytes: int, *, dry_run: bool = False) -> list[Removed]:
        """Remove what dead processes left in staging, then, while the cache has more than
        `max_bytes`, what is in quarantine, logs of failed builds, and entries that were not used
        for longest. Entries in use are spared. What was (or would be) removed, with its bytes."""
        removed: list[Removed] = []
        for base in self._roots.bases():
            removed += remove(base, excess(base, max_bytes), dry_run=dry_run)
        return removed

    def clear(self, dry_run: bool) -> list[Removed]:
        """Remove every entry that is not in use, quarantined entry, kept log and abandoned staging
        folder; what was (or, with `dry_run`, would be) removed, with its bytes."""
        removed: list[Removed] = []
        for base in self._roots.bases():
            removed += remove(base, contents(base), dry_run=dry_run)
        return removed

    def used(self) -> list[Path]:
        """The folders of the entries that some process uses now."""
        return [path for path in self._roots.entry_folders() if is_used(path)]

    def info(self) -> dict[str, Any]:
        """What there is, in numbers: path, bytes, max_bytes, entries, in_use, quarantined,
        failed_logs, staging, abandoned; the folder of the build locks; and in `problem` why the
        cache cannot be used, if so."""
        bases = self._roots.bases()
        problem = self.unreadable()
        try:
            self._roots.check_trusted(*own_folders(self.root))
        except (CacheError, OSError) as error:
            problem = problem or str(error)
        return {
            "path": self.root,
            "bytes": self.total_bytes(),
            "max_bytes": self.max_bytes,
            "entries": len(self._roots.entry_folders()),
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
        self._entries.release()

    def total_bytes(self) -> int:
        """Bytes of all files of this cache."""
        return sum(folder_bytes(base) for base in self._roots.bases())

    def use_temporary(self, reason: str) -> bool:
        """Build in a private temporary folder from now on, with a warning that tells the reason;
        False if that is so already."""
        return self._roots.use_temporary(reason)

    def unreadable(self) -> str:
        """Why the entries below the root, or the first of those that no look-up by meaning can
        see, cannot be looked at; empty if they can, or if there are none."""
        try:
            os.scandir(self.root / LAYOUT / "entries").close()
        except OSError as error:
            if error.errno not in GONE:
                return f"{self.root} cannot be read: {error.strerror}"
        for path in self._roots.entry_folders():
            problem = _manifest_problem(path)
            if problem:
                return f"the cache entry {path} is not usable: {problem}"
        return ""


def _manifest_problem(path: Path) -> str:
    try:
        verify_manifest(path, path.name)
    except (ManifestError, OSError) as error:
        return str(error)
    return ""


def _entry_path(base: Path, digest: str) -> Path:
    return base / "entries" / digest[:2] / digest
