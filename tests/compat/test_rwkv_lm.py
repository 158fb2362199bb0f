"""RWKV-LM's functions against the float64 references: results, states and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from comparing import TOLERANCES, Call, random_call, reference, relative_rms
from rwkv_jit import get_op
from rwkv_jit.compat import rwkv_lm
from rwkv_jit.errors import ArgumentError
from rwkv_jit.launch import TORCH_DTYPES

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)
Tokens = dict[str, torch.Tensor]
Function = Callable[[Tokens, torch.Tensor, int], Any]


def sizes(x: torch.Tensor, size: int) -> tuple[int, int, int, int]:
    return (*x.shape, x.shape[-1] // size)  # type: ignore[return-value]


# Operator, decay, state order, whether the function starts from the state, and whether it returns
# one; then the function of tokens [B, T, C], state and head size.
CASES: dict[str, tuple[str, str, str, bool, bool, Function]] = {
    "RUN_CUDA_RWKV7g": (
        "wkv7", "loglog", "vk", False, False,
        lambda x, _, n: rwkv_lm.RUN_CUDA_RWKV7g(*take(x, "rwkvab"), HEAD_SIZE=n),
    ),
    "RWKV7_CLAMPW_CUDA": (
        "wkv7", "logit", "vk", False, False,
        lambda x, _, n: rwkv_lm.RWKV7_CLAMPW_CUDA(*take(x, "rwkvab"), n),
    ),
    "RWKV7_STATE_CLAMPW_CUDA": (
        "wkv7", "logit", "vk", True, False,
        lambda x, s, n: rwkv_lm.RWKV7_STATE_CLAMPW_CUDA(s, *take(x, "rwkvab"), n),
    ),
    "RWKV7_STATE_PASSING_CLAMPW_CUDA": (
        "wkv7", "logit", "vk", True, True,
        lambda x, s, n: rwkv_lm.RWKV7_STATE_PASSING_CLAMPW_CUDA(s, *take(x, "rwkvab"), n),
    ),
    "RUN_RWKV7_STATE": (
        "wkv7", "loglog", "vk", True, True,
        lambda x, s, n: rwkv_lm.RUN_RWKV7_STATE(*take(x, "rkvwab"), s, HEAD_SIZE=n),
    ),
    "RUN_RWKV7_INFCTX": (
        "wkv7", "loglog", "kv", True, True,
        lambda x, s, n: rwkv_lm.RUN_RWKV7_INFCTX(*take(x, "rkvwab"), s, HEAD_SIZE=n),
    ),
    "RUN_CUDA_RWKV6 without sizes": (
        "wkv6", "loglog", "vk", False, False,
        lambda x, _, n: rwkv_lm.RUN_CUDA_RWKV6(*take(x, "rkvwu"), HEAD_SIZE=n),
    ),
    "RUN_CUDA_RWKV6 with sizes": (
        "wkv6", "loglog", "vk", False, False,
        lambda x, _, n: rwkv_lm.RUN_CUDA_RWKV6(*sizes(x["r"], n), *take(x, "rkvw"), u=x["u"]),
    ),
    "RUN_CUDA_RWKV6_STATE": (
        "wkv6", "loglog", "vk", True, False,
        lambda x, s, n: rwkv_lm.RUN_CUDA_RWKV6_STATE(*sizes(x["r"], n), *take(x, "rkvwu"), s),
    ),
    "RUN_CUDA_RWKV6_STATE passing states": (
        "wkv6", "loglog", "vk", True, True,
        lambda x, s, n: rwkv_lm.RUN_CUDA_RWKV6_STATE(
            *sizes(x["r"], n), *take(x, "rkvwu"), s, output_final_state=True
        ),
    ),
    "RUN_CUDA_RWKV5": (
        "wkv5", "loglog", "vk", False, False,
        lambda x, _, n: rwkv_lm.RUN_CUDA_RWKV5(
            *sizes(x["r"], n), *take(x, "rkv"), w=x["w"], u=x["u"]
        ),
    ),
}  # fmt: skip


def take(tokens: Tokens, names: str) -> list[torch.Tensor]:
    return [tokens[name] for name in names]


def check(case: str, dtype: str, size: int, length: int, device: str = "cpu") -> None:
    """Results and gradients within the tolerance of the dtype."""
    name, decay, layout, from_state, to_state, function = CASES[case]
    op = get_op(
        name, head_size=size, dtype=TORCH_DTYPES[dtype], device=device, decay=decay,
        state_layout=layout,
    )  # fmt: skip
    call = random_call(2, length, 3, size, op=name).rounded(op)
    assert call.dfinal_state is not None
    if not from_state:
        call = replace(call, initial_state=None)
    if not to_state:
        call = replace(call, dfinal_state=torch.zeros_like(call.dfinal_state))
    truth = reference(op, call)
    leaves = {
        name: (x.flatten(2) if x.dim() == 4 else x).to(device).requires_grad_()
        for name, x in call.tokens.items()
    }
    tokens = dict(leaves)
    state = torch.empty(0)
    if call.initial_state is not None:
        state = leaves["initial_state"] = call.initial_state.to(device).requires_grad_()
    results, given = function(tokens, state, size), [call.dy]
    if to_state:
        given.append(call.dfinal_state)
    else:
        results = (results,)
    found = dict(zip(("y", "final_state"), results, strict=False))
    assert call.dy is not None
    cotangents = [g.reshape(x.shape).to(device) for g, x in zip(given, results, strict=True)]  # type: ignore[union-attr]
    grads = torch.autograd.grad(results, list(leaves.values()), cotangents)
    found.update({f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    output, gradient, of_w = TOLERANCES[dtype]
    for key, value in found.items():
        limit = of_w if key == "dw" else gradient if key.startswith("d") else output
        assert relative_rms(value, truth[key].reshape(value.shape)) <= limit, key


@on_each_device
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "size", "length"), [("fp32", 32, 37), ("bf16", 64, 16)])
def test_results_and_gradients_match_the_reference(
    case: str, dtype: str, size: int, length: int, device: str
) -> None:
    check(case, dtype, size, length, device)


@pytest.mark.parametrize("dtype", ["fp16", "fp64"])
@pytest.mark.parametrize("case", ["RUN_CUDA_RWKV7g", "RUN_CUDA_RWKV6_STATE", "RUN_CUDA_RWKV5"])
def test_every_dtype_of_a_cpu_matches_the_reference(case: str, dtype: str) -> None:
    check(case, dtype, 64, 19)


@pytest.mark.parametrize("case", ["RUN_CUDA_RWKV7g", "RUN_CUDA_RWKV6 without sizes"])
def test_a_single_token_matches_the_reference(case: str) -> None:
    check(case, "fp32", 32, 1)


def tokens_of(call: Call, dtype: torch.dtype = torch.float32) -> Tokens:
    return {
        name: (x.flatten(2) if x.dim() == 4 else x).to(dtype) for name, x in call.tokens.items()
    }


def test_the_head_size_is_64_unless_another_is_said() -> None:
    tokens = tokens_of(random_call(1, 5, 2, 64))
    y = rwkv_lm.RUN_CUDA_RWKV7g(*take(tokens, "rwkvab"))
    assert torch.equal(y, rwkv_lm.RUN_CUDA_RWKV7g(*take(tokens, "rwkvab"), HEAD_SIZE=64))


def test_a_state_of_one_sequence_is_that_of_all_and_its_gradient_their_sum() -> None:
    tokens = tokens_of(random_call(3, 7, 2, 32, op="wkv6"))
    arguments = (*sizes(tokens["r"], 32), *take(tokens, "rkvwu"))
    state = torch.randn(2, 32, 32, requires_grad=True)
    each = state.detach().expand(3, -1, -1, -1).clone().requires_grad_()
    y, same = (rwkv_lm.RUN_CUDA_RWKV6_STATE(*arguments, s) for s in (state, each))
    assert isinstance(y, torch.Tensor)
    assert isinstance(same, torch.Tensor)
    assert torch.equal(y, same)
    dy = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, state, dy)
    (grads,) = torch.autograd.grad(same, each, dy)
    assert relative_rms(grad, grads.sum(0)) <= 1e-6


def test_a_state_of_16_bits_is_widened_and_gets_a_gradient_of_16_bits() -> None:
    tokens = tokens_of(random_call(2, 7, 1, 64, op="wkv6"), torch.bfloat16)
    state = torch.randn(1, 64, 64).bfloat16().requires_grad_()
    y = rwkv_lm.RUN_CUDA_RWKV6_STATE(*sizes(tokens["r"], 64), *take(tokens, "rkvwu"), state)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert state.grad is not None
    assert state.grad.dtype == torch.bfloat16
    assert state.grad.any()


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-5), ("fp16", 1e-3), ("bf16", 4e-3)])
def test_rwkv7_op_updates_its_state_in_place(dtype: str, limit: float) -> None:
    op = get_op("wkv7", head_size=64, dtype=TORCH_DTYPES[dtype], device="cpu")
    call = random_call(1, 21, 2, 64).rounded(op)
    truth = reference(op, call, gradients=False)
    assert call.initial_state is not None
    state = call.initial_state[0].clone()
    tokens = [call.tokens[name][0].flatten(-2).requires_grad_() for name in "rwkvab"]
    y = rwkv_lm.RWKV7_OP(state, *tokens)
    assert y.shape == (21, 128)
    assert not y.requires_grad
    assert relative_rms(y, truth["y"][0].flatten(-2)) <= limit
    assert relative_rms(state, truth["final_state"][0]) <= limit


def test_two_pieces_of_a_sequence_are_the_whole_of_it() -> None:
    tokens = take(tokens_of(random_call(2, 24, 2, 32)), "rwkvab")
    whole, last = rwkv_lm.RWKV7_STATE_PASSING_CLAMPW_CUDA(torch.zeros(2, 32, 32), *tokens, 32)
    state, parts = torch.zeros(2, 2, 32, 32), []
    for part in (slice(0, 11), slice(11, None)):
        y, state = rwkv_lm.RWKV7_STATE_PASSING_CLAMPW_CUDA(state, *(x[:, part] for x in tokens), 32)
        parts.append(y)
    assert relative_rms(torch.cat(parts, 1), whole) <= 1e-5
    assert relative_rms(state, last) <= 1e-5


R = torch.zeros(2, 4, 128)
ONE_STATE = torch.zeros(2, 64, 64)
HEAD = torch.zeros(2, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV7g(*[R] * 6, HEAD_SIZE=96),
            (
                "RUN_CUDA_RWKV7g: q has shape [2, 4, 128], but must be [B, T, C] with C a multiple "
                "of the head size 96; reshape it, or check the head size"
            ),
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV7g(*[R[0]] * 6),
            (
                "RUN_CUDA_RWKV7g: q has shape [4, 128], but must be [B, T, C] with C a multiple of "
                "the head size 64; reshape it, or check the head size"
            ),
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV7g(R, R, R.half(), R, R, R),
            "wkv7: k is float16, but must be float32; convert it, or get an operator of that dtype",
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV7g(R, R, R[:, :3], R, R, R),
            "wkv7: k has T=3 in [B, T, H, N], but r has T=4",
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV7g(R, R, R, R, R, 0.0),  # type: ignore[arg-type]
            "RUN_CUDA_RWKV7g: b is a float, not a tensor",
        ),
        (
            lambda: rwkv_lm.RWKV7_STATE_CLAMPW_CUDA(ONE_STATE[:1], *[R] * 6),
            (
                "RWKV7_STATE_CLAMPW_CUDA: s0 has shape [1, 64, 64], but must be [H, N, N] or "
                "[B, H, N, N] with B=2, H=2 and N=64"
            ),
        ),
        (
            lambda: rwkv_lm.RWKV7_OP(ONE_STATE, *[R] * 6),
            (
                "RWKV7_OP: r has shape [2, 4, 128], but must be [T, C] with C a multiple of the "
                "head size 64; reshape it, or check the head size"
            ),
        ),
        (
            lambda: rwkv_lm.RWKV7_OP(ONE_STATE[0], *[R[0]] * 6),
            "RWKV7_OP: state has shape [64, 64], but must be [H, N, N]",
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV6(R, R, R, R),
            (
                "RUN_CUDA_RWKV6: takes r, k, v, w and u, or B, T, C, H before them, but 4 "
                "arguments were given in order"
            ),
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV6(R, R, R, R, HEAD, u=HEAD),
            (
                "RUN_CUDA_RWKV6: takes r, k, v, w and u, or B, T, C, H before them, but 5 "
                "arguments were given in order"
            ),
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV6(2, 4, 128, 3, R, R, R, R, HEAD),
            "RUN_CUDA_RWKV6: C=128 must be a multiple of H=3, the number of heads",
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV6(2, 5, 128, 2, R, R, R, R, HEAD),
            (
                "RUN_CUDA_RWKV6: r has shape [2, 4, 128], but must be [B, T, C] with B=2, T=5 and "
                "C=128"
            ),
        ),
        (
            lambda: rwkv_lm.RUN_CUDA_RWKV5(2, 4, 128, 2, R, R, R, HEAD, HEAD[0]),
            "RUN_CUDA_RWKV5: u has shape [64], but must hold [2, 64]",
        ),
    ],
)
def test_a_refusal_says_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        call()
    assert str(caught.value) == message
