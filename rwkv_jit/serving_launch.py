"""Launching a serving operator, and registering it with torch as what changes a pool of states."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import increment_version

from .arch import is_cuda
from .autograd import register
from .config import OpConfig
from .errors import ArgumentError
from .indices import check_bounds, check_slots
from .launch import (
    ALIGNMENT,
    Kernel,
    are_aligned,
    dtype_code,
    is_current,
    launchable,
    several_gpus,
    stream_and_threads,
)
from .loader import KERNELS
from .ops import get_spec
from .settings import current_settings

_POINTER = torch.Tensor.data_ptr
# Sizes, strides and dtype of a tensor.
Made: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What calls on tensors that are alike have in common.

    gpu: its index; -1 is a CPU.
    one_of_several: whether another GPU may be the current one.
    empty: makes a tensor on the current device, of which nothing is written yet.
    made: all that is made: results, then scratch.
    numbers: members of the argument block between their addresses and the stream, after a null for
        scratch that is not needed.
    """

    gpu: int
    one_of_several: bool
    empty: Callable[..., torch.Tensor]
    made: tuple[Made, ...]
    numbers: tuple[int, ...]


class Launcher:
    """What all calls of one configuration have in common."""

    def __init__(self, slug: str) -> None:
        self._slug = slug
        config = OpConfig.parse(slug)
        self._spec = get_spec(config.op)
        self.entry, entry = next(iter(self._spec.entries.items()))
        self._sizes = entry.sizes
        inputs = [tensor.name for tensor in entry.inputs]
        assert inputs[-1] == "state_indices"
        self._inputs = len(inputs)
        self._state_at = inputs.index("state")
        self._bounds_at = inputs.index("cu_seqlens") if "cu_seqlens" in inputs else None
        scratch = self._spec.variant(config, self.entry).scratch
        assert [tensor.name for tensor in scratch] in ([], ["order"])
        self._has_order = bool(scratch)
        self._typed = tuple(at for at, t in enumerate(entry.inputs) if t.has_dtype_field)
        self._results = len(entry.outputs)
        self._on_gpu = is_cuda(config.arch)
        self._sees_values = not self._on_gpu or current_settings().debug
        self._kernel: Kernel | None = None

    def prepare(self, tensors: Sequence[Any]) -> Prepared:
        """What is the same for all calls on tensors like these."""
        first, bounds = tensors[0], self._bounds(tensors)
        batch, length, heads, size = shape = (*first.shape,)
        sequences = sequences_of(first, bounds)
        sizes = {
            "B": batch,
            "S": sequences,
            "T": length,
            "H": heads,
            "P": tensors[self._state_at].shape[0],
        }
        types = (tensors[at] for at in self._typed)
        contiguous = (length * heads * size, heads * size, size, 1)
        made: list[Made] = [(shape, contiguous, first.dtype)] * self._results
        if self._has_order and bounds is not None:
            made.append(((sequences,), (1,), torch.int32))
        return Prepared(
            gpu=first.get_device(),
            one_of_several=first.is_cuda and several_gpus(),
            empty=_empty_on(first.device.type),
            made=tuple(made),
            numbers=(
                *((0,) if self._has_order and bounds is None else ()),
                *(0 if tensor is None else dtype_code(tensor.dtype) for tensor in types),
                *(sizes[letter] for letter in self._sizes),
            ),
        )

    def run(self, tensors: Sequence[Any], pointers: Sequence[int], prepared: Prepared) -> Any:
        """Launch on tensors that are as they have to be, at `pointers`. None, and nothing is
        launched, unless they are aligned. Each line costs the host, at every call."""
        gpu = prepared.gpu
        if prepared.one_of_several and not is_current(gpu):
            with torch.cuda.device(gpu):
                return self.run(tensors, pointers, prepared)
        if self._sees_values:
            self._check_values(tensors)
        kernel = self._kernel
        if kernel is None:
            kernel = self._kernel = KERNELS.get(self._slug, self.entry)
        made = (*itertools.starmap(prepared.empty, prepared.made),)
        block = kernel.block.pack(
            *pointers, *map(_POINTER, made), *prepared.numbers, *stream_and_threads(gpu)
        )
        if not are_aligned(block, self._inputs):
            return None
        kernel.call(block, gpu)
        # So that autograd sees that what it may have saved is no more.
        increment_version(tensors[self._state_at])
        return made[0] if self._results == 1 else made[: self._results]

    def run_any(self, tensors: Sequence[Any]) -> Any:
        """The same on tensors of any strides and alignment, but for the states."""
        made: list[Any] = [launchable(tensor) for tensor in tensors]
        state = tensors[self._state_at]
        if made[self._state_at] is not state:
            raise ArgumentError(
                f"{self._spec.name}: state is advanced in place and must be contiguous and aligned "
                f"to {ALIGNMENT} bytes, but has strides {state.stride()}; keep the pool of each "
                "layer in a tensor of its own"
            )
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in made]
        return self.run(made, pointers, self.prepare(made))

    def _bounds(self, tensors: Sequence[Any]) -> torch.Tensor | None:
        return None if self._bounds_at is None else tensors[self._bounds_at]

    def _check_values(self, tensors: Sequence[Any]) -> None:
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            return
        name = self._spec.name
        if self._bounds_at is not None:
            check_bounds(name, tensors[self._bounds_at], tensors[0].shape[1], may_end_before=True)
        check_slots(name, tensors[-1], tensors[self._state_at].shape[0])


def sequences_of(first: torch.Tensor, bounds: torch.Tensor | None) -> int:
    """How many sequences a call has: rows of a batch, or what is packed into one."""
    return first.shape[0] if bounds is None else bounds.shape[0] - 1


def _empty_on(kind: str) -> Callable[..., torch.Tensor]:
    """What makes an uninitialised tensor on the current device of a kind, as `Made` has it."""
    # What torch's compiled code calls: past the dispatcher, which takes longer than the allocation.
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}", None)
    if quick is None:
        return lambda *made: torch.empty_strided(*made[:2], dtype=made[2], device=kind)
    make: Callable[..., torch.Tensor] = quick
    return make


@functools.cache
def launcher(slug: str) -> Launcher:
    """The launcher of a configuration."""
    return Launcher(slug)


@functools.cache
def registered(name: str) -> Callable[..., Any]:
    """The registered op of a serving operator: its inputs, and the slug. It checks nothing but what
    it needs to be safe."""
    spec = get_spec(name)

    def run(*call: Any) -> Any:
        return launcher(call[-1]).run_any(call[:-1])

    def fake(*call: Any) -> Any:
        first: torch.Tensor = call[0]
        results = tuple(first.new_empty(first.shape) for _ in spec.called.outputs)
        return results if len(results) > 1 else results[0]

    return register(spec, next(iter(spec.entries)), run, fake)
