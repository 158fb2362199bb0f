"""The serving operators: rows of a batch on slots of a pool, by the recurrences themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Results = tuple[Any, ...]


def on_pool(recurrence: Callable[..., Results]) -> Callable[..., Results]:
    """A recurrence as a serving operator, which returns the recurrence's results, and the pool
    as it is afterwards instead of the final state.

    It takes the tokens of `recurrence`, state [slots, H, N, N], state_indices [B] or None, and the
    same options. A row whose index is no slot has results of 0.
    """

    def decode(*tensors: torch.Tensor | None, **options: Any) -> Results:
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
        *results, final = recurrence(*tokens, read, True, **options)
        results = [torch.where(uses.any(0)[:, None, None, None], x, 0) for x in results]
        if rows == 0:
            return *results, state.to(final.dtype)
        advanced = final[uses.int().argmax(1)]
        pool = torch.where(uses.any(1)[:, None, None, None], advanced, state.to(final.dtype))
        return *results, pool

    return decode
