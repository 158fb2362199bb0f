"""Manifests: what a cache entry says about itself, and whether that is true."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

MANIFEST_SCHEMA = 1
LIBRARY_NAME = "kernel.so"
MANIFEST_NAME = "manifest.json"
LOG_NAME = "build.log"
_READ_BYTES = 1 << 20
_MANIFEST_BYTES = 16 << 20
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "schema": int,
    "digest": str,
    "meaning": str,
    "identity": str,
    "fields": dict,
    "size": int,
    "sha256": str,
    "build_seconds": (int, float),
    "created": str,
    "command": str,
    "resources": dict,
}


class ManifestError(ValueError):
    """An entry that is not what its manifest says, or has none that can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """identity: what the library says it is. fields: the key's. size, sha256: of the library.
    created: UTC, ISO 8601. command: that of the compiler. resources: for each kernel, by name,
    registers, spill_stores, spill_loads, shared and stack (bytes but for registers), as the
    compiler reported them."""

    schema: int
    digest: str
    meaning: str
    identity: str
    fields: Mapping[str, str]
    size: int
    sha256: str
    build_seconds: float
    created: str
    command: str
    resources: Mapping[str, Mapping[str, int]]

    def to_json(self) -> str:
        """The text of a manifest file."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(data, indent=1, default=dict) + "\n"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One library in a cache, with its manifest."""

    path: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The shared object."""
        return self.path / LIBRARY_NAME

    @property
    def log(self) -> Path:
        """Everything that the compilers said."""
        return self.path / LOG_NAME

    @property
    def source(self) -> Path:
        """The source that was built."""
        cuda = self.path / "source.cu"
        return cuda if cuda.exists() else self.path / "source.cpp"


def read_manifest(entry: Path) -> Manifest:
    """The manifest of an entry's folder. Raises ManifestError unless it is a complete one of a
    known schema, and OSError if it cannot be read."""
    with open_regular(entry / MANIFEST_NAME) as file:
        text = file.read(_MANIFEST_BYTES + 1)
    if len(text) > _MANIFEST_BYTES:
        raise ManifestError(f"{MANIFEST_NAME} has more than {_MANIFEST_BYTES} bytes")
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{MANIFEST_NAME} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != MANIFEST_SCHEMA:
        raise ManifestError(f"{MANIFEST_NAME} has no known schema")
    for name, kind in _TYPES.items():
        if not isinstance(data.get(name), kind):
            raise ManifestError(f"{MANIFEST_NAME} has no valid {name!r}")
    if not _are(str, data["fields"]):
        raise ManifestError(f"{MANIFEST_NAME} has no valid 'fields'")
    kernels = data["resources"].values()
    if not all(isinstance(kernel, dict) and _are(int, kernel) for kernel in kernels):
        raise ManifestError(f"{MANIFEST_NAME} has no valid 'resources'")
    return Manifest(**{field.name: data[field.name] for field in fields(Manifest)})


def verify_entry(entry: Path, digest: str) -> CacheEntry:
    """The entry in a folder, after comparing the library with the manifest, and the manifest with
    the digest. Raises ManifestError if they differ, and OSError if they cannot be read."""
    manifest = verify_manifest(entry, digest)
    with open_regular(entry / LIBRARY_NAME) as file:
        size = os.fstat(file.fileno()).st_size
        if size != manifest.size:
            raise ManifestError(f"{LIBRARY_NAME} has {size} bytes instead of {manifest.size}")
        if _hash(file) != manifest.sha256:
            raise ManifestError(f"{LIBRARY_NAME} is not the file that was built (SHA-256 differs)")
    return CacheEntry(entry, manifest)


def verify_manifest(entry: Path, digest: str) -> Manifest:
    """The manifest of an entry's folder, after comparing it with the digest, but not the library
    with it. Raises ManifestError if they differ, and OSError if it cannot be read."""
    if not stat.S_ISDIR(entry.lstat().st_mode):
        raise ManifestError("it is not a folder")
    manifest = read_manifest(entry)
    if manifest.digest != digest:
        raise ManifestError(f"{MANIFEST_NAME} is that of {manifest.digest[:16]}")
    if digest_fields(manifest.fields) != digest:
        raise ManifestError(f"{MANIFEST_NAME} has fields that are not those of its digest")
    return manifest


def digest_fields(fields: Mapping[str, str]) -> str:
    """SHA-256 over names and values in order, each preceded by its length, so that no two
    different lists of fields read the same."""
    hasher = hashlib.sha256()
    for part in (text for item in fields.items() for text in item):
        data = part.encode()
        hasher.update(f"{len(data)}:".encode())
        hasher.update(data)
    return hasher.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return _hash(file)


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading that must be a regular one and no link. Raises ManifestError if it
    is missing or something else."""
    try:
        # Nonblocking: opening a pipe that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.parent.is_dir():
            raise ManifestError(f"{path.name} is missing") from error
        if path.is_symlink():
            raise ManifestError(f"{path.name} is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ManifestError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def _hash(file: IO[bytes]) -> str:
    hasher = hashlib.sha256()
    while chunk := file.read(_READ_BYTES):
        hasher.update(chunk)
    return hasher.hexdigest()


def _are(kind: type, values: Mapping[str, object]) -> bool:
    return all(isinstance(value, kind) for value in values.values())
