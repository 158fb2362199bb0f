"""The loss with RWKV's L2Wrap: values and gradients in float64, and the form that has the head."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from comparing import relative_rms
from rwkv_jit import get_op
from rwkv_jit.errors import ArgumentError
from rwkv_jit.nn import head_l2wrap_cross_entropy, l2wrap_cross_entropy

# Relative RMS errors of losses, which are kept in float32, and of gradients.
LOSS = 1e-6
GRADIENTS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}

on_each_device = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)],
)
of_each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


class L2Wrap(torch.autograd.Function):
    """The term of the gradient as RWKV-LM defines it, for a loss that is a mean over all tokens."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, Tensor]:
        (logits,) = ctx.saved_tensors
        largest, place = logits.max(-1, keepdim=True)
        tokens = largest.numel()
        added = torch.zeros_like(logits).scatter(-1, place, largest * 1e-4 / tokens)
        return dloss, dloss * added


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def in_float64(logits: Tensor, targets: Tensor, dloss: float = 1.0) -> tuple[Tensor, Tensor]:
    """RWKV-LM's loss and its gradient."""
    x = logits.detach().cpu().double().requires_grad_()
    loss = L2Wrap.apply(F.cross_entropy(x.flatten(0, -2), targets.cpu().flatten()), x)
    (grad,) = torch.autograd.grad(loss * dloss, x)
    return loss.detach(), grad


@on_each_device
@of_each_dtype
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("classes", [1, 2, 31, 64, 1003, 4096])
def test_loss_and_gradient_are_rwkv_lms(
    classes: int, scale: float, dtype: torch.dtype, device: str
) -> None:
    logits = (torch.randn(3, 5, classes) * scale).clamp(-6e4, 6e4).to(device, dtype)
    logits.requires_grad_()
    targets = torch.randint(classes, (3, 5), device=device)
    loss = l2wrap_cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(loss * 3, logits)
    right, slope = in_float64(logits, targets, 3.0)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - right.item()) <= LOSS * max(1.0, abs(right.item()))
    assert grad.dtype == dtype
    assert relative_rms(grad, slope) <= GRADIENTS[dtype]


def test_float64_is_computed_in_float64_on_a_cpu() -> None:
    logits = torch.randn(7, 33, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(33, (7,))
    loss = l2wrap_cross_entropy(logits, targets)
    right, slope = in_float64(logits, targets)
    assert abs(loss.item() - right.item()) <= 1e-12
    assert relative_rms(torch.autograd.grad(loss, logits)[0], slope) <= 1e-12


@on_each_device
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_tokens_count_nothing(reduction: str, ignore_index: int, device: str) -> None:
    logits = torch.randn(12, 9, device=device, requires_grad=True)
    targets = torch.randint(4, 9, (12,), device=device)
    targets[::3] = ignore_index
    kept = targets != ignore_index
    loss = l2wrap_cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)
    given = torch.randn_like(loss)
    (grad,) = torch.autograd.grad(loss, logits, given)
    assert not grad[~kept].any()
    alone = logits.detach()[kept].requires_grad_()
    right = l2wrap_cross_entropy(alone, targets[kept], reduction=reduction)
    (slope,) = torch.autograd.grad(right, alone, given[kept] if reduction == "none" else given)
    if reduction == "none":
        assert not loss[~kept].any()
        loss = loss[kept]
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(grad[kept], slope)
    plain = F.cross_entropy(alone, targets[kept], reduction=reduction)
    torch.testing.assert_close(right, plain)


def test_without_l2wrap_the_gradient_is_the_cross_entropys() -> None:
    logits = torch.randn(6, 17, requires_grad=True)
    targets = torch.randint(17, (6,))
    ours = torch.autograd.grad(l2wrap_cross_entropy(logits, targets, l2wrap=0.0), logits)
    plain = torch.autograd.grad(F.cross_entropy(logits, targets), logits)
    torch.testing.assert_close(ours, plain)


@on_each_device
def test_the_first_of_equal_maxima_gets_the_term(device: str) -> None:
    logits = torch.zeros(1, 700, device=device)
    logits[0, [300, 301, 650]] = 5.0
    logits.requires_grad_()
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    grads = [
        torch.autograd.grad(l2wrap_cross_entropy(logits, targets, l2wrap=x), logits)[0]
        for x in (0.0, 0.1)
    ]
    change = grads[1] - grads[0]
    assert change.nonzero().tolist() == [[0, 300]]
    torch.testing.assert_close(change[0, 300].item(), 0.5)


@on_each_device
def test_masked_classes_and_lost_numbers_do_as_in_torch(device: str) -> None:
    logits = torch.randn(3, 40, device=device)
    logits[0, 5:] = -math.inf
    logits[1] = -math.inf
    logits[2, 39] = math.nan
    targets = torch.zeros(3, dtype=torch.int64, device=device)
    loss = l2wrap_cross_entropy(logits, targets, reduction="none")
    right = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss, right, equal_nan=True)


@on_each_device
def test_results_are_the_same_bits_every_time(device: str) -> None:
    logits = torch.randn(33, 5000, device=device).bfloat16().requires_grad_()
    targets = torch.randint(5000, (33,), device=device)

    def results() -> tuple[Tensor, Tensor]:
        loss = l2wrap_cross_entropy(logits, targets)
        return loss, torch.autograd.grad(loss, logits)[0]

    first = results()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(results(), first, strict=True))


