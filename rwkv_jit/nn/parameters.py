"""Parameters of the modules: made empty, filled as RWKV-LM begins, and taken from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import ArgumentError


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


def checkpoint_part(
    module: str,
    checkpoint: Mapping[str, Tensor],
    prefix: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Copies of a checkpoint's tensors whose names begin with `prefix`, named without it.

    module: who wants them, for the error. Raises ArgumentError if there are none.
    """
    part = {
        name.removeprefix(prefix): tensor.to(device=device, dtype=dtype, copy=True)
        for name, tensor in checkpoint.items()
        if name.startswith(prefix)
    }
    if not part:
        raise ArgumentError(
            f"{module}: the checkpoint has no {prefix}*; pass one in RWKV-LM's format, and the "
            "number of a layer that it has"
        )
    return part
