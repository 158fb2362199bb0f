"""FLA 0.6.0's functions for the steps around RWKV-7's recurrence, with its arguments.

They need no Triton and run on a CPU, too. `channel_mixing_rwkv7` has our operators inside. The
others cut the layer at other places than our operators and are plain PyTorch here; where the code
around them can change, "token_shift_mix", "kk_pre" and "readout" do more in one pass.
"""

from __future__ import annotations

import torch

from ..registry import get_op

Mixed = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None
]

# Where token_shift_mix has what is made with x_k.
_KEY = 2


def channel_mixing_rwkv7(
    x: torch.Tensor,
    x_prev: torch.Tensor,
    x_k: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    inplace: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RWKV-7's channel mixing.

    x: [B, T, C], float32, float16 or bfloat16.
    x_prev: [B, C] or [B, 1, C], same dtype. The token before the first.
    x_k: C values in any shape, same dtype or float32.
    key_weight: [C, F]; value_weight: [F, C]. The transposed weights of nn.Linear.
    inplace: without effect; upstream writes the gradients of x and x_prev into them.

    Returns the output [B, T, C] and x[-1], which is what upstream returns; the last token of each
    sequence is x[:, -1]. Raises ArgumentError for tensors that do not fit.
    """
    del inplace
    shift, activate = (
        get_op(name, dtype=x.dtype, device=x.device) for name in ("token_shift_mix", "relu_squared")
    )
    before = x_prev.reshape(x.shape[0], x.shape[-1])
    mixed = shift(x, x_k=x_k.reshape(-1), initial_state=before)
    return activate(mixed[_KEY] @ key_weight) @ value_weight, x[-1]


def fused_addcmul_rwkv7(
    hidden_states: torch.Tensor,
    delta: torch.Tensor,
    xr: torch.Tensor,
    xw: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    xa: torch.Tensor,
    xg: torch.Tensor | None = None,
) -> Mixed:
    """hidden_states + delta * x for each x, or None for an xg of None.

    hidden_states, delta: [B, T, C]. xr ... xg: what broadcasts to them.
    """
    r, w, k, v, a = (torch.addcmul(hidden_states, delta, x) for x in (xr, xw, xk, xv, xa))
    return r, w, k, v, a, None if xg is None else torch.addcmul(hidden_states, delta, xg)


def fused_k_rwkv7(
    k: torch.Tensor,
    a: torch.Tensor,
    ka: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
) -> torch.Tensor:
    """k * (1 + (a - 1) * ka).

    k, a: [B, T, C]. ka: what broadcasts to them. cu_seqlens, cu_seqlens_cpu: without effect.
    """
    del cu_seqlens, cu_seqlens_cpu
    return k.addcmul(k * (a - 1), ka)


def gate_output_correction(
    o: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    r_k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
) -> torch.Tensor:
    """(o + (sum over a head of r * k * r_k) v) * g.

    o, g: [B, T, H * N]. r, k, v: [B, T, H, N]. r_k: [H, N].
    """
    bonus = (r * k * r_k).sum(-1, keepdim=True) * v
    return (o + bonus.view(o.shape)) * g
