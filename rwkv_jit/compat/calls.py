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
from .extensions import Function
from .received import Received
from .steps import reference_gradients
from .tensors import operator_for

_STATES = ("final_state", "dinitial_state")
Tensors = dict[str, torch.Tensor]


def call(function: Function, *args: Any) -> None:
    """Call `function` with its arguments in order, and fill those that it writes into.

    Raises ArgumentError for tensors that do not fit, and what `get_op` and its operators raise.
    """
    values = {ours: x for (_, ours, _), x in zip(function.arguments, args, strict=True)}
    made = _Call(Received(function, values))
    results = made.gradients() if "dy" in values else made.results()
    for _, ours, written in function.arguments:
        if written and ours in results:
            made.write(ours, results[ours])


class _Call:
    """One call. Kernels write into upstream's buffers where they can; where its buffer for what its
    backward reads has room, the forward leaves our checkpoints there, and the backward needs no
    forward of its own. The reference keeps nothing."""

    def __init__(self, given: Received) -> None:
        self._given = given
        self._spec = get_spec(given.op)
        self._op = operator_for(given.op, given.op, given.tokens["r"], decay=given.decay)
        self._state_dtype = dtype_of("state", self._op.config, {})
        self._runs_reference = current_settings().mode == "reference"
        self._kept = None if self._runs_reference else self._checkpoints()
        self._state = given.initial_state(needed=self._kept is None)
        self._inputs: dict[str, torch.Tensor | None] = {
            **given.tokens,
            "initial_state": self._state,
            "cu_seqlens": None,
        }
        check_arguments(self._spec, self._op.config, self._inputs)

    def results(self) -> Tensors:
        values = self._given.values
        if self._runs_reference:
            with torch.no_grad():
                y, final_state = self._op(*self._given.tokens.values(), self._state, True)
            assert final_state is not None, "it was asked for"
            found = {"y": y, "final_state": final_state}
        else:
            wanted = [] if self._kept is None else ["checkpoints"]
            if not {"final_state", "state"}.isdisjoint(values):
                wanted.append("final_state")
            found = self._run("forward", self._inputs, wanted)
        found["state"] = found["final_state"]
        if self._kept is None and "s" in values and self._state is not None:
            # Upstream's backward is not given the state, but this.
            found["s"] = self._state
        return found

    def gradients(self) -> Tensors:
        given = self._given
        flowing = {"dy": given.shaped("dy", given.shape).to(given.tokens["r"].dtype)}
        if "dfinal_state" in given.values:
            dfinal = given.shaped("dfinal_state", given.state_shape)
            flowing["dfinal_state"] = dfinal.to(self._state_dtype)
        if self._runs_reference:
            inputs = {name: x for name, x in self._inputs.items() if x is not None}
            found = reference_gradients(self._op, inputs, flowing, output_final_state=True)
        else:
            checkpoints = self._kept
            if checkpoints is None:
                checkpoints = self._run("forward", self._inputs, ("checkpoints",))["checkpoints"]
            every = {**self._inputs, **flowing, "checkpoints": checkpoints}
            found = self._run("backward", every, given.written)
        if given.slope is not None:
            found["dw"] = found["dw"] * given.slope
        return found

    def write(self, name: str, value: torch.Tensor) -> None:
        """Into the buffer of that name, unless it is there."""
        buffer: torch.Tensor = self._given.values[name]
        if value is buffer:
            return
        if name == "s":
            self._given.waiting_state().copy_(value)
        elif buffer.numel() == value.numel():
            buffer.copy_(value.reshape(buffer.shape))
        elif buffer.dim() > 1 and buffer.shape[0] == self._given.shape[0] and (
            buffer[0].numel() == value.numel()
        ):  # fmt: skip
            # A row for each sequence, which the caller adds up: all of it is in the first.
            buffer.zero_()
            buffer[0].copy_(value.reshape(buffer.shape[1:]))
        else:
            raise ArgumentError(
                f"{self._given.title}: the buffer for {name} has shape {list(buffer.shape)}, but "
                f"must hold {list(value.shape)}"
            )

    def _run(
        self,
        entry_name: str,
        given: Mapping[str, torch.Tensor | None],
        wanted: Collection[str],
    ) -> Tensors:
        """The outputs of an entry. wanted: the optional ones among them."""
        entry = self._spec.entries[entry_name]
        arguments = [given.get(tensor.name) for tensor in entry.inputs]
        flags = [name in wanted for name in entry.optional_outputs]
        names = [tensor.name for tensor in entry.outputs]
        buffers = {name: x for name in names if (x := self._buffer(name)) is not None}
        call = (*arguments, self._op.config.slug, *flags)
        return dict(zip(names, run_entry(self._spec, entry_name, call, buffers), strict=True))

    def _buffer(self, name: str) -> torch.Tensor | None:
        """Where an output is to be written, if a kernel can do so."""
        if name == "checkpoints":
            return self._kept
        buffer: torch.Tensor | None = self._given.values.get(name)
        if buffer is None:
            return None
        if name in _STATES:
            count, dtype = math.prod(self._given.state_shape), self._state_dtype
        else:
            like = self._given.tokens["r" if name == "y" else name.removeprefix("d")]
            count, dtype = like.numel(), like.dtype
        return buffer if self._takes(buffer, count, dtype) else None

    def _takes(self, buffer: torch.Tensor, count: int, dtype: torch.dtype) -> bool:
        return (
            buffer.numel() == count
            and buffer.dtype == dtype
            and buffer.device == self._given.tokens["r"].device
            and buffer.is_contiguous()
            and buffer.data_ptr() % ALIGNMENT == 0
        )

    def _checkpoints(self) -> torch.Tensor | None:
        """Upstream's buffer for what its backward reads, as ours, if it has the room."""
        s: torch.Tensor | None = self._given.values.get("s")
        if s is None or s.dtype != torch.float32 or not s.is_contiguous():
            return None
        spacing = self._spec.checkpoint_spacing(self._op.config, "forward")
        sizes = entry_sizes(self._spec.called, spacing, self._given.tokens)
        shape = (sizes["K"], sizes["H"], sizes["N"], sizes["N"])
        dtype = dtype_of(self._spec.checkpoint_dtype(self._op.config), self._op.config, {})
        begin = s.view(-1).view(dtype)[: math.prod(shape)]
        return begin.view(shape) if self._takes(begin, math.prod(shape), dtype) else None
