"""Operators on tokens [B, T, C], as the functions of RWKV-LM have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ArgumentError
from .tensors import batched_state, check_is_tensor, operator_for, shaped, split_heads

_TOKENS = {"wkv5": ("r", "k", "v"), "wkv6": ("r", "k", "v", "w")}


def run_op(
    op: str,
    tokens: Sequence[torch.Tensor],
    state: torch.Tensor | None,
    *,
    decay: str = "loglog",
    state_layout: str = "vk",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, T, H, N] and the final state of `op` for tokens in its order, where they are."""
    operator = operator_for(op, op, tokens[0], decay=decay, state_layout=state_layout)
    y, final_state = operator(*tokens, initial_state=state, output_final_state=True)
    assert final_state is not None, "it was asked for"
    return y, final_state


def without_bonus(
    function: str,
    tokens: tuple[torch.Tensor, ...],
    head_size: int,
    *,
    names: str = "rwkvab",
    decay: str = "loglog",
    s0: torch.Tensor | None = None,
    state_name: str = "s0",
    state_layout: str = "vk",
) -> tuple[torch.Tensor, torch.Tensor]:
    """RWKV-7: y [B, T, C] and the final state, for tokens in the order of our operator."""
    values = [
        split_heads(function, name, x, head_size) for name, x in zip(names, tokens, strict=True)
    ]
    state = None if s0 is None else batched_state(function, state_name, s0, values[0])
    y, final_state = run_op("wkv7", values, state, decay=decay, state_layout=state_layout)
    return y.flatten(-2), final_state


def with_bonus(
    function: str,
    op: str,
    sizes: tuple[int, ...],
    tensors: dict[str, torch.Tensor],
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RWKV-5 and RWKV-6: y [B, T, C] and the final state. sizes: B, T, C and H."""
    batch, length, channels, heads = sizes
    if heads < 1 or channels % heads != 0:
        raise ArgumentError(
            f"{function}: C={channels} must be a multiple of H={heads}, the number of heads"
        )
    size = channels // heads
    # As [B, T, C] first, for a message in the caller's terms.
    tokens = {name: tensors[name] for name in _TOKENS[op]}
    for name, x in tokens.items():
        check_is_tensor(function, name, x)
        if x.shape != (batch, length, channels):
            raise ArgumentError(
                f"{function}: {name} has shape {list(x.shape)}, but must be [B, T, C] with "
                f"B={batch}, T={length} and C={channels}"
            )
    split = {name: split_heads(function, name, x, size) for name, x in tokens.items()}
    for name in ("w", "u"):
        if name not in split:
            split[name] = shaped(function, name, tensors[name], (heads, size))
    values = [split[name] for name in "rwkvu"]
    start = None if state is None else batched_state(function, "s", state, values[0])
    y, final_state = run_op(op, values, start)
    return y.flatten(-2), final_state
