"""Registered torch operators and their fakes, from the spec's tensor lists.

Each entry of an operator is one registered torch op (`rwkv_jit::wkv7_forward`); the configuration
travels as its slug. An autograd.Function stands outside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from .arguments import dtype_of, entry_sizes
from .config import OpConfig
from .gradients import differentiable
from .launch import launchable
from .loader import KERNELS
from .ops import get_spec
from .spec import EntrySpec, OpSpec, TensorSpec

_LIBRARY = torch.library.Library("rwkv_jit", "DEF")
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_NOWHERE: Mapping[str, torch.Tensor] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TorchOps:
    """An operator's registered ops. Each takes the entry's inputs in order, its scalars, the slug,
    and a bool for each optional output; an output that is not asked for, or whose input is not
    there, comes back with no elements.

    run: the forward past torch's dispatcher, which costs the host a good part of a call; for
        arguments that are plain.
    differentiable: takes slug, the forward's bools but those of saved outputs, the scalars, and the
        inputs.
    """

    forward: Callable[..., Sequence[torch.Tensor]]
    backward: Callable[..., Sequence[torch.Tensor]]
    run: Callable[..., Sequence[torch.Tensor]]
    differentiable: Callable[..., Sequence[torch.Tensor]]


def is_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether these are tensors and nothing more, and no mode, transform, tracer or compiler has to
    see what is called with them."""
    return (
        _PLAIN.issuperset(map(type, tensors))
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


@functools.cache
def torch_ops(name: str) -> TorchOps:
    """Register the ops of the operator `name`, once in a process."""
    spec = get_spec(name)
    forward, backward = (_register_sequence(spec, entry) for entry in ("forward", "backward"))

    def run(*call: Any) -> tuple[torch.Tensor, ...]:
        return run_entry(spec, "forward", call)

    return TorchOps(forward, backward, run, differentiable(spec, forward, backward))


def register(
    spec: OpSpec, entry_name: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an entry as a torch op, which takes the inputs in order, the scalars, the slug, and
    a bool for each optional output.

    run: the op. fake: the same for tensors without values: what it returns is like what `run` does.
    """
    entry = spec.entries[entry_name]
    name = spec.name if f"_{entry_name}" in spec.name else f"{spec.name}_{entry_name}"
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
        return run_entry(spec, entry_name, call)

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
        if rule == "checkpoint":
            rule = spec.checkpoint_dtype(config)
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

    def allocate(self, buffers: Mapping[str, torch.Tensor] = _NOWHERE) -> tuple[torch.Tensor, ...]:
        """Every output, uninitialised; with no elements where it is not wanted."""
        return tuple(
            buffers[output.name]
            if output.name in buffers
            else output.empty(self.sizes, self.tensors, self.device, wanted=self.wants(output))
            for output in self.plan.outputs
        )


def run_entry(
    spec: OpSpec,
    entry_name: str,
    arguments: Sequence[Any],
    buffers: Mapping[str, torch.Tensor] = _NOWHERE,
) -> tuple[torch.Tensor, ...]:
    """What the registered op of an entry does with these arguments.

    buffers: what outputs are to be written into, by name: of their dtype and as many elements,
        contiguous, aligned for vector loads, and apart from the inputs.
    """
    call = _Call(spec, entry_name, arguments)
    kernel = KERNELS.get(call.slug, entry_name)
    outputs = call.allocate(buffers)
    tensors = {name: launchable(tensor) for name, tensor in call.tensors.items()}
    for output, tensor in zip(call.plan.outputs, outputs, strict=True):
        tensors[output.name] = tensor if call.wants(output) else None
    for scratch in call.plan.scratch:
        made = scratch.empty(call.sizes, call.tensors, call.device) if call.wants(scratch) else None
        tensors[scratch.name] = made
    scalars = zip(call.plan.scalars, call.scalars, strict=True)
    kernel.launch(tensors, {**call.sizes, **dict(scalars)}, call.device)
    return outputs
