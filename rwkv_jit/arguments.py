"""Argument checks: do these tensors fit the operator, as its spec has them?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from .arch import display_arch
from .config import MOST_SHARED, OpConfig, default_state_dtype
from .errors import ArgumentError
from .indices import check_bounds
from .launch import TORCH_DTYPES, on_device_of
from .spec import EntrySpec, OpSpec, TensorSpec

# Values of parts of sums. More keep more of a GPU busy, and are themselves written and read.
_SUMMED_TOGETHER = 1 << 21
Tensors = Mapping[str, torch.Tensor | None]


def allowed_dtypes(
    tensor: TensorSpec, config: OpConfig, tensors: Tensors
) -> tuple[torch.dtype, ...]:
    """The dtypes that `tensor` may have."""
    return tuple(dtype_of(rule, config, tensors) for rule in tensor.dtype)


def dtype_of(rule: str, config: OpConfig, tensors: Tensors) -> torch.dtype:
    """The dtype that a rule of a TensorSpec stands for in a call with these tensors."""
    if rule == "op":
        return TORCH_DTYPES[config.dtype]
    if rule == "state":
        return TORCH_DTYPES[config.state_dtype]
    if rule == "accumulator":
        return TORCH_DTYPES[default_state_dtype(config.dtype)]
    if rule.startswith("like:"):
        like = tensors[rule.removeprefix("like:")]
        assert like is not None, "a required input"
        return like.dtype
    return TORCH_DTYPES[rule]


def entry_sizes(entry: EntrySpec, spacing: int, tensors: Tensors) -> dict[str, int]:
    """The sizes of a call by their letters, from its first tensor and cu_seqlens.

    spacing: tokens between two state checkpoints; 0 where there are none.
    """
    first = tensors[entry.inputs[0].name]
    assert first is not None, "a required input"
    batch, length = first.shape[:2]
    bounds = tensors.get("cu_seqlens")
    sequences = batch if bounds is None else bounds.shape[0] - 1
    sizes = {"B": batch, "T": length, "S": sequences}
    if first.dim() == 4:
        sizes["H"], sizes["N"] = first.shape[2:]
        sizes["C"] = sizes["H"] * sizes["N"]
    else:
        sizes["C"] = first.shape[2]
    if spacing:
        places = batch * length // spacing + sequences
        sizes.update(K=places, L=spacing, Q=spacing // 4)
        heads = sequences * sizes["H"]
        # E is laid out in wkv7_chunked_plan.h.
        sizes.update(D=heads if heads <= MOST_SHARED else 1, E=4 + heads + 2 * places)
    elif "G" in entry.sizes:
        sizes["G"] = sum_groups(batch * length, sizes["C"])
    return sizes


def sum_groups(tokens: int, channels: int) -> int:
    """In how many groups tokens are taken that are summed, channel by channel: as many as keep a
    GPU busy, whichever it is, so that results are the same bits on all. At least one."""
    return max(1, min(tokens, _SUMMED_TOGETHER // max(channels, 1)))


def bind(spec: OpSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a public call by name; what is not given is None, or False for an output
    that may be asked for. Raises ArgumentError."""
    parameters = spec.parameters
    if len(args) > len(parameters):
        raise ArgumentError(
            f"{spec.name}: takes {len(parameters)} arguments ({', '.join(parameters)}), "
            f"but {len(args)} were given"
        )
    values = dict(zip(parameters, args, strict=False))
    for name, value in kwargs.items():
        if name not in parameters or name in values:
            problem = "is given twice" if name in values else "is not an argument"
            raise ArgumentError(f"{spec.name}: {name} {problem}; it takes {', '.join(parameters)}")
        values[name] = value
    scalars = spec.called.scalars
    for name in parameters:
        values.setdefault(name, False if name.startswith("output_") else scalars.get(name))
    return values


def cast_for_autocast(spec: OpSpec, config: OpConfig, values: dict[str, Any]) -> None:
    """Under autocast: convert floating tokens to the operator's dtype, but for a float32 tensor
    that may be one."""
    dtype = TORCH_DTYPES[config.dtype]
    for tensor in spec.called.inputs:
        value = values[tensor.name]
        if "op" not in tensor.dtype or not isinstance(value, torch.Tensor):
            continue
        if value.is_floating_point() and not (
            value.dtype == torch.float32 and "fp32" in tensor.dtype
        ):
            values[tensor.name] = value.to(dtype)


def widen(inputs: Sequence[TensorSpec], config: OpConfig, values: dict[str, Any]) -> None:
    """Give tensors that came without their last axis, along which they are the same, that axis."""
    for tensor in inputs:
        if tensor.last_axis_optional and values[tensor.name].dim() < len(tensor.shape):
            narrow = values[tensor.name][..., None]
            values[tensor.name] = narrow.expand(*narrow.shape[:-1], config.head_size)


