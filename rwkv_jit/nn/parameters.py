"""Parameters of the modules: made empty, and filled as RWKV-LM begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def vectors(
    count: int, width: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> list[nn.Parameter]:
    """`count` unset parameters [1, 1, C], which is how checkpoints have what is of each channel."""
    return [
        nn.Parameter(torch.empty(1, 1, width, device=device, dtype=dtype)) for _ in range(count)
    ]


def low_rank(
    width: int, rank: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """The unset factors [C, rank] and [rank, C] of a map."""
    return (
        nn.Parameter(torch.empty(width, rank, device=device, dtype=dtype)),
        nn.Parameter(torch.empty(rank, width, device=device, dtype=dtype)),
    )


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter to as many values, in the order of its elements."""
    parameter.copy_(values.reshape(parameter.shape))


@torch.no_grad()
def fill_low_rank(first: Tensor, second: Tensor) -> None:
    """A map that is zero, and whose second factor is ready to learn."""
    first.zero_()
    fill_orthogonal(second, 0.1)


@torch.no_grad()
def fill_orthogonal(parameter: Tensor, gain: float) -> None:
    """Rows or columns that are orthogonal, whichever are fewer, of length `gain`."""
    # The decomposition that makes them exists in float32.
    values = torch.empty(parameter.shape, device=parameter.device)
    parameter.copy_(nn.init.orthogonal_(values, gain))
