"""Running a function of an extension that returns its results: the steps around the recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from ..errors import ArgumentError
from ..launch import TORCH_DTYPES
from ..nn.loss import L2WRAP, head_l2wrap_cross_entropy
from .extensions import Function
from .steps import Tensors, gradients, has_values, outputs
from .tensors import shaped

# Rows of a head's logits at a time where the caller leaves it open.
_CHUNK_ROWS = 4096
Values = Mapping[str, Any]
Results = torch.Tensor | list[torch.Tensor]


def call_step(function: Function, *args: Any) -> Results:
    """Call `function` with its arguments in order. Tensors without values will do.

    Raises ArgumentError for tensors that do not fit, and what `get_op` and its operators raise.
    """
    op, title = function.extension.op, function.title
    values = {ours: x for (_, ours, _), x in zip(function.arguments, args, strict=True)}
    composed = _COMPOSED.get((op, function.name))
    if composed is not None:
        found = composed(title, values)
    else:
        found = (gradients if function.name == "backward" else outputs)(title, op, values)
    like = next(iter(found.values()))
    returned = [_returned(found, name, mark, like) for name, mark in function.returns]
    return returned if len(returned) > 1 else returned[0]


def _returned(found: Tensors, name: str, mark: str, like: torch.Tensor) -> torch.Tensor:
    if mark == "-":
        return like.new_empty(0, dtype=torch.float32)
    return found[name].to(TORCH_DTYPES[mark]) if mark else found[name]


def _channel_mix(title: str, given: Values) -> Tensors:
    """Where upstream keeps the activation for the backward, here are the products that it is made
    of: its root would have been rounded twice."""
    x, key, value = _layer(title, given)
    mixed = outputs(title, "token_shift_mix", {"x": x, "x_k": given["x_k"]})["k"]
    products = mixed @ key.T
    out = outputs(title, "relu_squared", {"x": products})["y"] @ value.T
    return {"out": out, "mixed": mixed, "products": products}


def _channel_mix_gradients(title: str, given: Values) -> Tensors:
    x, key, value = _layer(title, given)
    batch, length, _ = x.shape
    inner, width = key.shape
    dout = shaped(title, "dout", given["dout"], (batch * length, value.shape[0])).to(x.dtype)
    mixed = shaped(title, "mixed", given["mixed"], (batch * length, width))
    products = shaped(title, "act", given["products"], (batch, length, inner))
    activated = outputs(title, "relu_squared", {"x": products})["y"]
    dvalue = dout.T @ activated.flatten(0, 1)
    # Or it would lie beside two more of its size.
    del activated
    step = {"x": products, "dy": dout @ value}
    dproducts = gradients(title, "relu_squared", step)["dx"].flatten(0, 1)
    shift = {"x": x, "x_k": given["x_k"], "dk": dproducts @ key}
    found = gradients(title, "token_shift_mix", shift)
    return {**found, "dkey_weight": dproducts.T @ mixed, "dvalue_weight": dvalue}


def _layer(title: str, given: Values) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, the key's and the value's weight, which go together."""
    x, key, value = (given[name] for name in ("x", "key_weight", "value_weight"))
    for name, weight, shown, columns in (
        ("key_weight", key, "[F, C]", x.shape[-1]),
        ("value_weight", value, "[C, F]", key.shape[0]),
    ):
        if weight.dim() != 2 or weight.shape[1] != columns or weight.dtype != x.dtype:
            raise ArgumentError(
                f"{title}: {name} is {weight.dtype} of shape {list(weight.shape)}, but must be "
                f"{x.dtype} of shape {shown} with {shown[-2]}={columns}"
            )
    return x, key, value


def _cross_entropy(title: str, given: Values) -> Tensors:
    rows = _rows(title, given)
    found = outputs(title, "l2wrap_cross_entropy", rows)
    logits, maximum = rows["logits"], found["maximum"]
    if "logsum" not in found:
        # The reference saves nothing.
        found["logsum"] = logits.to(maximum.dtype).logsumexp(-1) - maximum
        found["argmax"] = logits.argmax(-1).to(torch.int32)
    return {
        "loss": found["loss"].mean(),
        "lse": (maximum + found["logsum"]).flatten(),
        "maximum": maximum.flatten(),
        "argmax": found["argmax"].flatten(),
    }


def _cross_entropy_gradients(title: str, given: Values) -> Tensors:
    rows = _rows(title, given)
    shape = rows["targets"].shape
    lse, maximum, argmax = (
        shaped(title, name, given[name], shape) for name in ("lse", "maximum", "argmax")
    )
    share = shaped(title, "grad_loss", given["dloss"], (1, 1)) / shape[1]
    saved = {"maximum": maximum, "logsum": lse - maximum, "argmax": argmax}
    flowing = {"dloss": share.expand(shape), "dmaximum": L2WRAP * share * maximum}
    found = gradients(title, "l2wrap_cross_entropy", {**rows, **saved, **flowing})
    return {"dlogits": found["dlogits"].view(given["logits"].shape)}


def _rows(title: str, given: Values) -> Tensors:
    """Logits [1, rows, V] and targets [1, rows]."""
    logits = given["logits"]
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ArgumentError(
            f"{title}: logits has shape {list(logits.shape)}, but must be [..., V] with a class "
            "and two axes at least"
        )
    logits = logits.reshape(1, -1, logits.shape[-1])
    return {
        "logits": logits,
        "targets": shaped(title, "targets", given["targets"], (1, logits.shape[1])),
    }


def _head_cross_entropy(title: str, given: Values) -> Tensors:
    hidden, weight = (given[name].detach().requires_grad_() for name in ("hidden", "weight"))
    targets = shaped(title, "targets", given["targets"], hidden.shape[:-1])
    if not has_values(hidden):
        # The targets' would be looked at.
        loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        return {
            "loss": loss,
            "dhidden": torch.empty_like(hidden),
            "dweight": torch.empty_like(weight),
        }
    rows = int(given["chunk_rows"])
    with torch.enable_grad():
        loss = head_l2wrap_cross_entropy(
            hidden, weight, targets, chunk_tokens=rows if rows > 0 else _CHUNK_ROWS
        )
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    return {"loss": loss.detach(), "dhidden": dhidden, "dweight": dweight}


_COMPOSED: Mapping[tuple[str, str], Callable[[str, Values], Tensors]] = MappingProxyType({
    ("channel_mix", "forward"): _channel_mix,
    ("channel_mix", "backward"): _channel_mix_gradients,
    ("l2wrap_cross_entropy", "forward"): _cross_entropy,
    ("l2wrap_cross_entropy", "backward"): _cross_entropy_gradients,
    ("head_l2wrap_cross_entropy", "forward"): _head_cross_entropy,
})  # fmt: skip
