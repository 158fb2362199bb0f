"""Calls of serving operators, for their tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from comparing import random_call
from rwkv_jit import ServingOp, get_op
from rwkv_jit.launch import TORCH_DTYPES

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
for_each_state = pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "fp16"])
Tokens = list[torch.Tensor]


def op_for(
    name: str, device: str, dtype: str = "fp32", size: int = 32, **options: Any
) -> ServingOp:
    if "state_dtype" in options:
        options["state_dtype"] = TORCH_DTYPES[options["state_dtype"]]
    op = get_op(name, head_size=size, dtype=TORCH_DTYPES[dtype], device=device, **options)
    assert isinstance(op, ServingOp)
    return op


def draw(
    op: ServingOp, device: str, rows: int, length: int, heads: int, slots: int
) -> tuple[Tokens, torch.Tensor]:
    """Tokens in the operator's dtype, and a pool of states."""
    size = op.config.head_size
    drawn = op.config.op.removesuffix("_decode").removesuffix("_prefill")
    call = random_call(rows, length, heads, size, op=drawn, sequences=slots)
    assert call.initial_state is not None
    w = call.tokens["w"]
    if op.config.decay == "log":
        call.tokens["w"] = -w.exp()
    elif op.config.decay == "factor":
        call.tokens["w"] = (-w.exp()).exp()
    tokens = [x.to(device, TORCH_DTYPES[op.config.dtype]) for x in call.tokens.values()]
    return tokens, call.initial_state.to(device, TORCH_DTYPES[op.config.state_dtype])


def indices(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
