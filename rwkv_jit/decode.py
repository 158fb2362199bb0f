"""Serving: the way of a call on a pool of states to its kernel, made short for the host.

An eager call with nothing to convert and nobody to see it goes straight to the launcher. Any other
goes through the registered op (`rwkv_jit::wkv7_decode`), which says that it changes the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arch import is_cuda
from .arguments import (
    allowed_dtypes,
    bind,
    cast_for_autocast,
    check_arguments,
    check_slots,
    widen,
)
from .autograd import register
from .config import OpConfig, default_state_dtype
from .errors import ArgumentError
from .launch import (
    ALIGNMENT,
    TORCH_DTYPES,
    announce_reference,
    current_stream,
    dtype_code,
    launchable,
)
from .loader import KERNELS
from .ops import get_spec
from .reference import REFERENCES
from .settings import current_settings

ENTRY = "decode"
_MOST_SIGNATURES = 1024
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


class DecodeOp:
    """A serving operator of one configuration. Call it with tensors; get one from `get_op`.

    config: the configuration.
    """

    def __init__(self, config: OpConfig) -> None:
        self.config = config
        self._spec = get_spec(config.op)
        self._slug = config.slug
        self._inputs = self._spec.parameters
        self._state_at = self._inputs.index("state")
        self._device_type = "cuda" if is_cuda(config.arch) else "cpu"
        self._runs_reference = current_settings().mode == "reference"
        self._registered = _registered(config.op)
        self._launcher = _launcher(self._slug)
        # What tensors of calls that were found right are like, by what tells such calls apart.
        self._known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __repr__(self) -> str:
        return f"<rwkv_jit.DecodeOp {self._slug}>"

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the operator on a pool of states, which it advances in place:

            y = wkv7_decode(r, w, k, v, a, b, state, state_indices=None)
            y = wkv6_decode(r, w, k, v, u, state, state_indices=None)    and wkv5_decode likewise

        r, ...: as for the operator without "_decode"; made for T from 1 to 8, but any will do.
        state: [slots, H, N, N] in the state dtype, contiguous and aligned to 16 bytes, axes (value,
            key) for "vk". Computed in float32 (float64 for float64) and rounded after each token.
        state_indices: [B], int32, on the tensors' device. The slot of each row, no slot twice; -1
            skips a row: its y is 0 and no state changes. Row i has slot i if None.

        Returns y [B, T, H, N] in the operator's dtype. There are no gradients.

        Raises ArgumentError for tensors that do not fit. On a CPU, and with RWKV_JIT_DEBUG=1 on a
        GPU, that includes the values of state_indices; else looking at them would wait for the GPU:
        a row whose index is no slot is skipped, and a slot that is there twice is left undefined.
        """
        if kwargs or len(args) != len(self._inputs):
            args = self._positional(args, kwargs)
        if not torch.compiler.is_compiling():
            pointers = self._pointers(args)
            if pointers is not None:
                return self._launcher.run(args, pointers)
        return self._run(args)

    def load(self) -> None:
        """Find or build the kernel now, rather than at the first call."""
        KERNELS.get(self._slug, ENTRY)

    def info(self) -> dict[str, Any]:
        """What this operator is, and for its kernel, if it is loaded, where the binary lies, what
        the compiler said of it (registers, spills, shared memory) and how long it took to build."""
        return {
            "slug": self._slug,
            "summary": self._spec.summary,
            "formula": self._spec.formula,
            "mode": current_settings().mode,
            "kernels": KERNELS.describe(self._slug, (ENTRY,)),
        }

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        rest = self._inputs[len(args) :]
        if len(args) > len(self._inputs) or any(name not in rest for name in kwargs):
            bind(self._spec, args, kwargs)
        return (*args, *(kwargs.get(name) for name in rest))

    def _pointers(self, tensors: Sequence[Any]) -> list[int] | None:
        """Where the tensors are, if they can be launched on as they are; else None."""
        if _watched():
            return None
        first, state, indices = tensors[0], tensors[self._state_at], tensors[-1]
        if type(first) not in _PLAIN or type(state) not in _PLAIN:
            return None
        device = first.device
        known = self._known.get((first.shape, state.shape, indices is None, device))
        if known is None:
            return None
        grad = torch.is_grad_enabled()
        pointers: list[int] = []
        for tensor, (dtypes, shape) in zip(tensors, known, strict=False):
            if (
                type(tensor) not in _PLAIN
                or tensor.dtype not in dtypes
                or tensor.shape != shape
                or tensor.device != device
                or not tensor.is_contiguous()
                or (grad and tensor.requires_grad)
            ):
                return None
            pointer = tensor.data_ptr()
            if pointer % ALIGNMENT:
                return None
            pointers.append(pointer)
        if indices is None:
            pointers.append(0)
        return pointers

    def _run(self, args: Sequence[Any]) -> torch.Tensor:
        """A call of any kind: checked, converted, and through the registered op."""
        values = dict(zip(self._inputs, args, strict=True))
        if torch.is_autocast_enabled(self._device_type):
            cast_for_autocast(self._spec, self.config, values)
        self._check(values)
        widen(self._spec.called.inputs, self.config, values)
        if not torch.compiler.is_compiling():
            self._remember(values)
        tensors = tuple(values.values())
        if self._runs_reference:
            return self._reference(tensors)
        return self._registered(*tensors, self._slug)

    def _check(self, values: dict[str, Any]) -> None:
        check_arguments(self._spec, self.config, values)
        rows, slots = values[self._inputs[0]].shape[0], values["state"].shape[0]
        if values["state_indices"] is None and rows > slots:
            raise ArgumentError(
                f"{self._spec.name}: state has {slots} slots, but the batch has B={rows}; give "
                "every row a slot, or pass state_indices"
            )
        if not torch.is_grad_enabled():
            return
        for name, tensor in values.items():
            if tensor is not None and tensor.requires_grad:
                raise ArgumentError(
                    f"{self._spec.name}: {name} requires grad, but decoding has no gradients; call "
                    f"it under torch.no_grad(), or use {self._spec.name.removesuffix('_decode')}"
                )

    def _remember(self, values: dict[str, Any]) -> None:
        first, indices = values[self._inputs[0]], values["state_indices"]
        key = (first.shape, values["state"].shape, indices is None, first.device)
        if len(self._known) >= _MOST_SIGNATURES:
            self._known.clear()
        self._known[key] = tuple(
            (allowed_dtypes(tensor, self.config, values), values[tensor.name].shape)
            for tensor in self._spec.called.inputs
            if values[tensor.name] is not None
        )

    def _reference(self, tensors: Sequence[Any]) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            announce_reference(self._spec.name)
        state = tensors[self._state_at]
        y, advanced = REFERENCES[self._spec.name](
            *tensors,
            decay=self.config.decay,
            state_layout=self.config.state_layout,
            compute_dtype=TORCH_DTYPES[default_state_dtype(self.config.dtype)],
        )
        state.copy_(advanced)
        return y.to(TORCH_DTYPES[self.config.dtype])


