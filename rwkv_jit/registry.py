"""The composition root: get_op returns the operator of one configuration."""

from __future__ import annotations

import functools
import threading
from typing import Literal, overload

import torch

from .arch import cuda_arch_of_capability, host_cpu_arch, parse_arch
from .config import DEFAULT_CHUNK_LENGTH, OpConfig, default_state_dtype, is_bounded, not_a_size
from .errors import ConfigError
from .launch import dtype_name
from .loader import KERNELS
from .op import ElementwiseOp, Op
from .ops import SPECS, get_spec
from .serving import ServingOp

BUILD_POLICIES = ("auto", "never", "always")
_MAKING = threading.Lock()


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
    precision: str = "float32",
    lower_bound: float | None = None,
    build: str = "auto",
) -> ServingOp: ...


@overload
def get_op(
    name: Literal["kk_pre", "readout", "gate_output_correction"],
    *,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device | str | int | None = None,
    arch: str | None = None,
    build: str = "auto",
) -> ElementwiseOp: ...


@overload
def get_op(
    name: Literal[
        "a_gate",
        "vres_gate",
        "token_shift_mix",
        "relu_squared",
        "addcmul_mix",
        "k_update",
        "l2wrap_cross_entropy",
    ],
    *,
    dtype: torch.dtype,
    device: torch.device | str | int | None = None,
    arch: str | None = None,
    build: str = "auto",
) -> ElementwiseOp: ...


@overload
def get_op(
    name: str = "wkv7",
    *,
    head_size: int | None = None,
    dtype: torch.dtype,
    chunk_length: int | None = None,
    device: torch.device | str | int | None = None,
    arch: str | None = None,
    decay: str = "loglog",
    state_dtype: torch.dtype | None = None,
    state_layout: str = "vk",
    checkpoint_dtype: torch.dtype | None = None,
    precision: str = "float32",
    lower_bound: float | None = None,
    build: str = "auto",
) -> Op: ...


def get_op(
    name: str = "wkv7",
    *,
    head_size: int | None = None,
    dtype: torch.dtype,
    chunk_length: int | None = None,
    device: torch.device | str | int | None = None,
    arch: str | None = None,
    decay: str = "loglog",
    state_dtype: torch.dtype | None = None,
    state_layout: str = "vk",
    checkpoint_dtype: torch.dtype | None = None,
    precision: str = "float32",
    lower_bound: float | None = None,
    build: str = "auto",
) -> Op | ServingOp:
    """The operator of one configuration. The same configuration is the same object.

    name: one of `list_ops()`; "wkv7_decode", "wkv7_prefill" and the like, for serving, are a
        ServingOp; the steps around the recurrence, "token_shift_mix" to
        "l2wrap_cross_entropy", an ElementwiseOp. They have no other choices than head_size, where
        there are heads, dtype, device, arch and build.
    head_size: N. Of a recurrence on a CPU a multiple of 8 up to 256, on a GPU 16, 32, 64, 128 or
        256; else any up to 256.
    dtype: of the tokens' vectors and what is made of them: bfloat16, float16 or float32, on a CPU
        float64 too.
    chunk_length: L, tokens that a kernel takes together, or that lie between the states kept for
        the backward; 16 if None.
    device: where it will run. None is the GPU if there is one, else the CPU.
    arch: what to compile for, e.g. "9.0a"; None is the device's own.
    decay: what w means: "loglog" d = exp(-exp(w)), "logit" d = exp(-exp(-1/2) sigmoid(w)) (wkv7
        alone), "log" d = exp(w), "factor" d = w (wkv5 alone).
    state_dtype: of the states passed in and out; None is float32 (float64 for float64).
    state_layout: order of a state's last axes: "vk" (value, key) or "kv".
    checkpoint_dtype: of the states that the forward keeps for the backward, which `op.info()`
        counts. float32 (float64 for float64), or bfloat16, for bfloat16 on tensor cores, which
        halves their memory and rounds what some gradients are made of once more. None is bfloat16
        for wkv7 where that is possible, and float32 else.
    precision: what float32 operators may round operands of products to: "float32", nothing, or
        "tf32", ten bits of mantissa, for which wkv7 and wkv7_prefill have kernels on tensor cores
        (head size 64, compute capability 8.0, 9.0 and 10.0). It is permission, no demand: where no
        kernel makes use of it, as with other dtypes and on a CPU, nothing is rounded so.
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
        checkpoint_dtype, precision, lower_bound, build, _current_gpu(),
    )  # fmt: skip


def list_ops() -> tuple[str, ...]:
    """Names of the operators."""
    return tuple(SPECS)


# typed: 64 and 64.0 are equal, but only one is a head size.
@functools.lru_cache(maxsize=None, typed=True)
def _get_op(
    name: str,
    head_size: int | None,
    dtype: torch.dtype,
    chunk_length: int | None,
    device: torch.device | str | int | None,
    arch: str | None,
    decay: str,
    state_dtype: torch.dtype | None,
    state_layout: str,
    checkpoint_dtype: torch.dtype | None,
    precision: str,
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
    if "head_size" in spec.knobs and head_size is None:
        raise not_a_size(name, "head_size", head_size)
    usual_length = DEFAULT_CHUNK_LENGTH if "chunk_length" in spec.knobs else 0
    config = OpConfig(
        op=name,
        head_size=0 if head_size is None else head_size,
        dtype=short,
        chunk_length=usual_length if chunk_length is None else chunk_length,
        arch=_device_arch(device, current_gpu) if arch is None else parse_arch(arch),
        decay=decay,
        state_dtype=default_state_dtype(short) if state_dtype is None else dtype_name(state_dtype),
        state_layout=state_layout,
        checkpoint_dtype="accumulator" if kept == default_state_dtype(short) else kept or "auto",
        precision=precision,
        bounded=is_bounded(name, short, lower_bound),
    )
    config = spec.without_idle(config)
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
    spec = get_spec(config.op)
    if spec.is_serving:
        return ServingOp(config)
    return Op(config) if spec.is_recurrence else ElementwiseOp(config)


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
