"""Serving: the way of a call on a pool of states to its kernel, made short for the host.

An eager call with nothing to convert and nobody to see it goes straight to the launcher. Any other
goes through the registered op (`rwkv_jit::wkv7_decode`), which says that it changes the pool.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .arch import is_cuda
from .arguments import bind, cast_for_autocast, check_arguments, check_slots, widen
from .config import OpConfig, default_state_dtype
from .decode_launch import ENTRY, launcher, registered
from .errors import ArgumentError
from .launch import ALIGNMENT, TORCH_DTYPES, announce_reference
from .loader import KERNELS
from .ops import get_spec
from .reference import REFERENCES
from .settings import current_settings

_MOST_SIGNATURES = 1024
_LIKENESS = operator.attrgetter("dtype", "shape", "device")
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_IS_CONTIGUOUS = torch.Tensor.is_contiguous
_POINTER = torch.Tensor.data_ptr
_INDICES = frozenset({"state_indices"})
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
        self._count = len(self._inputs)
        self._device_type = "cuda" if is_cuda(config.arch) else "cpu"
        self._runs_reference = current_settings().mode == "reference"
        self._registered = registered(config.op)
        self._launcher = launcher(self._slug)
        # Of calls that were found right, and the last of them.
        self._known: dict[tuple[Any, ...], _Known] = {}
        self._last: _Known | None = None

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
        if kwargs or len(args) != self._count:
            if len(args) == self._count - 1 and kwargs.keys() <= _INDICES:
                args = (*args, kwargs.get("state_indices"))
            else:
                args = self._positional(args, kwargs)
        if not torch.compiler.is_compiling():
            y = self._run_as_it_is(args)
            if y is not None:
                return y
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

    def _run_as_it_is(self, tensors: Sequence[Any]) -> torch.Tensor | None:
        """A call with nothing to convert and nobody to see it, of sizes found right before; None
        for any other. Each line costs the host, at every call."""
        indices = tensors[-1]
        given = tensors[:-1] if indices is None else tensors
        # What goes over all tensors does so in C.
        if not _PLAIN.issuperset(map(type, given)) or _watched():
            return None
        likenesses = (*map(_LIKENESS, given),)
        known = self._last
        if known is None or likenesses != known.likenesses:
            known = self._known.get(likenesses)
            if known is None:
                return None
            self._last = known
        if not all(map(_IS_CONTIGUOUS, given)) or (
            torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, given))
        ):
            return None
        pointers = [*map(_POINTER, given)]
        if functools.reduce(operator.or_, pointers) % ALIGNMENT:
            return None
        if indices is None:
            pointers.append(0)
        return self._launcher.run(
            tensors[0], tensors[self._state_at], indices, pointers, known.numbers
        )

    def _run(self, args: Sequence[Any]) -> torch.Tensor:
        """A call of any kind: checked, converted, and through the registered op."""
        values = dict(zip(self._inputs, args, strict=True))
        if torch.is_autocast_enabled(self._device_type):
            cast_for_autocast(self._spec, self.config, values)
        self._check(values)
        widen(self._spec.called.inputs, self.config, values)
        tensors = tuple(values.values())
        if self._runs_reference:
            return self._reference(tensors)
        if not torch.compiler.is_compiling():
            self._remember(tensors)
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

    def _remember(self, tensors: Sequence[Any]) -> None:
        given = [tensor for tensor in tensors if tensor is not None]
        if not _PLAIN.issuperset(map(type, given)):
            return
        if len(self._known) >= _MOST_SIGNATURES:
            self._known.clear()
        likenesses = (*map(_LIKENESS, given),)
        self._known[likenesses] = _Known(likenesses, self._launcher.numbers(tensors))

    def _reference(self, tensors: Sequence[Any]) -> torch.Tensor:
        state = tensors[self._state_at]
        if not torch.compiler.is_compiling():
            announce_reference(self._spec.name)
            if self._device_type == "cpu":
                check_slots(self._spec.name, tensors[-1], state.shape[0])
        y: torch.Tensor
        y, advanced = REFERENCES[self._spec.name](
            *tensors,
            decay=self.config.decay,
            state_layout=self.config.state_layout,
            compute_dtype=TORCH_DTYPES[default_state_dtype(self.config.dtype)],
        )
        state.copy_(advanced)
        return y.to(TORCH_DTYPES[self.config.dtype])


@dataclass(frozen=True, slots=True)
class _Known:
    """What the tensors of a call are like, those that are there, and the numbers of its block."""

    likenesses: tuple[Any, ...]
    numbers: tuple[int, ...]


def _watched() -> bool:
    """Whether modes, transforms or a tracer have to see the call."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )
