"""The steps around the recurrence as RWKV-LM's training builds them, with our operators behind.

Every program calls an extension as upstream's autograd.Functions do. The truth is the PyTorch that
upstream says each extension stands for, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils import cpp_extension

import rwkv_jit.launch
import rwkv_jit.settings
from comparing import TOLERANCES, relative_rms
from rwkv_jit.compat.extensions import EXTENSIONS, Function
from rwkv_jit.compat.intercept import intercept
from rwkv_jit.errors import ArgumentError
from rwkv_jit.launch import TORCH_DTYPES

BATCH, LENGTH, HEADS, SIZE, INNER, CLASSES = 2, 9, 3, 20, 44, 37
WIDTH = HEADS * SIZE
TOKENS, CHANNELS = (BATCH, LENGTH, WIDTH), (WIDTH,)
# As parameters of RWKV-LM's models are.
PARAMETER = (1, 1, WIDTH)
MIXES = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
Tensors = dict[str, torch.Tensor]
Results = tuple[list[torch.Tensor], list[torch.Tensor]]

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`load` as a program has it while it is intercepted; nothing goes to the original."""

    def build(name: str, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} is built")

    monkeypatch.setattr(cpp_extension, "load", build)
    with intercept():
        yield cpp_extension.load


@dataclass(frozen=True)
class Case:
    """What an extension stands for, and how it is called.

    shapes: of the inputs by name, in the order of the gradients that the program returns.
    truth: outputs, from the inputs.
    program: outputs and gradients, from the extension's functions, the inputs, and the gradients of
        the outputs.
    """

    shapes: dict[str, tuple[int, ...]]
    truth: Callable[..., list[torch.Tensor]]
    program: Callable[[Any, Tensors, list[torch.Tensor]], Results]


def shifted(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 1, -1))


def mix6_truth(x: torch.Tensor, *mixes: torch.Tensor) -> list[torch.Tensor]:
    return [x + (shifted(x) - x) * mix for mix in mixes]


def mix6(ops: Any, x: Tensors, given: list[torch.Tensor]) -> Results:
    return ops.forward(*x.values()), ops.backward(*given, *x.values())


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (HEADS, SIZE))


def kk_pre_truth(
    k: torch.Tensor, k_k: torch.Tensor, a: torch.Tensor, k_a: torch.Tensor
) -> list[torch.Tensor]:
    kk = F.normalize(heads(k * k_k), dim=-1, p=2.0).flatten(2)
    return [k * (1 + (a - 1) * k_a), -kk, kk * a]


def kk_pre(ops: Any, x: Tensors, given: list[torch.Tensor], *, keeps_kk: bool) -> Results:
    *made, norm = ops.forward(*x.values(), SIZE)
    assert (norm.shape, norm.dtype) == ((0,), torch.float32)
    kept = [made[1]] if keeps_kk else []
    return made, ops.backward(*given, *x.values(), *kept, norm, SIZE)


def gate(ops: Any, x: Tensors, given: list[torch.Tensor]) -> Results:
    return [ops.forward(*x.values())], ops.backward(*given, *x.values())


def a_gate_truth(a0: torch.Tensor, a12: torch.Tensor) -> list[torch.Tensor]:
    return [torch.sigmoid(a0 + a12)]


def vres_gate_truth(
    v: torch.Tensor, v_first: torch.Tensor, v0: torch.Tensor, v12: torch.Tensor
) -> list[torch.Tensor]:
    return [v + (v_first - v) * torch.sigmoid(v0 + v12)]


def vres_gate_v1(ops: Any, x: Tensors, given: list[torch.Tensor]) -> Results:
    dv, dv_first, before_sigmoid = ops.backward(*given, *x.values())
    assert before_sigmoid.dtype == torch.float32
    dv0 = before_sigmoid.sum(dim=(0, 1), keepdim=True)
    gradients = [dv, dv_first, dv0.to(x["v0"].dtype), before_sigmoid.to(x["v12"].dtype)]
    return [ops.forward(*x.values())], gradients


def lnx_truth(
    x: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    r_k: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    g: torch.Tensor,
) -> list[torch.Tensor]:
    normed = F.group_norm(x.flatten(0, 1), HEADS, weight, bias, eps=64e-5).view(x.shape)
    bonus = (heads(r) * heads(k) * r_k).sum(-1, keepdim=True) * heads(v)
    return [(normed + bonus.flatten(2)) * g]


def lnx(ops: Any, x: Tensors, given: list[torch.Tensor]) -> Results:
    out, mean, rstd = ops.forward(*x.values())
    assert mean.shape == rstd.shape == (0,)
    return [out], ops.backward(*given, *x.values(), mean, rstd)


