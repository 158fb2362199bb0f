"""flash_rwkv's calling convention: results, states and gradients against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from comparing import assert_matches_reference, random_call, relative_rms
from rwkv_jit.compat.flash_rwkv import (
    Rwkv5LinearAttention,
    Rwkv6LinearAttention,
    rwkv5_cuda_linear_attention,
    rwkv6_cuda_linear_attention,
)
from rwkv_jit.errors import ArgumentError, ConfigError
from upstream_calls import Function, Tensor, Tokens, dressed

FUNCTIONS = {"wkv5": rwkv5_cuda_linear_attention, "wkv6": rwkv6_cuda_linear_attention}
for_each_op = pytest.mark.parametrize("op", FUNCTIONS)


def upstream(op: str) -> Function:
    """The function, called as models call it."""

    def call(t: Tokens, state: Tensor | None, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert state is not None
        r, k, v = (t[name].flatten(2) for name in "rkv")
        if op == "wkv5":
            y, final = rwkv5_cuda_linear_attention(
                r, k, v, t["w"].flatten(), t["u"].flatten(), state
            )
            return y.view(t["r"].shape), final
        return rwkv6_cuda_linear_attention(r, k, v, t["w"].flatten(2), t["u"], state)

    return call


def arguments(op: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Valid arguments, B = 2, T = 3, H = 2, N = 32."""
    tokens = random_call(2, 3, 2, 32, op=op).tokens
    r, k, v = (tokens[name].flatten(2).to(dtype) for name in "rkv")
    w, u = tokens["w"].to(dtype), tokens["u"].to(dtype)
    state = torch.randn(2, 2, 32, 32)
    return [r, k, v, w.flatten() if op == "wkv5" else w.flatten(2), u, state]


@for_each_op
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("batch", "length"), [(3, 19), (1, 1), (2, 16)])
def test_results_states_and_gradients_of_a_batch_match_the_reference(
    op: str, dtype: str, batch: int, length: int
) -> None:
    ours = dressed(op, upstream(op), dtype, 64, decay="loglog", state_layout="vk")
    assert_matches_reference(ours, random_call(batch, length, 2, 64, op=op), "cpu")


@for_each_op
def test_head_size_is_that_of_the_state(op: str) -> None:
    ours = dressed(op, upstream(op), "fp32", 32, decay="loglog", state_layout="vk")
    assert_matches_reference(ours, random_call(2, 5, 3, 32, op=op), "cpu")


@for_each_op
def test_documented_layouts(op: str) -> None:
    out, state = FUNCTIONS[op](*arguments(op))
    assert out.shape == ((2, 3, 64) if op == "wkv5" else (2, 3, 2, 32))
    assert state.shape == (2, 2, 32, 32)
    assert state.dtype == torch.float32


@for_each_op
def test_state_has_axes_value_and_key_and_is_not_written_to(op: str) -> None:
    r, k, v, w, u, _ = arguments(op)
    r, k, v = r[:, :1], k[:, :1], v[:, :1]
    w = w if op == "wkv5" else w[:, :1]
    zeros = torch.zeros(2, 2, 32, 32)
    _, state = FUNCTIONS[op](r, k, v, w, u, zeros)
    heads = (2, 2, 32)
    assert torch.equal(state, v.view(heads)[..., None] * k.view(heads)[..., None, :])
    assert not zeros.any()


@for_each_op
def test_two_halves_equal_the_whole(op: str) -> None:
    r, k, v, w, u, state = arguments(op)
    whole, last = FUNCTIONS[op](r, k, v, w, u, state)
    parts = []
    for part in (slice(0, 1), slice(1, 3)):
        decay = w if op == "wkv5" else w[:, part]
        y, state = FUNCTIONS[op](r[:, part], k[:, part], v[:, part], decay, u, state)
        parts.append(y)
    assert relative_rms(torch.cat(parts, 1), whole) < 1e-6
    assert relative_rms(state, last) < 1e-6


@for_each_op
def test_decay_has_any_dtype_and_bonus_either_shape(op: str) -> None:
    r, k, v, w, u, state = arguments(op)
    w = w.bfloat16().float()
    expected = FUNCTIONS[op](r, k, v, w, u, state)
    for decay, bonus in ((w.bfloat16(), u), (w, u.flatten()), (w.double(), u)):
        result = FUNCTIONS[op](r, k, v, decay, bonus, state)
        assert all(map(torch.equal, result, expected))


@for_each_op
def test_views_of_any_strides_are_taken(op: str) -> None:
    given = arguments(op)
    strided = [torch.stack((x, -x), -1)[..., 0] for x in given]
    assert all(map(torch.equal, FUNCTIONS[op](*strided), FUNCTIONS[op](*given)))


@pytest.mark.parametrize(
    ("op", "function"), [("wkv5", Rwkv5LinearAttention), ("wkv6", Rwkv6LinearAttention)]
)
def test_classes_apply_the_functions(op: str, function: type) -> None:
    given = arguments(op)
    assert all(map(torch.equal, function.apply(*given), FUNCTIONS[op](*given)))  # type: ignore[attr-defined]


@for_each_op
@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda r: r[0], r"receptance has shape \[3, 64\], but must be \[B, T, C\]"),
        (1, lambda k: k[..., :40], r"key has shape \[2, 3, 40\].* multiple of the head size 32"),
        (1, lambda k: k.half(), r"key is torch.float16, but receptance is torch.float32"),
        (2, lambda v: v[:, :2], r"v has T=2 in \[B, T, H, N\], but r has T=3"),
        (3, lambda _: None, r"time_decay is a NoneType, not a tensor"),
        (4, lambda u: u.flatten()[:40], r"time_first has shape \[40\], but must be \[H, N\]"),
        (4, lambda u: u.bfloat16(), r"u is bfloat16, but must be float32"),
        (5, lambda s: s[0], r"state has shape \[2, 32, 32\], but must be \[B, H, N, N\]"),
        (5, lambda s: s[:1], r"initial_state has S=1"),
        (5, lambda s: s.half(), r"initial_state is float16, but must be float32"),
        (5, lambda s: s.to("meta"), r"initial_state is on meta, but r is on cpu"),
    ],
)
def test_refusals_name_argument_value_and_rule(
    op: str, position: int, change: object, message: str
) -> None:
    given = arguments(op)
    given[position] = change(given[position])  # type: ignore[operator]
    with pytest.raises(ArgumentError, match=message):
        FUNCTIONS[op](*given)


@for_each_op
def test_a_head_size_without_a_kernel_is_refused_with_the_choices(op: str) -> None:
    given = [torch.zeros(1, 1, 12)] * 4 + [torch.zeros(1, 12), torch.zeros(1, 1, 12, 12)]
    given[3] = torch.zeros(12) if op == "wkv5" else given[3]
    with pytest.raises(ConfigError, match=f"{op}: head_size=12 is not supported"):
        FUNCTIONS[op](*given)
