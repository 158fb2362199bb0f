"""From a configuration to a loaded kernel: render, find in a bundle or the cache, or build; open.

There is one table in a process.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .arch import is_cuda
from .build import obtain, warm_command
from .bundle import bundles_in_force, explain_near, find, nearest
from .cache import CacheEntry
from .config import OpConfig
from .errors import KernelLoadError, KernelMissingError, ToolchainError
from .launch import Kernel, load_kernel
from .ops import get_spec
from .render import RenderedSource, render
from .settings import Settings, current_settings
from .spec import OpSpec


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel and the entry, of a bundle or the cache, that it was loaded from."""

    kernel: Kernel
    origin: CacheEntry


class KernelTable:
    """The kernels that this process has loaded, by slug and entry."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str], LoadedKernel] = {}
        self._policies: dict[str, str] = {}
        self._frozen = "off"
        self._lock = threading.Lock()

    def set_policy(self, slug: str, policy: str) -> None:
        """What to do when a kernel of `slug` is not loaded yet: "auto", "never" or "always"."""
        self._policies[slug] = policy

    def peek(self, slug: str, entry: str) -> LoadedKernel | None:
        """The loaded kernel, if it is loaded."""
        return self._loaded.get((slug, entry))

    def describe(self, slug: str, entries: Sequence[str]) -> dict[str, Any]:
        """Of each of these entries that is loaded, where its binary lies, what the compiler said of
        it and how long it took to build."""
        kernels: dict[str, Any] = {}
        for entry in entries:
            loaded = self.peek(slug, entry)
            if loaded is not None:
                manifest = loaded.origin.manifest
                kernels[entry] = {
                    "library": str(loaded.origin.library),
                    "digest": manifest.digest,
                    "built": manifest.created,
                    "build_seconds": manifest.build_seconds,
                    "resources": manifest.resources,
                }
        return kernels

    def freeze(self, on_build: str) -> None:
        """From now on a build is an "error", or worth a warning ("warn"), or fine ("off")."""
        self._frozen = on_build

    def names(self) -> list[str]:
        """The kernels that are loaded, as "slug.entry" as they were asked for, sorted."""
        with self._lock:
            return sorted(f"{slug}.{entry}" for slug, entry in self._loaded)

    def get(self, slug: str, entry: str) -> Kernel:
        """The kernel, found in a bundle or the cache, or built if need be.

        Raises KernelMissingError while a CUDA graph is being captured and it is not loaded, and
        whatever finding, building and loading raise.
        """
        found = self._loaded.get((slug, entry))
        if found is None:
            found = self._load(slug, entry)
        return found.kernel

    def _load(self, slug: str, entry: str) -> LoadedKernel:
        config = OpConfig.parse(slug)
        if is_cuda(config.arch) and _capturing():
            raise KernelMissingError(
                f"{slug}.{entry} is not loaded, and kernels are not built while a CUDA graph is "
                "being captured; call the operator once, or op.load(), before the capture"
            )
        spec = get_spec(config.op)
        source = render(spec, config, entry)
        settings = current_settings()
        found = self._from_bundles(spec, source, settings)
        if found is None:
            found = self._open(spec, source, settings)
        with self._lock:
            return self._loaded.setdefault((slug, entry), found)

    def _policy(self, source: RenderedSource) -> str:
        return self._policies.get(source.config.slug, "auto")

    def _from_bundles(
        self, spec: OpSpec, source: RenderedSource, settings: Settings
    ) -> LoadedKernel | None:
        """The kernel from a bundle; None where none has it, or where it must be built anew."""
        if self._policy(source) == "always" or settings.mode == "rebuild":
            return None
        match = find(source, settings)
        if match is None:
            return None
        try:
            kernel = load_kernel(spec, match.source.config, source.entry, match.entry.library)
        except KernelLoadError as error:
            # As where a bundle was built on a newer system, whose C library this one lacks.
            if settings.mode == "prebuilt":
                raise
            warnings.warn(f"rwkv_jit: {error}; it is passed over", RuntimeWarning, stacklevel=2)
            return None
        return LoadedKernel(kernel, match.entry)

    def _open(self, spec: OpSpec, source: RenderedSource, settings: Settings) -> LoadedKernel:
        """The kernel from the cache. One whose hashes are right but which is not what it should
        be is built again, once, where building is not forbidden."""
        origin = self._from_cache(source, settings)
        try:
            kernel = load_kernel(spec, source.config, source.entry, origin.library)
        except KernelLoadError as error:
            never = self._policy(source) == "never" or self._frozen != "off"
            if never or settings.mode == "prebuilt":
                raise
            warnings.warn(f"rwkv_jit: {error}; it is built again", RuntimeWarning, stacklevel=2)
            origin = _obtain(source, settings, "always")
            kernel = load_kernel(spec, source.config, source.entry, origin.library)
        return LoadedKernel(kernel, origin)

    def _from_cache(self, source: RenderedSource, settings: Settings) -> CacheEntry:
        """The cache's entry, built if need be and not forbidden."""
        policy = self._policy(source)
        if self._frozen == "off":
            return _obtain(source, settings, policy)
        try:
            return _obtain(source, settings, "never")
        except KernelMissingError as error:
            if policy == "never" or settings.mode == "prebuilt":
                raise
            if self._frozen == "error":
                raise KernelMissingError(
                    f"{error}\nrwkv_jit.freeze('error') was called: nothing is built any more"
                ) from error
        warnings.warn(
            f"rwkv_jit: {source.identity} is built after rwkv_jit.freeze('warn'): warm it before "
            f"with: {warm_command(source.config)}",
            RuntimeWarning,
            stacklevel=2,
        )
        return _obtain(source, settings, policy)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _obtain(source: RenderedSource, settings: Settings, policy: str) -> CacheEntry:
    """`obtain`, whose errors also say why no bundle serves."""
    try:
        return obtain(source, settings, policy=policy)
    except (KernelMissingError, ToolchainError) as error:
        near = nearest(source, bundles_in_force(settings))
        if near is None or not near.differs:
            raise
        raise type(error)(f"{error}\n{explain_near(near)}") from error


KERNELS = KernelTable()