def cmix_truth(
    x: torch.Tensor, x_k: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> list[torch.Tensor]:
    mixed = x + (shifted(x) - x) * x_k
    return [torch.relu(mixed @ key.T) ** 2 @ value.T]


def cmix(ops: Any, x: Tensors, given: list[torch.Tensor]) -> Results:
    out, mixed, act = ops.forward(*x.values())
    assert mixed.shape == x["x"].shape
    assert act.shape == (BATCH, LENGTH, INNER)
    return [out], ops.backward(*given, *x.values(), mixed, act)


def targets(x: torch.Tensor) -> torch.Tensor:
    """A class for each token, on the device of `x`."""
    return torch.arange(BATCH * LENGTH, device=x.device).view(BATCH, LENGTH) * 5 % CLASSES


def loss_truth(logits: torch.Tensor) -> list[torch.Tensor]:
    loss = F.cross_entropy(logits.flatten(0, 1), targets(logits).flatten())
    largest = logits.max(-1).values
    # Of no value, but of L2Wrap's gradient.
    wrap = (largest.detach() * (largest - largest.detach())).mean()
    return [loss + 1e-4 * wrap]


def cross_entropy(ops: Any, x: Tensors, given: list[torch.Tensor]) -> Results:
    logits, right = x["logits"], targets(x["logits"])
    loss, lse, largest, where = ops.forward(logits, right)
    rows = logits.flatten(0, 1).float()
    torch.testing.assert_close(lse.float(), rows.logsumexp(-1))
    assert torch.equal(largest.float(), rows.max(-1).values)
    assert torch.equal(where, rows.argmax(-1).int())
    dloss = given[0].contiguous().float()
    return [loss], [ops.backward(dloss, logits, right.view(-1), lse, largest, where)]


def head_truth(hidden: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    return loss_truth(hidden @ weight.T)


def head(ops: Any, x: Tensors, given: list[torch.Tensor], *, rows: int) -> Results:
    loss, *grads = ops.forward(*x.values(), targets(x["hidden"]), rows)
    return [loss], [grad * given[0].to(grad.dtype) for grad in grads]


_MIX6 = Case({"x": TOKENS, **dict.fromkeys(MIXES, CHANNELS)}, mix6_truth, mix6)
_KEYS = {"k": TOKENS, "k_k": CHANNELS, "a": TOKENS, "k_a": CHANNELS}
_RESIDUAL = {"v": TOKENS, "v_first": TOKENS, "v0": PARAMETER, "v12": TOKENS}
_READ = {
    **dict.fromkeys(("x", "r", "k", "v"), TOKENS), "r_k": (HEADS, SIZE),
    "weight": CHANNELS, "bias": CHANNELS, "g": TOKENS,
}  # fmt: skip
_LAYER = {"x": TOKENS, "x_k": CHANNELS, "key": (INNER, WIDTH), "value": (WIDTH, INNER)}
_LOSS = Case({"logits": (BATCH, LENGTH, CLASSES)}, loss_truth, cross_entropy)
_HEAD = {"hidden": TOKENS, "weight": (CLASSES, WIDTH)}
CASES = {
    "rwkv7_tmix_mix6_bf16_v2": _MIX6,
    "rwkv7_tmix_mix6_bf16_v5": _MIX6,
    "rwkv7_tmix_kk_pre_bf16_v2": Case(
        _KEYS, kk_pre_truth, functools.partial(kk_pre, keeps_kk=True)
    ),
    "rwkv7_tmix_kk_pre_bf16_v5": Case(
        _KEYS, kk_pre_truth, functools.partial(kk_pre, keeps_kk=False)
    ),
    "rwkv7_tmix_a_gate_bf16": Case({"a0": PARAMETER, "a12": TOKENS}, a_gate_truth, gate),
    "rwkv7_tmix_vres_gate_bf16_v1": Case(_RESIDUAL, vres_gate_truth, vres_gate_v1),
    "rwkv7_tmix_vres_gate_bf16_v3": Case(_RESIDUAL, vres_gate_truth, gate),
    "rwkv7_tmix_lnx_rkvres_xg_bf16_v1": Case(_READ, lnx_truth, lnx),
    "rwkv7_cmix_bf16_v2": Case(_LAYER, cmix_truth, cmix),
    "rwkv7_cmix_bf16_v5": Case(_LAYER, cmix_truth, cmix),
    "rwkv7_l2wrap_ce_bf16_v1": _LOSS,
    "rwkv7_l2wrap_ce_bf16_v2": _LOSS,
    "rwkv7_head_l2wrap_ce_bf16_v4": Case(_HEAD, head_truth, functools.partial(head, rows=5)),
}


def draw(case: Case, dtype: str = "fp32", device: str = "cpu") -> Tensors:
    return {
        name: (torch.randn(shape) / (shape[-1] ** 0.5 if len(shape) == 2 else 1))
        .to(TORCH_DTYPES[dtype])
        .to(device)
        for name, shape in case.shapes.items()
    }


def check(name: str, load: Callable[..., Any], dtype: str, device: str) -> None:
    ops, case = load(name=name, sources=["nowhere.cu"], verbose=True), CASES[name]
    x = draw(case, dtype, device)
    leaves = [value.detach().cpu().double().requires_grad_() for value in x.values()]
    outputs = case.truth(*leaves)
    given = [torch.randn_like(y).to(TORCH_DTYPES[dtype]) for y in outputs]
    expected = torch.autograd.grad(outputs, leaves, [dy.double() for dy in given])
    made, gradients = case.program(ops, x, [dy.to(device) for dy in given])
    output, gradient, _ = TOLERANCES[dtype]
    for at, (y, right) in enumerate(zip(made, outputs, strict=True)):
        assert relative_rms(y, right) <= output, f"output {at}"
    for (key, value), grad, right in zip(x.items(), gradients, expected, strict=True):
        assert grad.shape == value.shape
        assert grad.dtype == value.dtype
        assert relative_rms(grad, right) <= gradient, f"gradient of {key}"


@on_each_device
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_plain_pytorch(
    name: str, dtype: str, device: str, load: Callable[..., Any]
) -> None:
    check(name, load, dtype, device)
