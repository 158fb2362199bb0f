"""Explaining: which layer answers for a kernel, and what is in the way of those that do not."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..build import obtain, warm_command
from ..bundle import (
    Bundle,
    Place,
    explain_near,
    field_differences,
    find_in,
    nearest,
    open_place,
    places,
)
from ..cache import Cache, CacheEntry, cache_key, meaning_fields
from ..compilers import torch_cuda_major
from ..errors import (
    BundleError,
    KernelMissingError,
    RwkvJitError,
    ToolchainError,
)
from ..render import RenderedSource
from ..settings import Settings
from ..toolchain import find_toolchain


@dataclass(frozen=True, slots=True)
class Layer:
    """One place where a kernel is looked for.

    name: "bundle", "cache" or "build". where: a path, or a compiler. answers: whether it has the
    kernel. said: why, in a sentence. differs: of what is nearest to it, (wanted, found) by name.
    """

    name: str
    where: str
    answers: bool
    said: str
    differs: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Explanation:
    """answer: the layer that answers; "nothing" where it would be an error."""

    kernel: str
    answer: str
    layers: tuple[Layer, ...]


def explain(source: RenderedSource, settings: Settings) -> Explanation:
    """Which layer answers for a kernel in a new process of these settings. Builds nothing, and, in
    mode "prebuilt", starts no compiler."""
    layers = (*_bundles(source, settings), _cache(source, settings), _build(source, settings))
    if settings.mode == "reference":
        return Explanation(source.identity, "reference", layers)
    if settings.mode == "rebuild":
        layers = tuple(replace(x, answers=x.answers and x.name == "build") for x in layers)
    answer = next((layer.name for layer in layers if layer.answers), "nothing")
    return Explanation(source.identity, answer, layers)


def _bundles(source: RenderedSource, settings: Settings) -> list[Layer]:
    """The bundles in the order in which they are searched; before them the one that answers, since
    the exact architecture in a later one comes before another in an earlier one."""
    opened = [_open(place, settings) for place in places(settings)]
    usable = [bundle for bundle in opened if isinstance(bundle, Bundle)]
    layers = [x if isinstance(x, Layer) else _bundle(source, x) for x in opened]
    with warnings.catch_warnings(), contextlib.suppress(BundleError):
        warnings.simplefilter("ignore")
        match = find_in(source, usable, strict=settings.mode == "prebuilt")
        if match is not None:
            first = str(match.bundle.root)
            layers.sort(key=lambda layer: layer.where != first)
    return layers


def _open(place: Place, settings: Settings) -> Bundle | Layer:
    try:
        return open_place(place, settings)
    except BundleError as error:
        return Layer("bundle", str(place.root), False, str(error), {})


def _bundle(source: RenderedSource, bundle: Bundle) -> Layer:
    where = str(bundle.root)
    try:
        match = find_in(source, [bundle], strict=True)
    except BundleError as error:
        return Layer("bundle", where, False, str(error), {})
    if match is not None:
        what = match.source.identity
        said = "has it" if what == source.identity else f"has {what}, whose binary runs here"
        return Layer("bundle", where, True, said, {})
    near = nearest(source, [bundle])
    if near is None:
        return Layer("bundle", where, False, f"has no kernel of {source.config.op}", {})
    return Layer("bundle", where, False, explain_near(near), near.differs)


def _cache(source: RenderedSource, settings: Settings) -> Layer:
    cache = Cache.open(settings)
    where = str(cache.root)
    try:
        fields = _wanted_fields(source, settings)
        entry = _cached(source, settings)
        entries = cache.entries()
    except RwkvJitError as error:
        return Layer("cache", where, False, str(error), {})
    if entry is not None:
        return Layer("cache", where, True, f"has it as {entry.manifest.digest[:16]}", {})
    found = [
        (other, field_differences(source.config, fields, other.manifest.fields))
        for other in entries
        if other.manifest.fields.get("operator") == source.config.op
    ]
    if not found:
        return Layer("cache", where, False, f"has no kernel of {source.config.op}", {})
    near, differs = min(found, key=lambda pair: len(pair[1]))
    return Layer("cache", where, False, _tell(near, differs), differs)


def _cached(source: RenderedSource, settings: Settings) -> CacheEntry | None:
    if settings.mode != "prebuilt":
        with contextlib.suppress(ToolchainError):
            toolchain = find_toolchain(source.config.arch, settings)
            return Cache.open(settings).lookup(cache_key(source, toolchain).digest, repair=False)
    try:
        return obtain(source, settings, policy="never")
    except KernelMissingError:
        return None


def _wanted_fields(source: RenderedSource, settings: Settings) -> Mapping[str, str]:
    if settings.mode != "prebuilt":
        with contextlib.suppress(ToolchainError):
            return cache_key(source, find_toolchain(source.config.arch, settings)).fields
    return meaning_fields(source, torch_cuda_major() or 0)


def _build(source: RenderedSource, settings: Settings) -> Layer:
    command = warm_command(source.config)
    if settings.mode == "prebuilt":
        said = f"RWKV_JIT_MODE=prebuilt forbids building. Build it with: {command}"
        return Layer("build", "", False, said, {})
    try:
        toolchain = find_toolchain(source.config.arch, settings)
    except ToolchainError as error:
        return Layer("build", "", False, str(error), {})
    said = f"would build it, as does: {command}"
    return Layer("build", str(toolchain.compiler), True, said, {})


def _tell(near: CacheEntry, differs: Mapping[str, tuple[str, str]]) -> str:
    if not differs:
        return f"has {near.manifest.identity}, but as an entry that cannot be used"
    reasons = []
    for name, (wanted, found) in differs.items():
        if name == "source":
            reasons.append("source is that of another version of rwkv_jit or of its templates")
            continue
        shown = [" ".join(text.split("\n")) for text in (found, wanted)]
        reasons.append(f"{name} is {shown[0]!r} instead of {shown[1]!r}")
    return f"the nearest, {near.manifest.identity}: {'; '.join(reasons)}"
