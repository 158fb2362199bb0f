"""Running a function of an extension: its tensors through our operator, its results into theirs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..arguments import check_arguments, dtype_of, entry_sizes
from ..autograd import run_entry
from ..errors import ArgumentError
from ..launch import ALIGNMENT
from ..ops import get_spec
from ..settings import current_settings
from .extensions import SIZES, Function
from .tensors import batched_state, operator_for, shaped

_INPUTS = {"wkv7": "rwkvab", "wkv6": "rwkvu", "wkv5": "rwkvu"}
_STATES = ("final_state", "dinitial_state")
Tensors = dict[str, torch.Tensor]


def call(function: Function, *args: Any) -> None:
    """Call `function` with its arguments in order, and fill those that it writes into.

    Raises ArgumentError for tensors that do not fit, and what `get_op` and its operators raise.
    """
    values = {ours: x for (_, ours, _), x in zip(function.arguments, args, strict=True)}
    made = _Call(function, values)
    results = made.gradients() if "dy" in values else made.results()
    for _, ours, written in function.arguments:
        if written and ours in results:
            made.write(ours, results[ours])


class _Call:
    """The arguments of one call, by our names."""

    def __init__(self, function: Function, values: dict[str, Any]) -> None:
        name = function.extension.op
        self._spec = get_spec(name)
        self._title = f"torch.ops.{function.extension.namespace}.{function.name}"
        self._values = values
        self._written = {ours for _, ours, written in function.arguments if written}
        self._shape = self._token_shape()
        self._decay = function.extension.decay
        # What the gradient of the decay in our convention is to be multiplied by for upstream's.
        self._slope: torch.Tensor | None = None
        self._tokens = {letter: self._input(letter) for letter in _INPUTS[name]}
        self._op = operator_for(name, name, self._tokens["r"], decay=self._decay)
        # The reference keeps nothing.
        self._runs_reference = current_settings().mode == "reference"
        self._kept = None if self._runs_reference else self._checkpoints()
        self._state = self._initial_state()
        self._inputs: dict[str, torch.Tensor | None] = {
            **self._tokens,
            "initial_state": self._state,
            "cu_seqlens": None,
        }
        check_arguments(self._spec, self._op.config, self._inputs)

    def results(self) -> Tensors:
        wanted = [] if self._kept is None else ["checkpoints"]
        if not {"final_state", "state"}.isdisjoint(self._values):
            wanted.append("final_state")
        if self._runs_reference:
            with torch.no_grad():
                y, final_state = self._op(*self._tokens.values(), self._state, True)
            assert final_state is not None, "it was asked for"
            found = {"y": y, "final_state": final_state}
        else:
            found = self._run("forward", self._inputs, wanted)
        found["state"] = found["final_state"]
        if self._kept is None and "s" in self._values and self._state is not None:
            # Upstream's backward is not given the state, but this.
            found["s"] = self._state
        return found

    def gradients(self) -> Tensors:
        given = {"dy": self._shaped("dy", self._shape).to(self._tokens["r"].dtype)}
        if "dfinal_state" in self._values:
            batch, _, heads, size = self._shape
            dfinal = self._shaped("dfinal_state", (batch, heads, size, size))
            given["dfinal_state"] = dfinal.to(self._state_dtype)
        if self._runs_reference:
            found = self._reference_gradients(given)
        else:
            checkpoints = self._kept
            if checkpoints is None:
                checkpoints = self._run("forward", self._inputs, ("checkpoints",))["checkpoints"]
            every = {**self._inputs, **given, "checkpoints": checkpoints}
            found = self._run("backward", every, self._written)
        if self._slope is not None:
            found["dw"] = found["dw"] * self._slope
        return found

    def write(self, name: str, value: torch.Tensor) -> None:
        """Into the buffer of that name, unless it is there."""
        buffer: torch.Tensor = self._values[name]
        if value is buffer:
            return
        if name == "s":
            self._kept_state(buffer).copy_(value)
        elif buffer.numel() == value.numel():
            buffer.copy_(value.reshape(buffer.shape))
        elif buffer.dim() > 1 and buffer.shape[0] == self._shape[0] and (
            buffer[0].numel() == value.numel()
        ):  # fmt: skip
            # A row for each sequence, which the caller adds up: all of it is in the first.
            buffer.zero_()
            buffer[0].copy_(value.reshape(buffer.shape[1:]))
        else:
            raise ArgumentError(
                f"{self._title}: the buffer for {name} has shape {list(buffer.shape)}, but must "
                f"hold {list(value.shape)}"
            )

    def _run(
        self,
        entry_name: str,
        given: Mapping[str, torch.Tensor | None],
        wanted: Collection[str],
    ) -> Tensors:
        """The outputs of an entry, in upstream's buffers where a kernel can write into them.

        wanted: the optional ones among them.
        """
        entry = self._spec.entries[entry_name]
        arguments = [given.get(tensor.name) for tensor in entry.inputs]
        flags = [name in wanted for name in entry.optional_outputs]
        names = [tensor.name for tensor in entry.outputs]
        buffers = {name: x for name in names if (x := self._buffer(name)) is not None}
        call = (*arguments, self._op.config.slug, *flags)
        return dict(zip(names, run_entry(self._spec, entry_name, call, buffers), strict=True))

    def _buffer(self, name: str) -> torch.Tensor | None:
        """Where an output is to be written, if it can be there."""
        if name == "checkpoints":
            return self._kept
        buffer: torch.Tensor | None = self._values.get(name)
        if buffer is None:
            return None
        if name in _STATES:
            batch, _, heads, size = self._shape
            return (
                buffer if self._holds(buffer, batch * heads * size**2, self._state_dtype) else None
            )
        like = self._tokens["r" if name == "y" else name.removeprefix("d")]
        return buffer if self._holds(buffer, like.numel(), like.dtype) else None

    def _holds(self, buffer: torch.Tensor, count: int, dtype: torch.dtype) -> bool:
        return (
            buffer.numel() == count
            and buffer.dtype == dtype
            and buffer.device == self._tokens["r"].device
            and buffer.is_contiguous()
            and buffer.data_ptr() % ALIGNMENT == 0
        )

    def _checkpoints(self) -> torch.Tensor | None:
        """Upstream's buffer for what its backward reads, as ours, if it has the room."""
        s: torch.Tensor | None = self._values.get("s")
        if s is None or not s.is_contiguous():
            return None
        entry = self._spec.entries["forward"]
        spacing = self._spec.checkpoint_spacing(self._op.config, "forward")
        sizes = entry_sizes(entry, spacing, self._tokens)
        shape = (sizes["C"], sizes["H"], sizes["N"], sizes["N"])
        begin = s.view(-1)[: math.prod(shape)]
        dtype = dtype_of("checkpoint", self._op.config, {})
        return begin.view(shape) if self._holds(begin, math.prod(shape), dtype) else None

    def _reference_gradients(self, given: Tensors) -> Tensors:
        leaves = {name: x.detach() for name, x in self._tokens.items()}
        tokens, state = list(leaves.values()), None
        if self._state is not None:
            state = leaves["initial_state"] = self._state.detach()
        wanted = [name for name in leaves if f"d{name}" in self._written]
        for name in wanted:
            leaves[name].requires_grad_()
        with torch.enable_grad():
            y, final_state = self._op(*tokens, state, True)
        assert final_state is not None, "it was asked for"
        outputs = {"dy": y, "dfinal_state": final_state}
        grads = torch.autograd.grad(
            [outputs[name] for name in given], [leaves[name] for name in wanted], [*given.values()]
        )
        return {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}

    @property
    def _state_dtype(self) -> torch.dtype:
        return dtype_of("state", self._op.config, {})

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
        of_a_head = name == "u" or (name == "w" and self._spec.name == "wkv5")
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
        if self._spec.name == "wkv6" and w.dtype == torch.float32 != self._values["r"].dtype:
            # RWKV-CUDA and RWKV-PEFT pass -exp(w) in float32, and expect the gradient of w.
            self._decay, self._slope = "log", w
        return w

    def _factor(self, shape: tuple[int, ...]) -> torch.Tensor:
        factor = self._shaped("factor", shape)
        if self._spec.name == "wkv6":
            self._decay = "log"
            return factor.log()
        self._decay = "factor"
        if "log" in self._values:
            self._slope = factor * self._shaped("log", shape)
        return factor

    def _initial_state(self) -> torch.Tensor | None:
        name = "state" if "state" in self._values else "initial_state"
        if name in self._values:
            state = self._values[name]
        elif "dinitial_state" in self._values and self._kept is None:
            state = self._kept_state(self._values["s"])
        else:
            return None
        batch, _, heads, size = self._shape
        if state.numel() == batch * heads * size * size:
            state = state.reshape(batch, heads, size, size)
        return batched_state(self._title, "state", state, self._tokens["r"])

    def _kept_state(self, s: torch.Tensor) -> torch.Tensor:
        """The part of upstream's buffer in which the initial state waits for the backward."""
        batch, _, heads, size = self._shape
        if s.dim() != 5 or s.shape[2] < 1 or s[:, :, 0].shape != (batch, heads, size, size):
            raise ArgumentError(
                f"{self._title}: s has shape {list(s.shape)}, but must be [B, H, chunks, N, N] "
                f"with B={batch}, H={heads}, N={size} and a chunk at least"
            )
        return s[:, :, 0]
