"""The cache of built kernels: what names an entry, what an entry holds, and the folders of both."""

from __future__ import annotations

from .folders import LAYOUT, folder_bytes
from .growth import Removed
from .keys import CacheKey, cache_key, meaning_fields, meaning_key
from .manifest import (
    LIBRARY_NAME,
    LOG_NAME,
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    CacheEntry,
    Manifest,
    ManifestError,
    digest_fields,
    hash_file,
    open_regular,
)
from .roots import NO_SPACE
from .store import Cache
from .trust import check_trusted

__all__ = [
    "LAYOUT",
    "LIBRARY_NAME",
    "LOG_NAME",
    "MANIFEST_NAME",
    "MANIFEST_SCHEMA",
    "NO_SPACE",
    "Cache",
    "CacheEntry",
    "CacheKey",
    "Manifest",
    "ManifestError",
    "Removed",
    "cache_key",
    "check_trusted",
    "digest_fields",
    "folder_bytes",
    "hash_file",
    "meaning_fields",
    "meaning_key",
    "open_regular",
]
