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

from comparing import TOLERANCES, relative_rms
from rwkv_jit.compat.extensions import EXTENSIONS
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
    steps: how many there are between which values are rounded.
    """

    shapes: dict[str, tuple[int, ...]]
    truth: Callable[..., list[torch.Tensor]]
    program: Callable[[Any, Tensors, list[torch.Tensor]], Results]
    steps: int = 1


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
    assert where.dtype == torch.int32
    assert torch.equal(rows.gather(1, where.long()[:, None])[:, 0], largest)
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
    "rwkv7_cmix_bf16_v2": Case(_LAYER, cmix_truth, cmix, steps=4),
    "rwkv7_cmix_bf16_v5": Case(_LAYER, cmix_truth, cmix, steps=4),
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
    output, gradient = (limit * case.steps**0.5 for limit in TOLERANCES[dtype][:2])
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


def test_every_extension_that_returns_results_has_a_program_here() -> None:
    returning = {
        name for name, each in EXTENSIONS.items() if "->" in "".join(each.functions.values())
    }
    assert set(CASES) == returning


# Losses are looked at by their programs.
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case is not _LOSS])
def test_fakes_are_like_results_and_gradients(name: str, load: Callable[..., Any]) -> None:
    ops, case = load(name=name), CASES[name]
    x = draw(case)
    given = [torch.randn_like(y) for y in case.truth(*x.values())]
    real = case.program(ops, x, given)
    with FakeTensorMode() as mode:
        leaves = {key: mode.from_tensor(value) for key, value in x.items()}
        fake = case.program(ops, leaves, [mode.from_tensor(dy) for dy in given])
    for makes, made in zip(fake, real, strict=True):
        for a, b in zip(makes, made, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_a_loss_has_a_fake(load: Callable[..., Any]) -> None:
    ops = load(name="rwkv7_l2wrap_ce_bf16_v2")
    with FakeTensorMode():
        logits = torch.empty(BATCH, LENGTH, CLASSES, dtype=torch.bfloat16)
        right = targets(logits)
        loss, *kept = ops.forward(logits, right)
        dlogits = ops.backward(torch.ones(()), logits, right, *kept)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert [(x.numel(), x.dtype) for x in kept[1:]] == [
        (BATCH * LENGTH, torch.float32), (BATCH * LENGTH, torch.int32)
    ]  # fmt: skip
    assert (dlogits.shape, dlogits.dtype) == (logits.shape, logits.dtype)


@pytest.fixture
def differentiable(load: Callable[..., Any]) -> Iterator[Any]:
    """The functions of an extension whose program has registered their gradients, as upstream's."""
    name = "rwkv7_tmix_kk_pre_bf16_v5"
    load(name=name)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
        ctx.save_for_backward(*inputs[:-1], output[3])

    def backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        arriving = [grad.contiguous() for grad in grads[:3]]
        *saved, norm = ctx.saved_tensors
        ops = torch.ops.rwkv7_tmix_kk_pre_bf16_v5
        return (*ops.backward(*arriving, *saved, norm, SIZE), None)

    with torch.library._scoped_library(name, "FRAGMENT") as library:
        torch.library.register_autograd(
            f"{name}::forward", backward, setup_context=setup, lib=library
        )
        yield


def keys_of(
    k: torch.Tensor, k_k: torch.Tensor, a: torch.Tensor, k_a: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.ops.rwkv7_tmix_kk_pre_bf16_v5.forward(k, k_k, a, k_a, 20)
    return made[0], made[1], made[2]


@pytest.mark.usefixtures("differentiable")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "compiled",
    [
        lambda function: function,
        torch.jit.script,
        functools.partial(torch.compile, fullgraph=True, backend="aot_eager"),
    ],
    ids=["eager", "TorchScript", "torch.compile"],
)
def test_a_program_can_register_gradients(compiled: Callable[..., Any]) -> None:
    leaves = [x.requires_grad_() for x in draw(CASES["rwkv7_tmix_kk_pre_bf16_v5"]).values()]
    outputs = compiled(keys_of)(*leaves)
    right = kk_pre_truth(*leaves)
    given = [torch.randn_like(y) for y in right]
    found = torch.autograd.grad(outputs, leaves, given)
    for grad, expected in zip(found, torch.autograd.grad(right, leaves, given), strict=True):
        assert relative_rms(grad, expected) <= TOLERANCES["fp32"][1]


