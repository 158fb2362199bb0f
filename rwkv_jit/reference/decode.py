"""The serving operators: rows of a batch on slots of a pool, by the recurrences themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .sequences import Result


def on_pool(recurrence: Callable[..., Result]) -> Callable[..., Result]:
    """A recurrence as a serving operator, which returns y and the pool as it is afterwards.

    It takes the tokens of `recurrence`, state [slots, H, N, N], state_indices [B] or None, and the
    same options. A row whose index is no slot has a y of 0.
    """

    def decode(*tensors: torch.Tensor | None, **options: Any) -> Result:
        *tokens, state, indices = tensors
        first = tokens[0]
        assert first is not None
        assert state is not None
        rows, slots = first.shape[0], state.shape[0]
        if indices is None:
            indices = torch.arange(rows, device=state.device)
        # uses[p, i]: row i has slot p. Nothing here has a shape that depends on values.
        uses = indices[None] == torch.arange(slots, device=state.device)[:, None]
        read = state[indices.long().clamp(0, max(slots - 1, 0))] if slots else state
        y, final = recurrence(*tokens, read, True, **options)
        assert final is not None
        y = torch.where(uses.any(0)[:, None, None, None], y, 0)
        if rows == 0:
            return y, state.to(final.dtype)
        advanced = final[uses.int().argmax(1)]
        return y, torch.where(uses.any(1)[:, None, None, None], advanced, state.to(final.dtype))

    return decode
