"""The operators that modules and functions run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import get_op


def computing_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# Compiled code breaks its graph here; it would trace into asking what machine this is otherwise.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def find(
    name: str, head_size: int, dtype: torch.dtype, device: torch.device, decay: str = "loglog"
) -> Any:
    """An operator. head_size: 0 for one that knows no heads."""
    return get_op(name, head_size=head_size, dtype=dtype, device=device, decay=decay)


class Operators:
    """Operators of a module, each found once: by then compiled code has its graph in one piece.

    A copy of a module, and one that was pickled, finds its own.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, torch.dtype, torch.device], Any] = {}

    def __reduce__(self) -> tuple[type[Operators], tuple[()]]:
        return Operators, ()

    def get(self, name: str, x: Tensor, head_size: int = 0, decay: str = "loglog") -> Any:
        """The operator `name` for a module that has only one such, for tensors like `x`."""
        dtype = computing_dtype(x)
        op = self._found.get((name, dtype, x.device))
        if op is None:
            op = self._found[name, dtype, x.device] = find(name, head_size, dtype, x.device, decay)
        return op
