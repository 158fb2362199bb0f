"""Build locks: one process builds a key while others wait. The only user of filelock.

They save double work and nothing else: publishing is safe without them. They are flocks, which
the kernel drops with their holder, in a folder of the user on this machine's own disk, since a
cache may lie on a network file system where locks fail, hang or outlive a host.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import is_alive, process_scope

if TYPE_CHECKING:
    import filelock

_FIRST_ANNOUNCEMENT_SECONDS = 1.0
_ANNOUNCE_SECONDS = 5.0
_POLL_SECONDS = 0.1
# A new holder writes its name a moment after it got the lock.
_DEAD_HOLDER_SECONDS = 1.0


def lock_place(root: Path) -> Path:
    """Where the locks of the cache at `root` lie: below the system's temporary folder."""
    home = Path(tempfile.gettempdir()) / f"rwkv_jit-{os.geteuid()}"
    return home / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


def lock_folder(root: Path) -> Path:
    """The same, made if need be and private to this user. OSError where it cannot be."""
    folder = lock_place(root)
    home = folder.parent
    home.mkdir(mode=0o700, exist_ok=True)
    status = home.lstat()
    # Anyone can make a folder of this name in /tmp.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise PermissionError(errno.EACCES, "is not a private folder of this user", str(home))
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def hold_lock(
    root: Path,
    digest: str,
    timeout: float,
    announce: Callable[[float, str], None],
    stop: threading.Event,
) -> Iterator[bool]:
    """Hold the build lock of a digest in the cache at `root`; the value says whether it is held.

    Waits for at most `timeout` seconds, or until `stop` is set, or until the holder is found dead
    (a forked child of it may still have the lock), and then, or where there are no locks, goes on
    without. While it waits it calls `announce` every few seconds with the seconds waited and a
    description of the holder.
    """
    # Only a build needs it, and importing it takes longer than finding a kernel.
    import filelock  # noqa: PLC0415

    lock: filelock.BaseFileLock | None = None
    holder = Path()
    # Without flock filelock may turn to a lock that lives by existing, which would outlive a
    # killed process.
    with contextlib.suppress(OSError, NotImplementedError):
        folder = lock_folder(root)
        holder = folder / f"{digest}.json"
        if has_flock(folder):
            path = folder / f"{digest}.lock"
            candidate = filelock.UnixFileLock(path, mode=0o600, thread_local=False)
            if _acquire(candidate, holder, timeout, announce, stop):
                lock = candidate
    try:
        if lock is not None:
            _write_holder(holder)
        yield lock is not None
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                holder.unlink()
            with contextlib.suppress(OSError):
                lock.release()


def has_flock(folder: Path) -> bool:
    """Whether the file system of a folder has locks that the kernel drops with their process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _acquire(
    lock: filelock.BaseFileLock,
    holder: Path,
    timeout: float,
    announce: Callable[[float, str], None],
    stop: threading.Event,
) -> bool:
    started = time.monotonic()
    announcement = _FIRST_ANNOUNCEMENT_SECONDS
    dead_since: float | None = None
    while True:
        with contextlib.suppress(TimeoutError):
            lock.acquire(timeout=0)
            return True
        now = time.monotonic()
        waited = now - started
        if waited >= announcement:
            announce(waited, _describe(_read_holder(holder)))
            announcement = waited + _ANNOUNCE_SECONDS
        if not _is_dead(_read_holder(holder)):
            dead_since = None
        elif dead_since is None:
            dead_since = now
        elif now - dead_since >= _DEAD_HOLDER_SECONDS:
            return False
        if waited >= timeout or stop.wait(min(_POLL_SECONDS, timeout - waited)):
            return False


def _write_holder(path: Path) -> None:
    data = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "scope": process_scope(),
        "since": time.time(),
    }
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(data), encoding="utf-8")


def _read_holder(path: Path) -> dict[str, Any]:
    """What the holder wrote; empty if that is not there or no sense."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    kinds = {"pid": int, "host": str, "scope": str, "since": float}
    good = isinstance(data, dict) and all(isinstance(data.get(k), t) for k, t in kinds.items())
    return data if good else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    age = max(0.0, time.time() - holder["since"])
    return f"process {holder['pid']} on {holder['host']}, at it for {age:.0f} s"


def _is_dead(holder: dict[str, Any]) -> bool:
    return bool(holder) and holder["scope"] == process_scope() and not is_alive(holder["pid"])
