"""Refusals: every message names operator, argument, value and rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rwkv_jit import Op, get_op
from rwkv_jit.errors import ArgumentError


@pytest.fixture(scope="module")
def op() -> Op:
    return get_op("wkv7", head_size=16, dtype=torch.float32, device="cpu")


def arguments() -> dict[str, Any]:
    return {name: torch.randn(2, 5, 3, 16) for name in "rwkvab"}


def changed(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**arguments(), **changes}


PACKED = {name: torch.randn(1, 5, 3, 16) for name in "rwkvab"}
REFUSED: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (changed(k=torch.randn(2, 4, 3, 16)), r"wkv7: k has T=4 in \[B, T, H, N\], but r has T=5"),
    (changed(v=torch.randn(1, 5, 3, 16)), r"wkv7: v has B=1 in \[B, T, H, N\], but r has B=2"),
    (changed(r=torch.randn(2, 5, 3, 8)), r"wkv7: r has N=8 .* but the operator has head_size=16"),
    (changed(r=torch.randn(5, 3, 16)), r"wkv7: r has shape \[5, 3, 16\], but must be \[B, T, H, N"),
    (changed(a=None), "wkv7: a is None, but only optional tensors may be"),
    (changed(a=3.0), "wkv7: a is a float, not a tensor"),
    (
        changed(b=torch.randn(2, 5, 3, 16).half()),
        "wkv7: b is float16, but must be float32",
    ),
    (changed(w=torch.randn(2, 5, 3, 16).double()), "wkv7: w is float64, but must be float32"),
    (changed(k=torch.randn(2, 5, 3, 16, device="meta")), "wkv7: k is on meta, but r is on cpu"),
    (
        changed(r=torch.randn(2, 5, 3, 16, device="meta")),
        "wkv7: r is on meta, but the op",
    ),
    (
        changed(initial_state=torch.randn(3, 3, 16, 16)),
        r"wkv7: initial_state has S=3 in \[S, H, N, N\], but r has S=2",
    ),
    (
        changed(initial_state=torch.randn(2, 3, 16, 16).bfloat16()),
        "wkv7: initial_state is bfloat16, but must be float32",
    ),
    (changed(cu_seqlens=torch.tensor([0, 5])), r"cu_seqlens packs sequences into B=1.* B=2"),
    (lambda: {**PACKED, "cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens=\[0, 4\] must rise from"),
    (lambda: {**PACKED, "cu_seqlens": torch.tensor([1, 5])}, r"must rise from 0 to T=5"),
    (lambda: {**PACKED, "cu_seqlens": torch.tensor([0, 4, 2, 5])}, r"must rise from 0 to T=5"),
    (lambda: {**PACKED, "cu_seqlens": torch.zeros(1, 2).long()}, r"cu_seqlens has shape \[1, 2\]"),
    (lambda: {**PACKED, "cu_seqlens": torch.tensor([0.0, 5.0])}, "cu_seqlens is float32, but must"),
    (
        lambda: {
            **PACKED,
            "cu_seqlens": torch.tensor([0, 2, 5]),
            "initial_state": torch.randn(3, 3, 16, 16),
        },
        "wkv7: initial_state has S=3 in .* but cu_seqlens has S=2",
    ),
    (changed(state=torch.randn(1)), "wkv7: state is not an argument; it takes r, w, k, v, a, b"),
]


def bonus_arguments(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of wkv5."""
    tokens = {name: torch.randn(2, 5, 3, 16) for name in "rkv"}
    return {**tokens, "w": torch.randn(3, 16), "u": torch.randn(3, 16), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": torch.randn(2, 16)}, r"wkv5: u has H=2 in \[H, N\], but r has H=3"),
        ({"u": torch.randn(3)}, r"wkv5: u has shape \[3\], but must be \[H, N\]$"),
        ({"w": torch.randn(2)}, r"wkv5: w has H=2 in \[H\], but r has H=3"),
        ({"w": torch.randn(3, 8)}, r"wkv5: w has N=8 .* but the operator has head_size=16"),
        (
            {"w": torch.randn(2, 5, 3, 16)},
            r"wkv5: w has shape \[2, 5, 3, 16\], but must be \[H, N\] or \[H\]",
        ),
        ({"w": torch.tensor(1.0)}, r"wkv5: w has shape \[\], but must be \[H, N\] or \[H\]"),
    ],
)
def test_tensors_that_are_not_of_each_token_are_checked(
    changes: dict[str, torch.Tensor], message: str
) -> None:
    wkv5 = get_op("wkv5", head_size=16, dtype=torch.float32, device="cpu")
    with pytest.raises(ArgumentError, match=message):
        wkv5(**bonus_arguments(**changes))


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_a_refusal_names_the_argument_and_the_rule(
    op: Op, make: Callable[[], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        op(**make())


def test_an_argument_given_twice_is_refused(op: Op) -> None:
    tokens = list(arguments().values())
    with pytest.raises(ArgumentError, match="wkv7: r is given twice"):
        op(*tokens, r=tokens[0])


def test_too_many_arguments_are_refused(op: Op) -> None:
    with pytest.raises(ArgumentError, match=r"wkv7: takes 9 arguments .* but 10 were given"):
        op(*arguments().values(), None, False, None, None)


def test_a_missing_argument_is_refused(op: Op) -> None:
    with pytest.raises(ArgumentError, match="wkv7: b is None"):
        op(*list(arguments().values())[:5])
