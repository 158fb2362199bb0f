"""Inputs as a model makes them, and the fewest bytes that an operator has to move for them."""

from __future__ import annotations

import itertools
import math

import torch

from ..arguments import allowed_dtypes, entry_sizes
from ..config import OpConfig, default_state_dtype
from ..launch import TORCH_DTYPES
from ..spec import OpSpec, TensorSpec
from .cases import Shape, lengths_in

Tensors = dict[str, torch.Tensor]


def draw(spec: OpSpec, config: OpConfig, shape: Shape, device: str) -> Tensors:
    """The inputs that `spec` cannot do without, and those that outputs are made with, by name; the
    same from call to call.

    Names mean the same in every recurrence. w holds the same decays in every convention, as far as
    the dtype can: d = exp(-exp(-1/2) sigmoid(x)) with x normal. |a| = 1 and b = -a * gate.
    """
    sizes = {"B": shape.batch, "T": shape.length, "H": shape.heads, "N": shape.head_size}
    sizes.update(P=shape.batch, C=shape.heads * shape.head_size)
    wanted = {output.only_with for output in spec.called.outputs}
    precise = TORCH_DTYPES[default_state_dtype(config.dtype)]
    generator = torch.Generator(device).manual_seed(0)
    exact: Tensors = {}
    drawn: Tensors = {}
    for tensor in spec.called.inputs:
        if tensor.optional and tensor.name not in wanted:
            continue
        x = torch.randn(
            [sizes[letter] for letter in tensor.shape],
            generator=generator,
            dtype=precise,
            device=device,
        )
        if spec.is_recurrence:
            x = _as_model(tensor.name, x, config.decay, exact)
        exact[tensor.name] = x
        dtype = allowed_dtypes(tensor, config, drawn)[0]
        # The only whole numbers that there are choose a channel.
        drawn[tensor.name] = x.to(dtype) if dtype.is_floating_point else _chosen(x, sizes["C"])
    return drawn


def pack(tensors: Tensors, shape: Shape) -> Tensors:
    """The same tokens as sequences of the lengths of `lengths_in`, packed."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths_in(shape))], dtype=torch.int32)
    rows = (shape.batch, shape.length)
    packed = {
        name: x.flatten(0, 1)[None] if x.shape[:2] == rows and name != "state" else x
        for name, x in tensors.items()
    }
    return {**packed, "cu_seqlens": bounds.to(tensors["r"].device)}


def draw_gradient(y: torch.Tensor) -> torch.Tensor:
    """A random gradient of a result; the same from call to call."""
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype)


def fewest_bytes(spec: OpSpec, config: OpConfig, tensors: Tensors, *, backward: bool) -> int:
    """Bytes of a call with `tensors` if each is moved once by each entry that names it, and twice
    where it is changed.

    backward: of forward and backward together. What is optional counts where it is there, and what
    the forward saves for the backward alone does not.
    """
    name, called = next(iter(spec.entries.items()))
    sizes = entry_sizes(called, spec.checkpoint_spacing(config, name), tensors)
    if "state" in tensors:
        sizes["P"] = tensors["state"].shape[0]
    total = 0
    for entry in (called, spec.entries["backward"]) if backward else (called,):
        changed = [tensor for tensor in entry.inputs if tensor.mutated]
        for tensor in (*entry.inputs, *entry.outputs, *changed):
            if not _is_there(spec, tensor, tensors):
                continue
            if tensor.name in tensors:
                total += tensors[tensor.name].nbytes
                continue
            dtype = allowed_dtypes(tensor, config, tensors)[0]
            total += math.prod(sizes[letter] for letter in tensor.shape) * dtype.itemsize
    return total


def _is_there(spec: OpSpec, tensor: TensorSpec, tensors: Tensors) -> bool:
    """Whether a tensor of an entry is one of `tensors`, or made with them."""
    made_with = {output.name: output.only_with for output in spec.called.outputs}
    if tensor.name in spec.saved_outputs:
        return False
    if tensor.only_with:
        return tensor.only_with in tensors
    given = tensor.name in tensors or made_with.get(tensor.name.removeprefix("d")) in tensors
    return given or not tensor.optional


def _as_model(name: str, x: torch.Tensor, decay: str, exact: Tensors) -> torch.Tensor:
    if name == "w":
        return _decay(x, decay)
    if name == "w0":
        return x.zero_()  # w has it
    if name == "a":
        return -torch.nn.functional.normalize(x, dim=-1)
    return -exact["a"] * torch.sigmoid(x) if name == "b" else x


def _chosen(x: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers below `count`, of normal ones."""
    chosen: torch.Tensor = (torch.special.ndtr(x) * count).long()
    return chosen.clamp(0, count - 1)


def _decay(x: torch.Tensor, decay: str) -> torch.Tensor:
    """w in the convention `decay`, from the logit of the clamped one."""
    if decay == "logit":
        return x
    if decay == "loglog":
        return -torch.nn.functional.softplus(-x) - 0.5
    log_d = -math.exp(-0.5) * torch.sigmoid(x)
    return log_d if decay == "log" else torch.exp(log_d)
