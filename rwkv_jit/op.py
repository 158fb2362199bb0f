"""Operators as objects: a call's way from its arguments to the registered ops."""

from __future__ import annotations

from typing import Any

import torch

from .arch import is_cuda
from .arguments import bind, cast_for_autocast, check_arguments, dtype_of, widen
from .autograd import is_plain, torch_ops
from .config import OpConfig, default_state_dtype
from .launch import TORCH_DTYPES, announce_reference
from .loader import KERNELS
from .ops import get_spec
from .reference import REFERENCES
from .settings import current_settings

_MOST_SIGNATURES = 1024


class Op:
    """An operator of one configuration. Call it with tensors; get one from `get_op`.

    config: the configuration.
    """

    def __init__(self, config: OpConfig) -> None:
        self.config = config
        self._spec = get_spec(config.op)
        self._slug = config.slug
        self._ops = torch_ops(config.op)
        self._runs_reference = current_settings().mode == "reference"
        self._device_type = "cuda" if is_cuda(config.arch) else "cpu"
        forward, saved = self._spec.entries["forward"], self._spec.saved_outputs
        self._inputs = tuple(tensor.name for tensor in forward.inputs)
        self._scalars = tuple(forward.scalars)
        public = [tensor for tensor in forward.outputs if tensor.name not in saved]
        self._returned = len(public)
        flags = [name for name in forward.optional_outputs if name not in saved]
        self._flags = tuple(f"output_{name}" for name in flags)
        # Of the registered op, which knows those of what is saved, too. They come last.
        self._unsaved = (False,) * (len(forward.optional_outputs) - len(flags))
        # The outputs that are not always there, and which flag or input says that they are.
        self._asked = tuple(
            (at, flags.index(tensor.name)) for at, tensor in enumerate(public) if tensor.optional
        )
        self._given = tuple(
            (at, tensor.only_with) for at, tensor in enumerate(public) if tensor.only_with
        )
        self._checked: set[tuple[Any, ...]] = set()
        self._widened = tuple(tensor for tensor in forward.inputs if tensor.last_axis_optional)

    def __repr__(self) -> str:
        return f"<rwkv_jit.Op {self._slug}>"

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the operator:

            y, final_state = wkv7(r, w, k, v, a, b, initial_state=None, output_final_state=False,
                                  cu_seqlens=None)
            y, final_state = wkv6(r, w, k, v, u, ...)    and wkv5 likewise, the rest as for wkv7

        r, k, v, a, b: [B, T, H, N] in the operator's dtype; any strides.
        w: [B, T, H, N], for wkv5 [H, N] or [H], same dtype as r or float32. Decay; what it means
            is `config.decay`.
        u: [H, N], same dtype as r or float32. What a token's own key counts for in its output.
        initial_state: [B or S, H, N, N] in the state dtype, axes (value, key) for "vk". Zeros if
            None.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1], int32 or int64, on the tensors' device: sequences packed into B = 1,
            the s-th being tokens cu_seqlens[s] to cu_seqlens[s + 1]; empty ones are fine. On a GPU
            the values are not checked, which would wait for the device: tokens of no sequence
            leave y undefined.

        Returns y [B, T, H, N] in the operator's dtype and final_state [B or S, H, N, N], or None.
        All floating inputs get gradients; there are no second derivatives. Under autocast the
        inputs are converted to the operator's dtype, but for a w, u or state of float32.

        Raises ArgumentError for tensors that do not fit, and what building or loading a kernel
        raises at the first call. The formula is in docs/adding_an_operator.md and `op.info()`.
        """
        y, final_state = self._run(args, kwargs)
        return y, final_state

    def load(self, *, backward: bool = True) -> None:
        """Find or build the kernels now, rather than at the first call."""
        for entry in self._spec.entries if backward else ("forward",):
            KERNELS.get(self._slug, entry)

    def info(self) -> dict[str, Any]:
        """What this operator is, of a recurrence what it computes to, whether it relies on a
        declared bound of the decays and the bytes of states that a forward keeps for the backward,
        and for each kernel that is loaded where its binary lies, what the compiler said of it
        (registers, spills, shared memory) and how long it took to build."""
        recurrence = {
            "precision": self.config.precision,
            "bounded": self.config.bounded,
            "kept_bytes_per_token_and_head": self._kept_bytes(),
        }
        return {
            "slug": self._slug,
            "summary": self._spec.summary,
            "formula": self._spec.formula,
            "mode": current_settings().mode,
            **(recurrence if self._spec.is_recurrence else {}),
            "kernels": KERNELS.describe(self._slug, tuple(self._spec.entries)),
        }

    def _kept_bytes(self) -> float:
        """Of checkpoints, where a sequence is long; a short one has one more than whole spans."""
        dtype = dtype_of(self._spec.checkpoint_dtype(self.config), self.config, {})
        spacing = self._spec.checkpoint_spacing(self.config, "forward")
        if not spacing:
            return 0.0
        return float(self.config.head_size**2 * dtype.itemsize / spacing)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The outputs of a public call, None for those that are not asked for."""
        values = bind(self._spec, args, kwargs)
        if torch.is_autocast_enabled(self._device_type):
            cast_for_autocast(self._spec, self.config, values)
        self._check(values)
        if self._widened:
            widen(self._widened, self.config, values)
        if self._runs_reference:
            return self._reference(values)
        tensors = [values[name] for name in self._inputs]
        flags = tuple([bool(values[name]) for name in self._flags])
        scalars = tuple([values[name] for name in self._scalars])
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            outputs = self._ops.differentiable(self._slug, flags, scalars, *tensors)
        else:
            plain = is_plain(tensor for tensor in tensors if tensor is not None)
            forward = self._ops.run if plain else self._ops.forward
            outputs = forward(*tensors, *scalars, self._slug, *flags, *self._unsaved)
        results: list[Any] = [*outputs[: self._returned]]
        for at, flag in self._asked:
            if not flags[flag]:
                results[at] = None
        for at, name in self._given:
            if values[name] is None:
                results[at] = None
        return results

    def _check(self, values: dict[str, Any]) -> None:
        """Check the arguments, once for tensors of the same shapes, dtypes and device.

        Where the values of cu_seqlens can be looked at they are, each time.
        """
        tensors = [values[name] for name in self._inputs]
        known = not torch.compiler.is_compiling() and all(
            tensor is None or isinstance(tensor, torch.Tensor) for tensor in tensors
        )
        if known and (self._device_type == "cuda" or values.get("cu_seqlens") is None):
            signature = tuple(
                [t if t is None else (t.shape, t.dtype, t.device) for t in tensors]
                + [values[name] for name in self._scalars]
            )
            if signature in self._checked:
                return
            check_arguments(self._spec, self.config, values)
            if len(self._checked) >= _MOST_SIGNATURES:
                self._checked.clear()
            self._checked.add(signature)
        else:
            check_arguments(self._spec, self.config, values)

    def _reference(self, values: dict[str, Any]) -> list[Any]:
        if not torch.compiler.is_compiling():
            announce_reference(self._spec.name)
        results = REFERENCES[self._spec.name](
            *(values[name] for name in self._spec.parameters),
            **self._spec.reference_options(self.config),
            compute_dtype=TORCH_DTYPES[default_state_dtype(self.config.dtype)],
        )
        made = results if isinstance(results, tuple) else (results,)
        return [
            result if result is None else result.to(dtype_of(tensor.dtype[0], self.config, {}))
            for tensor, result in zip(self._spec.called.outputs, made, strict=False)
        ]


