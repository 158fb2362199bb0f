"""Cache keys: what decides whether two builds are the same library.

Not part of a key: any path or time stamp, the versions of torch and Python, job counts, verbosity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..render import RenderedSource
from ..spec import LAUNCHER_ABI
from ..toolchain import Toolchain, host_platform
from .manifest import digest_fields

KEY_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKey:
    """digest: SHA-256 over all fields, in hex; the name of the entry.
    meaning: the same without the compilers and their flags: what the library does, whoever built
        it. Where no compiler exists, and in bundles, this is what is looked for.
    fields: everything that went in, in order; the source as its own SHA-256.
    """

    digest: str
    meaning: str
    fields: Mapping[str, str]


def cache_key(source: RenderedSource, toolchain: Toolchain) -> CacheKey:
    """The key of one source built by one toolchain."""
    meaning = meaning_fields(source, toolchain.cuda_major)
    fields = {
        **meaning,
        "host_compiler": toolchain.host_identity,
        "nvcc": toolchain.nvcc_identity,
        # Flags may hold blanks but never a line break.
        "flags": "\n".join(toolchain.code_flags),
    }
    return CacheKey(
        digest=digest_fields(fields),
        meaning=digest_fields(meaning),
        fields=MappingProxyType(fields),
    )


def meaning_key(source: RenderedSource, cuda_major: int) -> str:
    """The `meaning` of a key, without a toolchain. cuda_major: of the CUDA runtime that the
    library may need; 0 for a CPU."""
    return digest_fields(meaning_fields(source, cuda_major))


def meaning_fields(source: RenderedSource, cuda_major: int) -> dict[str, str]:
    """The fields behind `meaning_key`, in order."""
    return {
        "schema": str(KEY_SCHEMA),
        "operator": source.config.op,
        "configuration": source.config.slug,
        "entry": source.entry,
        "identity": source.identity,
        "source": hashlib.sha256(source.text.encode()).hexdigest(),
        "suffix": source.suffix,
        "arch": source.config.arch,
        "cuda_major": str(cuda_major),
        "abi": str(LAUNCHER_ABI),
        "platform": host_platform(),
    }
