"""Folders of the cache: whose they are, who uses them, and making their files last."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

from ..errors import CacheError

LAYOUT = "v1"
_FOLDERS = ("entries", "staging", "quarantine", "locks", "failed")
_STAGING_SECONDS = 24 * 3600
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_folders(root: Path) -> Path:
    """Make the folders of a cache; the one of this layout. OSError where one cannot be made or
    written."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    base = root / LAYOUT
    for folder in (base, *(base / name for name in _FOLDERS)):
        folder.mkdir(mode=0o700, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    check_trusted(root, base, *(base / name for name in _FOLDERS))
    return base


def check_trusted(*folders: Path) -> None:
    """Raise CacheError unless each folder is this user's (or root's) and only its owner can write
    it: a library from it will run in this process. OSError if one is missing."""
    for folder in folders:
        status = folder.stat()
        if status.st_uid not in (0, os.geteuid()):
            raise CacheError(
                f"{folder} belongs to user {status.st_uid}, who could change what runs here; set "
                "RWKV_JIT_CACHE_DIR to a folder of yours"
            )
        if status.st_mode & _OTHERS_WRITE:
            raise CacheError(
                f"{folder} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}), who "
                f"could change what runs here; correct it with chmod go-w {folder}, or set "
                "RWKV_JIT_CACHE_DIR to a folder of yours"
            )


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
    for file in [path, *path.rglob("*")]:
        with contextlib.suppress(OSError):
            status = file.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def has_flock(folder: Path) -> bool:
    """Whether the file system of a folder has locks that the kernel drops with their process."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@functools.cache
def process_scope() -> str:
    """A short name for where process ids are unique: this boot and this process namespace, since
    containers may share a cache and a host name."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def write_holder(path: Path) -> None:
    """Say in a file beside a lock that this process holds it since now."""
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
    with contextlib.suppress(OSError):
        path.write_text(text, encoding="utf-8")


def read_holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        return f"process {data['pid']} on {data['host']} since {data['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def temporary_root() -> Path:
    """A private temporary folder that this process removes when it ends."""
    root = Path(tempfile.mkdtemp(prefix="rwkv_jit."))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(root, ignore_errors=True)

    atexit.register(remove)
    return root


def abandoned(staging: Path) -> list[Path]:
    """Staging folders whose process is dead, or that are too old to be in use."""
    found = []
    scope = process_scope()
    with contextlib.suppress(OSError):
        for folder in staging.iterdir():
            owner, _, rest = folder.name.partition(".")
            pid = rest.partition(".")[0]
            dead = owner == scope and pid.isdecimal() and not _is_alive(int(pid))
            with contextlib.suppress(OSError):
                if dead or time.time() - folder.lstat().st_mtime > _STAGING_SECONDS:
                    found.append(folder)
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
