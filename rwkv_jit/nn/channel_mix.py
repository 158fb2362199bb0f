"""RWKV-7's channel mixing as a torch.nn module, with the parameters of RWKV-LM's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .layer import Layer
from .operators import Operators
from .parameters import fill, fill_orthogonal, vectors

# Where token_shift_mix has what is made with x_k.
_KEY = 2


class ChannelMix7(Layer):
    """RWKV-7's channel mixing: a squared ReLU over each token and the one before it.

    layer: its number, from 0.
    layers: how many the model has; the initialisation depends on both.
    width: C.
    hidden: the inner width; 4 C if None.
    device, dtype: of the parameters.

    Parameters have the names, shapes and initial values of RWKV-LM's `ffn`.
    """

    part = "ffn"

    def __init__(
        self,
        layer: int,
        layers: int,
        width: int,
        hidden: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layer, layers)
        self._operators = Operators({"token_shift_mix": None, "relu_squared": None})
        hidden = 4 * width if hidden is None else hidden
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        (self.x_k,) = vectors(1, width, **place)
        self.key = nn.Linear(width, hidden, bias=False, **place)
        self.value = nn.Linear(hidden, width, bias=False, **place)
        self.reset_parameters()

    @classmethod
    def _sized_as(cls, part: Mapping[str, Tensor], layer: int, layers: int) -> ChannelMix7:
        hidden, width = part["key.weight"].shape
        return cls(layer, layers, width, hidden, device="meta")

    def reset_parameters(self) -> None:
        """Set every parameter to RWKV-LM's initial values."""
        width = self.x_k.numel()
        share = torch.arange(width, device=self.x_k.device) / width
        fill(self.x_k, 1 - share ** ((1 - self.layer / self.layers) ** 4))
        fill_orthogonal(self.key.weight, 1.0)
        nn.init.zeros_(self.value.weight)

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        *,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, T, C], and the state after the last token or None.

        x: [B, T, C], T >= 1.
        state: [B or S, C], the input before the first; zeros if None.
        output_state: whether to return the state, which is the last input.
        cu_seqlens: [S + 1], int32 or int64, with B = 1: sequences packed one after another.
        """
        ops = self._operators.of(x)
        mixed = ops["token_shift_mix"](
            x,
            x_k=self.x_k.view(-1),
            initial_state=state,
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
        )
        xk, last = mixed[_KEY], mixed[-1]
        return self.value(ops["relu_squared"](self.key(xk))), last