class ElementwiseOp(Op):
    """One of the steps around the recurrence, of one configuration. Call it with tensors; get one
    from `get_op`.

    config: the configuration.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the operator:

            y = a_gate(x, a0)                       sigmoid(a0 + x)
            y = vres_gate(v, v_first, x, v0)        v + (v_first - v) * sigmoid(v0 + x)
            k, neg_kk, kk_a = kk_pre(k, a, k_k, k_a)
            out = readout(y, r, k, v, g, r_k, weight, bias, eps=64e-5)
            r, w, k, v, a, g, final_state = token_shift_mix(
                x, x_r=None, x_w=None, x_k=None, x_v=None, x_a=None, x_g=None, initial_state=None,
                output_final_state=False, cu_seqlens=None)
            y = relu_squared(x)
            r, w, k, v, a, g = addcmul_mix(
                x, delta, x_r=None, x_w=None, x_k=None, x_v=None, x_a=None, x_g=None)
            new_k = k_update(k, a, k_a)
            out = gate_output_correction(y, r, k, v, g, r_k)
            loss, maximum = l2wrap_cross_entropy(logits, targets)

        x, v, v_first, delta, k, a: [B, T, C] in the operator's dtype; any strides. Where there are
            heads k, a, y, r, v, g: [B, T, H, N].
        a0, v0, k_k, k_a, x_r, ..., weight, bias: [C], C = H * N where there are heads, same dtype
            as the first argument or float32. r_k: [H, N], likewise.
        logits: [B, T, V]; targets: [B, T], int64, -1 for a token that counts nothing. loss and
            maximum, the largest logit, are float32 (float64 for float64), [B, T].
        initial_state: [B or S, C], the token before the first; zeros if None. cu_seqlens,
            output_final_state: as for the recurrences; final_state is the last token.

        Returns a tensor, or a tuple of tensors, with None for what has no x_j, and for a final
        state that is not asked for. All floating inputs get gradients, those of parameters summed
        in float32 (float64 for float64) in a fixed order. Under autocast the inputs are converted
        to the operator's dtype, but for parameters of float32.

        Raises ArgumentError for tensors that do not fit, and what building or loading a kernel
        raises at the first call. The formula is in `op.info()`.
        """
        results = self._run(args, kwargs)
        return tuple(results) if len(results) > 1 else results[0]
