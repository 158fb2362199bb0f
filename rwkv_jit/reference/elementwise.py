"""The steps around the recurrence, from RWKV-7's equations (Peng et al., 2025, section 4)."""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import normalize, relu

Mixed = tuple[torch.Tensor | None, ...]


def a_gate(
    x: torch.Tensor, a0: torch.Tensor, *, compute_dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """sigmoid(a0 + x), computed in `compute_dtype`, as all of these. x: [B, T, C]. a0: [C]."""
    return torch.sigmoid(a0.to(compute_dtype) + x.to(compute_dtype))


def vres_gate(
    v: torch.Tensor,
    v_first: torch.Tensor,
    x: torch.Tensor,
    v0: torch.Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """v + (v_first - v) * sigmoid(v0 + x). v, v_first, x: [B, T, C]. v0: [C]."""
    v, v_first, x, v0 = (tensor.to(compute_dtype) for tensor in (v, v_first, x, v0))
    return v + (v_first - v) * torch.sigmoid(v0 + x)


def relu_squared(x: torch.Tensor, *, compute_dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """max(x, 0)^2. x: [B, T, C]."""
    return relu(x.to(compute_dtype)).square()


def kk_pre(
    k: torch.Tensor,
    a: torch.Tensor,
    k_k: torch.Tensor,
    k_a: torch.Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k * (1 + (a - 1) * k_a), -kk and kk * a with kk = normalize(k * k_k), head by head.

    k, a: [B, T, H, N]. k_k, k_a: [C], C = H * N.
    """
    k, a, k_k, k_a = (tensor.to(compute_dtype) for tensor in (k, a, k_k, k_a))
    k_k, k_a = (tensor.view(k.shape[2:]) for tensor in (k_k, k_a))
    kk = normalize(k * k_k, dim=-1)
    return k * (1 + (a - 1) * k_a), -kk, kk * a


def readout(
    y: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    r_k: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 64e-5,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """(group_norm(y) * weight + bias + (sum_n r * k * r_k) v) * g, head by head.

    y, r, k, v, g: [B, T, H, N]. r_k: [H, N]. weight, bias: [C], C = H * N.
    """
    y, r, k, v, g = (tensor.to(compute_dtype) for tensor in (y, r, k, v, g))
    r_k, weight, bias = (
        tensor.to(compute_dtype).view(y.shape[2:]) for tensor in (r_k, weight, bias)
    )
    deviation = y - y.mean(-1, keepdim=True)
    normed = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt()
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (normed * weight + bias + bonus) * g


def token_shift_mix(
    x: torch.Tensor,
    x_r: torch.Tensor | None = None,
    x_w: torch.Tensor | None = None,
    x_k: torch.Tensor | None = None,
    x_v: torch.Tensor | None = None,
    x_a: torch.Tensor | None = None,
    x_g: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> Mixed:
    """x_t + (x_{t-1} - x_t) * x_j for each x_j that is given, and the last token.

    x: [B, T, C]. x_j: [C]. initial_state: [B or S, C], the token before the first; zeros if None.
    cu_seqlens: [S + 1], with B = 1.
    """
    x = x.to(compute_dtype)
    batch, _, channels = x.shape
    if cu_seqlens is None:
        sequences = [x]
        states = batch
    else:
        bounds = cu_seqlens.tolist()
        sequences = [x[:, begin:end] for begin, end in itertools.pairwise(bounds)]
        states = len(sequences)
    if initial_state is None:
        initial_state = x.new_zeros(states, channels)
    starts = initial_state.to(compute_dtype)[:, None].split(batch if cu_seqlens is None else 1)
    whole = [torch.cat([start, part], 1) for start, part in zip(starts, sequences, strict=True)]
    before = torch.cat([part[:, :-1] for part in whole], 1) if whole else x
    outputs = (
        None if mix is None else x + (before - x) * mix.to(compute_dtype)
        for mix in (x_r, x_w, x_k, x_v, x_a, x_g)
    )
    final = torch.cat([part[:, -1] for part in whole]) if whole else x.new_zeros(0, channels)
    return *outputs, final if output_final_state else None


def addcmul_mix(
    x: torch.Tensor,
    delta: torch.Tensor,
    x_r: torch.Tensor | None = None,
    x_w: torch.Tensor | None = None,
    x_k: torch.Tensor | None = None,
    x_v: torch.Tensor | None = None,
    x_a: torch.Tensor | None = None,
    x_g: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> Mixed:
    """x + delta * x_j for each x_j that is given. x, delta: [B, T, C]. x_j: [C]."""
    x, delta = x.to(compute_dtype), delta.to(compute_dtype)
    return tuple(
        None if mix is None else x + delta * mix.to(compute_dtype)
        for mix in (x_r, x_w, x_k, x_v, x_a, x_g)
    )


def k_update(
    k: torch.Tensor,
    a: torch.Tensor,
    k_a: torch.Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """k * (1 + (a - 1) * k_a). k, a: [B, T, C]. k_a: [C]."""
    k, a, k_a = (tensor.to(compute_dtype) for tensor in (k, a, k_a))
    return k * (1 + (a - 1) * k_a)


def gate_output_correction(
    y: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    r_k: torch.Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """(y + (sum_n r * k * r_k) v) * g, head by head. y, r, k, v, g: [B, T, H, N]. r_k: [H, N]."""
    y, r, k, v, g, r_k = (tensor.to(compute_dtype) for tensor in (y, r, k, v, g, r_k))
    return (y + (r * k * r_k).sum(-1, keepdim=True) * v) * g
