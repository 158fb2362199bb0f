"""The decay conventions in plain PyTorch."""

from __future__ import annotations

import math

import torch


def log_decay(w: torch.Tensor, decay: str) -> torch.Tensor:
    """log d, where d is the factor of a token's decay.

    w: any shape. Raw decay, as the convention `decay` has it:
        "loglog" d = exp(-exp(w)) (RWKV-LM), "logit" d = exp(-exp(-1/2) * sigmoid(w)) (RWKV-LM's
        clamped kernels), "log" d = exp(w) (flash-linear-attention).
    """
    if decay == "loglog":
        # From e^10 on d is 0 in float64 too; the bound keeps 0 * infinity out of the gradient.
        return -torch.exp(w.clamp_max(10.0))
    if decay == "logit":
        return -math.exp(-0.5) * torch.sigmoid(w)
    return w
