"""Whose a cache is: a library from it runs in this process, so who else could change it matters."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import CacheError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH
_WAYS_OUT = (
    "set RWKV_JIT_CACHE_DIR to a folder of yours, or, if you trust all who can write there, "
    "RWKV_JIT_ALLOW_SHARED_CACHE=1"
)


def check_trusted(*folders: Path) -> None:
    """Raise CacheError unless each folder is this user's (or root's) and only its owner can write
    it. OSError if one is missing."""
    for folder in folders:
        check_status(folder, folder.stat())


def check_status(path: Path, status: os.stat_result) -> None:
    """The same for one file or folder whose status is known."""
    if status.st_uid not in (0, os.geteuid()):
        raise CacheError(
            f"{path} belongs to user {status.st_uid}, who could change what runs here; {_WAYS_OUT}"
        )
    if status.st_mode & _OTHERS_WRITE:
        raise CacheError(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}), who "
            f"could change what runs here; correct it with chmod go-w {path}, or {_WAYS_OUT}"
        )


def check_parents(root: Path) -> None:
    """Raise CacheError where others could put a cache of theirs in the place of `root`: its parent
    can be written by them, or a folder further up that they can get to. Sticky folders such as
    /tmp are fine."""
    closed = False
    parents = [folder for folder in reversed(root.resolve().parents) if folder.is_dir()]
    for folder in parents:
        mode = folder.stat().st_mode
        near = folder == parents[-1]
        if mode & _OTHERS_WRITE and not mode & stat.S_ISVTX and (near or not closed):
            raise CacheError(
                f"{folder}, above the cache {root}, can be written by others (mode "
                f"{stat.S_IMODE(mode):04o}), who could change what runs here; correct it with "
                f"chmod go-w {folder}, or {_WAYS_OUT}"
            )
        closed = closed or not mode & _OTHERS_ENTER
