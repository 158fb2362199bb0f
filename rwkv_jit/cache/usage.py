"""Entries in use: a process holds a shared flock on the manifest of each entry that it uses, so
that trimming and clearing leave it alone. The time of the last use is that of the entry's folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from .folders import private_name
from .manifest import MANIFEST_NAME

# Where there is no flock, an entry used this recently counts as in use.
_RECENT_SECONDS = 24 * 3600
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_TRIES = 20
_TRY_SECONDS = 0.01


class Uses:
    """The entries that this process uses, from `take` to `drop` or the end of the process."""

    def __init__(self) -> None:
        self._held: dict[Path, int] = {}
        self._guard = threading.Lock()
        weakref.finalize(self, _close_all, self._held)

    def take(self, entry: Path) -> bool:
        """Use an entry from now on; whether it is there. OSError if that cannot be said."""
        for _ in range(_TRIES):
            try:
                descriptor = os.open(
                    entry / MANIFEST_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                )
            except FileNotFoundError:
                return False
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                held = True
            except OSError as error:
                held = error.errno not in _HELD
            # A remover may have been faster: then what is locked is no longer the entry.
            if held and _is_same(descriptor, entry / MANIFEST_NAME):
                self._keep(entry, descriptor)
                with contextlib.suppress(OSError):
                    os.utime(entry)
                return True
            os.close(descriptor)
            time.sleep(0 if held else _TRY_SECONDS)
        return True

    def move(self, entry: Path, target: Path) -> None:
        """Go on using an entry whose folder was renamed."""
        with self._guard:
            descriptor = self._held.pop(entry, None)
        if descriptor is not None:
            self._keep(target, descriptor)

    def drop(self, entry: Path) -> None:
        """Use an entry no longer."""
        with self._guard:
            descriptor = self._held.pop(entry, None)
        if descriptor is not None:
            os.close(descriptor)

    def drop_all(self) -> None:
        """Use no entry any longer."""
        for entry in list(self._held):
            self.drop(entry)

    def _keep(self, entry: Path, descriptor: int) -> None:
        with self._guard:
            before = self._held.pop(entry, None)
            self._held[entry] = descriptor
        if before is not None:
            os.close(before)


def is_used(entry: Path) -> bool:
    """Whether a process uses an entry, this one included."""
    with _unused(entry) as free:
        return not free


def last_use(entry: Path) -> float:
    """When an entry was used last; 0 if it is gone."""
    try:
        return entry.lstat().st_mtime
    except OSError:
        return 0.0


def remove_unused(path: Path, staging: Path) -> bool:
    """Remove an entry's folder, unless a process uses it, or any other file or folder; whether it
    is gone. It goes by one rename, so that nobody finds a part of it."""
    with _unused(path) as free:
        if not free:
            return False
        if path.is_symlink() or not path.is_dir():
            with contextlib.suppress(OSError):
                path.unlink()
            return not path.is_symlink() and not path.exists()
        try:
            grave = Path(tempfile.mkdtemp(prefix=private_name(), dir=staging))
            path.rename(grave)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            return not path.exists()
        shutil.rmtree(grave, ignore_errors=True)
    return True


@contextlib.contextmanager
def _unused(entry: Path) -> Iterator[bool]:
    """Keep others from beginning to use an entry; whether nobody does."""
    descriptor = None
    for access in (os.O_RDWR, os.O_RDONLY):
        # A network file system gives exclusive locks to writers alone.
        with contextlib.suppress(OSError):
            flags = access | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(entry / MANIFEST_NAME, flags)
            break
    if descriptor is None:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            recent = time.time() - last_use(entry) < _RECENT_SECONDS
            free = error.errno not in _HELD and not recent
        yield free
    finally:
        os.close(descriptor)


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _close_all(held: dict[Path, int]) -> None:
    for descriptor in held.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    held.clear()
