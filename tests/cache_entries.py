"""Cache entries that look real and hold no code, for tests of what only reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rwkv_jit.cache.manifest import MANIFEST_SCHEMA, CacheEntry, Manifest, read_manifest

MANGLED = "_ZN12_GLOBAL__N_114forward_kernelENS_9ArgumentsE"
RESOURCES = {"registers": 80, "spill_stores": 4, "spill_loads": 8, "shared": 128, "stack": 0}
LOG = "".join(f"line {number}\n" for number in range(1, 41))


def add_entry(
    root: Path,
    identity: str,
    *,
    digest: str | None = None,
    created: str = "2026-01-02T03:04:05+00:00",
) -> CacheEntry:
    """Put an entry for `identity` into the cache at `root`."""
    name = digest or hashlib.sha256(f"{identity}{created}".encode()).hexdigest()
    folder = root / "v1" / "entries" / name[:2] / name
    folder.mkdir(parents=True, mode=0o700)
    library = b"not a library"
    (folder / "kernel.so").write_bytes(library)
    (folder / "build.log").write_text(LOG)
    (folder / "source.cu").write_text(f"// source of {identity}\n")
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        digest=name,
        meaning="0" * 64,
        identity=identity,
        fields={"nvcc": "nvcc release 13.0", "flags": "-O3\n-lineinfo"},
        size=len(library),
        sha256=hashlib.sha256(library).hexdigest(),
        build_seconds=3.25,
        created=created,
        command="nvcc -c source.cu",
        resources={MANGLED: RESOURCES},
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return CacheEntry(folder, read_manifest(folder))
