"""wkv6 token by token, from the formula of the RWKV-5 and -6 paper (Peng et al., 2024)."""

from __future__ import annotations

import torch

from .decay import decay_factor
from .sequences import Result, run_sequences


def wkv6(
    r: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    u: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    *,
    decay: str = "loglog",
    state_layout: str = "vk",
    compute_dtype: torch.dtype = torch.float64,
) -> Result:
    """y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T.

    r, k, v: [B, T, H, N], any floating dtype; computed in `compute_dtype`.
    w: [B, T, H, N], or what broadcasts to it.
    u: [H, N].
    initial_state: [B or S, H, N, N], in the order `state_layout`. Zeros if None.
    cu_seqlens: [S + 1], with B = 1.
    Returns y [B, T, H, N] and the final state [B or S, H, N, N], both in `compute_dtype`. Slow;
    differentiable by autograd, any number of times.
    """
    r, w, k, v, u = (x.to(compute_dtype) for x in (r, w, k, v, u))

    def step(
        s: torch.Tensor, r: torch.Tensor, d: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kv = v[..., None] * k[..., None, :]
        y = (s + u[..., None, :] * kv) @ r[..., None]
        return y.squeeze(-1), s * d[..., None, :] + kv

    d = decay_factor(w, decay).expand(r.shape)
    y, final = run_sequences(step, (r, d, k, v), initial_state, cu_seqlens, state_layout)
    return y, final if output_final_state else None
