"""Launching a serving operator, and registering it with torch as what changes a pool of states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arch import is_cuda
from .arguments import check_slots
from .autograd import register
from .config import OpConfig
from .errors import ArgumentError
from .launch import ALIGNMENT, Kernel, current_stream, dtype_code, launchable
from .loader import KERNELS
from .ops import get_spec
from .settings import current_settings

ENTRY = "decode"
_POINTER = torch.Tensor.data_ptr


class Launcher:
    """What all calls of one configuration have in common."""

    def __init__(self, slug: str) -> None:
        self._slug = slug
        config = OpConfig.parse(slug)
        self._spec = get_spec(config.op)
        entry = self._spec.called
        assert entry.sizes == ("B", "T", "H", "P"), "the order of the argument block"
        inputs = [tensor.name for tensor in entry.inputs]
        self._state_at, self._indices_at = inputs.index("state"), inputs.index("state_indices")
        self._typed = tuple(at for at, t in enumerate(entry.inputs) if t.has_dtype_field)
        self._results = len(entry.outputs)
        self._debug = current_settings().debug
        self._on_gpu = is_cuda(config.arch)
        self._kernel: Kernel | None = None

    def numbers(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        """The members of the argument block between the pointers and the stream."""
        return (
            *(dtype_code(tensors[at].dtype) for at in self._typed),
            *tensors[0].shape[:3],
            tensors[self._state_at].shape[0],
        )

    def run(
        self,
        first: torch.Tensor,
        state: torch.Tensor,
        indices: torch.Tensor | None,
        pointers: Sequence[int],
        numbers: Sequence[int],
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Launch on tensors that are as they have to be, at `pointers`."""
        if not self._on_gpu or (self._debug and not torch.cuda.is_current_stream_capturing()):
            check_slots(self._spec.name, indices, state.shape[0])
        kernel = self._kernel
        if kernel is None:
            kernel = self._kernel = KERNELS.get(self._slug, ENTRY)
        gpu, results = first.get_device(), (*map(torch.empty_like, (first,) * self._results),)
        stream, threads = current_stream(gpu), torch.get_num_threads()
        kernel.call((*pointers, *map(_POINTER, results), *numbers, stream, threads), gpu)
        # So that autograd sees that what it may have saved is no more.
        torch.autograd.graph.increment_version(state)
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
        return self.run(made[0], state, made[self._indices_at], pointers, self.numbers(made))


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

    return register(spec, ENTRY, run, fake)
