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
from .spec import EntrySpec, OpSpec, TensorSpec

_LIBRARY = torch.library.Library("rwkv_jit", "DEF")


@dataclass(frozen=True, slots=True)
class TorchOps:
    """An operator's registered ops. Each takes the entry's inputs in order, its scalars, the slug,
    and a bool for each optional output; an output that is not asked for, or whose input is not
    there, comes back with no elements.

    differentiable: takes slug, the forward's bools but those of saved outputs, the scalars, and the
        inputs.
    """

    forward: Callable[..., Sequence[torch.Tensor]]
    backward: Callable[..., Sequence[torch.Tensor]]
    differentiable: Callable[..., Sequence[torch.Tensor]]


@functools.cache
def torch_ops(name: str) -> TorchOps:
    """Register the ops of the operator `name`, once in a process."""
    spec = get_spec(name)
    forward, backward = (_register_sequence(spec, entry) for entry in ("forward", "backward"))
    return TorchOps(forward, backward, _differentiable(spec, forward, backward))


def register(
    spec: OpSpec, entry_name: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an entry as a torch op, which takes the inputs in order, the scalars, the slug, and
    a bool for each optional output.

    run: the op. fake: the same for tensors without values: what it returns is like what `run` does.
    """
    entry = spec.entries[entry_name]
    name = spec.name if spec.name.endswith(f"_{entry_name}") else f"{spec.name}_{entry_name}"
    arguments = [f"{_schema_type(tensor)} {tensor.name}" for tensor in entry.inputs]
    arguments += [f"float {scalar}" for scalar in entry.scalars]
    flags = [f"bool output_{output}" for output in entry.optional_outputs]
    returns = ", ".join(f"Tensor {output.name}" for output in entry.outputs)
    _LIBRARY.define(f"{name}({', '.join([*arguments, 'str config', *flags])}) -> ({returns})")
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"rwkv_jit::{name}", fake, lib=_LIBRARY)
    op: Callable[..., Any] = getattr(torch.ops.rwkv_jit, name).default
    return op


def _schema_type(tensor: TensorSpec) -> str:
    if tensor.mutated:
        return "Tensor(a!)"
    return "Tensor?" if tensor.optional else "Tensor"


def _register_sequence(spec: OpSpec, entry_name: str) -> Callable[..., Sequence[torch.Tensor]]:
    """Register an entry that allocates all that it writes. What is returned gives a sequence also
    where the entry has a single output, and so torch's op a tensor."""

    def run(*call: Any) -> tuple[torch.Tensor, ...]:
        return _run(spec, entry_name, call)

    def fake(*call: Any) -> tuple[torch.Tensor, ...]:
        return _Call(spec, entry_name, call).allocate()

    if len(spec.entries[entry_name].outputs) > 1:
        return register(spec, entry_name, run, fake)
    op = register(spec, entry_name, lambda *call: run(*call)[0], lambda *call: fake(*call)[0])
    return lambda *call: (op(*call),)


@dataclass(frozen=True, slots=True)
class _Made:
    """A tensor that a call makes: its name, letters of its shape, its dtype, which for one "like"
    another is that one's name, and the tensor without which it is not made."""

    name: str
    shape: tuple[str, ...]
    dtype: torch.dtype | str
    only_with: str

    def empty(
        self,
        sizes: dict[str, int],
        tensors: dict[str, torch.Tensor | None],
        device: torch.device,
        *,
        wanted: bool = True,
    ) -> torch.Tensor:
        dtype = self.dtype
        if isinstance(dtype, str):
            like = tensors[dtype]
            dtype = torch.float32 if like is None else like.dtype
        shape = [sizes[letter] for letter in self.shape] if wanted else [0]
        return torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all calls of one registered op with one configuration have in common."""

    entry: EntrySpec
    spacing: int
    inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    outputs: tuple[_Made, ...]
    scratch: tuple[_Made, ...]


@functools.cache
def _plan(name: str, slug: str, entry_name: str) -> _Plan:
    spec, config = get_spec(name), OpConfig.parse(slug)
    entry = spec.entries[entry_name]

    def made(tensor: TensorSpec) -> _Made:
        rule = tensor.dtype[0]
        like = rule.removeprefix("like:") if rule.startswith("like:") else None
        dtype = like or dtype_of(rule, config, {})
        return _Made(tensor.name, tensor.shape, dtype, tensor.only_with)

    return _Plan(
        entry=entry,
        spacing=spec.checkpoint_spacing(config, entry_name),
        inputs=tuple(tensor.name for tensor in entry.inputs),
        scalars=tuple(entry.scalars),
        outputs=tuple(map(made, entry.outputs)),
        scratch=tuple(map(made, spec.variant(config, entry_name).scratch)),
    )


class _Call:
    """The arguments of one registered op, taken apart."""

    def __init__(self, spec: OpSpec, entry_name: str, call: Sequence[Any]) -> None:
        entry = spec.entries[entry_name]
        count = len(entry.inputs)
        at = count + len(entry.scalars)
        self.slug: str = call[at]
        plan = self.plan = _plan(spec.name, self.slug, entry_name)
        self.tensors: dict[str, torch.Tensor | None] = dict(
            zip(plan.inputs, call[:count], strict=True)
        )
        self.scalars = call[count:at]
        self.wanted = dict(zip(plan.entry.optional_outputs, call[at + 1 :], strict=True))
        self.sizes = entry_sizes(plan.entry, plan.spacing, self.tensors)
        first: torch.Tensor = call[0]
        self.device = first.device

    def wants(self, made: _Made) -> bool:
        """Whether an output or scratch tensor is made at all."""
        if made.only_with:
            return self.tensors[made.only_with] is not None
        return bool(self.wanted.get(made.name, True))

    def allocate(self) -> tuple[torch.Tensor, ...]:
        """Every output, uninitialised; with no elements where it is not wanted."""
        return tuple(
            output.empty(self.sizes, self.tensors, self.device, wanted=self.wants(output))
            for output in self.plan.outputs
        )


def _run(spec: OpSpec, entry_name: str, arguments: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    call = _Call(spec, entry_name, arguments)
    kernel = KERNELS.get(call.slug, entry_name)
    outputs = call.allocate()
    tensors = {name: launchable(tensor) for name, tensor in call.tensors.items()}
    for output, tensor in zip(call.plan.outputs, outputs, strict=True):
        tensors[output.name] = tensor if call.wants(output) else None
    for scratch in call.plan.scratch:
        made = scratch.empty(call.sizes, call.tensors, call.device) if call.wants(scratch) else None
        tensors[scratch.name] = made
    scalars = zip(call.plan.scalars, call.scalars, strict=True)
    kernel.launch(tensors, {**call.sizes, **dict(scalars)}, call.device)
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

    def differentiable(
        slug: str, wanted: tuple[bool, ...], scalars: tuple[float, ...], *tensors: Any
    ) -> Any:
        return Differentiable.apply(slug, wanted, scalars, *tensors)  # type: ignore[no-untyped-call]

    return differentiable
