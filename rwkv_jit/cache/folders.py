"""Folders of the cache: making them and their files last, and knowing which are left over."""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

LAYOUT = "v1"
# What a network file system answers for a file that another host has just removed or replaced.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_FOLDERS = ("entries", "staging", "quarantine", "failed")
_STAGING_SECONDS = 24 * 3600


def make_folders(root: Path) -> Path:
    """Make the folders of a cache; the one of this layout. OSError where one cannot be made or
    written."""
    base = root / LAYOUT
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in (base, *(base / name for name in _FOLDERS)):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return base


def own_folders(root: Path) -> list[Path]:
    """The folders of a cache that exist, from the root down, without those of single entries."""
    base = root / LAYOUT
    folders = (root, base, *(base / name for name in _FOLDERS))
    return [folder for folder in folders if folder.exists()]


def seal(folder: Path, *, files: bool = True) -> None:
    """Make a folder and its files private, and have them reach the disk."""
    if files:
        folder.chmod(0o700)
        for path in folder.iterdir():
            path.chmod(0o600)
            _sync(path)
    _sync(folder)


def folder_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    with contextlib.suppress(OSError):
        for file in [path, *path.rglob("*")]:
            with contextlib.suppress(OSError):
                status = file.lstat()
                total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def children(folder: Path, pattern: str = "*") -> list[Path]:
    """What lies in a folder, sorted; nothing where it is missing or cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


@functools.cache
def process_scope() -> str:
    """A short name for where process ids are unique: this boot and this process namespace, since
    containers may share a cache and a host name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def temporary_root() -> Path:
    """A private temporary folder that this process removes when it ends."""
    root = Path(tempfile.mkdtemp(prefix="rwkv_jit."))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(root, ignore_errors=True)

    atexit.register(remove)
    return root


def private_name() -> str:
    """The beginning of a name that says whose a folder in staging is."""
    return f"{process_scope()}.{os.getpid()}."


def abandoned(staging: Path) -> list[Path]:
    """Staging folders whose process is dead, or that are too old to be in use."""
    found = []
    scope = process_scope()
    for folder in children(staging):
        owner, _, rest = folder.name.partition(".")
        pid = rest.partition(".")[0]
        dead = owner == scope and pid.isdecimal() and not is_alive(int(pid))
        with contextlib.suppress(OSError):
            if dead or time.time() - folder.lstat().st_mtime > _STAGING_SECONDS:
                found.append(folder)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process of this scope runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
