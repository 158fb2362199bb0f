"""Calls of the steps around the recurrence, and their float64 references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rwkv_jit.op import ElementwiseOp
from rwkv_jit.ops import ELEMENTWISE
from rwkv_jit.reference import REFERENCES
from rwkv_jit.registry import get_op

OPS = tuple(spec.name for spec in ELEMENTWISE)
SPECS = {spec.name: spec for spec in ELEMENTWISE}
# Bits after the first of a dtype's numbers.
DIGITS = {torch.bfloat16: 7, torch.float16: 10}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a call; C is heads * size."""

    batch: int = 2
    length: int = 37
    heads: int = 3
    size: int = 20
    sequences: int = 0

    def of(self, shape: tuple[str, ...]) -> list[int]:
        numbers = {
            "B": self.batch,
            "T": self.length,
            "H": self.heads,
            "N": self.size,
            "C": self.heads * self.size,
            "S": self.sequences or self.batch,
        }
        return [numbers[letter] for letter in shape]


def make_op(
    name: str, dtype: torch.dtype, device: str, sizes: Sizes | None = None
) -> ElementwiseOp:
    """The operator for calls of these sizes."""
    size = (sizes or Sizes()).size if "head_size" in SPECS[name].knobs else None
    op: Any = get_op(name, head_size=size, dtype=dtype, device=device)
    assert isinstance(op, ElementwiseOp)
    return op


def draw(
    name: str,
    dtype: torch.dtype,
    device: str,
    sizes: Sizes | None = None,
    *,
    parameters: torch.dtype | None = None,
    scale: float = 1.0,
) -> Tensors:
    """Random inputs by name, all but cu_seqlens. parameters: the dtype of those of each channel."""
    tensors = {}
    for tensor in SPECS[name].called.inputs:
        if tensor.name == "cu_seqlens":
            continue
        x = torch.randn((sizes or Sizes()).of(tensor.shape), dtype=torch.float64)
        of_channels = "fp32" in tensor.dtype
        x = x if of_channels else x * scale
        wanted = parameters if of_channels and parameters is not None else dtype
        tensors[tensor.name] = x.to(wanted).to(device)
    return tensors


def outputs_of(results: Any) -> list[torch.Tensor]:
    """The tensors among the results of a call."""
    return [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]


def options_of(name: str, cu_seqlens: torch.Tensor | None) -> dict[str, Any]:
    """What token_shift_mix takes beside its floating tensors."""
    if name != "token_shift_mix":
        return {}
    return {"output_final_state": True, "cu_seqlens": cu_seqlens}


@dataclass(frozen=True)
class Outcome:
    """Outputs, in order, and gradients by the names of the inputs."""

    outputs: list[torch.Tensor]
    gradients: Tensors


def run(
    op: ElementwiseOp,
    tensors: Tensors,
    gradients: list[torch.Tensor],
    cu_seqlens: torch.Tensor | None = None,
) -> Outcome:
    """A call and its backward. gradients: of the outputs."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    name = op.config.op
    outputs = outputs_of(op(**leaves, **options_of(name, cu_seqlens)))
    given = [dy.to(y.device, y.dtype) for y, dy in zip(outputs, gradients, strict=True)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given)
    return Outcome([y.detach() for y in outputs], dict(zip(leaves, grads, strict=True)))


def truth(
    name: str,
    tensors: Tensors,
    dtype: torch.dtype,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[Outcome, list[torch.Tensor]]:
    """The same from the float64 reference on the CPU, with random gradients of the outputs, as
    they are in `dtype`."""
    leaves = {n: x.detach().cpu().double().requires_grad_() for n, x in tensors.items()}
    bounds = None if cu_seqlens is None else cu_seqlens.cpu()
    outputs = outputs_of(REFERENCES[name](**leaves, **options_of(name, bounds)))
    given = [torch.randn_like(y).to(dtype).double() for y in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), given, materialize_grads=True)
    found = Outcome([y.detach() for y in outputs], dict(zip(leaves, grads, strict=True)))
    return found, given


def roundings(value: torch.Tensor, right: torch.Tensor) -> float:
    """The largest error in roundings of the value's dtype, half a unit in the last place each, but
    for what float32 loses on the way."""
    if value.numel() == 0:
        return 0.0
    least = torch.finfo(value.dtype).smallest_normal
    _, exponent = torch.frexp(right.abs().clamp_min(least))
    rounding = torch.ldexp(torch.ones_like(right), exponent - 2 - DIGITS[value.dtype])
    allowed = rounding + 2.0**-22 * right.abs().max()
    return float(((value.cpu().double() - right).abs() / allowed).max())
