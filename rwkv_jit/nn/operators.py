"""The operators that modules and functions run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..build.jobs import default_jobs
from ..errors import KernelMissingError
from ..registry import get_op
from ..settings import current_settings


def computing_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# Compiled code breaks its graph here; it would trace into asking what machine this is otherwise.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def find(name: str, dtype: torch.dtype, device: torch.device, head_size: int | None = None) -> Any:
    """An operator, as RWKV-LM's models mean it. head_size: None for one that knows no heads."""
    any_op: Any = get_op
    decay = "logit" if name == "wkv7" else "loglog"
    return any_op(name, head_size=head_size, dtype=dtype, device=device, decay=decay)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def find_and_load(
    names: Mapping[str, int | None], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Operators by name, whose kernels are loaded, or built side by side.

    names: each with its head size, or None.
    """
    ops = {name: find(name, dtype, device, size) for name, size in names.items()}
    settings = current_settings()
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if settings.mode != "reference" and not capturing:
        backward = torch.is_grad_enabled()
        with ThreadPoolExecutor(default_jobs(settings.max_jobs)) as pool:
            list(pool.map(lambda op: _load(op, backward), ops.values()))
    return ops


class Operators:
    """The operators of a module, found once for a dtype and device: by then compiled code has its
    graph in one piece. A copy of a module, and one that was pickled, finds its own.

    names: each with its head size, or None.
    """

    def __init__(self, names: Mapping[str, int | None]) -> None:
        self._names = names
        self._found: dict[tuple[torch.dtype, torch.device], dict[str, Any]] = {}

    def __reduce__(self) -> tuple[type[Operators], tuple[Mapping[str, int | None]]]:
        return Operators, (self._names,)

    def of(self, x: Tensor) -> dict[str, Any]:
        """The operators by name, for tensors like `x`."""
        dtype = computing_dtype(x)
        ops = self._found.get((dtype, x.device))
        if ops is None:
            ops = self._found[dtype, x.device] = find_and_load(self._names, dtype, x.device)
        return ops


def _load(op: Any, backward: bool) -> None:
    op.load(backward=False)
    if backward:
        # Where there is none and none may be built, a backward says so; there may never be one.
        with contextlib.suppress(KernelMissingError):
            op.load()
