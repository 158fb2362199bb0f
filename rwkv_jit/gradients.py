"""Gradients: an autograd.Function of an operator's registered forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .spec import OpSpec


def differentiable(
    spec: OpSpec,
    forward_op: Callable[..., Sequence[torch.Tensor]],
    backward_op: Callable[..., Sequence[torch.Tensor]],
) -> Callable[..., Sequence[torch.Tensor]]:
    """An operator's forward, from its registered ops, with the backward as its gradient. It takes
    slug, the forward's bools but those of saved outputs, the scalars, and the inputs."""
    forward, backward = spec.entries["forward"], spec.entries["backward"]
    input_names = tuple(tensor.name for tensor in forward.inputs)
    output_names = tuple(tensor.name for tensor in forward.outputs)
    public = tuple(name for name in output_names if name not in spec.saved_outputs)
    backward_names = tuple(tensor.name for tensor in backward.inputs)
    saved_names = tuple(n for n in backward_names if n in input_names or n in output_names)
    optional = forward.optional_outputs
    gradient_flags = tuple(name.removeprefix("d") for name in backward.optional_outputs)
    gradients = {tensor.name: at for at, tensor in enumerate(backward.outputs)}
    given_with = {tensor.name: tensor.only_with for tensor in forward.outputs if tensor.only_with}
    assert not backward.scalars or list(backward.scalars) == list(forward.scalars)

    class Once(torch.autograd.Function):
        """The backward op, as something that cannot be differentiated again."""

        @staticmethod
        def forward(_ctx: Any, *call: Any) -> tuple[torch.Tensor, ...]:
            return tuple(backward_op(*call))

        @staticmethod
        def backward(_ctx: Any, *_grads: Any) -> Any:
            raise NotImplementedError(
                f"{spec.name}: second derivatives are not supported; RWKV_JIT_MODE=reference "
                "runs a PyTorch recurrence that has them"
            )

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            slug: str,
            wanted: tuple[bool, ...],
            scalars: tuple[float, ...],
            *tensors: Any,
        ) -> Any:
            flags = dict(zip((n for n in optional if n in public), wanted, strict=True))
            asked = (flags.get(name, True) for name in optional)
            outputs = forward_op(*tensors, *scalars, slug, *asked)
            values = dict(zip(input_names, tensors, strict=True))
            values.update(zip(output_names, outputs, strict=True))
            ctx.save_for_backward(*(values[name] for name in saved_names))
            ctx.slug, ctx.flags = slug, flags
            ctx.scalars = scalars if backward.scalars else ()
            flags.update((name, values[given] is not None) for name, given in given_with.items())
            return tuple(values[name] for name in public)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            values = dict(zip(saved_names, ctx.saved_tensors, strict=True))
            for name, grad in zip(public, grads, strict=True):
                values[f"d{name}"] = grad if ctx.flags.get(name, True) else None
            needed = dict(zip(input_names, ctx.needs_input_grad[3:], strict=True))
            call = (
                *(values[name] for name in backward_names),
                *ctx.scalars,
                ctx.slug,
                *(needed[name] for name in gradient_flags),
            )
            # Grad mode is on here only for create_graph=True.
            run = Once.apply if torch.is_grad_enabled() else backward_op
            results = run(*call)
            return (
                None,
                None,
                None,
                *(
                    results[gradients[f"d{name}"]]
                    if needed[name] and f"d{name}" in gradients
                    else None
                    for name in input_names
                ),
            )

    def apply(
        slug: str, wanted: tuple[bool, ...], scalars: tuple[float, ...], *tensors: Any
    ) -> Any:
        return Differentiable.apply(slug, wanted, scalars, *tensors)  # type: ignore[no-untyped-call]

    return apply
