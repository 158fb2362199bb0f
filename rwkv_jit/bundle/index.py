"""The index of a bundle: what it holds, file by file, as data. `bundle.json` is its text.

It names no path outside the bundle and no time, so the same kernels give the same text, and a
signature of it stands for every file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache import LIBRARY_NAME, MANIFEST_SCHEMA, CacheEntry, Manifest, digest_fields
from ..errors import BundleError

INDEX_NAME = "bundle.json"
SIGNATURE_NAME = "bundle.sig"
ENTRIES_NAME = "entries"
INDEX_SCHEMA = 1
MAX_INDEX_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 30
FILE_NAMES = (LIBRARY_NAME, "source.cu", "source.cpp")

_ENTRY_NAME = re.compile(r"[a-z0-9_]+\.[a-z]+\.[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What is in a cache key and not in its meaning: who built it, and how.
_BUILDER_FIELDS = ("host_compiler", "nvcc", "flags")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a bundle: bytes, and SHA-256 in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleEntry:
    """One kernel of a bundle.

    name: of its folder. fields, digest: of the cache key that it was built with. meaning: of the
    same without who built it. files: by name. resources: as in a manifest.
    """

    name: str
    fields: Mapping[str, str]
    digest: str
    meaning: str
    files: Mapping[str, FileRecord]
    resources: Mapping[str, Mapping[str, int]]

    @property
    def identity(self) -> str:
        """Slug and entry."""
        return self.fields["identity"]

    @property
    def arch(self) -> str:
        """The architecture that it was built for, in slug form."""
        return self.fields["arch"]

    @property
    def cuda_major(self) -> int:
        """Of the CUDA runtime that it needs; 0 for a CPU."""
        return int(self.fields["cuda_major"])

    def as_cache_entry(self, folder: Path) -> CacheEntry:
        """The entry as one of a cache, in the folder of the bundle that holds it."""
        library = self.files[LIBRARY_NAME]
        manifest = Manifest(
            schema=MANIFEST_SCHEMA,
            digest=self.digest,
            meaning=self.meaning,
            identity=self.identity,
            fields=self.fields,
            size=library.size,
            sha256=library.sha256,
            # A bundle is the same whenever and however fast it was built.
            build_seconds=0.0,
            created="",
            command="",
            resources=self.resources,
        )
        return CacheEntry(folder, manifest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """entries: sorted by name. made_by: the version of rwkv_jit that made it."""

    made_by: str
    entries: tuple[BundleEntry, ...]
    by_meaning: Mapping[str, BundleEntry] = field(repr=False)

    def to_json(self) -> str:
        """The text of an index file."""
        return json.dumps(_index_data(self), indent=1) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of the text: the same for the same kernels."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def make_index(entries: Sequence[BundleEntry], made_by: str) -> Index:
    """An index of these entries. Of two with the same meaning the one with the lesser digest is
    kept."""
    by_meaning: dict[str, BundleEntry] = {}
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.digest)):
        by_meaning.setdefault(entry.meaning, entry)
    return Index(made_by=made_by, entries=tuple(by_meaning.values()), by_meaning=by_meaning)


def make_entry(
    fields: Mapping[str, str],
    files: Mapping[str, FileRecord],
    resources: Mapping[str, Mapping[str, int]],
) -> BundleEntry:
    """An entry; its name and digests follow from the fields."""
    meaning = digest_fields({k: v for k, v in fields.items() if k not in _BUILDER_FIELDS})
    return BundleEntry(
        name=f"{fields['identity']}.{meaning[:16]}",
        fields=fields,
        digest=digest_fields(fields),
        meaning=meaning,
        files=files,
        resources=resources,
    )


@functools.lru_cache(maxsize=8)
def parse_index(text: bytes) -> Index:
    """The index of a text. Raises BundleError unless it is a complete one of a known schema."""
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{INDEX_NAME} is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema") != INDEX_SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise BundleError(
            f"{INDEX_NAME} has schema {found!r}, and this version of rwkv_jit reads {INDEX_SCHEMA}"
        )
    try:
        entries = [_parse_entry(item) for item in data["entries"]]
        index = make_index(entries, _text(data["made_by"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{INDEX_NAME} is damaged: {error!r}") from error
    if len(index.entries) != len(entries) or index.to_json().encode() != text:
        raise BundleError(f"{INDEX_NAME} is not in the form in which it is written")
    return index


def _parse_entry(data: Any) -> BundleEntry:
    files = {
        name: FileRecord(_size(record["size"]), _sha256(record["sha256"]))
        for name, record in data["files"].items()
    }
    if LIBRARY_NAME not in files or not set(files) <= set(FILE_NAMES):
        raise ValueError("an entry has other files than a library and its source")
    fields = {_text(name): _text(value) for name, value in data["fields"].items()}
    resources = {
        _text(kernel): {_text(name): int(value) for name, value in used.items()}
        for kernel, used in data["resources"].items()
    }
    entry = make_entry(fields, files, resources)
    # The name becomes a path.
    if entry.name != data["name"] or _ENTRY_NAME.fullmatch(entry.name) is None:
        raise ValueError(f"an entry is called {data['name']!r}")
    # Read once here, so that a number is one wherever it is used.
    _ = entry.arch, entry.cuda_major, entry.fields["operator"], entry.fields["entry"]
    return entry


def _index_data(index: Index) -> dict[str, Any]:
    return {
        "schema": INDEX_SCHEMA,
        "made_by": index.made_by,
        "entries": [
            {
                "name": entry.name,
                # In their order: the digest is over it.
                "fields": dict(entry.fields),
                "files": {
                    name: {"size": record.size, "sha256": record.sha256}
                    for name, record in sorted(entry.files.items())
                },
                "resources": {
                    kernel: dict(sorted(used.items()))
                    for kernel, used in sorted(entry.resources.items())
                },
            }
            for entry in index.entries
        ],
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_FILE_BYTES:
        raise ValueError(f"{value!r} is not the size of a file")
    return value


def _sha256(value: Any) -> str:
    if _SHA256.fullmatch(_text(value)) is None:
        raise ValueError(f"{value!r} is not a SHA-256")
    return _text(value)
