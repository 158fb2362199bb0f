"""The gate: what is right passes, what is not is found, and a missing number is infinite."""

from __future__ import annotations

import math

import pytest
import torch

from rwkv_jit.arguments import sum_groups
from rwkv_jit.bench.cases import Shape
from rwkv_jit.bench.gate import LIMITS, relative_errors, slice_of, worst_of
from rwkv_jit.bench.inputs import Tensors


def product(tensors: Tensors) -> list[torch.Tensor | None]:
    return [tensors["x"] * tensors["y"], None]


@pytest.fixture
def tensors(seed: int) -> Tensors:
    return {"x": torch.randn(50), "y": torch.randn(50)}


def test_results_and_gradients_are_compared_in_float64(tensors: Tensors) -> None:
    errors = relative_errors(product, product, tensors, ("z",))
    assert list(errors) == ["z", "dx", "dy"]
    assert 0 < max(errors.values()) < LIMITS["fp32"]


def test_a_wrong_gradient_is_found_behind_a_right_result(tensors: Tensors) -> None:
    def half(tensors: Tensors) -> list[torch.Tensor | None]:
        x = tensors["x"] / 2
        return [(x + x.detach()) * tensors["y"]]

    errors = relative_errors(half, product, tensors)
    assert errors["y"] < LIMITS["fp32"]
    assert errors["dx"] == pytest.approx(0.5)
    assert worst_of(errors) == "dx"


def test_an_error_that_is_no_number_is_infinite(tensors: Tensors) -> None:
    def undefined(tensors: Tensors) -> list[torch.Tensor | None]:
        return [tensors["x"] * tensors["y"] * math.nan]

    assert relative_errors(undefined, product, tensors)["y"] == math.inf


def test_zeros_that_are_right_have_no_error() -> None:
    errors = relative_errors(product, product, {"x": torch.zeros(3), "y": torch.zeros(3)})
    assert errors == {"y": 0.0, "dx": 0.0, "dy": 0.0}


def test_the_slice_is_small_and_never_larger_than_the_shape() -> None:
    assert slice_of(Shape(8, 4096, 64, 32)) == Shape(2, 128, 2, 32)
    assert slice_of(Shape(1, 5, 1, 32)) == Shape(1, 5, 1, 32)


def test_a_step_around_the_recurrence_is_looked_at_with_several_tokens_of_a_group() -> None:
    looked_at = slice_of(Shape(8, 4096, 64, 64), all_channels=True)
    assert looked_at == Shape(2, 1024, 64, 64)
    tokens = looked_at.batch * looked_at.length
    assert sum_groups(tokens, looked_at.heads * looked_at.head_size) <= tokens / 2
