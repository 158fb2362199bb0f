"""The gate: results and gradients against the recurrence in float64, on a small slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from .cases import Shape
from .inputs import Tensors, draw_gradient

# Largest relative RMS error of y and of any gradient that is right for the dtype, or for tf32.
LIMITS: Mapping[str, float] = {
    "bf16": 1.2e-2,
    "fp16": 5e-3,
    "tf32": 1.5e-3,
    "fp32": 2e-5,
    "fp64": 1e-12,
}
# Of two sequences and two heads; the tokens are a multiple of what kernels of others insist on.
_MOST_TOKENS = 128
# Of two sequences with all channels, so that sums over tokens are shared out as in the whole.
_MOST_TOKENS_OF_STEPS = 1024

Results = Callable[[Tensors], Sequence[torch.Tensor | None]]


def slice_of(shape: Shape, *, all_channels: bool = False) -> Shape:
    """The shape that the gate looks at."""
    return replace(
        shape,
        batch=min(shape.batch, 2),
        length=min(shape.length, _MOST_TOKENS_OF_STEPS if all_channels else _MOST_TOKENS),
        heads=shape.heads if all_channels else min(shape.heads, 2),
    )


def relative_errors(
    results: Results,
    truth: Results,
    tensors: Tensors,
    names: Sequence[str] = ("y",),
    *,
    gradients: bool = True,
) -> dict[str, float]:
    """Relative RMS error of each result and, with `gradients`, of each tensor's (`d<name>`).

    results: what is examined. truth: gets the same in float64 on the CPU. Both return a
    tensor for each of `names`, and may return None for others. An error that is no number is
    infinite.
    """
    given_in = {name: x.detach().clone() for name, x in tensors.items()}
    exact_in = {name: _exact(x) for name, x in given_in.items()}
    differentiable = [name for name, x in tensors.items() if x.is_floating_point()]
    leaves = [given_in[name].requires_grad_(gradients) for name in differentiable]
    exact = [exact_in[name].requires_grad_(gradients) for name in differentiable]
    outputs, right = _made(results, given_in), _made(truth, exact_in)
    labels, pairs = [*names], [*zip(outputs, right, strict=True)]
    if gradients:
        given = [draw_gradient(x) for x in outputs]
        made = torch.autograd.grad(outputs, leaves, given)
        expected = torch.autograd.grad(right, exact, [x.double().cpu() for x in given])
        labels += [f"d{name}" for name in differentiable]
        pairs += zip(made, expected, strict=True)
    return {
        label: _relative_rms(value.detach().double().cpu(), right_value.detach())
        for label, (value, right_value) in zip(labels, pairs, strict=True)
    }


def worst_of(errors: Mapping[str, float]) -> str:
    """The name of the largest error."""
    return max(errors, key=lambda name: errors[name])


def _exact(x: torch.Tensor) -> torch.Tensor:
    """On the CPU, in float64 unless it is of whole numbers."""
    return x.to("cpu", torch.float64 if x.is_floating_point() else x.dtype, copy=True)


def _made(results: Results, tensors: Tensors) -> list[torch.Tensor]:
    return [x for x in results(tensors) if x is not None]


def _relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    if torch.equal(value, truth):
        # Of a first token the gradients of w, a and b are 0, which nothing can be relative to.
        return 0.0
    error = ((value - truth).norm() / truth.norm()).item()
    return math.inf if math.isnan(error) else error
