"""Checks of indices: do cu_seqlens and state_indices say where sequences and states are?"""

from __future__ import annotations

import torch

from .errors import ArgumentError


def check_slots(name: str, indices: torch.Tensor | None, slots: int) -> None:
    """Raise ArgumentError unless `indices` are slots of a pool of `slots`, each once, or -1. Waits
    for the device."""
    if indices is None:
        return
    values = indices.tolist()
    seen: set[int] = set()
    for row, slot in enumerate(values):
        if not -1 <= slot < slots:
            raise ArgumentError(
                f"{name}: state_indices[{row}] is {slot}, but state has {slots} slots; choose from "
                f"0 to {slots - 1}, or -1 to skip the row"
            )
        if slot in seen:
            raise ArgumentError(
                f"{name}: state_indices has slot {slot} twice, in rows {values.index(slot)} and "
                f"{row}; a slot serves one row of a call"
            )
        if slot >= 0:
            seen.add(slot)


def check_bounds(
    name: str, bounds: torch.Tensor | None, length: int, *, may_end_before: bool
) -> None:
    """Raise ArgumentError unless `bounds` rise from 0 to `length`, or to at most that. Waits for
    the device."""
    if bounds is None:
        return
    values = bounds.tolist()
    end_is_right = values[-1] <= length if may_end_before else values[-1] == length
    if values[0] != 0 or not end_is_right or values != sorted(values):
        raise ArgumentError(
            f"{name}: cu_seqlens={_shorten(values)} must rise from 0 to "
            f"{'at most ' if may_end_before else ''}T={length}"
        )


def _shorten(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