def check_arguments(spec: OpSpec, config: OpConfig, tensors: Tensors) -> None:
    """Raise ArgumentError unless `tensors`, by name, fit the entry of `spec` that is called."""
    entry = spec.called
    known: dict[str, tuple[int, str]] = {}
    if config.head_size:
        known["N"] = config.head_size, "the operator"
    first = entry.inputs[0].name
    for tensor_spec in entry.inputs:
        name, tensor = tensor_spec.name, tensors[tensor_spec.name]
        if tensor is None:
            if not tensor_spec.optional:
                raise ArgumentError(
                    f"{spec.name}: {name} is None, but only optional tensors may be"
                )
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"{spec.name}: {name} is a {type(tensor).__name__}, not a tensor")
        _check_device(spec, config, name, tensor, tensors[first])
        _check_dtype(spec, config, tensor_spec, tensor, tensors)
        if name == "cu_seqlens":
            _check_bounds(spec, tensor, tensors[first])
            known["S"] = (tensor.shape[0] - 1, name)
            continue
        _check_shape(spec, tensor_spec, tensor, known)
        if tensors.get("cu_seqlens") is None:
            known["S"] = known["B"]
        if "H" in known:
            known["C"] = known["H"][0] * known["N"][0], first
    for name in entry.scalars:
        _check_scalar(spec, name, tensors[name])


def _check_device(
    spec: OpSpec,
    config: OpConfig,
    name: str,
    tensor: torch.Tensor,
    first: torch.Tensor | None,
) -> None:
    assert first is not None, "a required input"
    if tensor is first and not on_device_of(config, tensor):
        raise ArgumentError(
            f"{spec.name}: {name} is on {tensor.device}, but the operator was made for "
            f"{display_arch(config.arch)}; get one with device={tensor.device.type!r}"
        )
    if tensor.device != first.device:
        raise ArgumentError(
            f"{spec.name}: {name} is on {tensor.device}, but {spec.called.inputs[0].name} is on "
            f"{first.device}; move them to one device"
        )


def _check_dtype(
    spec: OpSpec, config: OpConfig, tensor_spec: TensorSpec, tensor: torch.Tensor, tensors: Tensors
) -> None:
    allowed = allowed_dtypes(tensor_spec, config, tensors)
    if tensor.dtype in allowed:
        return
    choices = " or ".join(dict.fromkeys(_short(dtype) for dtype in allowed))
    raise ArgumentError(
        f"{spec.name}: {tensor_spec.name} is {_short(tensor.dtype)}, but must be {choices}; "
        "convert it, or get an operator of that dtype"
    )


def _check_scalar(spec: OpSpec, name: str, value: object) -> None:
    if type(value) not in (int, float) or not 0 <= cast("float", value) < math.inf:
        raise ArgumentError(f"{spec.name}: {name} is {value!r}, but must be a number of at least 0")


def _check_shape(
    spec: OpSpec, tensor_spec: TensorSpec, tensor: torch.Tensor, known: dict[str, tuple[int, str]]
) -> None:
    name, letters = tensor_spec.name, tensor_spec.shape
    shown = f"[{', '.join(letters)}]"
    if tensor_spec.last_axis_optional and tensor.dim() == len(letters) - 1:
        letters = letters[:-1]
        shown = f"[{', '.join(letters)}]"
    if tensor.dim() != len(letters):
        short = f" or [{', '.join(letters[:-1])}]" if tensor_spec.last_axis_optional else ""
        raise ArgumentError(
            f"{spec.name}: {name} has shape {list(tensor.shape)}, but must be {shown}{short}"
        )
    for letter, size in zip(letters, tensor.shape, strict=True):
        if letter not in known:
            known[letter] = (size, name)
            continue
        value, owner = known[letter]
        if size != value:
            raise ArgumentError(
                f"{spec.name}: {name} has {letter}={size} in {shown}, but {owner} has "
                f"{'head_size' if owner == 'the operator' else letter}={value}"
            )


def _check_bounds(spec: OpSpec, bounds: torch.Tensor, first: torch.Tensor | None) -> None:
    assert first is not None, "a required input"
    if bounds.dim() != 1 or bounds.shape[0] < 1:
        raise ArgumentError(
            f"{spec.name}: cu_seqlens has shape {list(bounds.shape)}, but must be [S + 1]"
        )
    if first.shape[0] != 1:
        raise ArgumentError(
            f"{spec.name}: cu_seqlens packs sequences into B=1, but the batch has "
            f"B={first.shape[0]}; reshape the tensors to "
            f"[{', '.join(['1', 'B * T', *spec.called.inputs[0].shape[2:]])}]"
        )
    # On a GPU the values are not looked at, which would wait for the device; kernels clamp them.
    if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
        check_bounds(spec.name, bounds, first.shape[1], may_end_before=spec.is_serving)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
