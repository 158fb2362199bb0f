"""Running a function of an extension: its tensors through our operator, its results into theirs."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentError
from .extensions import SIZES, Function
from .heads import batched_state, run_op, shaped

_INPUTS = {"wkv7": "rwkvab", "wkv6": "rwkvu", "wkv5": "rwkvu"}


def call(function: Function, *args: Any) -> None:
    """Call `function` with its arguments in order, and fill those that it writes into.

    Raises ArgumentError for tensors that do not fit, and what `get_op` and its operators raise.
    """
    values = {ours: x for (_, ours, _), x in zip(function.arguments, args, strict=True)}
    made = _Call(function, values)
    results = made.gradients() if "dy" in values else made.results()
    for _, ours, written in function.arguments:
        if written:
            made.write(ours, results.get(ours))


class _Call:
    """The arguments of one call, by our names."""

    def __init__(self, function: Function, values: dict[str, Any]) -> None:
        self._op = function.extension.op
        self._title = f"torch.ops.{function.extension.namespace}.{function.name}"
        self._values = values
        self._shape = self._token_shape()
        self._decay = function.extension.decay
        # What the gradient of the decay in our convention is to be multiplied by for upstream's.
        self._slope: torch.Tensor | None = None
        self._inputs = {name: self._input(name) for name in _INPUTS[self._op]}
        self._state = self._initial_state()

    def results(self) -> dict[str, torch.Tensor]:
        tokens = list(self._inputs.values())
        with torch.no_grad():
            y, final_state = run_op(self._op, tokens, self._state, decay=self._decay)
        found = {"y": y, "final": final_state, "state": final_state}
        if "s" in self._values and self._state is not None:
            # Upstream's backward is not given the state, but this.
            found["s"] = self._state
        return found

    def gradients(self) -> dict[str, torch.Tensor]:
        leaves = {name: x.detach() for name, x in self._inputs.items()}
        tokens, state = list(leaves.values()), None
        if self._state is not None:
            state = leaves["state"] = self._state.detach()
        wanted = [name for name in leaves if f"d{name}" in self._values]
        for name in wanted:
            leaves[name].requires_grad_()
        with torch.enable_grad():
            y, final_state = run_op(self._op, tokens, state, decay=self._decay)
        outputs, given = [y], [self._shaped("dy", y.shape).to(y.dtype)]
        if "dfinal" in self._values:
            outputs.append(final_state)
            given.append(self._shaped("dfinal", final_state.shape).to(final_state.dtype))
        grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], given)
        found = {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
        if self._slope is not None:
            found["dw"] = found["dw"] * self._slope
        return found

    def write(self, name: str, value: torch.Tensor | None) -> None:
        """Into the buffer of that name; zeros where there is nothing to write."""
        buffer: torch.Tensor = self._values[name]
        batch = self._shape[0]
        if value is None:
            buffer.zero_()
        elif name == "s":
            self._kept_state(buffer.zero_()).copy_(value)
        elif buffer.numel() == value.numel():
            buffer.copy_(value.reshape(buffer.shape))
        elif buffer.dim() > 1 and buffer.shape[0] == batch and buffer[0].numel() == value.numel():
            # A row for each sequence, which the caller adds up: all of it is in the first.
            buffer.zero_()
            buffer[0].copy_(value.reshape(buffer.shape[1:]))
        else:
            raise ArgumentError(
                f"{self._title}: the buffer for {name} has shape {list(buffer.shape)}, but must "
                f"hold {list(value.shape)}"
            )

    def _token_shape(self) -> tuple[int, ...]:
        if "B" not in self._values:
            shape = tuple(self._values["r"].shape)
            if len(shape) != 4:
                raise ArgumentError(
                    f"{self._title}: r has shape {list(shape)}, but must be [B, T, H, N]"
                )
            return shape
        batch, length, channels, heads = (int(self._values[name]) for name in SIZES)
        if heads < 1 or channels % heads != 0:
            raise ArgumentError(
                f"{self._title}: C={channels} must be a multiple of H={heads}, the number of heads"
            )
        return batch, length, heads, channels // heads

    def _shaped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return shaped(self._title, name, self._values[name], shape)

    def _input(self, name: str) -> torch.Tensor:
        of_a_head = name == "u" or (name == "w" and self._op == "wkv5")
        shape = self._shape[2:] if of_a_head else self._shape
        if "B" not in self._values:
            # They have their shape, and the operator will see whether it is right.
            x: torch.Tensor = self._values[name]
            return x
        if name != "w":
            return self._shaped(name, shape)
        if "factor" in self._values:
            return self._factor(shape)
        w = self._shaped("w", shape)
        if self._op == "wkv6" and w.dtype == torch.float32 != self._values["r"].dtype:
            # RWKV-CUDA and RWKV-PEFT pass -exp(w) in float32, and expect the gradient of w.
            self._decay, self._slope = "log", w
        return w

    def _factor(self, shape: tuple[int, ...]) -> torch.Tensor:
        factor = self._shaped("factor", shape)
        if self._op == "wkv6":
            self._decay = "log"
            return factor.log()
        self._decay = "factor"
        if "log" in self._values:
            self._slope = factor * self._shaped("log", shape)
        return factor

    def _initial_state(self) -> torch.Tensor | None:
        tokens = self._inputs["r"]
        if "state" in self._values:
            state = self._values["state"]
        elif "dstate" in self._values:
            state = self._kept_state(self._values["s"])
        else:
            return None
        batch, _, heads, size = self._shape
        if state.numel() == batch * heads * size * size:
            state = state.reshape(batch, heads, size, size)
        return batched_state(self._title, "state", state, tokens)

    def _kept_state(self, s: torch.Tensor) -> torch.Tensor:
        """The part of upstream's buffer in which the initial state waits for the backward."""
        batch, _, heads, size = self._shape
        if s.dim() != 5 or s.shape[2] < 1 or s[:, :, 0].shape != (batch, heads, size, size):
            raise ArgumentError(
                f"{self._title}: s has shape {list(s.shape)}, but must be [B, H, chunks, N, N] "
                f"with B={batch}, H={heads}, N={size} and a chunk at least"
            )
        return s[:, :, 0]
