"""What the calling conventions share, where torch itself is what they meet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from comparing import random_call
from rwkv_jit.compat import fla, rwkv_ops

B, T, H, N = 2, 5, 3, 32


# A function, and the order and the shape of its arguments.
CALLS: dict[str, tuple[Callable[..., Any], str, bool]] = {
    "fla 7": (fla.chunk_rwkv7, "rwkvab", False),
    "fla 6": (fla.chunk_rwkv6, "rkvwu", False),
    "rwkv_ops 7": (rwkv_ops.rwkv7_op, "rwkvab", False),
    "rwkv_ops 6": (rwkv_ops.get_rwkv6_kernel(N), "rkvwu", True),
}


def arguments(order: str, *, flat: bool) -> list[torch.Tensor]:
    """Arguments in this order, tokens [B, T, C] if flat."""
    given = random_call(B, T, H, N, op="wkv6" if "u" in order else "wkv7").tokens
    return [given[name].flatten(2 if flat and name != "u" else -1).float() for name in order]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_compiled_code_gives_the_same_and_dynamo_has_no_complaint(name: str) -> None:
    function, order, flat = CALLS[name]
    leaves = [x.requires_grad_() for x in arguments(order, flat=flat)]

    def layer(*given: torch.Tensor) -> torch.Tensor:
        results = function(*given)
        return (results[0] if isinstance(results, tuple) else results) * 2

    expected = layer(*leaves)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        y = torch.compile(layer, backend="aot_eager")(*leaves)
    assert not [w for w in heard if w.category is UserWarning and "trace" in str(w.message)]
    assert torch.equal(y, expected)
    for grad, right in zip(
        torch.autograd.grad(y.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(grad, right)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_takes_tokens_of_mixed_dtypes(name: str) -> None:
    function, order, flat = CALLS[name]
    given = arguments(order, flat=flat)
    given[0] = given[0].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        results = function(*given)
    y = results[0] if isinstance(results, tuple) else results
    assert y.dtype == torch.bfloat16
