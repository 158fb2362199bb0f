"""Reading bundles: open one, check a kernel of it before it is loaded, or check all of it.

Nothing is written, no link is followed below the bundle's folder, and nothing of it runs here.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..cache import CacheEntry, ManifestError, open_regular
from ..errors import BundleError
from .index import (
    ENTRIES_NAME,
    INDEX_NAME,
    MAX_INDEX_BYTES,
    SIGNATURE_NAME,
    BundleEntry,
    Index,
    parse_index,
)
from .sign import MAX_SIGNATURE_BYTES, check_signature

_READ_BYTES = 1 << 20
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle that was opened.

    root: its folder. index: what it holds. signed_by: the public key that its signature was checked
    with, if any. guarded: whether owners and modes are checked, too.
    """

    root: Path
    index: Index
    signed_by: Path | None
    guarded: bool

    def folder(self, entry: BundleEntry) -> Path:
        """Where an entry's files lie."""
        return self.root / ENTRIES_NAME / entry.name


def open_bundle(root: Path, *, keys: Sequence[Path] = (), guarded: bool = True) -> Bundle:
    """Open the bundle in a folder and read its index, but no kernel.

    keys: public keys; where there are any, the bundle must be signed with one of them. guarded:
    refuse it where somebody other than this user and root owns it or can write to it.

    Raises BundleError, with the folder and the reason.
    """
    if root.is_file():
        raise BundleError(
            f"{root} is a file, and a bundle is a folder; unpack it with: "
            f"rwkv-jit bundle install {root}"
        )
    try:
        if guarded:
            _check_owner(root, root / INDEX_NAME)
        text = read_limited(root / INDEX_NAME, MAX_INDEX_BYTES)
        index = parse_index(text)
        signed_by = check_signature(text, _signature(root), keys) if keys else None
    except BundleError as error:
        raise BundleError(f"the bundle {root} is refused: {error}") from error
    except (OSError, ManifestError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BundleError(f"{root} is not a bundle that can be read: {reason}") from error
    return Bundle(root=root, index=index, signed_by=signed_by, guarded=guarded)


def check_entry(bundle: Bundle, entry: BundleEntry) -> CacheEntry:
    """A kernel of a bundle, after comparing its files with the index. Raises BundleError if they
    differ."""
    folder = bundle.folder(entry)
    try:
        # The last component of a path is never followed; these are the ones between.
        for path in (folder.parent, folder):
            if not stat.S_ISDIR(path.lstat().st_mode):
                raise BundleError(f"{path} is not a folder")
        if bundle.guarded:
            _check_owner(folder.parent, folder, *(folder / name for name in entry.files))
        for name, record in entry.files.items():
            with open_regular(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                digest = _sha256(file) if size == record.size else ""
            if size != record.size:
                raise BundleError(f"{name} has {size} bytes instead of {record.size}")
            if digest != record.sha256:
                raise BundleError(f"{name} is not the file that was bundled (SHA-256 differs)")
    except (OSError, ManifestError, BundleError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BundleError(f"{entry.identity} in the bundle {bundle.root}: {reason}") from error
    return entry.as_cache_entry(folder)


def verify_bundle(bundle: Bundle) -> list[str]:
    """What is wrong with the files of a bundle, in sentences: each kernel is checked, and there
    must be nothing that the index does not name."""
    problems = [text for entry in bundle.index.entries if (text := _problem(bundle, entry))]
    expected = {INDEX_NAME, SIGNATURE_NAME, ENTRIES_NAME}
    for entry in bundle.index.entries:
        expected.add(f"{ENTRIES_NAME}/{entry.name}")
        expected |= {f"{ENTRIES_NAME}/{entry.name}/{name}" for name in entry.files}
    for folder, folders, files in os.walk(bundle.root):
        for name in (*folders, *files):
            path = (Path(folder) / name).relative_to(bundle.root).as_posix()
            if path not in expected:
                problems.append(f"{path} is in the bundle {bundle.root}, but not in its index")
    return problems


def _problem(bundle: Bundle, entry: BundleEntry) -> str:
    try:
        check_entry(bundle, entry)
    except BundleError as error:
        return str(error)
    return ""


def read_limited(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises BundleError if it is larger."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BundleError(f"{path.name} has more than {limit} bytes")
    return data


def _signature(root: Path) -> bytes:
    try:
        return read_limited(root / SIGNATURE_NAME, MAX_SIGNATURE_BYTES)
    except ManifestError as error:
        raise BundleError(
            "it is not signed, and a signature is asked for (RWKV_JIT_BUNDLE_KEYS, or --key)"
        ) from error


def _sha256(file: IO[bytes]) -> str:
    hasher = hashlib.sha256()
    while chunk := file.read(_READ_BYTES):
        hasher.update(chunk)
    return hasher.hexdigest()


def _check_owner(*paths: Path) -> None:
    for path in paths:
        status = path.stat()
        if status.st_uid not in (0, os.geteuid()):
            problem = f"{path} belongs to user {status.st_uid}"
        elif status.st_mode & _OTHERS_WRITE:
            problem = f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
        else:
            continue
        raise BundleError(
            f"{problem}, who could change what runs here; give it to root or to you and "
            "chmod go-w it, or, if you trust all who can write there, set "
            "RWKV_JIT_ALLOW_SHARED_CACHE=1"
        )
