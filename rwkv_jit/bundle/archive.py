"""Bundles as one file: a tar archive that is the same for the same bundle, and taking one apart.

An archive may come from anywhere, so nothing of it is trusted: only regular files of known names
and bounded sizes are taken, and the bundle is checked before it gets its name.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from pathlib import Path
from typing import IO

from ..errors import BundleError
from .index import (
    ENTRIES_NAME,
    FILE_NAMES,
    INDEX_NAME,
    MAX_FILE_BYTES,
    MAX_INDEX_BYTES,
    SIGNATURE_NAME,
)
from .make import make_folder, publish
from .read import Bundle, open_bundle, verify_bundle
from .sign import MAX_SIGNATURE_BYTES

MAX_MEMBERS = 100_000
MAX_TOTAL_BYTES = 16 << 30
_FOLDER = re.compile(rf"{ENTRIES_NAME}(/[a-z0-9_]+\.[a-z]+\.[0-9a-f]{{16}})?")
_FILE = re.compile(
    rf"{ENTRIES_NAME}/[a-z0-9_]+\.[a-z]+\.[0-9a-f]{{16}}/({'|'.join(map(re.escape, FILE_NAMES))})"
)
_SPECIAL = {INDEX_NAME: MAX_INDEX_BYTES, SIGNATURE_NAME: MAX_SIGNATURE_BYTES}
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


def write_archive(bundle: Bundle, path: Path) -> None:
    """Write a bundle as a tar archive: sorted names, no times, no owners. Raises BundleError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name in _names(bundle):
                archive.addfile(*_member(bundle.root, name))
        temporary.replace(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"the archive {path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def unpack_archive(archive: Path, out: Path, *, keys: tuple[Path, ...], replace: bool) -> Bundle:
    """Make the bundle of an archive at `out`. keys: as for `open_bundle`. Raises BundleError for an
    archive that holds anything but a bundle."""
    if not archive.is_file():
        raise BundleError(f"{archive} is not there, or is not a file")

    def fill(folder: Path) -> None:
        try:
            # Not compressed: what is read is as large as the file is.
            with archive.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as members:
                _unpack(members, folder)
        except tarfile.TarError as error:
            raise BundleError(f"{archive} is not a tar archive of a bundle: {error}") from error
        open_bundle(folder, keys=keys)

    return publish(fill, out, replace=replace)


def copy_bundle(bundle: Bundle, out: Path, *, replace: bool) -> Bundle:
    """Copy a bundle to `out`, checked before it gets its name. Raises BundleError."""
    problems = verify_bundle(bundle)
    if problems:
        raise BundleError(problems[0])

    def fill(folder: Path) -> None:
        for name in _names(bundle):
            info, data = _member(bundle.root, name)
            _take(folder, info, data)

    return publish(fill, out, replace=replace)


def bundle_files(bundle: Bundle) -> list[str]:
    """The names of a bundle's files, relative and sorted, its signature included."""
    names = [INDEX_NAME]
    if (bundle.root / SIGNATURE_NAME).is_file():
        names.append(SIGNATURE_NAME)
    for entry in bundle.index.entries:
        names += [f"{ENTRIES_NAME}/{entry.name}/{name}" for name in entry.files]
    return sorted(names)


def _names(bundle: Bundle) -> list[str]:
    """Its files and folders, each folder before what is in it."""
    folders = [f"{ENTRIES_NAME}/{entry.name}" for entry in bundle.index.entries]
    return sorted([ENTRIES_NAME, *folders, *bundle_files(bundle)])


def _member(root: Path, name: str) -> tuple[tarfile.TarInfo, io.BytesIO | None]:
    info = tarfile.TarInfo(name)
    path = root / name
    if path.is_dir():
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        return info, None
    data = path.read_bytes()
    info.mode, info.size = 0o644, len(data)
    return info, io.BytesIO(data)


def _unpack(archive: tarfile.TarFile, folder: Path) -> None:
    total = 0
    for count, member in enumerate(archive):
        if count >= MAX_MEMBERS:
            raise BundleError(f"the archive has more than {MAX_MEMBERS} members")
        total += member.size
        if total > MAX_TOTAL_BYTES:
            raise BundleError(f"the archive unpacks to more than {MAX_TOTAL_BYTES} bytes")
        data = archive.extractfile(member) if member.type in _REGULAR else None
        _take(folder, member, data)


def _take(folder: Path, member: tarfile.TarInfo, data: IO[bytes] | None) -> None:
    """Make one file or folder of an archive."""
    name = member.name
    if member.type == tarfile.DIRTYPE and _FOLDER.fullmatch(name):
        path = folder / name
        # An archive that others made may have no folder before its files, or one twice.
        if not path.is_dir():
            _make_folders(folder, path)
        return
    limit = MAX_FILE_BYTES if _FILE.fullmatch(name) else _SPECIAL.get(name)
    if limit is None or member.type not in _REGULAR or data is None:
        raise BundleError(f"the archive holds {name!r}, which is no part of a bundle")
    if member.size > limit:
        raise BundleError(f"{name} in the archive has more than {limit} bytes")
    path = folder / name
    _make_folders(folder, path.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o644), "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        shutil.copyfileobj(data, file)


def _make_folders(top: Path, path: Path) -> None:
    if path != top and not path.is_dir():
        _make_folders(top, path.parent)
        make_folder(path)
