"""wkv7_decode_fused: what it alone has."""

from __future__ import annotations

import pytest
import torch

from comparing import TOLERANCES, random_call, relative_rms
from rwkv_jit import get_op
from rwkv_jit.launch import TORCH_DTYPES

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)
Tokens = dict[str, torch.Tensor]
PARAMETERS = ("w0", "a0", "k_k", "k_a")


def draw(rows: int, length: int, heads: int, size: int) -> tuple[Tokens, torch.Tensor]:
    """Tokens and parameters, and a pool of states, in float64."""
    call = random_call(rows, length, heads, size, op="wkv7_decode_fused")
    assert call.initial_state is not None
    return call.tokens, call.initial_state


def unfused(x: Tokens) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What a model gives to wkv7_decode, and the key."""
    kk = torch.nn.functional.normalize(x["k_k"] * x["k"], dim=-1)
    gate = torch.sigmoid(x["a0"] + x["a"])
    k = x["k"] * (1 + (gate - 1) * x["k_a"])
    return [x["r"], x["w"] + x["w0"], k, x["v"], -kk, kk * gate], k


@on_each_device
@pytest.mark.parametrize("decay", ["loglog", "logit", "log"])
@pytest.mark.parametrize(("dtype", "size"), [("fp32", 64), ("bf16", 64), ("fp32", 16)])
def test_it_equals_the_unfused_one(device: str, dtype: str, size: int, decay: str) -> None:
    exact, state = draw(3, 4, 2, size)
    if decay == "log":
        exact["w"] = -exact["w"].exp()
    tokens = {name: x.to(device, TORCH_DTYPES[dtype]) for name, x in exact.items()}
    pool = state.to(device, torch.float32)
    other, slots = pool.clone(), torch.tensor([1, -1, 0], dtype=torch.int32, device=device)
    fused = get_op(
        "wkv7_decode_fused",
        head_size=size,
        dtype=TORCH_DTYPES[dtype],
        device=device,
        decay=decay,
    )
    plain = get_op("wkv7_decode", head_size=size, dtype=torch.float32, device=device, decay=decay)
    y, new_k = fused(*tokens.values(), pool, slots)
    inputs, k = unfused({name: x.float() for name, x in tokens.items()})
    assert y.dtype == new_k.dtype == TORCH_DTYPES[dtype]
    assert relative_rms(y, plain(*inputs, other, slots)) < TOLERANCES[dtype][0]
    assert relative_rms(pool, other) < 1e-5
    used = slots >= 0
    assert relative_rms(new_k[used], k[used]) < TOLERANCES[dtype][0]
    assert not new_k[~used].any()


@on_each_device
def test_parameters_may_be_in_float32_each_by_itself(device: str) -> None:
    exact, state = draw(2, 1, 2, 64)
    tokens = {name: x.to(device, torch.bfloat16) for name, x in exact.items()}
    op = get_op("wkv7_decode_fused", head_size=64, dtype=torch.bfloat16, device=device)
    expected = state.to(device, torch.float32)
    y, new_k = op(*tokens.values(), expected)
    for name in ("w", *PARAMETERS):
        pool = state.to(device, torch.float32)
        given = tokens | {name: tokens[name].float()}
        again = op(*given.values(), pool)
        assert torch.equal(again[0], y)
        assert torch.equal(again[1], new_k)
        assert torch.equal(pool, expected)


@on_each_device
@pytest.mark.parametrize("scale", [0.0, 1e-14, 1e-6, 1e6])
def test_a_key_of_any_length_is_normalised_as_in_a_model(device: str, scale: float) -> None:
    exact, state = draw(2, 2, 2, 64)
    exact["k"] *= scale
    tokens = {name: x.to(device, torch.float32) for name, x in exact.items()}
    pool, truth = state.to(device, torch.float32), state.clone()
    op = get_op("wkv7_decode_fused", head_size=64, dtype=torch.float32, device=device)
    y, _ = op(*tokens.values(), pool)
    right = get_op("wkv7_decode", head_size=64, dtype=torch.float64, device="cpu")
    inputs, _ = unfused({name: x.double().cpu() for name, x in tokens.items()})
    assert relative_rms(y, right(*inputs, truth)) < 1e-5
    assert relative_rms(pool, truth) < 1e-5


def test_a_parameter_of_the_wrong_shape_is_refused() -> None:
    exact, state = draw(2, 1, 2, 64)
    tokens = {name: x.float() for name, x in exact.items()} | {"k_k": torch.ones(128)}
    op = get_op("wkv7_decode_fused", head_size=64, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"k_k has shape \[128\], but must be \[H, N\]"):
        op(*tokens.values(), state.float())