def test_l2wrap_counts_as_the_loss_does(load: Callable[..., Any]) -> None:
    ops = load(name="rwkv7_l2wrap_ce_bf16_v1")
    logits = torch.randn(BATCH, LENGTH, CLASSES)
    right = targets(logits)
    _, *kept = ops.forward(logits, right)
    once, twice = (ops.backward(torch.tensor(by), logits, right, *kept) for by in (1.0, 2.0))
    assert torch.equal(2 * once, twice)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "rwkv7_tmix_mix6_bf16_v5",
            {"x": torch.zeros(9, 60)},
            "torch.ops.rwkv7_tmix_mix6_bf16_v5.forward: x has shape [9, 60], but must be [B, T, C]",
        ),
        (
            "rwkv7_tmix_mix6_bf16_v5",
            {"x_v": torch.zeros(59)},
            "token_shift_mix: x_v has C=59 in [C], but x has C=60",
        ),
        (
            "rwkv7_tmix_kk_pre_bf16_v5",
            {"a": torch.zeros(2, 8, 60)},
            "kk_pre: a has T=8 in [B, T, H, N], but k has T=9",
        ),
        (
            "rwkv7_tmix_kk_pre_bf16_v2",
            {"k": torch.zeros(2, 9, 61)},
            (
                "torch.ops.rwkv7_tmix_kk_pre_bf16_v2.forward: k has shape [2, 9, 61], but must "
                "be [B, T, C] with C a multiple of the head size 20; reshape it, or check the "
                "head size"
            ),
        ),
        (
            "rwkv7_tmix_a_gate_bf16",
            {"a0": torch.zeros(1, 1, 60).half()},
            (
                "a_gate: a0 is float16, but must be float32; "
                "convert it, or get an operator of that dtype"
            ),
        ),
        (
            "rwkv7_tmix_vres_gate_bf16_v3",
            {"v12": torch.zeros(2, 9, 60).double()},
            (
                "vres_gate: x is float64, but must be float32; "
                "convert it, or get an operator of that dtype"
            ),
        ),
        (
            "rwkv7_tmix_lnx_rkvres_xg_bf16_v1",
            {"r_k": torch.zeros(60)},
            (
                "torch.ops.rwkv7_tmix_lnx_rkvres_xg_bf16_v1.forward: r_k has shape [60], but "
                "must be [H, N]"
            ),
        ),
        (
            "rwkv7_cmix_bf16_v5",
            {"value": torch.zeros(60, 43)},
            (
                "torch.ops.rwkv7_cmix_bf16_v5.forward: value_weight is torch.float32 of shape "
                "[60, 43], but must be torch.float32 of shape [C, F] with F=44"
            ),
        ),
        (
            "rwkv7_l2wrap_ce_bf16_v2",
            {"logits": torch.zeros(2, 8, 37)},
            (
                "torch.ops.rwkv7_l2wrap_ce_bf16_v2.forward: targets has shape [2, 9], but must "
                "hold [1, 16]"
            ),
        ),
        (
            "rwkv7_head_l2wrap_ce_bf16_v4",
            {"weight": torch.zeros(37, 59)},
            (
                "head_l2wrap_cross_entropy: weight has shape [37, 59], but must be [V, C] with "
                "C=60, which hidden has; pass the head's weight as nn.Linear has it"
            ),
        ),
    ],
)
def test_a_refusal_says_what_was_expected(
    load: Callable[..., Any], name: str, change: Tensors, message: str
) -> None:
    ops, case = load(name=name), CASES[name]
    x = {key: torch.zeros(shape) for key, shape in case.shapes.items()}
    with pytest.raises(ArgumentError) as caught:
        case.program(ops, {**x, **change}, [])
    assert str(caught.value) == message


def test_gradients_that_do_not_fit_are_refused(load: Callable[..., Any]) -> None:
    ops = load(name="rwkv7_tmix_a_gate_bf16")
    x = torch.zeros(TOKENS)
    with pytest.raises(
        ArgumentError, match=r"dy has shape \[2, 8, 60\], but must hold \[2, 9, 60\]"
    ):
        ops.backward(x[:, :8], torch.zeros(PARAMETER), x)
