"""What the modules of upstreams share: channels to heads, states, and a call of an operator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..errors import ArgumentError
from .tensors import check_is_tensor, operator_for


def split_heads(
    operator: str, tensors: Mapping[str, torch.Tensor], head_size: int, shape: str = "[B, T, C]"
) -> dict[str, torch.Tensor]:
    """Tensors by name, each of `shape`, whose last axis C becomes H, N.

    Raises ArgumentError for another number of axes, or a C that is no multiple of `head_size`.
    """
    split: dict[str, torch.Tensor] = {}
    for name, x in tensors.items():
        check_is_tensor(operator, name, x)
        if x.dim() != len(shape.split(",")):
            raise ArgumentError(
                f"{operator}: {name} has shape {list(x.shape)}, but must be {shape}"
            )
        channels = x.shape[-1]
        if head_size < 1 or channels % head_size != 0:
            raise ArgumentError(
                f"{operator}: {name} has C={channels} in {shape}, but it must be a multiple of the "
                f"head size {head_size}; pass HEAD_SIZE= if yours is another"
            )
        split[name] = x.unflatten(-1, (channels // head_size, head_size))
    return split


def shaped(operator: str, name: str, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`x`, whose elements must be as many as those of `shape`, in that shape."""
    check_is_tensor(operator, name, x)
    if x.numel() != math.prod(shape):
        raise ArgumentError(
            f"{operator}: {name} has shape {list(x.shape)}, but must hold {list(shape)}"
        )
    return x.reshape(shape)


def batched_state(
    operator: str, name: str, state: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """A state for each sequence, in the dtype that the operator keeps states in.

    state: [H, N, N], the same for every sequence, or [B, H, N, N]; any floating dtype.
    tokens: [B, T, H, N].
    """
    check_is_tensor(operator, name, state)
    batch, _, heads, size = tokens.shape
    if state.shape == (heads, size, size):
        state = state.expand(batch, -1, -1, -1)
    elif state.shape != (batch, heads, size, size):
        raise ArgumentError(
            f"{operator}: {name} has shape {list(state.shape)}, but must be [H, N, N] or "
            f"[B, H, N, N] with B={batch}, H={heads} and N={size}"
        )
    return state.to(torch.promote_types(tokens.dtype, torch.float32))


def run_op(
    op: str,
    tokens: Sequence[torch.Tensor],
    state: torch.Tensor | None,
    *,
    decay: str = "loglog",
    state_layout: str = "vk",
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, T, H, N] and the final state of `op` for tokens in its order, where they are."""
    function = operator_for(op, op, tokens[0], decay=decay, state_layout=state_layout)
    y, final_state = function(*tokens, initial_state=state, output_final_state=True)
    assert final_state is not None, "it was asked for"
    return y, final_state
