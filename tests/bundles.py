"""Bundles that look real and hold no code, for tests of what only reads and compares them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rwkv_jit.bundle import Bundle
from rwkv_jit.bundle.make import write_bundle
from rwkv_jit.cache import MANIFEST_SCHEMA, CacheEntry, Manifest, digest_fields, meaning_fields
from rwkv_jit.config import OpConfig
from rwkv_jit.ops import get_spec
from rwkv_jit.render import RenderedSource, render

BUILDER = {"host_compiler": "gcc 12", "nvcc": "", "flags": "-O3"}


def source_of(name: str) -> RenderedSource:
    """The source of "slug" (its forward) or "slug.entry"."""
    slug, _, entry = name.partition(".")
    config = OpConfig.parse(slug)
    return render(get_spec(config.op), config, entry or "forward")


def fake_entry(
    folder: Path,
    name: str,
    *,
    cuda_major: int = 13,
    fields: Mapping[str, str] | None = None,
    library: bytes | None = None,
) -> CacheEntry:
    """A cache entry for a kernel. fields: what is to be different about its key."""
    source = source_of(name)
    cuda = source.suffix == ".cu"
    every = {**meaning_fields(source, cuda_major if cuda else 0), **BUILDER, **(fields or {})}
    data = f"library of {source.identity}".encode() if library is None else library
    digest = digest_fields(every)
    place = folder / digest
    place.mkdir(parents=True)
    (place / "kernel.so").write_bytes(data)
    (place / f"source{source.suffix}").write_text(source.text)
    meaning = digest_fields({k: v for k, v in every.items() if k not in BUILDER})
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        digest=digest,
        meaning=meaning,
        identity=source.identity,
        fields=every,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        build_seconds=1.5,
        created="2026-01-02T03:04:05+00:00",
        command=f"g++ -c {place}/source.cpp",
        resources={"kernel": {"registers": 80}},
    )
    (place / "manifest.json").write_text(manifest.to_json())
    return CacheEntry(place, manifest)


def fake_bundle(
    out: Path,
    names: Sequence[str],
    *,
    cuda_major: int = 13,
    fields: Mapping[str, str] | None = None,
    sign_with: Path | None = None,
) -> Bundle:
    """A bundle of such entries at `out`."""
    folder = out.with_name(f"{out.name}.entries")
    entries = [fake_entry(folder, name, cuda_major=cuda_major, fields=fields) for name in names]
    return write_bundle(entries, out, sign_with=sign_with)


def tree(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file and folder below a folder: mode, time of change and content by relative name."""
    return {
        path.relative_to(folder).as_posix(): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted([folder, *folder.rglob("*")])
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
