"""wkv5: wkv6 with one decay for all tokens."""

from __future__ import annotations

import torch

from .sequences import Result
from .wkv6 import wkv6


def wkv5(
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
    """y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d) + v_t k_t^T.

    w: [H, N] or [H]. The rest is as for wkv6.
    """
    return wkv6(
        r, w[:, None] if w.dim() == 1 else w, k, v, u, initial_state, output_final_state,
        cu_seqlens, decay=decay, state_layout=state_layout, compute_dtype=compute_dtype,
    )  # fmt: skip
