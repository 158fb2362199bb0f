"""The folders of one cache: its root, and a temporary one where that cannot be written. The only
user of platformdirs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import warnings
from pathlib import Path

import platformdirs

from ..errors import CacheError
from .folders import GONE, LAYOUT, children, make_folders, own_folders, temporary_root
from .trust import check_parents, check_trusted

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM)
_UNWRITABLE = (*DENIED, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, *NO_SPACE)
# Nothing can be made there, whoever tries.
_NOWHERE = Path(os.devnull, "no-home-directory", "rwkv_jit")


class Roots:
    """Where a cache is looked up, and where it is written.

    shared: use the root although others own it or can write to it.
    """

    def __init__(self, root: Path, *, shared: bool) -> None:
        self._root = root
        self._shared = shared
        self._fallback: Path | None = None
        self._guard = threading.Lock()

    def bases(self) -> list[Path]:
        """The folders of this layout in which entries are looked up."""
        roots = [self._root] if self._fallback is None else [self._root, self._fallback]
        return [root / LAYOUT for root in roots]

    def entry_folders(self) -> list[Path]:
        """The folders of all entries."""
        return [path for base in self.bases() for path in children(base / "entries", "??/*")]

    def writable(self) -> Path:
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
                    raise CacheError(f"{self._root} cannot be used: {error.strerror}") from error
                if self._root == _NOWHERE:
                    return self._fall_back("there is no home directory for a cache")
                return self._fall_back(
                    f"the cache {self._root} cannot be written ({error.strerror})"
                )

    def use_temporary(self, reason: str) -> bool:
        """Write to a private temporary folder from now on, with a warning that tells the reason;
        False if that is so already."""
        with self._guard:
            if self._fallback is not None:
                return False
            self._fall_back(reason)
            return True

    def check_trusted(self, *folders: Path) -> None:
        """Raise CacheError unless only this user can put or change something there."""
        if not self._shared:
            check_parents(self._root)
            check_trusted(*folders)

    def _make_folders(self) -> Path:
        self.check_trusted(*own_folders(self._root))
        return make_folders(self._root)

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


def default_root() -> Path:
    """The user's cache directory. A user without a home has none."""
    # Without a home platformdirs gives a relative path, or raises, depending on its version.
    with contextlib.suppress(RuntimeError):
        root = platformdirs.user_cache_path("rwkv_jit")
        if root.is_absolute():
            return root
    return _NOWHERE
