"""FLA's functions around the recurrence: their formulas, results and gradients in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from comparing import relative_rms
from elementwise import DIGITS, roundings
from rwkv_jit.compat import fla, fla_steps
from rwkv_jit.errors import ArgumentError

B, T, C, H, N = 2, 7, 33, 3, 11
# Relative RMS error of results and tokens' gradients, and of gradients that are sums over tokens.
LIMITS = {
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (4e-3, 1e-2),
    torch.float16: (5e-4, 1e-2),
}

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)
in_each_dtype = pytest.mark.parametrize(
    ("dtype", "parameters"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
Shapes = list[tuple[int, ...]]
TOKENS, HEADS = (B, T, C), (B, T, H, N)


def mixed(hidden: Tensor, delta: Tensor, *xs: Tensor) -> Tensor:
    return torch.stack([hidden + delta * x for x in xs])


def updated(k: Tensor, a: Tensor, ka: Tensor) -> Tensor:
    return k * (1 + (a - 1) * ka)


def corrected(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    bonus = torch.einsum("bthn,bthn,hn->bth", r, k, r_k.reshape(H, N))[..., None] * v
    return (o + bonus.reshape(o.shape)) * g


def mix(*tensors: Tensor) -> Tensor:
    return torch.stack([y for y in fla.fused_addcmul_rwkv7(*tensors) if y is not None])


# A function, its formula, and its arguments' shapes.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Shapes]] = {
    "addcmul": (mix, mixed, [TOKENS, TOKENS, *[(1, 1, C)] * 6]),
    "addcmul, no gate": (mix, mixed, [TOKENS, TOKENS, *[(C,)] * 5]),
    "k": (fla.fused_k_rwkv7, updated, [TOKENS, TOKENS, (C,)]),
    "k, wide": (fla.fused_k_rwkv7, updated, [TOKENS, TOKENS, (1, 1, C)]),
    "correction": (
        fla.gate_output_correction, corrected, [TOKENS, HEADS, HEADS, (H, N), HEADS, TOKENS]
    ),
    "correction, wide": (
        fla.gate_output_correction, corrected, [TOKENS, HEADS, HEADS, (1, 1, H, N), HEADS, TOKENS]
    ),
}  # fmt: skip
for_each_case = pytest.mark.parametrize("case", CASES)


def of_channels(x: Tensor) -> bool:
    return x.numel() == C


def drawn(
    shapes: Shapes, dtype: torch.dtype, parameters: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of these shapes, and the same values in float64 on the CPU."""
    leaves = []
    for shape in shapes:
        x = torch.randn(shape)
        leaves.append(x.to(parameters if of_channels(x) else dtype).to(device).requires_grad_())
    return leaves, [x.detach().cpu().double().requires_grad_() for x in leaves]


def assert_same(
    ours: Tensor, leaves: list[Tensor], right: Tensor, exact: list[Tensor], *, factor: float = 1.0
) -> None:
    """Results and the gradients of all leaves, those of 16 bits that are not sums over tokens
    within one rounding."""
    dtype = ours.dtype
    dy = torch.randn(right.shape, dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(ours, leaves, dy.to(ours.device))
    truths = torch.autograd.grad(right, exact, dy.double())
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.shape == leaf.shape
        assert grad.dtype == leaf.dtype
    for value, truth in zip((ours, *grads), (right, *truths), strict=True):
        summed = of_channels(value)
        assert relative_rms(value, truth) <= factor * LIMITS[dtype][summed]
        if dtype in DIGITS and not summed:
            assert roundings(value.detach(), truth.detach()) <= 1.01


@on_each_device
@in_each_dtype
@for_each_case
def test_results_and_gradients_are_within_a_rounding_of_the_formula(
    case: str, dtype: torch.dtype, parameters: torch.dtype, device: str
) -> None:
    function, formula, shapes = CASES[case]
    leaves, exact = drawn(shapes, dtype, parameters, device)
    assert_same(function(*leaves), leaves, formula(*exact), exact)


@on_each_device
@for_each_case
def test_a_single_token_and_huge_values_are_right(case: str, device: str) -> None:
    function, formula, shapes = CASES[case]
    one = [(shape[0], 1, *shape[2:]) if shape[:2] == (B, T) else shape for shape in shapes]
    leaves, exact = drawn(one, torch.float32, torch.float32, device)
    with torch.no_grad():
        for leaf, value in zip(leaves, exact, strict=True):
            if not of_channels(leaf):
                leaf.mul_(2.0**20)
                value.mul_(2.0**20)
    assert_same(function(*leaves), leaves, formula(*exact), exact)


@on_each_device
@pytest.mark.parametrize("before", [(B, C), (B, 1, C)])
def test_channel_mixing(before: tuple[int, ...], device: str) -> None:
    shapes: Shapes = [TOKENS, before, (1, 1, C), (C, 40), (40, C)]
    leaves, exact = drawn(shapes, torch.float32, torch.float32, device)
    out, last = fla.channel_mixing_rwkv7(*leaves)
    assert torch.equal(last, leaves[0][-1])
    x, x_prev, x_k, key, value = exact
    shifted = torch.cat([x_prev.view(B, 1, C), x[:, :-1]], dim=1)
    right = torch.relu((x + (shifted - x) * x_k) @ key) ** 2 @ value
    assert_same(out, leaves, right, exact, factor=5)


@pytest.mark.parametrize("with_gate", [True, False])
def test_without_a_share_for_the_gate_there_is_no_input_of_it(with_gate: bool) -> None:
    leaves, _ = drawn([TOKENS, TOKENS, *[(C,)] * 6], torch.float32, torch.float32, "cpu")
    results = (
        fla.fused_addcmul_rwkv7(*leaves) if with_gate else fla.fused_addcmul_rwkv7(*leaves[:7])
    )
    assert len(results) == 6
    assert (results[5] is None) == (not with_gate)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@for_each_case
def test_compiled_code_gives_the_same_and_dynamo_has_no_complaint(case: str) -> None:
    function, _, shapes = CASES[case]
    leaves, _ = drawn(shapes, torch.float32, torch.float32, "cpu")

    def layer(*given: Tensor) -> Tensor:
        return function(*given) * 2

    expected = layer(*leaves)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        y = torch.compile(layer, backend="aot_eager")(*leaves)
    assert not [w for w in heard if w.category is UserWarning and "trace" in str(w.message)]
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.sum(), leaves)))


