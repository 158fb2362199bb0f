"""wkv7 from what a layer of a model projects (Peng et al., 2025, section 4)."""

from __future__ import annotations

from typing import Any

import torch

from .wkv7 import wkv7


def wkv7_fused(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    w0: torch.Tensor,
    a0: torch.Tensor,
    k_k: torch.Tensor,
    k_a: torch.Tensor,
    *rest: Any,
    compute_dtype: torch.dtype = torch.float64,
    decay: str = "loglog",
    state_layout: str = "vk",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """kk = normalize(k_k * k), g = sigmoid(a0 + a), new_k = k * (1 + (g - 1) * k_a), and wkv7 of
    r, w0 + w, new_k, v, -kk, kk * g.

    r, w, k, v, a: [B, T, H, N]. w0, a0, k_k, k_a: [H, N]. rest: as for wkv7.
    Returns y, new_k and the final state.
    """
    w, k, a, w0, a0, k_k, k_a = (x.to(compute_dtype) for x in (w, k, a, w0, a0, k_k, k_a))
    kk = torch.nn.functional.normalize(k_k * k, dim=-1)
    gate = torch.sigmoid(a0 + a)
    new_k = k * (1 + (gate - 1) * k_a)
    y, final = wkv7(
        r,
        w0 + w,
        new_k,
        v,
        -kk,
        kk * gate,
        *rest,
        compute_dtype=compute_dtype,
        decay=decay,
        state_layout=state_layout,
    )
    return y, new_k, final
