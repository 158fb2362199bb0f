"""The steps around the recurrence, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the operators compute in: autocast's dtype where it is on, else that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def token_shift_mix(
    x: Tensor, mixes: Sequence[Tensor], shift: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    x = x.to(compute_dtype(x))
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    if cu_seqlens is None:
        if shift is not None:
            before = torch.cat([shift.to(x.dtype)[:, None], x[:, :-1]], dim=1)
        last = x[:, -1]
    else:
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        full = starts < ends
        if shift is None:
            shift = x.new_zeros(len(starts), x.shape[-1])
        before = before[0].index_put((starts[full],), shift[full].to(x.dtype))[None]
        last = torch.where(full[:, None], x[0][(ends - 1).clamp_min(0)], shift.to(x.dtype))
    return [x + (before - x) * m.to(x.dtype) for m in mixes], last


def a_gate(x: Tensor, a0: Tensor) -> Tensor:
    return torch.sigmoid(a0.to(x.dtype) + x)


def vres_gate(v: Tensor, v_first: Tensor, x: Tensor, v0: Tensor) -> Tensor:
    return v + (v_first - v) * torch.sigmoid(v0.to(x.dtype) + x)


def kk_pre(k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    H = k.shape[2]
    k_k, k_a = (x.to(k.dtype).view(H, -1) for x in (k_k, k_a))
    kk = F.normalize(k * k_k, dim=-1)
    return k * (1 + (a - 1) * k_a), -kk, kk * a


def readout(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, r_k: Tensor, weight: Tensor,
    bias: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    B, T, H, N = y.shape
    out = F.group_norm(y.reshape(B * T, H * N), H, weight, bias, eps).to(y.dtype).view(y.shape)
    out = out + (r * k * r_k.to(k.dtype)).sum(-1, keepdim=True) * v
    return out * g
