"""RWKV-7's channel mixing: its formula, its beginning, its state."""

from __future__ import annotations

import re

import pytest
import torch

from comparing import relative_rms
from rwkv_jit.errors import ArgumentError
from rwkv_jit.nn import ChannelMix7

WIDTH, LAYERS = 48, 3
LIMIT = 1e-5

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


def noisy() -> ChannelMix7:
    """A layer with noise on every parameter, since one begins at zero."""
    module = ChannelMix7(1, LAYERS, WIDTH)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def test_fresh_parameters_are_rwkv_lms() -> None:
    module = ChannelMix7(1, LAYERS, WIDTH)
    right = [1 - (i / WIDTH) ** ((1 - 1 / LAYERS) ** 4) for i in range(WIDTH)]
    torch.testing.assert_close(module.x_k.flatten(), torch.tensor(right), atol=2e-6, rtol=2e-5)
    weight = module.key.weight
    assert weight.shape == (4 * WIDTH, WIDTH)
    torch.testing.assert_close(weight.T @ weight, torch.eye(WIDTH), atol=1e-5, rtol=0)
    assert not module.value.weight.any()


@on_each_device
@pytest.mark.parametrize("with_state", [False, True])
def test_results_and_gradients_are_those_of_the_formula_in_float64(
    with_state: bool, device: str
) -> None:
    module = noisy().to(device)
    x = torch.randn(2, 9, WIDTH)
    before = torch.randn(2, WIDTH) if with_state else torch.zeros(2, WIDTH)
    dy = torch.randn(2, 9, WIDTH)
    given = x.to(device).requires_grad_()
    state = before.to(device).requires_grad_() if with_state else None
    y, last = module(given, state, output_state=True)
    leaves = [given, *([state] if with_state else []), *module.parameters()]
    grads = torch.autograd.grad(y, leaves, dy.to(device))

    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    z, *rest = exact
    first = rest.pop(0) if with_state else before.double()
    x_k, key, value = rest
    shifted = torch.cat([first[:, None], z[:, :-1]], dim=1)
    right = torch.relu((z + (shifted - z) * x_k) @ key.T) ** 2 @ value.T
    assert relative_rms(y, right) <= LIMIT
    assert torch.equal(last, given[:, -1])
    for ours, theirs in zip(grads, torch.autograd.grad(right, exact, dy.double()), strict=True):
        assert relative_rms(ours, theirs) <= LIMIT


def test_two_halves_are_the_whole() -> None:
    module = noisy()
    x = torch.randn(2, 12, WIDTH)
    whole, end = module(x, output_state=True)
    first, state = module(x[:, :5], output_state=True)
    second, last = module(x[:, 5:], state, output_state=True)
    assert relative_rms(torch.cat([first, second], dim=1), whole) <= LIMIT
    assert torch.equal(last, end)
    assert module(x)[1] is None


def test_packed_sequences_are_the_separate_ones() -> None:
    module = noisy()
    lengths = [4, 0, 7]
    x, state = torch.randn(1, 11, WIDTH), torch.randn(3, WIDTH)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    y, end = module(x, state, output_state=True, cu_seqlens=bounds)
    for s, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(end[s], state[s])
            continue
        tokens = slice(bounds[s], bounds[s + 1])
        alone, last = module(x[:, tokens], state[s : s + 1], output_state=True)
        assert relative_rms(y[:, tokens], alone) <= LIMIT
        assert torch.equal(end[s : s + 1], last)


def test_a_checkpoint_gives_the_inner_width() -> None:
    module = ChannelMix7(1, LAYERS, WIDTH, 60)
    saved = {f"blocks.1.ffn.{name}": tensor for name, tensor in module.state_dict().items()}
    loaded = ChannelMix7.from_checkpoint(saved, 1, LAYERS, dtype=torch.bfloat16)
    assert loaded.value.weight.shape == (WIDTH, 60)
    assert torch.equal(loaded.x_k, module.x_k.bfloat16())


def test_layers_that_do_not_exist_are_refused() -> None:
    message = "ChannelMix7: layer=3 must be at least 0 and below layers=3"
    with pytest.raises(ArgumentError, match=re.escape(message)):
        ChannelMix7(LAYERS, LAYERS, WIDTH)