def test_under_autocast_a_float32_output_of_the_norm_is_corrected_in_float32() -> None:
    *_, shapes = CASES["correction"]
    leaves, exact = drawn(shapes, torch.bfloat16, torch.float32, "cpu")
    leaves[0] = leaves[0].detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fla.gate_output_correction(*leaves)
    assert out.dtype == torch.float32
    assert relative_rms(out, corrected(*exact)) < 1e-6


# As many values as there are channels, but one for each token.
OF_TOKENS = torch.randn(C, 1)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("fused_addcmul_rwkv7", {"xk": OF_TOKENS}, r"xk has shape \[33, 1\], but must be \[33\]"),
        ("fused_addcmul_rwkv7", {"xr": None}, "xr is a NoneType, not a tensor"),
        ("fused_addcmul_rwkv7", {"delta": torch.randn(B, 1, C)}, "delta has T=1 in"),
        ("fused_k_rwkv7", {"ka": torch.randn(B, T, C)}, r"ka has shape \[2, 7, 33\], but must be"),
        ("fused_k_rwkv7", {"ka": torch.tensor(1.0)}, r"ka has shape \[\], but must be \[33\]"),
        ("fused_k_rwkv7", {"a": torch.randn(B, T, C).double()}, "a is float64, but must be float"),
        ("gate_output_correction", {"r_k": torch.randn(C)}, r"r_k has shape \[33\], but must be"),
        ("gate_output_correction", {"o": torch.randn(B, C)}, r"o has shape \[2, 33\], but must be"),
        ("channel_mixing_rwkv7", {"x_k": OF_TOKENS}, r"x_k has shape \[33, 1\], but must be"),
    ],
)
def test_what_no_kernel_takes_is_refused(
    function: str, change: dict[str, Any], message: str
) -> None:
    heads = torch.randn(HEADS)
    tokens, share = torch.randn(TOKENS), torch.randn(C)
    shares = dict.fromkeys(("xr", "xw", "xk", "xv", "xa"), share)
    weights = {"key_weight": torch.randn(C, 4), "value_weight": torch.randn(4, C)}
    of_heads = dict.fromkeys("rkv", heads)
    given: dict[str, Any] = {
        "fused_addcmul_rwkv7": {"hidden_states": tokens, "delta": tokens, **shares},
        "fused_k_rwkv7": {"k": tokens, "a": tokens, "ka": share},
        "gate_output_correction": {"o": tokens, "g": tokens, "r_k": share.view(H, N), **of_heads},
        "channel_mixing_rwkv7": {"x": tokens, "x_prev": tokens[:, 0], "x_k": share, **weights},
    }[function]
    call = getattr(fla, function)
    call(**given)
    with pytest.raises(ArgumentError, match=message):
        call(**{**given, **change})


def test_both_modules_have_the_same_functions() -> None:
    for name in (
        "channel_mixing_rwkv7", "fused_addcmul_rwkv7", "fused_k_rwkv7", "gate_output_correction"
    ):  # fmt: skip
        assert getattr(fla, name) is getattr(fla_steps, name)
