"""rwkv_ops, RWKV operators for keras, with its functions replaced by ours.

The package's own native functions, for the torch backend and without kernels, are the oracle here.
Relative RMS errors are asserted: 1e-5 for outputs and states and 2e-5 for gradients in float32,
4e-3 and 1.2e-2 in bfloat16, which the oracle computes in float32. Upstream's tests allow its
kernels rtol 1e-2 for outputs, 1e-3 for states and 7e-3 to 1e-2 for gradients.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from comparing import random_call, relative_rms
from rwkv_jit.compat import rwkv_ops as ours

# Importing it needs the settings of `client`.
if importlib.util.find_spec("rwkv_ops") is None:
    pytest.skip("rwkv_ops is not installed", allow_module_level=True)

B, T, H, N = 3, 37, 2, 64
LIMITS = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (4e-3, 1.2e-2)}

for_each_dtype = pytest.mark.parametrize("dtype", LIMITS, ids=str)
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package, without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERNEL_TYPE", "native")
        patch.setenv("RWKV_OPS_KERAS_NATIVE", "1")
        threads = torch.get_num_threads()
        # Thousands of tiny operations, which threads only slow down.
        torch.set_num_threads(1)
        yield importlib.import_module("rwkv_ops")
        torch.set_num_threads(threads)


def gradients_of(
    function: Callable[..., Any], given: Tensors, options: dict[str, Any]
) -> tuple[list[torch.Tensor], Tensors]:
    """Results of a function, and the gradients of what is given as floating tensors."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    results = function(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(0)
    flowing = [torch.randn(x.shape).to(x.dtype) for x in results]
    grads = torch.autograd.grad(results, list(leaves.values()), flowing)
    return [x.detach() for x in results], dict(zip(leaves, grads, strict=True))


def assert_alike(
    function: Callable[..., Any],
    oracle: Callable[..., Any],
    given: Tensors,
    options: dict[str, Any],
) -> None:
    results, grads = gradients_of(function, given, options)
    truths, right = gradients_of(oracle, given, options)
    limit, gradient_limit = LIMITS[given["r"].dtype]
    for result, truth in zip(results, truths, strict=True):
        assert result.dtype == truth.dtype
        assert relative_rms(result, truth) <= limit
    for name, grad in grads.items():
        assert right[name].any(), f"{name} has a part in the results"
        assert grad.dtype == right[name].dtype
        assert relative_rms(grad, right[name]) <= gradient_limit, name


def tokens7(dtype: torch.dtype) -> Tensors:
    return {name: x.to(dtype) for name, x in random_call(B, T, H, N).tokens.items()}


def tokens6(dtype: torch.dtype) -> Tensors:
    tokens = random_call(B, T, H, N, op="wkv6").tokens
    return {name: (x.flatten(2) if x.dim() == 4 else x).to(dtype) for name, x in tokens.items()}


@for_each_dtype
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("states", [0, 1, B])
def test_rwkv7_is_its_own_operator(
    dtype: torch.dtype, masked: bool, states: int, client: Any
) -> None:
    given, options = tokens7(dtype), {}
    if states:
        given["initial_state"] = torch.randn(states, H, N, N)
    if masked:
        options["mask"] = (torch.rand(B, T) < 0.7).float()
    assert_alike(ours.rwkv7_op, client.rwkv7_op, given, options)


@for_each_dtype
def test_rwkv7_head_first_is_its_own_operator_in_the_documented_layout(
    dtype: torch.dtype, client: Any
) -> None:
    given = {name: x.transpose(1, 2) for name, x in tokens7(dtype).items()}
    y, state = ours.rwkv7_op(**given, head_first=True)
    right, right_state = client.rwkv7_op(**given, head_first=True)
    assert y.shape == (B, H, T, N)
    assert relative_rms(y.transpose(1, 2), right) <= LIMITS[dtype][0]
    assert relative_rms(state, right_state) <= LIMITS[dtype][0]


def test_single_steps_are_its_own_operator(client: Any) -> None:
    given = {name: x[:, :1] for name, x in tokens7(torch.float32).items()}
    state = torch.randn(B, H, N, N)
    results = ours.rwkv7_op_rnn(**given, initial_state=state)
    for result, right in zip(
        results, client.rwkv7_op_rnn(**given, initial_state=state), strict=True
    ):
        assert relative_rms(result, right) <= LIMITS[torch.float32][0]


@for_each_dtype
@pytest.mark.parametrize("final", [False, True])
def test_rwkv6_is_its_own_operator(dtype: torch.dtype, final: bool, client: Any) -> None:
    options = {"output_final_state": final}
    assert_alike(ours.rwkv6_op, client.rwkv6_op, tokens6(dtype), options)


@pytest.mark.parametrize("state_map", [None, [2, 0, 2]])
def test_rwkv6_with_states_is_its_own_operator(state_map: list[int] | None, client: Any) -> None:
    given = tokens6(torch.float32)
    given["initial_state"] = torch.randn(3, H, N, N)
    options = {"output_final_state": True, "state_map": state_map}
    assert_alike(ours.rwkv6_op, client.rwkv6_op, given, options)


def test_factories_give_its_own_operators_for_another_head_size(client: Any) -> None:
    given = {name: x.to(torch.float32) for name, x in random_call(B, T, H, 32).tokens.items()}
    makers = [module.get_generalized_delta_rule for module in (ours, client)]
    pairs = zip(*(make(32, "native", 16) for make in makers), strict=True)
    for function, oracle in pairs:
        for result, right in zip(function(**given), oracle(**given), strict=True):
            assert relative_rms(result, right) <= LIMITS[torch.float32][0]
    tokens = random_call(B, T, H, 32, op="wkv6").tokens.items()
    given = {name: (x.flatten(2) if x.dim() == 4 else x).float() for name, x in tokens}
    function, oracle = (module.get_rwkv6_kernel(HEAD_SIZE=32) for module in (ours, client))
    assert relative_rms(function(**given), oracle(**given)) <= LIMITS[torch.float32][0]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("rwkv_ops.rwkv7_kernel.native_keras_op", "generalized_delta_rule"),
        ("rwkv_ops", "get_generalized_delta_rule"),
        ("rwkv_ops", "get_rnn_generalized_delta_rule"),
        ("rwkv_ops", "get_rwkv6_kernel"),
    ],
)
def test_signatures_are_its_own(module: str, name: str, client: Any) -> None:
    theirs = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    mine = inspect.signature(getattr(ours, name)).parameters
    positional = [p for p in mine.values() if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [
        (p.name, p.default) for p in theirs.values()
    ]
