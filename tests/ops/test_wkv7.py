"""wkv7: what it alone has."""

from __future__ import annotations

import pytest
import torch

from comparing import assert_matches_reference, random_call
from rwkv_jit import get_op
from rwkv_jit.launch import TORCH_DTYPES

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


@on_each_device
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 32), ("bf16", 64)])
def test_vectors_that_are_not_of_length_one_match_the_reference(
    device: str, dtype: str, size: int
) -> None:
    call = random_call(1, 40, 2, size)
    call.tokens["a"] = torch.randn_like(call.tokens["a"]) * 0.15
    call.tokens["b"] = torch.randn_like(call.tokens["b"]) * 0.15
    assert_matches_reference(
        get_op("wkv7", head_size=size, dtype=TORCH_DTYPES[dtype], device=device), call, device
    )
