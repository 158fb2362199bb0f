"""One operator's results or gradients, from tensors as the callers of an extension have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..arguments import check_arguments, dtype_of, entry_sizes
from ..autograd import is_plain, run_entry, torch_ops
from ..errors import ArgumentError
from ..nn.operators import find
from ..ops import get_spec
from ..ops.tensors import TOKENS
from ..settings import current_settings
from ..spec import OpSpec, TensorSpec
from .tensors import check_is_tensor, shaped, split_heads

Tensors = dict[str, torch.Tensor]


def outputs(function: str, name: str, given: Mapping[str, Any]) -> Tensors:
    """What the operator `name` makes, tokens as [B, T, C], and what it saves for its backward, but
    for the reference, which saves nothing.

    function: what the caller called, for errors.
    given: inputs by the operator's names, tokens [B, T, C], parameters in any shape, and
        "head_size" where the operator has heads and no parameter [H, N].
    """
    spec, op, inputs = _prepared(function, name, given)
    entry = spec.called
    made: Sequence[torch.Tensor | None]
    if _runs_reference(inputs):
        with torch.no_grad():
            made = _several(op(**_present(inputs)))
    else:
        made = _run(spec, op, "forward", inputs)
    found = zip(entry.outputs, made, strict=False)
    return {
        tensor.name: x.flatten(2) if tensor.shape == TOKENS else x
        for tensor, x in found
        if x is not None
    }


def gradients(function: str, name: str, given: Mapping[str, Any]) -> Tensors:
    """The gradients of all inputs of the operator `name`, in their shapes.

    given: as for `outputs`; what that saved for the backward; and the gradients of the outputs.
    """
    spec, op, inputs = _prepared(function, name, given)
    entry = spec.entries["backward"]
    sizes = entry_sizes(spec.called, 0, inputs)

    def flowing(tensor: TensorSpec) -> torch.Tensor | None:
        if tensor.name not in given:
            return None
        x = shaped(function, tensor.name, given[tensor.name], [sizes[n] for n in tensor.shape])
        first = spec.called.inputs[0].name
        if x.device != given[first].device:
            raise ArgumentError(
                f"{function}: {tensor.name} is on {x.device}, but {first} is on "
                f"{given[first].device}; move them to one device"
            )
        return x.to(dtype_of(tensor.dtype[0], op.config, {}))

    arriving = {
        tensor.name: inputs[tensor.name] if tensor.name in inputs else flowing(tensor)
        for tensor in entry.inputs
    }
    if _runs_reference(inputs):
        made = reference_gradients(op, _present(inputs), _present(arriving))
    else:
        results = _run(spec, op, "backward", arriving)
        made = {tensor.name: x for tensor, x in zip(entry.outputs, results, strict=True)}
    wanted = {f"d{source}": x for source, x in given.items() if f"d{source}" in made}
    return {target: made[target].reshape(source.shape) for target, source in wanted.items()}


def has_values(x: torch.Tensor) -> bool:
    """Whether a tensor is more than shape and dtype, as those are that a compiler traces with."""
    return not isinstance(x, FakeTensor)


def reference_gradients(op: Any, inputs: Tensors, flowing: Tensors, **options: bool) -> Tensors:
    """The gradients of floating inputs from autograd, for an operator that runs its reference.

    flowing: gradients of outputs, by their names; others are passed over.
    """
    leaves = {name: x.detach() for name, x in inputs.items()}
    wanted = [name for name, x in leaves.items() if x.is_floating_point()]
    for name in wanted:
        leaves[name].requires_grad_()
    with torch.enable_grad():
        results = _several(op(**leaves, **options))
    made = zip(get_spec(op.config.op).called.outputs, results, strict=False)
    given = {f"d{tensor.name}": y for tensor, y in made if y is not None}
    given = {name: y for name, y in given.items() if name in flowing}
    grads = torch.autograd.grad(
        list(given.values()), [leaves[name] for name in wanted], [flowing[name] for name in given]
    )
    return {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def _runs_reference(inputs: Mapping[str, torch.Tensor | None]) -> bool:
    """Not where there are no values: results of kernels have the same shapes and dtypes, and
    autograd may be out of reach."""
    return current_settings().mode == "reference" and all(
        map(has_values, _present(inputs).values())
    )


def _run(
    spec: OpSpec, op: Any, entry_name: str, tensors: Mapping[str, torch.Tensor | None]
) -> Sequence[torch.Tensor]:
    """All that an entry makes unless it is asked for more, from its inputs in order."""
    entry = spec.entries[entry_name]
    scalars, flags = entry.scalars.values(), (False for _ in entry.optional_outputs)
    call = (*tensors.values(), *scalars, op.config.slug, *flags)
    if is_plain(x for x in tensors.values() if x is not None):
        return run_entry(spec, entry_name, call)
    ops = torch_ops(spec.name)
    return (ops.forward if entry_name == "forward" else ops.backward)(*call)


def _prepared(
    function: str, name: str, given: Mapping[str, Any]
) -> tuple[OpSpec, Any, dict[str, torch.Tensor | None]]:
    """The operator's spec, the operator, and its inputs as it takes them, which fit it."""
    spec = get_spec(name)
    called = spec.called
    first = given[called.inputs[0].name]
    check_is_tensor(function, called.inputs[0].name, first)
    if first.dim() != 3:
        raise ArgumentError(
            f"{function}: {called.inputs[0].name} has shape {list(first.shape)}, but must be "
            "[B, T, C]"
        )
    size = _head_size(function, given) if "head_size" in spec.knobs else None
    op = find(name, first.dtype, first.device, size)

    def taken(tensor: TensorSpec) -> torch.Tensor | None:
        x: torch.Tensor | None = given.get(tensor.name)
        if x is None:
            return None
        if size is not None and tensor.shape == TOKENS:
            return split_heads(function, tensor.name, x, size)
        return x.reshape(-1) if tensor.shape == ("C",) else x

    inputs = {tensor.name: taken(tensor) for tensor in called.inputs}
    scalars: Any = called.scalars
    check_arguments(spec, op.config, {**inputs, **scalars})
    return spec, op, inputs


def _head_size(function: str, given: Mapping[str, Any]) -> int:
    if "head_size" in given:
        return int(given["head_size"])
    r_k: torch.Tensor = given["r_k"]
    if r_k.dim() != 2:
        raise ArgumentError(f"{function}: r_k has shape {list(r_k.shape)}, but must be [H, N]")
    return r_k.shape[1]


def _present(tensors: Mapping[str, torch.Tensor | None]) -> Tensors:
    return {name: x for name, x in tensors.items() if x is not None}


def _several(results: Any) -> tuple[torch.Tensor | None, ...]:
    return results if isinstance(results, tuple) else (results,)
