"""Inputs like a model's, the same in every decay convention, and the bytes that they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rwkv_jit.bench.cases import Case, Shape
from rwkv_jit.bench.inputs import draw, draw_gradient, fewest_bytes
from rwkv_jit.config import OpConfig
from rwkv_jit.ops import get_spec
from rwkv_jit.reference.decay import decay_factor


def test_inputs_are_the_same_from_call_to_call(case: Case, config: OpConfig) -> None:
    torch.manual_seed(0)
    first = draw(get_spec(case.op), config, case.shape, "cpu")
    second = draw(get_spec(case.op), config, case.shape, "cpu")
    assert list(first) == ["r", "w", "k", "v", "a", "b"]
    for name in first:
        assert torch.equal(first[name], second[name])
        assert first[name].shape == (1, 20, 2, 8)
    assert torch.equal(draw_gradient(first["r"]), draw_gradient(first["r"]))
    assert not torch.equal(first["r"], first["k"])


def test_the_update_is_that_of_a_model(case: Case, config: OpConfig) -> None:
    tensors = draw(get_spec(case.op), config, case.shape, "cpu")
    torch.testing.assert_close(tensors["a"].norm(dim=-1), torch.ones(1, 20, 2))
    gate = -tensors["b"] / tensors["a"]
    assert gate.min() > 0
    assert gate.max() < 1


@pytest.mark.parametrize("decay", ["logit", "log"])
def test_every_convention_writes_the_same_decays(case: Case, config: OpConfig, decay: str) -> None:
    spec, double = get_spec(case.op), replace(config, dtype="fp64", state_dtype="fp64")
    ours = draw(spec, double, case.shape, "cpu")
    theirs = draw(spec, replace(double, decay=decay), case.shape, "cpu")
    factors = [decay_factor(x["w"], kind) for x, kind in ((ours, "loglog"), (theirs, decay))]
    torch.testing.assert_close(*factors, rtol=1e-12, atol=0)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "w")


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
def test_the_fewest_bytes_are_inputs_outputs_and_gradients(
    case: Case, config: OpConfig, dtype: str, size: int
) -> None:
    spec, config, shape = get_spec("wkv7"), replace(config, dtype=dtype), Shape(2, 5, 3, 8)
    tensors = draw(spec, config, shape, "cpu")
    one = 2 * 5 * 3 * 8 * size
    # Six in and y; then six in and dy again, and six gradients. No state, no checkpoint.
    assert fewest_bytes(spec, config, tensors, backward=False) == 7 * one
    assert fewest_bytes(spec, config, tensors, backward=True) == 20 * one


def test_a_state_that_is_advanced_is_read_and_written(case: Case, config: OpConfig) -> None:
    spec, config = get_spec("wkv7_decode"), replace(config, op="wkv7_decode", state_dtype="bf16")
    tensors = draw(spec, config, Shape(3, 1, 2, 8), "cpu")
    assert tensors["state"].shape == (3, 2, 8, 8)
    tokens, state = 7 * 3 * 2 * 8 * 4, 3 * 2 * 8 * 8 * 2
    assert fewest_bytes(spec, config, tensors, backward=False) == tokens + 2 * state


@pytest.mark.parametrize(
    ("name", "forward", "both", "parameters"),
    # x and six results; then x and their gradients in, and that of x.
    [("token_shift_mix", 7, 15, 6), ("a_gate", 2, 5, 1), ("readout", 6, 17, 3)],
)
def test_each_tensor_of_a_step_counts_once(
    name: str, forward: int, both: int, parameters: int
) -> None:
    spec = get_spec(name)
    config = OpConfig(op=name, dtype="bf16", arch="sm90a", head_size=8 if spec.knobs else 0)
    tensors = draw(spec, config, Shape(2, 5, 3, 8), "cpu")
    one, few = 2 * 5 * 24 * 2, 24 * 2
    assert fewest_bytes(spec, config, tensors, backward=False) == forward * one + parameters * few
    assert fewest_bytes(spec, config, tensors, backward=True) == both * one + 3 * parameters * few


def test_targets_of_a_loss_are_classes() -> None:
    config = OpConfig(op="l2wrap_cross_entropy", dtype="fp32", arch="x86_64_v3")
    tensors = draw(get_spec(config.op), config, Shape(3, 40, 2, 8), "cpu")
    assert tensors["logits"].shape == (3, 40, 16)
    assert tensors["targets"].unique().tolist() == list(range(16))
