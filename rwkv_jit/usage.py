"""What a running program may still build, and what it has used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from .errors import ConfigError
from .kernel_list import write_kernels
from .loader import KERNELS

_CHOICES = ("error", "warn", "off")


def freeze(on_build: Literal["error", "warn", "off"] = "error") -> None:
    """Say, after warming up, that nothing should be built any more in this process.

    on_build: what happens when a kernel would be built: "error" raises KernelMissingError, which
        names the command that builds it ahead of time; "warn" warns and builds; "off" builds as if
        this had never been called.

    Kernels that are loaded, in a bundle or in the cache are found as before.
    """
    if on_build not in _CHOICES:
        raise ConfigError(f"freeze({on_build!r}) is not known; choose from {', '.join(_CHOICES)}")
    KERNELS.freeze(on_build)


def used_configs(path: str | os.PathLike[str] | None = None) -> list[str]:
    """The kernels that this process has loaded, as "wkv7_n64_bf16_l16_sm90a.forward", sorted.

    path: also write them there, for `rwkv-jit warm --from` and `rwkv-jit bundle build --from`.
    """
    kernels = KERNELS.names()
    if path is not None:
        write_kernels(Path(path), kernels)
    return kernels
