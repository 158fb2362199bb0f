"""wkv7: what it alone has."""

from __future__ import annotations

import pytest
import torch

from comparing import TOLERANCES, assert_matches_reference, random_call, relative_rms, run
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


def on_tensor_cores(size: int = 64, **options: object) -> Op:
    return get_op("wkv7", head_size=size, dtype=torch.bfloat16, device="cuda", **options)  # type: ignore[arg-type]


def decays(shape: tuple[int, ...], values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape)]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("length", [31, 33, 63, 64, 65, 127, 128, 129, 200])
def test_tails_of_spans_match_the_reference(size: int, length: int) -> None:
    assert_matches_reference(on_tensor_cores(size), random_call(2, length, 2, size), "cuda")


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
@pytest.mark.parametrize("size", [64, 128])
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
    size: int, decay: str, values: list[float]
) -> None:
    op = on_tensor_cores(size, decay=decay, lower_bound=-8.0)
    assert op.config.bounded
    call = random_call(2, 75, 2, size, w=decays((2, 75, 2, size), values))
    assert_matches_reference(op, call, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("below", [-50.0, -torch.inf])
def test_a_decay_below_a_declared_bound_counts_as_e_to_the_minus_8(size: int, below: float) -> None:
    op = on_tensor_cores(size, decay="log", lower_bound=-0.61)
    call = random_call(2, 75, 2, size, w=decays((2, 75, 2, size), [-0.5, -8.0])).rounded(op)
    at_bound = run(op, call, "cuda")
    call.tokens["w"] = call.tokens["w"].masked_fill(call.tokens["w"] == -8, below)
    assert all(torch.equal(x, at_bound[name]) for name, x in run(op, call, "cuda").items())


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_tokens_that_hardly_differ_match_the_reference(size: int) -> None:
    call = random_call(1, 512, 4, size, identical=True)
    call.tokens = {name: x + 1e-3 * torch.randn_like(x) for name, x in call.tokens.items()}
    assert_matches_reference(on_tensor_cores(size), call, "cuda")


@pytest.mark.gpu
def test_a_very_long_sequence_matches_the_float32_recurrence() -> None:
    op, precise = on_tensor_cores(), get_op(head_size=64, dtype=torch.float32, device="cuda")
    call = random_call(1, 32768, 2, 64).rounded(op)
    found, truth = run(op, call, "cuda"), run(precise, call.rounded(precise), "cuda")
    output, gradient, _ = TOLERANCES["bf16"]
    errors = {name: relative_rms(found[name], truth[name]) for name in truth}
    bad = {
        name: error
        for name, error in errors.items()
        if not error <= (gradient if name.startswith("d") else output)
    }
    assert not bad


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
def test_rounded_checkpoints_change_gradients_alone_and_within_their_limits(size: int) -> None:
    op = on_tensor_cores(size, checkpoint_dtype=torch.bfloat16)
    call = random_call(2, 150, 2, size)
    assert_matches_reference(op, call, "cuda")
    rounded, whole = (run(x, call.rounded(op), "cuda") for x in (op, on_tensor_cores(size)))
    assert torch.equal(rounded["y"], whole["y"])
    assert not torch.equal(rounded["dr"], whole["dr"])
    packed = random_call(1, 100, 2, size, sequences=3)
    packed.cu_seqlens = torch.tensor([0, 33, 33, 100])
    assert_matches_reference(op, packed, "cuda")


def test_info_tells_what_is_kept_for_the_backward() -> None:
    def kept(**options: object) -> float:
        op = get_op(head_size=64, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
        return float(op.info()["kept_bytes_per_token_and_head"])

    assert kept(device="cpu", chunk_length=32) == 64 * 64 * 4 / 32
    assert kept(arch="9.0a") == 64 * 64 * 4 / 64
    assert kept(arch="9.0a", checkpoint_dtype=torch.bfloat16) == 64 * 64 * 2 / 64
