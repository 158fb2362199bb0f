"""wkv5: the shapes of w, and gradients that are sums over the batch and time."""

from __future__ import annotations

import pytest
import torch

from comparing import assert_matches_reference, random_call, relative_rms, run
from rwkv_jit import get_op
from rwkv_jit.settings import Settings

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_w_of_a_head_is_that_of_all_its_channels(device: str, dtype: torch.dtype) -> None:
    op = get_op("wkv5", head_size=32, dtype=dtype, device=device)
    wide = random_call(2, 21, 3, 32, op="wkv5", w=torch.randn(3, 1)).rounded(op)
    narrow = random_call(2, 21, 3, 32, op="wkv5").rounded(op)
    narrow.tokens = {**wide.tokens, "w": wide.tokens["w"][:, 0]}
    narrow.initial_state, narrow.dy = wide.initial_state, wide.dy
    narrow.dfinal_state = wide.dfinal_state
    assert_matches_reference(op, narrow, device)
    expected, results = run(op, wide, device), run(op, narrow, device)
    assert results["dw"].shape == (3,)
    for name in expected.keys() - {"dw"}:
        assert torch.equal(results[name], expected[name]), name


@on_each_device
def test_gradients_of_many_sequences_are_summed_without_loss(device: str) -> None:
    """Where all sequences are the same, what rounding takes from a sum adds up."""
    op = get_op("wkv5", head_size=32, dtype=torch.float32, device=device)
    one = random_call(1, 20, 2, 32, op="wkv5").rounded(op)
    many = random_call(3000, 20, 2, 32, op="wkv5").rounded(op)
    for name, x in one.tokens.items():
        many.tokens[name] = x.expand(3000, *x.shape[1:]) if x.dim() == 4 else x
    many.initial_state = many.dfinal_state = torch.zeros(3000, 2, 32, 32)
    one.initial_state = one.dfinal_state = torch.zeros(1, 2, 32, 32)
    assert one.dy is not None
    many.dy = one.dy.expand(3000, -1, -1, -1)
    single, total = run(op, one, device), run(op, many, device)
    for name in ("du", "dw"):
        assert relative_rms(total[name], single[name].double() * 3000) < 1e-6


def test_the_reference_mode_takes_both_shapes_of_w(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rwkv_jit.op.current_settings", lambda: Settings(mode="reference"))
    # No kernel of this size is built anywhere in the tests.
    op = get_op("wkv5", head_size=104, dtype=torch.float32, device="cpu", decay="factor")
    call = random_call(1, 5, 2, 104, op="wkv5", w=torch.rand(2, 1)).rounded(op)
    r, w, k, v, u = call.tokens.values()
    wide, narrow = op(r, w, k, v, u)[0], op(r, w[:, 0], k, v, u)[0]
    assert torch.equal(wide, narrow)
    assert not op.info()["kernels"]
