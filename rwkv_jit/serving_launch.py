"""Launching a serving operator, and registering it with torch as what changes a pool of states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arch import is_cuda
from .autograd import register
from .config import OpConfig
from .errors import ArgumentError
from .indices import check_bounds, check_slots
from .launch import ALIGNMENT, Kernel, current_stream, dtype_code, launchable
from .loader import KERNELS
from .ops import get_spec
from .settings import current_settings

_POINTER = torch.Tensor.data_ptr


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
        self._state_at = inputs.index("state")
        self._bounds_at = inputs.index("cu_seqlens") if "cu_seqlens" in inputs else None
        scratch = self._spec.variant(config, self.entry).scratch
        assert [tensor.name for tensor in scratch] in ([], ["order"])
        self._has_order = bool(scratch)
        self._typed = tuple(at for at, t in enumerate(entry.inputs) if t.has_dtype_field)
        self._results = len(entry.outputs)
        self._debug = current_settings().debug
        self._on_gpu = is_cuda(config.arch)
        self._kernel: Kernel | None = None

    def numbers(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        """The members of the argument block between the pointers and the stream."""
        batch, length, heads = tensors[0].shape[:3]
        sizes = {
            "B": batch,
            "S": sequences_of(tensors[0], self._bounds(tensors)),
            "T": length,
            "H": heads,
            "P": tensors[self._state_at].shape[0],
        }
        types = (tensors[at] for at in self._typed)
        return (
            *(0 if tensor is None else dtype_code(tensor.dtype) for tensor in types),
            *(sizes[letter] for letter in self._sizes),
        )

    def run(
        self, tensors: Sequence[Any], pointers: list[int], numbers: Sequence[int]
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Launch on tensors that are as they have to be, at `pointers`, which it adds to."""
        if not self._on_gpu or (self._debug and not torch.cuda.is_current_stream_capturing()):
            self._check_values(tensors)
        kernel = self._kernel
        if kernel is None:
            kernel = self._kernel = KERNELS.get(self._slug, self.entry)
        first = tensors[0]
        gpu, results = first.get_device(), (*map(torch.empty_like, (first,) * self._results),)
        pointers += map(_POINTER, results)
        if self._has_order:
            order = self._order(tensors)
            pointers.append(0 if order is None else order.data_ptr())
        stream, threads = current_stream(gpu), torch.get_num_threads()
        kernel.call((*pointers, *numbers, stream, threads), gpu)
        # So that autograd sees that what it may have saved is no more.
        torch.autograd.graph.increment_version(tensors[self._state_at])
        return results if len(results) > 1 else results[0]

    def run_any(self, tensors: Sequence[Any]) -> torch.Tensor | tuple[torch.Tensor, ...]:
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
        return self.run(made, pointers, self.numbers(made))

    def _bounds(self, tensors: Sequence[Any]) -> torch.Tensor | None:
        return None if self._bounds_at is None else tensors[self._bounds_at]

    def _order(self, tensors: Sequence[Any]) -> torch.Tensor | None:
        """Room for the order of packed sequences."""
        bounds = self._bounds(tensors)
        if bounds is None:
            return None
        return torch.empty(bounds.shape[0] - 1, dtype=torch.int32, device=bounds.device)

    def _check_values(self, tensors: Sequence[Any]) -> None:
        name = self._spec.name
        if self._bounds_at is not None:
            check_bounds(name, tensors[self._bounds_at], tensors[0].shape[1], may_end_before=True)
        check_slots(name, tensors[-1], tensors[self._state_at].shape[0])


def sequences_of(first: torch.Tensor, bounds: torch.Tensor | None) -> int:
    """How many sequences a call has: rows of a batch, or what is packed into one."""
    return first.shape[0] if bounds is None else bounds.shape[0] - 1


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
