"""Making bundles: entries of a cache become a folder that can be moved and made read-only."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import __version__
from ..cache import LIBRARY_NAME, CacheEntry, ManifestError, hash_file, open_regular
from ..errors import BundleError
from .index import (
    ENTRIES_NAME,
    INDEX_NAME,
    SIGNATURE_NAME,
    BundleEntry,
    FileRecord,
    Index,
    make_entry,
    make_index,
)
from .read import Bundle, open_bundle, verify_bundle
from .sign import sign_index

# A bundle is read by any user, written by none but its owner.
_FOLDER_MODE = 0o755
_FILE_MODE = 0o644


def write_bundle(
    entries: Sequence[CacheEntry],
    out: Path,
    *,
    sign_with: Path | None = None,
    replace: bool = False,
) -> Bundle:
    """Copy cache entries into a new bundle at `out`, which is there whole or not at all.

    sign_with: file of the private key to sign with. replace: take the place of a bundle that is
    there. Equal kernels give equal bundles, byte for byte. Raises BundleError.
    """
    made: list[tuple[CacheEntry, BundleEntry]] = [(entry, _describe(entry)) for entry in entries]
    index = make_index([entry for _, entry in made], __version__)
    kept = {entry.digest for entry in index.entries}

    def fill(folder: Path) -> None:
        _fill(folder, index, [(old, new) for old, new in made if new.digest in kept], sign_with)

    return publish(fill, out, replace=replace)


def publish(fill: Callable[[Path], None], out: Path, *, replace: bool) -> Bundle:
    """Have a bundle made in a folder beside `out`, check it, and rename it to `out`."""
    out = out.absolute()
    try:
        _check_target(out, replace)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _beside(out) as folder:
            fill(folder)
            made = open_bundle(folder)
            problems = verify_bundle(made)
            if problems:
                raise BundleError(problems[0])
            if out.exists():
                # Two renames: for a moment nothing is there, but never a part of a bundle.
                out.rename(folder.with_name(f"{folder.name}.old"))
            folder.rename(out)
    except OSError as error:
        raise BundleError(f"the bundle {out} cannot be written: {error}") from error
    finally:
        for old in out.parent.glob(f".{out.name}.{os.getpid()}.*.old"):
            shutil.rmtree(old, ignore_errors=True)
    return open_bundle(out, guarded=False)


def sign_bundle(bundle: Bundle, key: Path) -> None:
    """Put a signature into a bundle, in the place of one that it has. Raises BundleError."""
    path = bundle.root / SIGNATURE_NAME
    signature = sign_index(bundle.index.to_json().encode(), key)
    temporary = path.with_name(f".{SIGNATURE_NAME}.{os.getpid()}")
    try:
        _write(temporary, signature)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BundleError(f"{path} cannot be written: {error.strerror}") from error


def make_folder(path: Path) -> None:
    """Make a folder of a bundle, which others can read whatever the umask."""
    path.mkdir()
    path.chmod(_FOLDER_MODE)


def _describe(entry: CacheEntry) -> BundleEntry:
    try:
        files = {
            path.name: FileRecord(path.stat().st_size, hash_file(path))
            for path in (entry.library, entry.source)
        }
    except OSError as error:
        raise BundleError(f"{entry.path} cannot be read: {error.strerror}") from error
    manifest = entry.manifest
    if files[LIBRARY_NAME].sha256 != manifest.sha256:
        raise BundleError(f"{entry.library} is not the file that was built (SHA-256 differs)")
    return make_entry(manifest.fields, files, manifest.resources)


def _fill(
    folder: Path,
    index: Index,
    made: Sequence[tuple[CacheEntry, BundleEntry]],
    sign_with: Path | None,
) -> None:
    text = index.to_json().encode()
    make_folder(folder / ENTRIES_NAME)
    for old, new in made:
        place = folder / ENTRIES_NAME / new.name
        make_folder(place)
        for name in new.files:
            _write(place / name, _read(old.path / name))
    if sign_with is not None:
        _write(folder / SIGNATURE_NAME, sign_index(text, sign_with))
    # Last: without it nothing is a bundle.
    _write(folder / INDEX_NAME, text)


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except ManifestError as error:
        raise BundleError(f"{path.parent}: {error}") from error


def _write(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, _FILE_MODE), "wb") as file:
        os.fchmod(file.fileno(), _FILE_MODE)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _check_target(out: Path, replace: bool) -> None:
    if out.is_symlink() or out.is_file():
        raise BundleError(f"{out} is in the way; a bundle is a folder of its own")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / INDEX_NAME).is_file():
        raise BundleError(f"{out} holds something that is not a bundle; name another folder")
    if not replace:
        raise BundleError(f"{out} is a bundle already; replace it with --force, or remove it")


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, removed if it is still there in the end."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=out.parent))
    folder.chmod(_FOLDER_MODE)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
