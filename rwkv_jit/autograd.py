"""Registered torch operators, their fakes and their gradients, all from the spec's tensor lists.

Each entry of an operator is one registered torch op (`rwkv_jit::wkv7_forward`); the configuration
travels as its slug. An autograd.Function stands outside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .arguments import dtype_of, entry_sizes
from .config import OpConfig
from .launch import launchable
from .loader import KERNELS
from .ops import get_spec
from .spec import KernelVariant, OpSpec, TensorSpec

_LIBRARY = torch.library.Library("rwkv_jit", "DEF")


@dataclass(frozen=True, slots=True)
class TorchOps:
    """An operator's registered ops. Each takes the entry's inputs in order, the slug, and a bool
    for each optional output; an output that is not asked for comes back with no elements.

    differentiable: takes slug, the forward's bools but those of saved outputs, and the inputs.
    """

    forward: Callable[..., Sequence[torch.Tensor]]
    backward: Callable[..., Sequence[torch.Tensor]]
    differentiable: Callable[..., Sequence[torch.Tensor]]


@functools.cache
def torch_ops(name: str) -> TorchOps:
    """Register the ops of the operator `name`, once in a process."""
    spec = get_spec(name)
    forward, backward = _register(spec, "forward"), _register(spec, "backward")
    return TorchOps(forward, backward, _differentiable(spec, forward, backward))


def _register(spec: OpSpec, entry_name: str) -> Callable[..., Sequence[torch.Tensor]]:
    entry = spec.entries[entry_name]
    name = f"{spec.name}_{entry_name}"
    arguments = [f"Tensor{'?' if t.optional else ''} {t.name}" for t in entry.inputs]
    flags = [f"bool output_{output}" for output in entry.optional_outputs]
    returns = ", ".join(f"Tensor {output.name}" for output in entry.outputs)
    _LIBRARY.define(f"{name}({', '.join([*arguments, 'str config', *flags])}) -> ({returns})")

    def run(*call: Any) -> tuple[torch.Tensor, ...]:
        return _run(spec, entry_name, call)

    def fake(*call: Any) -> tuple[torch.Tensor, ...]:
        return _Call(spec, entry_name, call).allocate()

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"rwkv_jit::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Sequence[torch.Tensor]] = getattr(torch.ops.rwkv_jit, name).default
    return op


class _Call:
    """The arguments of one registered op, taken apart."""

    def __init__(self, spec: OpSpec, entry_name: str, call: Sequence[Any]) -> None:
        entry = spec.entries[entry_name]
        count = len(entry.inputs)
        self.entry = entry
        self.tensors: dict[str, torch.Tensor | None] = {
            tensor.name: value for tensor, value in zip(entry.inputs, call[:count], strict=True)
        }
        self.slug: str = call[count]
        self.config = _parse(self.slug)
        self.wanted = dict(zip(entry.optional_outputs, call[count + 1 :], strict=True))
        self.variant, spacing = _variant(spec.name, self.slug, entry_name)
        self.sizes = entry_sizes(entry, spacing, self.tensors)

    def allocate(self) -> tuple[torch.Tensor, ...]:
        """Every output, uninitialised; with no elements where it is not wanted."""
        return tuple(
            self.empty(output, wanted=self.wanted.get(output.name, True))
            for output in self.entry.outputs
        )

    def empty(self, tensor: TensorSpec, *, wanted: bool = True) -> torch.Tensor:
        like = self.tensors[self.entry.inputs[0].name]
        assert like is not None, "a required input"
        shape = [self.sizes[letter] for letter in tensor.shape] if wanted else [0]
        rule = tensor.dtype[0]
        if rule.startswith("like:"):
            dtype = dtype_of(rule, self.config, self.tensors)
        else:
            dtype = _fixed_dtype(rule, self.config)
        return torch.empty(shape, dtype=dtype, device=like.device)


@functools.cache
def _fixed_dtype(rule: str, config: OpConfig) -> torch.dtype:
    return dtype_of(rule, config, {})


@functools.cache
def _parse(slug: str) -> OpConfig:
    return OpConfig.parse(slug)


@functools.cache
def _variant(name: str, slug: str, entry: str) -> tuple[KernelVariant, int]:
    spec, config = get_spec(name), _parse(slug)
    return spec.variant(config, entry), spec.checkpoint_spacing(config, entry)


def _run(spec: OpSpec, entry_name: str, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    call = _Call(spec, entry_name, arguments)
    kernel = KERNELS.get(call.slug, entry_name)
    outputs = call.allocate()
    tensors = {name: launchable(tensor) for name, tensor in call.tensors.items()}
    for output, tensor in zip(call.entry.outputs, outputs, strict=True):
        tensors[output.name] = tensor if call.wanted.get(output.name, True) else None
    for scratch in call.variant.scratch:
        tensors[scratch.name] = call.empty(scratch)
    kernel.launch(tensors, call.sizes)
    return outputs


def _differentiable(
    spec: OpSpec,
    forward_op: Callable[..., Sequence[torch.Tensor]],
    backward_op: Callable[..., Sequence[torch.Tensor]],
) -> Callable[..., Sequence[torch.Tensor]]:
    forward, backward = spec.entries["forward"], spec.entries["backward"]
    input_names = tuple(tensor.name for tensor in forward.inputs)
    output_names = tuple(tensor.name for tensor in forward.outputs)
    public = tuple(name for name in output_names if name not in spec.saved_outputs)
    backward_names = tuple(tensor.name for tensor in backward.inputs)
    saved_names = tuple(n for n in backward_names if n in input_names or n in output_names)
    optional = forward.optional_outputs
    gradient_flags = tuple(name.removeprefix("d") for name in backward.optional_outputs)
    gradients = {tensor.name: at for at, tensor in enumerate(backward.outputs)}

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
        def forward(ctx: Any, slug: str, wanted: tuple[bool, ...], *tensors: Any) -> Any:
            flags = dict(zip((n for n in optional if n in public), wanted, strict=True))
            outputs = forward_op(*tensors, slug, *(flags.get(name, True) for name in optional))
            values = dict(zip(input_names, tensors, strict=True))
            values.update(zip(output_names, outputs, strict=True))
            ctx.save_for_backward(*(values[name] for name in saved_names))
            ctx.slug, ctx.flags = slug, flags
            return tuple(values[name] for name in public)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            values = dict(zip(saved_names, ctx.saved_tensors, strict=True))
            for name, grad in zip(public, grads, strict=True):
                values[f"d{name}"] = grad if ctx.flags.get(name, True) else None
            needed = dict(zip(input_names, ctx.needs_input_grad[2:], strict=True))
            call = (
                *(values[name] for name in backward_names),
                ctx.slug,
                *(needed[name] for name in gradient_flags),
            )
            # Grad mode is on here only for create_graph=True.
            run = Once.apply if torch.is_grad_enabled() else backward_op
            results = run(*call)
            return (
                None,
                None,
                *(
                    results[gradients[f"d{name}"]]
                    if needed[name] and f"d{name}" in gradients
                    else None
                    for name in input_names
                ),
            )

    def differentiable(slug: str, wanted: tuple[bool, ...], *tensors: Any) -> Any:
        return Differentiable.apply(slug, wanted, *tensors)  # type: ignore[no-untyped-call]

    return differentiable
