"""The composition root: get_op returns the operator of one configuration."""

from __future__ import annotations

import functools
import threading
from typing import Any, Literal, overload

import torch

from .arch import cuda_arch_of_capability, host_cpu_arch, is_cuda, parse_arch
from .arguments import bind, cast_for_autocast, check_arguments, dtype_of, widen
from .autograd import is_plain, torch_ops
from .config import DEFAULT_CHUNK_LENGTH, OpConfig, default_state_dtype, is_bounded
from .decode import ServingOp
from .errors import ConfigError
from .launch import TORCH_DTYPES, announce_reference, dtype_name
from .loader import KERNELS
from .ops import SPECS, get_spec
from .reference import REFERENCES
from .settings import current_settings

BUILD_POLICIES = ("auto", "never", "always")
_MOST_SIGNATURES = 1024
_MAKING = threading.Lock()


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
        forward = self._spec.entries["forward"]
        self._inputs = tuple(tensor.name for tensor in forward.inputs)
        self._optional = forward.optional_outputs
        self._public = tuple(
            tensor.name for tensor in forward.outputs if tensor.name not in self._spec.saved_outputs
        )
        self._checked: set[tuple[Any, ...]] = set()
        self._flags = tuple(name for name in self._optional if name in self._public)
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
        values = bind(self._spec, args, kwargs)
        if torch.is_autocast_enabled(self._device_type):
            cast_for_autocast(self._spec, self.config, values)
        self._check(values)
        widen(self._widened, self.config, values)
        if self._runs_reference:
            return self._reference(values)
        tensors = [values[name] for name in self._inputs]
        wanted = {name: bool(values[f"output_{name}"]) for name in self._flags}
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            flags = tuple(wanted[name] for name in self._flags)
            outputs = self._ops.differentiable(self._slug, flags, *tensors)
        else:
            flags = tuple(wanted.get(name, False) for name in self._optional)
            plain = is_plain(tensor for tensor in tensors if tensor is not None)
            forward = self._ops.run if plain else self._ops.forward
            outputs = forward(*tensors, self._slug, *flags)
        y, final_state = outputs[0], outputs[1]
        return y, final_state if wanted["final_state"] else None

    def load(self, *, backward: bool = True) -> None:
        """Find or build the kernels now, rather than at the first call."""
        for entry in self._spec.entries if backward else ("forward",):
            KERNELS.get(self._slug, entry)

    def info(self) -> dict[str, Any]:
        """What this operator is, whether it relies on a declared bound of the decays, the bytes of
        states that a forward keeps for the backward, and for each kernel that is loaded where its
        binary lies, what the compiler said of it (registers, spills, shared memory) and how long it
        took to build."""
        return {
            "slug": self._slug,
            "summary": self._spec.summary,
            "formula": self._spec.formula,
            "mode": current_settings().mode,
            "bounded": self.config.bounded,
            "kept_bytes_per_token_and_head": self._kept_bytes(),
            "kernels": KERNELS.describe(self._slug, tuple(self._spec.entries)),
        }

    def _kept_bytes(self) -> float:
        """Of checkpoints, where a sequence is long; a short one has one more than whole spans."""
        dtype = dtype_of("checkpoint", self.config, {})
        spacing = self._spec.checkpoint_spacing(self.config, "forward")
        return float(self.config.head_size**2 * dtype.itemsize / spacing)

    def _check(self, values: dict[str, Any]) -> None:
        """Check the arguments, once for tensors of the same shapes, dtypes and device.

        Where the values of cu_seqlens can be looked at they are, each time.
        """
        tensors = [values[name] for name in self._inputs]
        known = not torch.compiler.is_compiling() and all(
            tensor is None or isinstance(tensor, torch.Tensor) for tensor in tensors
        )
        if known and (self._device_type == "cuda" or values.get("cu_seqlens") is None):
            signature = tuple(t if t is None else (t.shape, t.dtype, t.device) for t in tensors)
            if signature in self._checked:
                return
            check_arguments(self._spec, self.config, values)
            if len(self._checked) >= _MOST_SIGNATURES:
                self._checked.clear()
            self._checked.add(signature)
        else:
            check_arguments(self._spec, self.config, values)

    def _reference(self, values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not torch.compiler.is_compiling():
            announce_reference(self._spec.name)
        y, final_state = REFERENCES[self._spec.name](
            *(values[name] for name in self._spec.parameters),
            decay=self.config.decay,
            state_layout=self.config.state_layout,
            compute_dtype=TORCH_DTYPES[default_state_dtype(self.config.dtype)],
        )
        if final_state is not None:
            final_state = final_state.to(TORCH_DTYPES[self.config.state_dtype])
        return y.to(TORCH_DTYPES[self.config.dtype]), final_state


@overload
def get_op(  # type: ignore[overload-overlap]
    name: Literal[
        "wkv5_decode",
        "wkv6_decode",
        "wkv7_decode",
        "wkv7_decode_fused",
        "wkv5_prefill",
        "wkv6_prefill",
        "wkv7_prefill",
    ],
    *,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str | int | None = None,
    arch: str | None = None,
    decay: str = "loglog",
    state_dtype: torch.dtype | None = None,
    state_layout: str = "vk",
    lower_bound: float | None = None,
    build: str = "auto",
) -> ServingOp: ...


@overload
def get_op(
    name: str = "wkv7",
    *,
    head_size: int,
    dtype: torch.dtype,
    chunk_length: int | None = None,
    device: torch.device | str | int | None = None,
    arch: str | None = None,
    decay: str = "loglog",
    state_dtype: torch.dtype | None = None,
    state_layout: str = "vk",
    checkpoint_dtype: torch.dtype | None = None,
    lower_bound: float | None = None,
    build: str = "auto",
) -> Op: ...


def get_op(
    name: str = "wkv7",
    *,
    head_size: int,
    dtype: torch.dtype,
    chunk_length: int | None = None,
    device: torch.device | str | int | None = None,
    arch: str | None = None,
    decay: str = "loglog",
    state_dtype: torch.dtype | None = None,
    state_layout: str = "vk",
    checkpoint_dtype: torch.dtype | None = None,
    lower_bound: float | None = None,
    build: str = "auto",
) -> Op | ServingOp:
    """The operator of one configuration. The same configuration is the same object.

    name: one of `list_ops()`; "wkv7_decode", "wkv7_prefill" and the like are for
        serving, and a ServingOp.
    head_size: N. On a CPU a multiple of 8 up to 256; on a GPU 16, 32, 64, 128 or 256.
    dtype: of the tokens' vectors and y: bfloat16, float16 or float32, on a CPU float64 too.
    chunk_length: L, tokens that a kernel takes together, or that lie between the states kept for
        the backward; 16 if None.
    device: where it will run. None is the GPU if there is one, else the CPU.
    arch: what to compile for, e.g. "9.0a"; None is the device's own.
    decay: what w means: "loglog" d = exp(-exp(w)), "logit" d = exp(-exp(-1/2) sigmoid(w)) (wkv7
        alone), "log" d = exp(w), "factor" d = w (wkv5 alone).
    state_dtype: of the states passed in and out; None is float32 (float64 for float64).
    state_layout: order of a state's last axes: "vk" (value, key) or "kv".
    checkpoint_dtype: of the states that the forward keeps for the backward, which `op.info()`
        counts; None is float32 (float64 for float64). bfloat16, for tensor-core kernels, halves
        their memory and rounds what the gradients are made of once more.
    lower_bound: what you know log d to be at least, for every token; -0.61 for decays like those of
        "logit", which needs no saying. From -8 on tensor-core kernels are a few per cent faster,
        and take a decay below e^-8 for that; float16 has such kernels from -0.61 on alone, and
        takes a decay below e^-0.61 for that. Otherwise it changes nothing. None, the default, is
        right for every decay.
    build: on a cache miss at the first call: "auto" builds, "never" is an error, "always" builds
        even on a hit.

    Nothing is built here; `op.load()` or the first call does. Raises ConfigError for what no
    kernel serves, with the choices.
    """
    return _get_op(
        name, head_size, dtype, chunk_length, device, arch, decay, state_dtype, state_layout,
        checkpoint_dtype, lower_bound, build, _current_gpu(),
    )  # fmt: skip


def list_ops() -> tuple[str, ...]:
    """Names of the operators."""
    return tuple(SPECS)


# typed: 64 and 64.0 are equal, but only one is a head size.
@functools.lru_cache(maxsize=None, typed=True)
def _get_op(
    name: str,
    head_size: int,
    dtype: torch.dtype,
    chunk_length: int | None,
    device: torch.device | str | int | None,
    arch: str | None,
    decay: str,
    state_dtype: torch.dtype | None,
    state_layout: str,
    checkpoint_dtype: torch.dtype | None,
    lower_bound: float | None,
    build: str,
    current_gpu: int | None,
) -> Op | ServingOp:
    if build not in BUILD_POLICIES:
        raise ConfigError(
            f"{name}: build={build!r} is not known; choose from {', '.join(BUILD_POLICIES)}"
        )
    spec = get_spec(name)
    short = dtype_name(dtype)
    kept = None if checkpoint_dtype is None else dtype_name(checkpoint_dtype)
    config = OpConfig(
        op=name,
        head_size=head_size,
        dtype=short,
        chunk_length=DEFAULT_CHUNK_LENGTH if chunk_length is None else chunk_length,
        arch=_device_arch(device, current_gpu) if arch is None else parse_arch(arch),
        decay=decay,
        state_dtype=default_state_dtype(short) if state_dtype is None else dtype_name(state_dtype),
        state_layout=state_layout,
        checkpoint_dtype="accumulator" if kept in (None, default_state_dtype(short)) else kept,
        bounded=is_bounded(name, short, lower_bound),
    )
    config = spec.without_idle_bound(config)
    spec.check(config)
    if build != "auto":
        KERNELS.set_policy(config.slug, build)
    return _op(config)


def _op(config: OpConfig) -> Op | ServingOp:
    # Two threads at once would register the same torch ops.
    with _MAKING:
        return _make_op(config)


@functools.cache
def _make_op(config: OpConfig) -> Op | ServingOp:
    return ServingOp(config) if get_spec(config.op).is_serving else Op(config)


@functools.cache
def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _current_gpu() -> int | None:
    return torch.cuda.current_device() if _has_gpu() else None


def _device_arch(device: torch.device | str | int | None, current_gpu: int | None) -> str:
    if device is None:
        device = "cpu" if current_gpu is None else torch.device("cuda", current_gpu)
    elif isinstance(device, int):
        device = torch.device("cuda", device)
    device = torch.device(device)
    if device.type == "cpu":
        return host_cpu_arch()
    if device.type != "cuda":
        raise ConfigError(f"device={str(device)!r} is not supported; choose from cpu, cuda")
    if not _has_gpu():
        raise ConfigError(
            f"device={str(device)!r} was asked for, but torch finds no GPU; "
            "pass arch= to build for a GPU that is elsewhere"
        )
    return cuda_arch_of_capability(*torch.cuda.get_device_capability(device))
