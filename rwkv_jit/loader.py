"""From a configuration to a loaded kernel: render, build or find, open. One table per process."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from .arch import is_cuda
from .build import obtain
from .cache import CacheEntry
from .config import OpConfig
from .errors import KernelMissingError
from .launch import Kernel, load_kernel
from .ops import get_spec
from .render import render
from .settings import current_settings


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel and the cache entry that it was loaded from."""

    kernel: Kernel
    origin: CacheEntry


class KernelTable:
    """The kernels that this process has loaded, by slug and entry."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str], LoadedKernel] = {}
        self._policies: dict[str, str] = {}
        self._lock = threading.Lock()

    def set_policy(self, slug: str, policy: str) -> None:
        """What to do when a kernel of `slug` is not loaded yet: "auto", "never" or "always"."""
        self._policies[slug] = policy

    def peek(self, slug: str, entry: str) -> LoadedKernel | None:
        """The loaded kernel, if it is loaded."""
        return self._loaded.get((slug, entry))

    def get(self, slug: str, entry: str) -> Kernel:
        """The kernel, found in the cache or built if need be.

        Raises KernelMissingError while a CUDA graph is being captured and it is not loaded, and
        whatever finding, building and loading raise.
        """
        found = self._loaded.get((slug, entry))
        if found is None:
            found = self._load(slug, entry)
        return found.kernel

    def _load(self, slug: str, entry: str) -> LoadedKernel:
        config = OpConfig.parse(slug)
        if is_cuda(config.arch) and torch.cuda.is_current_stream_capturing():
            raise KernelMissingError(
                f"{slug}.{entry} is not loaded, and kernels are not built while a CUDA graph is "
                "being captured; call the operator once, or op.load(), before the capture"
            )
        spec = get_spec(config.op)
        source = render(spec, config, entry)
        policy = self._policies.get(slug, "auto")
        origin = obtain(source, current_settings(), policy=policy)
        found = LoadedKernel(load_kernel(spec, config, entry, origin.library), origin)
        with self._lock:
            return self._loaded.setdefault((slug, entry), found)


KERNELS = KernelTable()