class _Launcher:
    """What all calls of one configuration have in common."""

    def __init__(self, slug: str) -> None:
        self._slug = slug
        self._spec = get_spec(OpConfig.parse(slug).op)
        entry = self._spec.called
        assert entry.sizes == ("B", "T", "H", "P"), "the order of the argument block"
        inputs = [tensor.name for tensor in entry.inputs]
        self._state_at, self._indices_at = inputs.index("state"), inputs.index("state_indices")
        self._typed = tuple(at for at, t in enumerate(entry.inputs) if t.has_dtype_field)
        self._debug = current_settings().debug

    def run(self, tensors: Sequence[Any], pointers: Sequence[int]) -> torch.Tensor:
        """Launch on tensors that are as they have to be, which are at `pointers`."""
        first, state = tensors[0], tensors[self._state_at]
        device = first.device
        kernel = KERNELS.get(self._slug, ENTRY)
        if device.type == "cpu" or (self._debug and not torch.cuda.is_current_stream_capturing()):
            check_slots(self._spec.name, tensors[self._indices_at], state.shape[0])
        y = torch.empty_like(first)
        batch, length, heads, _ = first.shape
        kernel.call(
            (
                *pointers,
                y.data_ptr(),
                *[dtype_code(tensors[at].dtype) for at in self._typed],
                batch,
                length,
                heads,
                state.shape[0],
                current_stream(device),
                torch.get_num_threads(),
            ),
            device,
        )
        # So that autograd sees that what it may have saved is no more.
        torch.autograd.graph.increment_version(state)
        return y

    def run_any(self, tensors: Sequence[Any]) -> torch.Tensor:
        """The same on tensors of any strides and alignment, but for the states."""
        made = [launchable(tensor) for tensor in tensors]
        state = tensors[self._state_at]
        if made[self._state_at] is not state:
            raise ArgumentError(
                f"{self._spec.name}: state is advanced in place and must be contiguous and aligned "
                f"to {ALIGNMENT} bytes, but has strides {state.stride()}; keep the pool of each "
                "layer in a tensor of its own"
            )
        return self.run(made, [0 if tensor is None else tensor.data_ptr() for tensor in made])


@functools.cache
def _launcher(slug: str) -> _Launcher:
    return _Launcher(slug)


@functools.cache
def _registered(name: str) -> Callable[..., torch.Tensor]:
    def run(*call: Any) -> torch.Tensor:
        return _launcher(call[-1]).run_any(call[:-1])

    def fake(*call: Any) -> torch.Tensor:
        first: torch.Tensor = call[0]
        return first.new_empty(first.shape)

    return register(get_spec(name), ENTRY, run, fake)


def _watched() -> bool:
    """Whether modes, transforms or a tracer have to see the call."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )
