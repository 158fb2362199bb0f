"""flash_rwkv 0.3.0's functions: RWKV-5 and RWKV-6 on tensors [B, T, C], with a state.

What differs from upstream: any head size, which is that of the state, where upstream has 64; a CPU
as well as a GPU; states of a batch are right (upstream reads and writes those of the first sequence
for all); RWKV-6 has gradients, and so has the state; inputs may have any strides.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from .tensors import check_is_tensor, operator_for, split_channels, split_heads


def rwkv5_cuda_linear_attention(
    receptance: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RWKV-5 time mixing.

    receptance, key, value: [B, T, C], one dtype: float32, float16 or bfloat16.
    time_decay: [C] or [H, N], any floating dtype. The factor is d = exp(-exp(time_decay)).
    time_first: [C] or [H, N], the dtype of receptance or float32. The bonus u.
    state: [B, H, N, N], axes (value, key), float32. It is not written to.

    Returns out [B, T, C] in the dtype of receptance and the state after the last token, like
    `state`. All inputs get gradients. Raises ArgumentError for tensors that do not fit.
    """
    function = "rwkv5_cuda_linear_attention"
    size = _head_size(function, state)
    r, k, v = _tokens(function, receptance, key, value, size)
    w = _decay(split_channels(function, "time_decay", time_decay, size), r)
    u = split_channels(function, "time_first", time_first, size)
    y, final_state = operator_for(function, "wkv5", r)(r, w, k, v, u, state, True)
    assert final_state is not None, "asked for"
    return y.flatten(2), final_state


def rwkv6_cuda_linear_attention(
    receptance: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    time_decay: torch.Tensor,
    time_first: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RWKV-6 time mixing.

    receptance, key, value: [B, T, C], one dtype: float32, float16 or bfloat16.
    time_decay: [B, T, C], any floating dtype. The factor is d = exp(-exp(time_decay)).
    time_first: [H, N] or [C], the dtype of receptance or float32. The bonus u.
    state: [B, H, N, N], axes (value, key), float32. It is not written to.

    Returns out [B, T, H, N] in the dtype of receptance and the state after the last token, like
    `state`. All inputs get gradients. Raises ArgumentError for tensors that do not fit.
    """
    function = "rwkv6_cuda_linear_attention"
    size = _head_size(function, state)
    r, k, v = _tokens(function, receptance, key, value, size)
    w = _decay(split_heads(function, "time_decay", time_decay, size), r)
    u = split_channels(function, "time_first", time_first, size)
    y, final_state = operator_for(function, "wkv6", r)(r, w, k, v, u, state, True)
    assert final_state is not None, "asked for"
    return y, final_state


class Rwkv5LinearAttention:
    """Its `apply` is `rwkv5_cuda_linear_attention`; it is no autograd function itself."""

    apply = staticmethod(rwkv5_cuda_linear_attention)


class Rwkv6LinearAttention:
    """Its `apply` is `rwkv6_cuda_linear_attention`; it is no autograd function itself."""

    apply = staticmethod(rwkv6_cuda_linear_attention)


def _head_size(function: str, state: torch.Tensor) -> int:
    check_is_tensor(function, "state", state)
    if state.dim() != 4 or not state.shape[-1]:
        raise ArgumentError(
            f"{function}: state has shape {list(state.shape)}, but must be [B, H, N, N] with the "
            "model's head size N; pass zeros where there is no state yet"
        )
    return state.shape[-1]


def _tokens(
    function: str, receptance: torch.Tensor, key: torch.Tensor, value: torch.Tensor, size: int
) -> list[torch.Tensor]:
    given = {"receptance": receptance, "key": key, "value": value}
    tokens = [split_heads(function, name, x, size) for name, x in given.items()]
    for name, x in given.items():
        if x.dtype != receptance.dtype:
            raise ArgumentError(
                f"{function}: {name} is {x.dtype}, but receptance is {receptance.dtype}; "
                "convert one of them"
            )
    return tokens


def _decay(time_decay: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The operators take a decay of the tokens' dtype or of float32."""
    if time_decay.is_floating_point() and time_decay.dtype != r.dtype:
        return time_decay.float()
    return time_decay
