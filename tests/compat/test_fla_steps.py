"""FLA's functions around the recurrence: their formulas, results and gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from comparing import relative_rms
from rwkv_jit.compat import fla_steps as fla

B, T, C, H, N = 2, 6, 24, 3, 8
LIMIT = 1e-5

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


def assert_same(ours: Tensor, leaves: list[Tensor], right: Tensor, exact: list[Tensor]) -> None:
    """Results and the gradients of all leaves."""
    assert relative_rms(ours, right) <= LIMIT
    dy = torch.randn(right.shape, dtype=torch.float64)
    grads = torch.autograd.grad(ours, leaves, dy.to(ours))
    for grad, truth in zip(grads, torch.autograd.grad(right, exact, dy), strict=True):
        assert relative_rms(grad, truth) <= LIMIT


def drawn(device: str, *shapes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves of these shapes in float32, and the same in float64 on the CPU."""
    exact = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    return [x.detach().float().to(device).requires_grad_() for x in exact], exact


@on_each_device
@pytest.mark.parametrize("before", [(B, C), (B, 1, C)])
def test_channel_mixing(before: tuple[int, ...], device: str) -> None:
    leaves, exact = drawn(device, (B, T, C), before, (1, 1, C), (C, 40), (40, C))
    out, last = fla.channel_mixing_rwkv7(*leaves)
    assert torch.equal(last, leaves[0][-1])
    x, x_prev, x_k, key, value = exact
    shifted = torch.cat([x_prev.view(B, 1, C), x[:, :-1]], dim=1)
    right = torch.relu((x + (shifted - x) * x_k) @ key) ** 2 @ value
    assert_same(out, leaves, right, exact)


@pytest.mark.parametrize("with_gate", [True, False])
def test_addcmul(with_gate: bool) -> None:
    leaves, exact = drawn("cpu", (B, T, C), (B, T, C), *[(1, 1, C)] * (6 if with_gate else 5))
    mixed = fla.fused_addcmul_rwkv7(*leaves)
    assert len(mixed) == 6
    assert (mixed[5] is None) == (not with_gate)
    hidden, delta, *xs = exact
    ours = torch.stack([m for m in mixed if m is not None])
    assert_same(ours, leaves, torch.stack([hidden + delta * x for x in xs]), exact)


def test_k_update() -> None:
    leaves, exact = drawn("cpu", (B, T, C), (B, T, C), (C,))
    k, a, ka = exact
    assert_same(fla.fused_k_rwkv7(*leaves), leaves, k * (1 + (a - 1) * ka), exact)


def test_gate_output_correction() -> None:
    heads = (B, T, H, N)
    leaves, exact = drawn("cpu", (B, T, C), heads, heads, (H, N), heads, (B, T, C))
    o, r, k, r_k, v, g = exact
    bonus = torch.einsum("bthn,bthn,hn->bth", r, k, r_k)[..., None] * v
    right = (o + bonus.reshape(B, T, C)) * g
    assert_same(fla.gate_output_correction(*leaves), leaves, right, exact)
