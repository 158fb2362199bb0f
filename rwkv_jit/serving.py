"""Serving: the way of a call on a pool of states to its kernel, made short for the host.

An eager call with nothing to convert and nobody to see it goes straight to the launcher. Any other
goes through the registered op (`rwkv_jit::wkv7_decode`), which says that it changes the pool.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from .arch import is_cuda
from .arguments import bind, cast_for_autocast, check_arguments, widen
from .autograd import is_plain
from .config import OpConfig, default_state_dtype
from .errors import ArgumentError
from .indices import check_slots
from .launch import TORCH_DTYPES, announce_reference
from .loader import KERNELS
from .ops import get_spec
from .reference import REFERENCES
from .serving_launch import Prepared, launcher, registered, sequences_of
from .settings import current_settings

_MOST_SIGNATURES = 1024
_LIKENESS = operator.attrgetter("dtype", "shape", "device")
# Of torch's own, looks at all tensors of a call at once, in C++; without it calls take longer.
_GUARDS = getattr(torch._C._dynamo.guards, "TensorGuards", None)
_REQUIRES_GRAD = operator.attrgetter("requires_grad")
_IS_CONTIGUOUS = torch.Tensor.is_contiguous
_FUNCTION_MODES = torch._C._len_torch_function_stack
_POINTER = torch.Tensor.data_ptr
_INDICES = frozenset({"state_indices"})


class ServingOp:
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
        # Of calls that were found right, and the last of them without and with indices.
        self._known: dict[tuple[Any, ...], Prepared] = {}
        self._last: list[_Known | None] = [None, None]

    def __repr__(self) -> str:
        return f"<rwkv_jit.ServingOp {self._slug}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator on a pool of states, which it advances in place:

            y = wkv7_decode(r, w, k, v, a, b, state, state_indices=None)
            y, new_k = wkv7_decode_fused(r, w, k, v, a, w0, a0, k_k, k_a, state, state_indices=None)
            y = wkv7_prefill(r, w, k, v, a, b, state, cu_seqlens=None, state_indices=None)
            y = wkv6_decode(r, w, k, v, u, state, ...)    and the other wkv6 and wkv5 likewise

        r, ...: as for the operator without "_decode", which is made for T from 1 to 8, though any
            will do, or "_prefill", which is made for more. The fused one takes w, k and a as a
            layer projects them, and its parameters [H, N], in the operator's dtype or float32; w0
            and a0 of zeros where w and a have them already.
        state: [slots, H, N, N] in the state dtype, contiguous and aligned to 16 bytes, axes (value,
            key) for "vk". Computed in float32 (float64 for float64) and rounded to its dtype after
            each token, or in prefill after the last.
        cu_seqlens: [S + 1], int32 or int64, on the tensors' device: sequences packed into B = 1,
            the s-th being tokens cu_seqlens[s] to cu_seqlens[s + 1]. An empty one leaves its state
            as it is. The last bound may lie before T: y is 0 from there on.
        state_indices: [B or S], int32, on the tensors' device. The slot of each row or sequence, no
            slot twice; -1 skips one: its results are 0 and no state changes. The i-th has slot i if
            None.

        Returns y [B, T, H, N] in the operator's dtype, and the fused one the key that its gate has
        changed, likewise. There are no gradients.

        Raises ArgumentError for tensors that do not fit. On a CPU, and with RWKV_JIT_DEBUG=1 on a
        GPU, that includes the values of cu_seqlens and state_indices; else looking at them would
        wait for the GPU: what has an index that is no slot is skipped, a slot that is there twice
        is left undefined, and so is everything where bounds do not rise.
        """
        if kwargs or len(args) != self._count:
            if len(args) == self._count - 1 and kwargs.keys() <= _INDICES:
                args = (*args, kwargs.get("state_indices"))
            else:
                args = self._positional(args, kwargs)
        if not is_dynamo_compiling():
            results = self._run_as_it_is(args)
            if results is not None:
                return results
        return self._run(args)

    def load(self) -> None:
        """Find or build the kernel now, rather than at the first call."""
        KERNELS.get(self._slug, self._launcher.entry)

    def info(self) -> dict[str, Any]:
        """What this operator is, and for its kernel, if it is loaded, where the binary lies, what
        the compiler said of it (registers, spills, shared memory) and how long it took to build."""
        return {
            "slug": self._slug,
            "summary": self._spec.summary,
            "formula": self._spec.formula,
            "mode": current_settings().mode,
            "kernels": KERNELS.describe(self._slug, tuple(self._spec.entries)),
        }

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        rest = self._inputs[len(args) :]
        if len(args) > len(self._inputs) or any(name not in rest for name in kwargs):
            bind(self._spec, args, kwargs)
        return (*args, *(kwargs.get(name) for name in rest))

    def _run_as_it_is(self, tensors: Sequence[Any]) -> Any:
        """A call with nothing to convert and nobody to see it, of sizes found right before; None
        for any other. Each line costs the host, at every call."""
        indices = tensors[-1]
        given = tensors[:-1] if indices is None else tensors
        known = self._last[indices is None]
        if known is None or not known.fits(*given):
            known = self._find(given)
            if known is None:
                return None
            self._last[indices is None] = known
        if _FUNCTION_MODES() or (known.requires_grad and torch.is_grad_enabled()):
            return None
        pointers = [*map(_POINTER, given)]
        if indices is None:
            pointers.append(0)
        return self._launcher.run(tensors, pointers, known.prepared)

    def _find(self, given: Sequence[Any]) -> _Known | None:
        """What is known of calls with such tensors, if they can be launched on as they are."""
        if not is_plain(given):
            return None
        prepared = self._known.get((*map(_LIKENESS, given),))
        if prepared is None or not all(map(_IS_CONTIGUOUS, given)):
            return None
        return _Known(_same_as(given), any(map(_REQUIRES_GRAD, given)), prepared)

    def _run(self, args: Sequence[Any]) -> Any:
        """A call of any kind: checked, converted, and through the registered op."""
        values = dict(zip(self._inputs, args, strict=True))
        if torch.is_autocast_enabled(self._device_type):
            cast_for_autocast(self._spec, self.config, values)
        self._check(values)
        widen(self._spec.called.inputs, self.config, values)
        tensors = tuple(values.values())
        if self._runs_reference:
            return self._reference(tensors)
        self._remember(tensors)
        return self._registered(*tensors, self._slug)

    def _check(self, values: dict[str, Any]) -> None:
        check_arguments(self._spec, self.config, values)
        bounds, slots = values.get("cu_seqlens"), values["state"].shape[0]
        count = sequences_of(values[self._inputs[0]], bounds)
        if values["state_indices"] is None and count > slots:
            has = f"the batch has B={count}" if bounds is None else f"cu_seqlens has S={count}"
            raise ArgumentError(
                f"{self._spec.name}: state has {slots} slots, but {has}; give every "
                f"{'row' if bounds is None else 'sequence'} a slot, or pass state_indices"
            )
        if not torch.is_grad_enabled():
            return
        for name, tensor in values.items():
            if tensor is not None and tensor.requires_grad:
                raise ArgumentError(
                    f"{self._spec.name}: {name} requires grad, but serving has no gradients; call "
                    f"it under torch.no_grad(), or use {self._spec.name.partition('_')[0]}"
                )

    def _remember(self, tensors: Sequence[Any]) -> None:
        given = tensors[:-1] if tensors[-1] is None else tensors
        if not is_plain(given):
            return
        if len(self._known) >= _MOST_SIGNATURES:
            self._known.clear()
        self._known[(*map(_LIKENESS, given),)] = self._launcher.prepare(tensors)

    def _reference(self, tensors: Sequence[Any]) -> Any:
        state = tensors[self._state_at]
        if not torch.compiler.is_compiling():
            announce_reference(self._spec.name)
            if self._device_type == "cpu":
                check_slots(self._spec.name, tensors[-1], state.shape[0])
        *results, advanced = REFERENCES[self._spec.name](
            *tensors,
            decay=self.config.decay,
            state_layout=self.config.state_layout,
            compute_dtype=TORCH_DTYPES[default_state_dtype(self.config.dtype)],
        )
        state.copy_(advanced)
        results = [x.to(TORCH_DTYPES[self.config.dtype]) for x in results]
        return results[0] if len(results) == 1 else tuple(results)


@dataclass(frozen=True, slots=True)
class _Known:
    """A call that was launched as it was, of which the last tensor may be missing.

    fits: whether tensors are like its tensors, in type, dtype, device, sizes, strides and whether
        they require gradients, and as little seen by modes (but of functions), transforms and
        tracers. None may be missing.
    prepared: what its launcher had ready.
    """

    fits: Callable[..., bool]
    requires_grad: bool
    prepared: Prepared


def _never(*_tensors: Any) -> bool:
    return False


def _same_as(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    if _GUARDS is None:
        return _never
    guards = _GUARDS(
        *tensors,
        dynamic_dims_sizes=[[*tensor.shape] for tensor in tensors],
        dynamic_dims_strides=[[*tensor.stride()] for tensor in tensors],
    )
    fits: Callable[..., bool] = guards.check
    return fits
