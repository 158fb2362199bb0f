"""What there is to say about operators, cache entries and bundles, as plain data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..arch import CPU_ARCHES, display_arch, is_cuda
from ..build import warm_command
from ..bundle import Bundle
from ..cache import CacheEntry, folder_bytes
from ..config import DTYPES, PRECISIONS, STATE_LAYOUTS, OpConfig
from ..errors import CacheError, ConfigError
from ..ops import get_spec
from ..spec import OpSpec, TensorSpec

_DIGEST_PREFIX = re.compile(r"[0-9a-f]{6,64}")


def parse_kernel(name: str) -> tuple[OpConfig, str | None]:
    """The configuration and entry of "slug" or "slug.entry". Raises ConfigError for neither."""
    slug, _, entry = name.partition(".")
    config = OpConfig.parse(slug)
    entries = get_spec(config.op).entries
    if entry and entry not in entries:
        raise ConfigError(
            f"{name}: entry={entry!r} does not exist; choose from {', '.join(entries)}"
        )
    return config, entry or None


def find_entries(name: str, entries: Sequence[CacheEntry]) -> list[CacheEntry]:
    """The entries that "slug", "slug.entry" or the beginning of a digest names; of several builds
    of one kernel the newest. Raises CacheError where there is none, or a digest is ambiguous."""
    if _DIGEST_PREFIX.fullmatch(name):
        found = [entry for entry in entries if entry.manifest.digest.startswith(name)]
        if len(found) == 1:
            return found
        if not found:
            raise CacheError(f"no kernel in the cache has a digest that begins with {name}")
        several = "\n".join(f"  {e.manifest.digest}  {e.manifest.identity}" for e in found)
        raise CacheError(f"{name} begins several digests; write more of one:\n{several}")
    config, wanted = parse_kernel(name)
    newest: dict[str, CacheEntry] = {}
    for entry in sorted(entries, key=lambda entry: entry.manifest.created):
        slug, _, kind = entry.manifest.identity.partition(".")
        if slug == config.slug and wanted in (None, kind):
            newest[kind] = entry
    if not newest:
        raise CacheError(f"{name} is not in the cache. Build it with: {warm_command(config)}")
    order = list(get_spec(config.op).entries)
    return [newest[kind] for kind in sorted(newest, key=order.index)]


def operator_data(spec: OpSpec) -> dict[str, Any]:
    """An operator as its spec has it: formula, tensors, and what can be chosen where."""
    arches = [CPU_ARCHES[0]] if any(v.min_arch == 0 for v in spec.variants) else []
    arches += [f"sm{number}" for number in sorted({v.min_arch for v in spec.variants} - {0})]
    platforms: list[dict[str, Any]] = []
    for arch in arches:
        choices = _choices(spec, arch)
        # A faster kernel for newer GPUs is no further choice.
        if not any(choices == {**row, "arch": choices["arch"]} for row in platforms):
            platforms.append(choices)
    return {
        "name": spec.name,
        "summary": spec.summary,
        "formula": spec.formula,
        "parameters": list(spec.parameters),
        "decays": list(spec.decays) if spec.is_recurrence else [],
        "state_layouts": list(STATE_LAYOUTS) if "state_layout" in spec.knobs else [],
        "precisions": list(PRECISIONS) if "precision" in spec.knobs else [],
        "platforms": platforms,
        "entries": {
            name: {
                "inputs": [_tensor_data(spec, tensor) for tensor in entry.inputs],
                "outputs": [_tensor_data(spec, tensor) for tensor in entry.outputs],
            }
            for name, entry in spec.entries.items()
        },
    }


def entry_data(entry: CacheEntry) -> dict[str, Any]:
    """A cache entry as plain data. registers and spill_bytes are those of its hungriest kernel and
    None where the compiler reported none, as for a CPU."""
    manifest = entry.manifest
    resources = manifest.resources.values()
    spills = [used.get("spill_stores", 0) + used.get("spill_loads", 0) for used in resources]
    return {
        "kernel": manifest.identity,
        "digest": manifest.digest,
        "path": str(entry.path),
        "library": str(entry.library),
        "source": str(entry.source),
        "log": str(entry.log),
        "bytes": folder_bytes(entry.path),
        "created": manifest.created,
        "build_seconds": manifest.build_seconds,
        "registers": max((used.get("registers", 0) for used in resources), default=None),
        "spill_bytes": max(spills, default=None),
        "resources": {name: dict(used) for name, used in manifest.resources.items()},
        "command": manifest.command,
        "fields": dict(manifest.fields),
    }


def kernel_name(mangled: str) -> str:
    """The plain name of a function, without namespaces and parameters, from its mangled one."""
    nested = mangled.startswith("_ZN")
    rest = mangled.removeprefix("_Z").removeprefix("N")
    name = mangled
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        name, rest = rest[match.end() :][:length], rest[match.end() + length :]
        # What follows a name outside namespaces are its parameters.
        if not nested:
            break
    return name


def bundle_data(bundle: Bundle) -> dict[str, Any]:
    """A bundle as its index has it."""
    return {
        "path": str(bundle.root),
        "digest": bundle.index.digest,
        "made_by": bundle.index.made_by,
        "kernels": len(bundle.index.entries),
        "signed": (bundle.root / "bundle.sig").is_file(),
    }


def bundled_data(bundle: Bundle) -> list[dict[str, Any]]:
    """The kernels of a bundle as its index has them."""
    return [
        {
            "kernel": entry.identity,
            "arch": entry.arch,
            "cuda_major": entry.cuda_major,
            "platform": entry.fields.get("platform", ""),
            "bytes": sum(record.size for record in entry.files.values()),
            "digest": entry.digest,
            "fields": dict(entry.fields),
            "files": {name: record.sha256 for name, record in entry.files.items()},
        }
        for entry in bundle.index.entries
    ]


def _choices(spec: OpSpec, arch: str) -> dict[str, Any]:
    """What every entry of an operator has kernels for on one architecture."""

    def served(knob: str) -> list[Any]:
        sets = [
            {
                value
                for variant in spec.variants
                if variant.entry == entry and variant.runs_on(arch)
                for value in getattr(variant, knob)
            }
            for entry in spec.entries
        ]
        return sorted(set.intersection(*sets) - {0})

    dtypes = sorted(served("dtypes"), key=DTYPES.index)
    head_sizes, chunk_lengths = served("head_sizes"), served("chunk_lengths")
    configs = [
        OpConfig(
            op=spec.name,
            head_size=head_sizes[0] if head_sizes else 0,
            dtype=dtype,
            chunk_length=chunk_lengths[0] if chunk_lengths else 0,
            arch=arch,
            decay=spec.decays[0],
        )
        for dtype in dtypes
    ]
    return {
        "platform": "cuda" if is_cuda(arch) else "cpu",
        "arch": f"{display_arch(arch)} or later" if is_cuda(arch) else "any",
        "head_sizes": head_sizes,
        "dtypes": dtypes,
        "chunk_lengths": chunk_lengths,
        "state_dtypes": {config.dtype: _state_dtypes(spec, config) for config in configs}
        if "state_dtype" in spec.knobs
        else {},
    }


def _state_dtypes(spec: OpSpec, config: OpConfig) -> list[str]:
    accepted = []
    for state_dtype in DTYPES:
        try:
            spec.check(replace(config, state_dtype=state_dtype))
        except ConfigError:
            continue
        accepted.append(state_dtype)
    return accepted


def _tensor_data(spec: OpSpec, tensor: TensorSpec) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": list(tensor.dtype),
        "optional": tensor.optional,
        "mutated": tensor.mutated,
        "saved": tensor.name in spec.saved_outputs,
        "meaning": tensor.meaning,
    }
