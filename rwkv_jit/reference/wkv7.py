"""wkv7 token by token, from the formula of the RWKV-7 paper (Peng et al., 2025, section 4)."""

from __future__ import annotations

import torch

from .decay import decay_factor
from .sequences import Result, run_sequences


def wkv7(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    decay: str = "loglog",
    state_layout: str = "vk",
    compute_dtype: torch.dtype = torch.float64,
) -> Result:
    """S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t.

    r, w, k, v, a, b: [B, T, H, N], any floating dtype; computed in `compute_dtype`.
    initial_state: [B or S, H, N, N], in the order `state_layout`. Zeros if None.
    cu_seqlens: [S + 1], with B = 1.
    Returns y [B, T, H, N] and the final state [B or S, H, N, N], both in `compute_dtype`. Slow;
    differentiable by autograd, any number of times.
    """
    r, w, k, v, a, b = (x.to(compute_dtype) for x in (r, w, k, v, a, b))
    tokens = (r, decay_factor(w, decay), k, v, a, b)
    y, final = run_sequences(_step, tokens, initial_state, cu_seqlens, state_layout)
    return y, final if output_final_state else None


def _step(
    s: torch.Tensor,
    r: torch.Tensor,
    d: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    sa = s @ a[..., None]
    s = s * d[..., None, :] + sa * b[..., None, :] + v[..., None] * k[..., None, :]
    return (s @ r[..., None]).squeeze(-1), s
