"""wkv7: what it alone has."""

from __future__ import annotations

import pytest
import torch

from comparing import assert_matches_reference, dtype_options, random_call, run
from rwkv_jit import Op, get_op
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


def on_tensor_cores(size: int = 64, dtype: str = "bf16", **options: object) -> Op:
    return get_op("wkv7", head_size=size, device="cuda", **dtype_options(dtype), **options)  # type: ignore[arg-type]


for_each_kernel = pytest.mark.parametrize(
    ("size", "dtype"), [(64, "bf16"), (128, "bf16"), (64, "tf32")]
)


def decays(shape: tuple[int, ...], values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("decay", "values"),
    [
        ("log", [-50.0]),
        ("log", [-50.0, -10.0, -1.0, -1e-6, 0.0]),
        ("log", [-torch.inf, -0.1]),
        ("loglog", [-1e9, -9.0, -1.0, 1.0, 6.0, 100.0]),
        ("logit", [-90.0, 0.0, 90.0]),
    ],
)
def test_any_decay_matches_the_reference_at_head_size_128(decay: str, values: list[float]) -> None:
    call = random_call(1, 48, 2, 128, w=decays((1, 48, 2, 128), values))
    assert_matches_reference(on_tensor_cores(128, decay=decay), call, "cuda")


@pytest.mark.gpu
@for_each_kernel
@pytest.mark.parametrize(
    ("decay", "values"),
    [
        ("log", [-8.0]),
        ("log", [-8.0, -7.0, -0.6, -1e-6, 0.0]),
        ("log", [-0.6065]),
        ("loglog", [-9.0, -0.5, 2.0]),
    ],
)
def test_decays_down_to_the_bound_match_the_reference(
    size: int, dtype: str, decay: str, values: list[float]
) -> None:
    op = on_tensor_cores(size, dtype, decay=decay, lower_bound=-8.0)
    assert op.config.bounded
    call = random_call(2, 75, 2, size, w=decays((2, 75, 2, size), values))
    assert_matches_reference(op, call, "cuda")


@pytest.mark.gpu
@for_each_kernel
@pytest.mark.parametrize("below", [-50.0, -torch.inf])
def test_a_decay_below_a_declared_bound_counts_as_e_to_the_minus_8(
    size: int, dtype: str, below: float
) -> None:
    op = on_tensor_cores(size, dtype, decay="log", lower_bound=-0.61)
    call = random_call(2, 75, 2, size, w=decays((2, 75, 2, size), [-0.5, -8.0])).rounded(op)
    at_bound = run(op, call, "cuda")
    call.tokens["w"] = call.tokens["w"].masked_fill(call.tokens["w"] == -8, below)
    assert all(torch.equal(x, at_bound[name]) for name, x in run(op, call, "cuda").items())


@pytest.mark.gpu
@for_each_kernel
def test_tokens_that_hardly_differ_match_the_reference(size: int, dtype: str) -> None:
    call = random_call(1, 512, 4, size, identical=True)
    call.tokens = {name: x + 1e-3 * torch.randn_like(x) for name, x in call.tokens.items()}
    assert_matches_reference(on_tensor_cores(size, dtype), call, "cuda")
