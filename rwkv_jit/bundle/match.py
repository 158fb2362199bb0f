"""Matching: which kernel of the bundles at hand serves a configuration, and why the others do not.

A match is by meaning: configuration, source, launcher ABI, CUDA major version, architecture and
platform; not by who built it. The exact architecture comes first, then others whose binaries run
there as they are.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..arch import arch_number, binary_runs_on, display_arch, is_cuda
from ..cache import CacheEntry, meaning_fields, meaning_key
from ..compilers import torch_cuda_major
from ..config import OpConfig
from ..errors import BundleError, ConfigError
from ..ops import get_spec
from ..render import RenderedSource, argument_block, render
from ..settings import Settings
from ..spec import OpSpec
from .index import BundleEntry
from .places import bundles_in_force
from .read import Bundle, check_entry


@dataclass(frozen=True, slots=True)
class Match:
    """A kernel of a bundle that serves a configuration.

    source: what it was built from; its configuration differs from the one that was asked for in
    the architecture at most. entry: its files, checked.
    """

    bundle: Bundle
    source: RenderedSource
    entry: CacheEntry


@dataclass(frozen=True, slots=True)
class Near:
    """An entry that does not serve, and in which fields it differs: (wanted, found) by name."""

    bundle: Bundle
    entry: BundleEntry
    differs: Mapping[str, tuple[str, str]]


def find(source: RenderedSource, settings: Settings) -> Match | None:
    """The kernel of the bundles in force that serves a source's configuration, checked.

    A bundle or a kernel that is not as it should be is a BundleError where kernels are not built
    (mode "prebuilt"); elsewhere it is passed over with a warning.
    """
    return find_in(source, bundles_in_force(settings), strict=settings.mode == "prebuilt")


def find_in(source: RenderedSource, bundles: Sequence[Bundle], *, strict: bool) -> Match | None:
    """The same in these bundles. strict: a kernel that is not as it should be is a BundleError."""
    for bundle, entry, built_from in _matches(source, bundles):
        try:
            checked = check_entry(bundle, entry)
        except BundleError as error:
            if strict:
                raise
            warnings.warn(f"rwkv_jit: {error}; it is passed over", RuntimeWarning, stacklevel=3)
            continue
        return Match(bundle, built_from, checked)
    return None


def nearest(source: RenderedSource, bundles: Sequence[Bundle]) -> Near | None:
    """The entry that differs in fewest fields from what would serve; None if the bundles have none
    of the operator."""
    found = [
        Near(bundle, entry, _differences(source, entry))
        for bundle in bundles
        for entry in bundle.index.entries
        if entry.fields["operator"] == source.config.op
    ]
    return min(found, key=lambda near: len(near.differs), default=None)


def explain_near(near: Near) -> str:
    """Why an entry does not serve, in a sentence."""
    reasons = [_reason(name, *values) for name, values in near.differs.items()]
    return (
        f"The nearest kernel in a bundle, {near.entry.identity} in {near.bundle.root}, "
        f"does not serve: {'; '.join(reasons)}."
    )


def field_differences(
    config: OpConfig, wanted: Mapping[str, str], found: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """The fields of a key in which what was found differs from what is wanted, (wanted, found) by
    name. In the place of the configuration its knobs are compared, and what follows from another
    difference is left out."""
    differs = {
        name: (value, found.get(name, ""))
        for name, value in wanted.items()
        if found.get(name) != value
    }
    knobs: dict[str, tuple[str, str]] = {}
    if "configuration" in differs:
        try:
            other = OpConfig.parse(found.get("configuration", ""))
        except ConfigError:
            return differs
        for field in dataclasses.fields(OpConfig):
            pair = str(getattr(config, field.name)), str(getattr(other, field.name))
            if pair[0] != pair[1]:
                knobs[field.name] = pair
    if knobs or "entry" in differs:
        followers = ("configuration", "operator", "arch", "identity", "source", "suffix")
        differs = {name: pair for name, pair in differs.items() if name not in followers}
    return {**knobs, **differs}


def _matches(
    source: RenderedSource, bundles: Sequence[Bundle]
) -> Iterator[tuple[Bundle, BundleEntry, RenderedSource]]:
    """Entries that serve a source, the best first."""
    for built_from in _renderings(source, bundles):
        cuda = is_cuda(built_from.config.arch)
        for bundle in bundles:
            for major in _cuda_majors(bundle) if cuda else (0,):
                entry = bundle.index.by_meaning.get(meaning_key(built_from, major))
                if entry is not None:
                    yield bundle, entry, built_from


def _renderings(source: RenderedSource, bundles: Sequence[Bundle]) -> Iterator[RenderedSource]:
    """The source itself, then those of other architectures in the bundles whose binaries can stand
    for it, the nearest first."""
    yield source
    archs = {entry.arch for bundle in bundles for entry in bundle.index.entries}
    others = [arch for arch in archs - {source.config.arch} if _runs_on(arch, source.config.arch)]
    # An "f" architecture has more to offer than the plain one.
    order = sorted(others, key=lambda arch: (arch_number(arch), arch), reverse=True)
    for arch in order:
        rendered = _render_for(source, arch)
        if rendered is not None:
            yield rendered


def _render_for(source: RenderedSource, arch: str) -> RenderedSource | None:
    """The source of another architecture; None where its kernel needs more than the one asked for
    has, such as shared memory, or is not called in the same way."""
    spec = get_spec(source.config.op)
    config = dataclasses.replace(source.config, arch=arch)
    try:
        rendered = render(spec, config, source.entry)
    except ConfigError:
        return None
    fits = spec.variant(config, source.entry).runs_on(source.config.arch)
    same = _interface(spec, config, source.entry) == _interface(spec, source.config, source.entry)
    return rendered if fits and same else None


def _interface(spec: OpSpec, config: OpConfig, entry: str) -> object:
    """What a caller of a kernel must know of it."""
    variant = spec.variant(config, entry)
    block = argument_block(spec.entries[entry], variant)
    return block, variant.scratch, spec.checkpoint_spacing(config, entry)


def _runs_on(built: str, arch: str) -> bool:
    try:
        return binary_runs_on(built, arch)
    except ValueError:
        return False


def _cuda_majors(bundle: Bundle) -> Sequence[int]:
    """The CUDA major versions that may be used: torch's, or any where torch is a CPU build."""
    major = torch_cuda_major()
    if major is not None:
        return (major,)
    found = {entry.cuda_major for entry in bundle.index.entries} - {0}
    return sorted(found, reverse=True)


def _differences(source: RenderedSource, entry: BundleEntry) -> dict[str, tuple[str, str]]:
    wanted_arch = source.config.arch
    if entry.arch != wanted_arch and _runs_on(entry.arch, wanted_arch):
        source = _render_for(source, entry.arch) or source
    major = torch_cuda_major()
    expected = entry.cuda_major if major is None else major
    wanted = meaning_fields(source, expected if is_cuda(source.config.arch) else 0)
    return field_differences(source.config, wanted, entry.fields)


def _reason(name: str, wanted: str, found: str) -> str:
    if name == "cuda_major":
        return f"it needs CUDA {found}, but torch here was built with CUDA {wanted}"
    if name == "source":
        return "its source is that of another version of rwkv_jit or of its templates"
    if name == "arch":
        if _runs_on(found, wanted):
            return f"it is for {_shown(found)}, and {_shown(wanted)} takes another kernel"
        return f"it is for {_shown(found)}, whose binaries do not run on {_shown(wanted)}"
    return f"it has {name}={found} instead of {wanted}"


def _shown(arch: str) -> str:
    try:
        return display_arch(arch)
    except ValueError:
        return arch
