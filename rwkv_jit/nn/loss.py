"""The loss of RWKV's training: cross entropy that also holds the largest logits small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from .operators import computing_dtype, find

# What RWKV-LM trains with.
L2WRAP = 1e-4
_REDUCTIONS = ("mean", "sum", "none")


def l2wrap_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    l2wrap: float = L2WRAP,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy whose gradient has `l2wrap` times a token's largest logit added at that logit,
    weighted as the token's loss is. The value is that of the cross entropy alone.

    logits: [..., V], bfloat16, float16 or float32, on a CPU float64 too. Kept for the backward as
        they are; the one tensor made of their size is their gradient.
    targets: [...], int64, from 0 to V - 1, or `ignore_index` for a token that counts nothing.
    reduction: "mean" over the tokens that count, "sum", or "none".

    Returns float32 (float64 for float64): a number, or [...] for "none". On a GPU, whose values are
    not looked at beforehand, a target that is no class makes the loss not a number. Raises
    ArgumentError for tensors that do not fit.
    """
    name = "l2wrap_cross_entropy"
    _check_reduction(name, reduction, _REDUCTIONS)
    _check_targets(name, logits, targets, ignore_index)
    counts = targets != ignore_index
    op = find(name, computing_dtype(logits), logits.device)
    loss: Tensor
    maximum: Tensor
    loss, maximum = op(
        logits.reshape(1, -1, logits.shape[-1]), torch.where(counts, targets, -1).reshape(1, -1)
    )
    # The second term is zero and has a gradient.
    loss = (loss + l2wrap * maximum.detach() * (maximum - maximum.detach())).view(targets.shape)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()


def head_l2wrap_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    l2wrap: float = L2WRAP,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_tokens: int = 4096,
) -> Tensor:
    """`l2wrap_cross_entropy(hidden @ weight.T, targets)`, without ever having all logits.

    hidden: [..., C], what the head takes.
    weight: [V, C], the head's, same dtype; both are converted under autocast.
    targets: [...], int64.
    reduction: "mean" or "sum".
    chunk_tokens: how many tokens' logits there are at a time, twice.

    Gradients are made in the forward, chunk by chunk in their order, that of the weight in float32,
    and are held until the backward: [..., C] and [V, C]. There are no second derivatives.
    """
    name = "head_l2wrap_cross_entropy"
    _check_reduction(name, reduction, _REDUCTIONS[:2])
    if chunk_tokens < 1:
        raise ArgumentError(f"{name}: chunk_tokens={chunk_tokens} must be at least 1")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ArgumentError(
            f"{name}: weight has shape {list(weight.shape)}, but must be [V, C] with "
            f"C={hidden.shape[-1]}, which hidden has; pass the head's weight as nn.Linear has it"
        )
    _check_targets(name, hidden, targets, ignore_index, classes=weight.shape[0])
    dtype = computing_dtype(hidden)
    loss: Tensor = _Head.apply(  # type: ignore[no-untyped-call]
        hidden.to(dtype).reshape(-1, hidden.shape[-1]),
        weight.to(dtype),
        targets.reshape(-1),
        l2wrap,
        ignore_index,
        chunk_tokens,
        torch.is_grad_enabled(),
    )
    return loss if reduction == "sum" else loss / (targets != ignore_index).sum()


class _Head(torch.autograd.Function):
    """The sum of the losses. Gradients are of the sum: those of a mean could vanish in float16."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        l2wrap: float,
        ignore_index: int,
        chunk_tokens: int,
        differentiable: bool,
    ) -> Tensor:
        # In here grad mode is off, and what is needed does not depend on what it was before.
        of_hidden, of_weight = (needed and differentiable for needed in ctx.needs_input_grad[:2])
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        dhidden = torch.empty_like(hidden) if of_hidden else None
        dweight = torch.zeros_like(weight, dtype=exact) if of_weight else None
        for first in range(0, len(hidden), chunk_tokens):
            chunk = slice(first, first + chunk_tokens)
            loss, dlogits = _loss_and_gradient(
                hidden[chunk] @ weight.T, targets[chunk], l2wrap, ignore_index,
                of_hidden or of_weight,
            )  # fmt: skip
            total += loss
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[chunk])
            if dweight is not None:
                dweight += dlogits.T @ hidden[chunk]
            # Or it would lie beside the next chunk's.
            del dlogits
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else (dhidden * dloss).to(ctx.dtype),
            None if dweight is None else (dweight * dloss).to(ctx.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, l2wrap: float, ignore_index: int, differentiable: bool
) -> tuple[Tensor, Tensor]:
    """The sum of the losses and, if it is wanted, the gradient of the logits, else the logits."""
    if not differentiable:
        return _sum(logits, targets, l2wrap, ignore_index), logits
    logits.requires_grad_()
    with torch.enable_grad():
        loss = _sum(logits, targets, l2wrap, ignore_index)
    (dlogits,) = torch.autograd.grad(loss, logits)
    return loss.detach(), dlogits


def _sum(logits: Tensor, targets: Tensor, l2wrap: float, ignore_index: int) -> Tensor:
    return l2wrap_cross_entropy(
        logits, targets, l2wrap=l2wrap, ignore_index=ignore_index, reduction="sum"
    )


def _check_reduction(name: str, reduction: str, choices: tuple[str, ...]) -> None:
    if reduction not in choices:
        raise ArgumentError(
            f"{name}: reduction={reduction!r} is not known; choose from {', '.join(choices)}"
        )


def _check_targets(
    name: str, x: Tensor, targets: Tensor, ignore_index: int, classes: int | None = None
) -> None:
    """classes: V, if it is not the last axis of `x`."""
    if targets.shape != x.shape[:-1] or targets.dtype != torch.int64:
        raise ArgumentError(
            f"{name}: targets is {targets.dtype} of shape {list(targets.shape)}, but must be int64 "
            f"of shape {list(x.shape[:-1])}; one class a token"
        )
    # On a GPU this would wait for the device.
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    classes = x.shape[-1] if classes is None else classes
    wrong = targets[((targets < 0) | (targets >= classes)) & (targets != ignore_index)]
    if len(wrong):
        raise ArgumentError(
            f"{name}: targets has {int(wrong[0])}, but must be from 0 to {classes - 1}, or "
            f"{ignore_index}, which is ignored"
        )