def test_no_tokens_are_no_loss() -> None:
    logits, targets = torch.randn(0, 7, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    assert l2wrap_cross_entropy(logits, targets, reduction="sum").item() == 0
    assert l2wrap_cross_entropy(logits, targets, reduction="none").shape == (0,)


def test_rows_of_a_wider_tensor_are_taken_as_they_are() -> None:
    wide = torch.randn(8, 50)
    targets = torch.randint(20, (8,))
    torch.testing.assert_close(
        l2wrap_cross_entropy(wide[:, 10:30], targets), F.cross_entropy(wide[:, 10:30], targets)
    )


def test_targets_of_any_strides_belong_to_their_tokens() -> None:
    logits, targets = torch.randn(3, 4, 9), torch.randint(9, (4, 3)).T
    right = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(l2wrap_cross_entropy(logits, targets), right)


@pytest.mark.gpu
def test_a_target_that_is_no_class_makes_the_loss_not_a_number_on_a_gpu() -> None:
    logits = torch.randn(2, 40, device="cuda", requires_grad=True)
    loss = l2wrap_cross_entropy(logits, torch.tensor([3, 40], device="cuda"), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True]
    assert logits.grad.isnan().any(1).tolist() == [False, True]


@on_each_device
@of_each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_form_with_the_head_is_the_two_steps(
    reduction: str, dtype: torch.dtype, device: str
) -> None:
    hidden = torch.randn(2, 23, 48, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(301, 48, device=device) * 0.2).to(dtype).requires_grad_()
    targets = torch.randint(301, (2, 23), device=device)
    targets[1, 4:9] = -100
    loss = head_l2wrap_cross_entropy(hidden, weight, targets, reduction=reduction, chunk_tokens=7)
    grads = torch.autograd.grad(loss * 2, (hidden, weight))

    exact = [x.detach().cpu().double().requires_grad_() for x in (hidden, weight)]
    right = l2wrap_cross_entropy(exact[0] @ exact[1].T, targets.cpu(), reduction=reduction)
    truth = torch.autograd.grad(right * 2, exact)
    limit = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert abs(loss.item() - right.item()) <= limit * abs(right.item())
    for grad, slope in zip(grads, truth, strict=True):
        assert grad.dtype == dtype
        assert relative_rms(grad, slope) <= limit


def test_the_form_with_the_head_never_has_all_logits() -> None:
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(100, 8, requires_grad=True)
    targets = torch.randint(100, (64,))
    with Largest() as seen:
        head_l2wrap_cross_entropy(hidden, weight, targets, chunk_tokens=10).backward()
    assert seen.elements == 10 * 100


def test_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.autograd, "grad")
    hidden, weight = torch.randn(9, 8), torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(11, (9,))
    with torch.no_grad():
        loss = head_l2wrap_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets))


def test_autocast_converts_hidden_and_weight() -> None:
    hidden = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    targets = torch.randint(11, (9,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_l2wrap_cross_entropy(hidden, weight, targets)
        logits = F.linear(hidden, weight)
        plain = l2wrap_cross_entropy(logits, targets)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "reduction='max' is not known; choose from mean, sum, none"),
        ({"targets": torch.tensor([1, 7])}, "targets has 7, but must be from 0 to 6, or -100"),
        ({"targets": torch.tensor([-1, 0])}, "targets has -1, but must be from 0 to 6, or -100"),
        ({"targets": torch.tensor([1])}, "targets is torch.int64 of shape [1], but must be int64"),
        ({"targets": torch.tensor([1.0, 2])}, "targets is torch.float32 of shape [2]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call = {"logits": torch.randn(2, 7), "targets": torch.tensor([1, 2]), **change}
    with pytest.raises(ArgumentError, match=re.escape(f"l2wrap_cross_entropy: {message}")):
        l2wrap_cross_entropy(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "reduction='none' is not known; choose from mean, sum"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
        ({"weight": torch.randn(4, 11)}, "weight has shape [4, 11], but must be [V, C] with C=4"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    call = {
        "hidden": torch.randn(2, 4), "weight": torch.randn(11, 4), "targets": torch.tensor([1, 2]),
        **change,
    }  # fmt: skip
    with pytest.raises(ArgumentError, match=re.escape(f"head_l2wrap_cross_entropy: {message}")):
        head_l2wrap_cross_entropy(**call)


def test_gradients_pass_gradcheck() -> None:
    op = get_op("l2wrap_cross_entropy", dtype=torch.float64, device="cpu")
    logits = torch.randn(1, 5, 19, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[3, -1, 0, 18, 7]])
    assert torch.autograd.gradcheck(lambda x: op(x, targets), (logits,))


def test_opcheck_accepts_the_registered_op() -> None:
    op = get_op("l2wrap_cross_entropy", dtype=torch.float32, device="cpu")
    logits, targets = torch.randn(1, 4, 10), torch.randint(10, (1, 4))
    op(logits, targets)
    registered = torch.ops.rwkv_jit.l2wrap_cross_entropy_forward.default
    torch.library.opcheck(registered, (logits, targets, op.config.slug))
