"""Calls of serving operators, for their tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from comparing import of_each_token, random_call
from rwkv_jit import ServingOp, get_op
from rwkv_jit.launch import TORCH_DTYPES
from rwkv_jit.ops import SPECS
from rwkv_jit.reference import REFERENCES
from rwkv_jit.settings import Settings

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
for_each_state = pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "fp16"])
for_each_empty_shape = pytest.mark.parametrize("shape", [(0, 1, 2), (2, 0, 2), (2, 1, 0)])
# wkv5 has the templates of wkv6.
_SIZES_OF_WKV5 = [("fp32", 32), ("bf16", 64)]
Tokens = list[torch.Tensor]


def for_each_size(names: Sequence[str], sizes: Sequence[tuple[str, int]]) -> pytest.MarkDecorator:
    rows = [(name, *row) for name in names for row in (_SIZES_OF_WKV5 if "5" in name else sizes)]
    return pytest.mark.parametrize(("name", "dtype", "size"), rows)


def for_each_decay(names: Sequence[str]) -> pytest.MarkDecorator:
    rows = [(name, decay) for name in names for decay in SPECS[name].decays]
    return pytest.mark.parametrize(("name", "decay"), rows)


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


def some(tokens: Tokens, times: slice, rows: slice | list[int] = slice(None)) -> Tokens:
    return [x[rows, times] if of_each_token(x) else x for x in tokens]


def right_results(
    op: ServingOp, tokens: Tokens, state: torch.Tensor, *places: torch.Tensor | None
) -> list[torch.Tensor]:
    """What the float64 recurrence returns, and the pool after it, on the CPU.

    places: bounds and slots, or slots alone.
    """
    return list(
        REFERENCES[op.config.op](
            *(x.double().cpu() for x in (*tokens, state)),
            *(None if x is None else x.cpu() for x in places),
            decay=op.config.decay,
            state_layout=op.config.state_layout,
        )
    )


def in_reference_mode(op: ServingOp, monkeypatch: pytest.MonkeyPatch) -> ServingOp:
    """The same operator, without its kernel."""
    monkeypatch.setattr("rwkv_jit.serving.current_settings", lambda: Settings(mode="reference"))
    monkeypatch.setattr("rwkv_jit.serving.launcher", lambda _slug: None)
    return ServingOp(op.config)
