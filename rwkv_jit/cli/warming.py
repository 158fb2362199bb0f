"""Warming: which of the kernels that are wanted exist, and building the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..build import build_many, obtain
from ..bundle import find
from ..cache import Cache, CacheEntry, cache_key
from ..errors import KernelMissingError, RwkvJitError, ToolchainError
from ..render import RenderedSource
from ..settings import Settings
from ..toolchain import find_toolchain


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one kernel: "hit", "built" or "failed"; in a dry run "hit" or "missing"."""

    identity: str
    status: str
    entry: CacheEntry | None = None
    error: RwkvJitError | None = None


def look_up(sources: Sequence[RenderedSource], settings: Settings) -> list[Outcome]:
    """Which kernels exist ("hit") and which would be built ("missing"). Builds nothing."""
    outcomes = []
    for source in sources:
        entry = _find(source, settings)
        status = "missing" if entry is None else "hit"
        outcomes.append(Outcome(identity=source.identity, status=status, entry=entry))
    return outcomes


def warm(
    sources: Sequence[RenderedSource],
    settings: Settings,
    *,
    force: bool = False,
    jobs: int | None = None,
    on_result: Callable[[], None] | None = None,
) -> list[Outcome]:
    """Build what no bundle and not the cache has, several at once. on_result: called as each kernel
    is done. force: builds and replaces what exists, too."""
    bundled = {} if force else _bundled(sources, settings)
    missing = [source for source in sources if source.identity not in bundled]
    built = dict(
        zip(
            (source.identity for source in missing),
            build_all(missing, settings, force=force, jobs=jobs, on_result=on_result),
            strict=True,
        )
    )
    return [
        Outcome(identity=source.identity, status="hit", entry=bundled[source.identity])
        if source.identity in bundled
        else built[source.identity]
        for source in sources
    ]


def build_all(
    sources: Sequence[RenderedSource],
    settings: Settings,
    *,
    force: bool = False,
    jobs: int | None = None,
    on_result: Callable[[], None] | None = None,
) -> list[Outcome]:
    """The same into the cache, whatever bundles have."""
    before = {entry.manifest.created for entry in Cache.open(settings).entries()}
    results = build_many(
        sources,
        settings,
        policy="always" if force else "auto",
        jobs=jobs,
        on_result=None if on_result is None else lambda _index, _result: on_result(),
    )
    outcomes = []
    for source, result in zip(sources, results, strict=True):
        if isinstance(result, RwkvJitError):
            outcome = Outcome(identity=source.identity, status="failed", error=result)
        else:
            status = "hit" if result.manifest.created in before else "built"
            outcome = Outcome(identity=source.identity, status=status, entry=result)
        outcomes.append(outcome)
    return outcomes


def _find(source: RenderedSource, settings: Settings) -> CacheEntry | None:
    """What would be found without building, in a bundle or in the cache."""
    match = find(source, settings)
    if match is not None:
        return match.entry
    if settings.mode != "prebuilt":
        with contextlib.suppress(ToolchainError):
            toolchain = find_toolchain(source.config.arch, settings)
            return Cache.open(settings).lookup(cache_key(source, toolchain).digest)
    try:
        return obtain(source, settings, policy="never")
    except KernelMissingError:
        return None


def _bundled(sources: Sequence[RenderedSource], settings: Settings) -> dict[str, CacheEntry]:
    """The kernels that bundles have, by identity of the source."""
    found = {source.identity: find(source, settings) for source in sources}
    return {name: match.entry for name, match in found.items() if match is not None}
