"""The loss of RWKV's training, from its formula."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy


def l2wrap_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's cross entropy, and its largest logit.

    logits: [B, T, C], any floating dtype; computed in `compute_dtype`.
    targets: [B, T], int64: from 0 to C - 1, or -1 for a token of which both results are 0.
    Returns loss and maximum, [B, T], in `compute_dtype`. Differentiable by autograd, any number of
    times; a maximum that several classes have is that of the first.
    """
    x = logits.to(compute_dtype)
    loss = cross_entropy(x.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    maximum = x.gather(-1, x.argmax(-1, keepdim=True)).squeeze(-1)
    return loss.view(targets.shape), torch.where(targets == -1, 0, maximum)
