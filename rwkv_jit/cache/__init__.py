"""The cache of built kernels: what names an entry, what an entry holds, and the folders of both."""

from __future__ import annotations

from .folders import LAYOUT, check_trusted, folder_bytes
from .keys import CacheKey, cache_key, meaning_key
from .manifest import (
    LIBRARY_NAME,
    LOG_NAME,
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    CacheEntry,
    Manifest,
    hash_file,
)
from .store import Cache

__all__ = [
    "LAYOUT",
    "LIBRARY_NAME",
    "LOG_NAME",
    "MANIFEST_NAME",
    "MANIFEST_SCHEMA",
    "Cache",
    "CacheEntry",
    "CacheKey",
    "Manifest",
    "cache_key",
    "check_trusted",
    "folder_bytes",
    "hash_file",
    "meaning_key",
]
