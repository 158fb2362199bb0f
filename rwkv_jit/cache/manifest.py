"""Manifests: what a cache entry says about itself, and whether that is true."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

MANIFEST_SCHEMA = 1
LIBRARY_NAME = "kernel.so"
MANIFEST_NAME = "manifest.json"
LOG_NAME = "build.log"
_READ_BYTES = 1 << 20
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
    path = entry / MANIFEST_NAME
    _require_regular(path)
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(f"{MANIFEST_NAME} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != MANIFEST_SCHEMA:
        raise ManifestError(f"{MANIFEST_NAME} has no known schema")
    for name, kind in _TYPES.items():
        if not isinstance(data.get(name), kind):
            raise ManifestError(f"{MANIFEST_NAME} has no valid {name!r}")
    return Manifest(**{field.name: data[field.name] for field in fields(Manifest)})


def verify_entry(entry: Path, digest: str) -> CacheEntry:
    """The entry in a folder, after comparing the library with the manifest. Raises ManifestError
    if they differ, and OSError if they cannot be read."""
    manifest = read_manifest(entry)
    if manifest.digest != digest:
        raise ManifestError(f"{MANIFEST_NAME} is that of {manifest.digest[:16]}")
    library = entry / LIBRARY_NAME
    size = _require_regular(library)
    if size != manifest.size:
        raise ManifestError(f"{LIBRARY_NAME} has {size} bytes instead of {manifest.size}")
    if hash_file(library) != manifest.sha256:
        raise ManifestError(f"{LIBRARY_NAME} is not the file that was built (SHA-256 differs)")
    return CacheEntry(entry, manifest)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _require_regular(path: Path) -> int:
    """The size of a regular file that is no link."""
    try:
        status = path.lstat()
    except FileNotFoundError as error:
        raise ManifestError(f"{path.name} is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise ManifestError(f"{path.name} is not a regular file")
    return status.st_size
