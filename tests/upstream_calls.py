"""An upstream function dressed as one of our operators, so that tests/comparing.py takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rwkv_jit import Op, get_op
from rwkv_jit.config import OpConfig
from rwkv_jit.launch import TORCH_DTYPES

Tensor = torch.Tensor
Tokens = dict[str, Tensor]
# From tokens by name, the initial state and cu_seqlens to y [B, T, H, N] and the final state.
Function = Callable[[Tokens, Tensor | None, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Dressed:
    """`function` as an operator of this configuration, which is what it is compared as."""

    config: OpConfig
    function: Function

    def __call__(
        self,
        *,
        initial_state: Tensor | None,
        output_final_state: bool,
        cu_seqlens: Tensor | None,
        **tokens: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        assert output_final_state
        return self.function(tokens, initial_state, cu_seqlens)


def dressed(
    name: str, function: Function, dtype: str, size: int, *, decay: str, state_layout: str
) -> Op:
    """`function` as the operator `name` of our library."""
    op = get_op(
        name, head_size=size, dtype=TORCH_DTYPES[dtype], device="cpu", decay=decay,
        state_layout=state_layout,
    )  # fmt: skip
    return Dressed(op.config, function)  # type: ignore[return-value]
