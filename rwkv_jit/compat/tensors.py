"""What the calling conventions need alike: operators for tensors, heads and states."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import ArgumentError
from ..launch import TORCH_DTYPES
from ..op import Op
from ..registry import get_op


def operator_for(
    function: str,
    name: str,
    r: torch.Tensor,
    *,
    head_size: int | None = None,
    decay: str = "loglog",
    state_layout: str = "vk",
    lower_bound: float | None = None,
) -> Op:
    """The operator `name` for the dtype and device of `r`.

    function: what the caller called, for errors.
    r: [B, T, H, N].
    head_size: N; that of `r` if None.
    """
    check_is_tensor(function, "r", r)
    if r.dim() != 4:
        raise ArgumentError(
            f"{function}: r has shape {list(r.shape)}, but must be [B, T, H, N]; reshape it"
        )
    if not r.is_floating_point():
        raise ArgumentError(
            f"{function}: r is {r.dtype}, but must be bfloat16, float16 or float32; convert it"
        )
    size = r.shape[-1] if head_size is None else head_size
    op: Op = _get_op(name, size, r.dtype, r.device, decay, state_layout, lower_bound)
    return op


# Compiled code breaks its graph here; it would trace into asking what machine this is otherwise.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _get_op(
    name: str,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    decay: str,
    state_layout: str,
    lower_bound: float | None,
) -> Op:
    return get_op(
        name,
        head_size=head_size,
        dtype=dtype,
        device=device,
        decay=decay,
        state_layout=state_layout,
        lower_bound=lower_bound,
    )


def check_is_tensor(function: str, name: str, value: object) -> None:
    """Raise ArgumentError unless `value`, the argument `name`, is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"{function}: {name} is a {type(value).__name__}, not a tensor")


def split_heads(
    function: str, name: str, x: torch.Tensor, head_size: int, shape: str = "[B, T, C]"
) -> torch.Tensor:
    """A tensor of `shape`, whose last axis C becomes H, N; a view where strides allow."""
    check_is_tensor(function, name, x)
    if x.dim() != len(shape.split(",")) or head_size < 1 or x.shape[-1] % head_size:
        raise ArgumentError(
            f"{function}: {name} has shape {list(x.shape)}, but must be {shape} with C a "
            f"multiple of the head size {head_size}; reshape it, or check the head size"
        )
    return x.reshape(*x.shape[:-1], x.shape[-1] // head_size, head_size)


def split_channels(function: str, name: str, x: torch.Tensor, head_size: int) -> torch.Tensor:
    """[C] as [H, N]; what is [H, N] is returned as it is."""
    check_is_tensor(function, name, x)
    if x.dim() == 2:
        return x
    if x.dim() != 1 or x.shape[0] % head_size:
        raise ArgumentError(
            f"{function}: {name} has shape {list(x.shape)}, but must be [H, N] or [C] with C a "
            f"multiple of the head size {head_size}; reshape it, or check the head size"
        )
    return x.reshape(x.shape[0] // head_size, head_size)


def shaped(function: str, name: str, x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`x`, whose elements must be as many as those of `shape`, in that shape."""
    check_is_tensor(function, name, x)
    if x.numel() != math.prod(shape):
        raise ArgumentError(
            f"{function}: {name} has shape {list(x.shape)}, but must hold {list(shape)}"
        )
    return x.reshape(shape)


def of_channels(function: str, name: str, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter of `shape`, which may have come with ones before that."""
    check_is_tensor(function, name, x)
    if x.shape[-len(shape) :] != shape or x.numel() != math.prod(shape):
        raise ArgumentError(
            f"{function}: {name} has shape {list(x.shape)}, but must be {list(shape)}, or that "
            "after ones, as it is the same for all tokens; reshape it"
        )
    return x.reshape(shape)


def batched_state(
    function: str, name: str, state: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """A state for each sequence, in the dtype that the operator keeps states in.

    state: [H, N, N], the same for every sequence, or [B, H, N, N]; any floating dtype.
    tokens: [B, T, H, N].
    """
    check_is_tensor(function, name, state)
    batch, _, heads, size = tokens.shape
    if state.shape == (heads, size, size):
        state = state.expand(batch, -1, -1, -1)
    elif state.shape != (batch, heads, size, size):
        raise ArgumentError(
            f"{function}: {name} has shape {list(state.shape)}, but must be [H, N, N] or "
            f"[B, H, N, N] with B={batch}, H={heads} and N={size}"
        )
    return state.to(torch.promote_types(tokens.dtype, torch.float32))


def as_state(op: Op, state: torch.Tensor | None) -> torch.Tensor | None:
    """A state of any floating dtype in the one that `op` takes."""
    if isinstance(state, torch.Tensor) and state.is_floating_point():
        return state.to(TORCH_DTYPES[op.config.state_dtype])
    return state
