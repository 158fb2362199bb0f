"""The serving operators: rows of a batch, or packed sequences, on slots of a pool, by the
recurrences themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Results = tuple[Any, ...]


def on_pool(recurrence: Callable[..., Results], *, packed: bool = False) -> Callable[..., Results]:
    """A recurrence as a serving operator, which returns the recurrence's results, and the pool as
    it is afterwards instead of the final state.

    It takes the tokens of `recurrence`, state [slots, H, N, N], if `packed` cu_seqlens [S + 1] or
    None, state_indices [B or S] or None, and the same options. What has an index that is no slot
    has results of 0.
    """

    def serve(*tensors: torch.Tensor | None, **options: Any) -> Results:
        *tokens, state, bounds, indices = tensors if packed else (*tensors[:-1], None, tensors[-1])
        first = tokens[0]
        assert first is not None
        assert state is not None
        count, slots = first.shape[0] if bounds is None else bounds.shape[0] - 1, state.shape[0]
        if indices is None:
            indices = torch.arange(count, device=state.device)
        # uses[p, i]: the i-th has slot p. Nothing here has a shape that depends on values.
        uses = indices[None] == torch.arange(slots, device=state.device)[:, None]
        read = state[indices.long().clamp(0, max(slots - 1, 0))] if slots else state
        given = (*tokens, read, True, bounds) if packed else (*tokens, read, True)
        *results, final = recurrence(*given, **options)
        if count == 0:
            return *results, state.to(final.dtype)
        used = uses.any(0)[:, None]
        if bounds is not None:
            times = torch.arange(first.shape[1], device=state.device)
            whose = torch.searchsorted(bounds.long(), times, right=True) - 1
            used = used[whose.clamp(max=count - 1), 0][None]
        results = [torch.where(used[..., None, None], x, 0) for x in results]
        advanced = final[uses.int().argmax(1)]
        pool = torch.where(uses.any(1)[:, None, None, None], advanced, state.to(final.dtype))
        return *results, pool

    return serve
