"""The operators that a module runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import Op, get_op


class Operators:
    """Operators for tensors as they come, each found once.

    They are kept because torch.compile cannot trace finding one; a copy of a module, and one that
    was pickled, finds its own.

    head_size: N of all of them.
    """

    def __init__(self, head_size: int) -> None:
        self._head_size = head_size
        self._found: dict[tuple[str, torch.dtype, torch.device], Op] = {}

    def __reduce__(self) -> tuple[type[Operators], tuple[Any, ...]]:
        return Operators, (self._head_size,)

    def get(self, name: str, x: Tensor, decay: str = "loglog") -> Op:
        """The operator `name` where `x` is, for its dtype or autocast's."""
        device = x.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else x.dtype
        op = self._found.get((name, dtype, device))
        if op is None:
            op = _find(name, self._head_size, dtype, device, decay)
            self._found[name, dtype, device] = op
        return op


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _find(name: str, head_size: int, dtype: torch.dtype, device: torch.device, decay: str) -> Op:
    return get_op(name, head_size=head_size, dtype=dtype, device=device, decay=decay)
