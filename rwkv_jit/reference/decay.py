"""The decay conventions in plain PyTorch."""

from __future__ import annotations

import math

import torch


def decay_factor(w: torch.Tensor, decay: str) -> torch.Tensor:
    """d, the factor of a token's decay.

    w: any shape. Raw decay, as the convention `decay` has it:
        "loglog" d = exp(-exp(w)) (RWKV-LM), "logit" d = exp(-exp(-1/2) * sigmoid(w)) (RWKV-LM's
        clamped kernels), "log" d = exp(w) (flash-linear-attention),
        "factor" d = w.
    """
    if decay == "factor":
        return w
    if decay == "loglog":
        # From e^10 on d is 0 in float64 too; the bound keeps 0 * infinity out of the gradient.
        return torch.exp(-torch.exp(w.clamp_max(10.0)))
    if decay == "logit":
        return torch.exp(-math.exp(-0.5) * torch.sigmoid(w))
    return torch.exp(w)
