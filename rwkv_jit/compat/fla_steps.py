"""FLA 0.6.0's functions for the steps around RWKV-7's recurrence, with its arguments.

They need no Triton and run on a CPU, too: one kernel each way, in channel mixing one before and one
between the matrix products. Where the code around them can change, "token_shift_mix", "kk_pre" and
"readout" do more in one pass.

Tensors have one dtype, the result's: float32, float16 or bfloat16. Parameters of the channels have
that or float32, and gradients summed in float32 in a fixed order. What does not fit raises
ArgumentError.
"""

from __future__ import annotations

import torch

from ..nn.operators import find
from .tensors import check_is_tensor, of_channels, split_heads

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

    x: [B, T, C].
    x_prev: [B, C] or [B, 1, C]. The token before the first.
    x_k: [C] or [1, 1, C].
    key_weight: [C, F]; value_weight: [F, C]. The transposed weights of nn.Linear.
    inplace: without effect; upstream writes the gradients of x and x_prev into them.

    Returns the output [B, T, C] and x[-1], which is what upstream returns; the last token of each
    sequence is x[:, -1].
    """
    del inplace
    function = "channel_mixing_rwkv7"
    check_is_tensor(function, "x", x)
    shift, activate = (
        find(name, x.dtype, x.device) for name in ("token_shift_mix", "relu_squared")
    )
    before = x_prev.reshape(x.shape[0], x.shape[-1])
    share = of_channels(function, "x_k", x_k, x.shape[-1:])
    mixed = shift(x, x_k=share, initial_state=before)
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

    hidden_states, delta: [B, T, C]. xr ... xg: [C] or [1, 1, C].
    """
    function = "fused_addcmul_rwkv7"
    check_is_tensor(function, "hidden_states", hidden_states)
    mix = find("addcmul_mix", hidden_states.dtype, hidden_states.device)
    channels = hidden_states.shape[-1:]
    given = {"xr": xr, "xw": xw, "xk": xk, "xv": xv, "xa": xa}
    if xg is not None:
        given["xg"] = xg
    shares = [of_channels(function, name, x, channels) for name, x in given.items()]
    mixed: Mixed = mix(hidden_states, delta, *shares)
    return mixed


def fused_k_rwkv7(
    k: torch.Tensor,
    a: torch.Tensor,
    ka: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
) -> torch.Tensor:
    """k * (1 + (a - 1) * ka).

    k, a: [B, T, C]. ka: [C] or [1, 1, C]. cu_seqlens, cu_seqlens_cpu: without effect.
    """
    del cu_seqlens, cu_seqlens_cpu
    function = "fused_k_rwkv7"
    check_is_tensor(function, "k", k)
    update = find("k_update", k.dtype, k.device)
    new_k: torch.Tensor = update(k, a, of_channels(function, "ka", ka, k.shape[-1:]))
    return new_k


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
    function = "gate_output_correction"
    check_is_tensor(function, "r", r)
    heads = r.shape[-2:]
    y, gate = (split_heads(function, name, x, heads[-1]) for name, x in (("o", o), ("g", g)))
    correct = find(function, o.dtype, o.device, heads[-1])
    out: torch.Tensor = correct(y, r, k, v, gate, of_channels(function, "r_k", r_k, heads))
    return out.flatten(2)
