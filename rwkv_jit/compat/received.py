"""What a function of an extension is called with, as our operator takes it."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import ArgumentError
from .extensions import SIZES, Function
from .tensors import batched_state, check_is_tensor, shaped

_TOKENS = {"wkv7": "rwkvab", "wkv6": "rwkvu", "wkv5": "rwkvu"}


class Received:
    """The arguments of one call, by our names.

    title: of the function, for errors.
    op: the operator's name.
    values: the arguments as they came.
    written: names of those that the function writes into.
    shape: B, T, H and N.
    decay: what w is.
    slope: what the gradient of w is to be multiplied by for upstream's, if it is another.
    tokens: the operator's inputs of each token or head, in its order.
    """

    def __init__(self, function: Function, values: dict[str, Any]) -> None:
        self.title = function.title
        self.op = function.extension.op
        self.values = values
        self.written = {ours for _, ours, written in function.arguments if written}
        self.shape = self._token_shape()
        self.decay = function.extension.decay
        self.slope: torch.Tensor | None = None
        self.tokens = {letter: self._input(letter) for letter in _TOKENS[self.op]}

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        batch, _, heads, size = self.shape
        return batch, heads, size, size

    def shaped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """An argument whose elements are those of `shape`, in that shape."""
        return shaped(self.title, name, self.values[name], shape)

    def initial_state(self, *, needed: bool) -> torch.Tensor | None:
        """The state before the first token; None for zeros.

        needed: whether a backward that is not given it must find it where the forward put it.
        """
        name = "state" if "state" in self.values else "initial_state"
        if name in self.values:
            state = self.values[name]
        elif needed and "dinitial_state" in self.values:
            state = self.waiting_state()
        else:
            return None
        if state.numel() == math.prod(self.state_shape):
            state = state.reshape(self.state_shape)
        return batched_state(self.title, "state", state, self.tokens["r"])

    def waiting_state(self) -> torch.Tensor:
        """The part of upstream's buffer in which the initial state waits for the backward."""
        s: torch.Tensor = self.values["s"]
        batch, heads, size, _ = self.state_shape
        if s.dim() != 5 or s.shape[2] < 1 or s[:, :, 0].shape != self.state_shape:
            raise ArgumentError(
                f"{self.title}: s has shape {list(s.shape)}, but must be [B, H, chunks, N, N] "
                f"with B={batch}, H={heads}, N={size} and a chunk at least"
            )
        return s[:, :, 0]

    def _token_shape(self) -> tuple[int, int, int, int]:
        if "B" not in self.values:
            r = self.values["r"]
            check_is_tensor(self.title, "r", r)
            if r.dim() != 4:
                raise ArgumentError(
                    f"{self.title}: r has shape {list(r.shape)}, but must be [B, T, H, N]"
                )
            batch, length, heads, size = r.shape
            return batch, length, heads, size
        batch, length, channels, heads = (int(self.values[name]) for name in SIZES)
        if heads < 1 or channels % heads != 0:
            raise ArgumentError(
                f"{self.title}: C={channels} must be a multiple of H={heads}, the number of heads"
            )
        return batch, length, heads, channels // heads

    def _input(self, name: str) -> torch.Tensor:
        of_a_head = name == "u" or (name == "w" and self.op == "wkv5")
        shape = self.shape[2:] if of_a_head else self.shape
        if "B" not in self.values:
            # They have their shape, and the operator will see whether it is right.
            x: torch.Tensor = self.values[name]
            return x
        if name != "w":
            return self.shaped(name, shape)
        if "factor" in self.values:
            return self._factor(shape)
        w = self.shaped("w", shape)
        if self.op == "wkv6" and w.dtype == torch.float32 != self.values["r"].dtype:
            # RWKV-CUDA and RWKV-PEFT pass -exp(w) in float32, and expect the gradient of w.
            self.decay, self.slope = "log", w
        return w

    def _factor(self, shape: tuple[int, ...]) -> torch.Tensor:
        factor = self.shaped("factor", shape)
        if self.op == "wkv6":
            self.decay = "log"
            return factor.log()
        self.decay = "factor"
        if "log" in self.values:
            self.slope = factor * self.shaped("log", shape)
        return factor
