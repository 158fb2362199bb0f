"""How fast a TimeMix7 layer is, and the loss, beside the same in PyTorch under torch.compile.

    python3 tools/bench_layer.py --shape 8,4096,4096 --dtype bf16

What does not pass its gate is not timed: the largest relative RMS error of the output and of all
gradients, against float32 for the layer. Times are medians, on a GPU with a cold cache.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_jit import Op, get_op
from rwkv_jit.bench.machine import default_device, describe_machine
from rwkv_jit.bench.timing import copy_bandwidth, extra_memory, time_of
from rwkv_jit.launch import TORCH_DTYPES
from rwkv_jit.nn import TimeMix7, head_l2wrap_cross_entropy, l2wrap_cross_entropy
from rwkv_jit.settings import current_settings

GATE = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float32: 2e-4}


def main() -> None:
    """Measure the layer, then the loss."""
    arguments = parse_arguments()
    device, dtype = default_device(), TORCH_DTYPES[arguments.dtype]
    torch.manual_seed(0)
    for name, value in describe_machine(device, current_settings()).items():
        print(f"{name}: {value}")
    bandwidth = copy_bandwidth(device, arguments.seconds)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    bench_layer(arguments.shape, arguments.head_size, dtype, device, arguments.seconds)
    if arguments.classes:
        bench_loss(arguments.shape, arguments.classes, dtype, device, arguments.seconds, bandwidth)
        bench_head(arguments.shape, arguments.classes, dtype, device, arguments.seconds)


def parse_arguments() -> argparse.Namespace:
    """The flags of this program."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shape", type=_shape, default=(8, 4096, 4096), help="B,T,C")
    parser.add_argument("--head-size", type=int, default=64, help="N")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of all")
    parser.add_argument("--classes", type=int, default=65536, help="of the loss; 0 leaves it out")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each time")
    return parser.parse_args()


def bench_layer(
    shape: tuple[int, int, int], head_size: int, dtype: torch.dtype, device: str, seconds: float
) -> None:
    """A second layer, forward and with its backward, ours and the plain one."""
    layer = TimeMix7(1, 2, shape[2], head_size, device=device)
    with torch.no_grad():
        layer.output.weight.normal_(std=0.02)
        for first in (layer.w1, layer.a1, layer.g1, layer.v1):
            first.normal_(std=0.02)
    layer.to(dtype).float()
    inputs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
    truth = gradients(plain(layer, torch.float32), [x.float() for x in inputs], layer)
    layer.to(dtype)
    contenders = {
        "TimeMix7": lambda x, v: layer(x, v)[0],
        "plain, torch.compile": torch.compile(plain(layer, dtype), fullgraph=True, dynamic=False),
        "plain": plain(layer, dtype),
    }
    for name, run in contenders.items():
        found = gradients(run, inputs, layer)
        error = max(relative_rms(x, y) for x, y in zip(found, truth, strict=True))
        del found
        if not error <= GATE[dtype]:
            print(f"{name}: not timed, the error is {error:.1e}", flush=True)
            continue
        leaves = [x.detach().requires_grad_() for x in inputs]
        forward = time_of(functools.partial(run, *leaves), device, seconds)
        work = functools.partial(gradients, run, inputs, layer)
        both = time_of(work, device, seconds)
        print(
            f"{name}: forward {forward.median_ms:.2f} ms, with backward {both.median_ms:.2f} ms, "
            f"{gibibytes(work, device)}, error {error:.1e}",
            flush=True,
        )


def plain(layer: TimeMix7, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """What a TimeMix7 computes from x and v_first, in PyTorch but for the recurrence."""
    device = layer.r_k.device
    wkv7 = get_op("wkv7", head_size=layer.head_size, dtype=dtype, device=device, decay="logit")
    return functools.partial(plain_layer, layer, wkv7)


def plain_layer(layer: TimeMix7, wkv7: Op, x: Tensor, v_first: Tensor) -> Tensor:
    """The layer in PyTorch. wkv7: the recurrence."""
    B, T, C = x.shape
    heads = (B, T, *layer.r_k.shape)
    dx = F.pad(x, (0, 0, 1, -1)) - x
    xr, xw, xk, xv, xa, xg = (
        x + dx * mix for mix in (layer.x_r, layer.x_w, layer.x_k, layer.x_v, layer.x_a, layer.x_g)
    )
    r, k, v = layer.receptance(xr), layer.key(xk), layer.value(xv)
    w = layer.w0 + torch.tanh(xw @ layer.w1) @ layer.w2
    v = v + (v_first - v) * torch.sigmoid(layer.v0 + (xv @ layer.v1) @ layer.v2)
    a = torch.sigmoid(layer.a0 + (xa @ layer.a1) @ layer.a2)
    g = torch.sigmoid(xg @ layer.g1) @ layer.g2
    kk = F.normalize((k * layer.k_k).view(heads), dim=-1)
    k = k * (1 + (a - 1) * layer.k_a)
    r, w, k, v, a = (tensor.view(heads) for tensor in (r, w, k, v, a))
    y, _ = wkv7(r, w, k, v, -kk, kk * a)
    y = layer.ln_x(y.reshape(B * T, C)).view(heads)
    y = y + (r * k * layer.r_k).sum(-1, keepdim=True) * v
    out: Tensor = layer.output(y.view(B, T, C) * g)
    return out


def bench_loss(
    shape: tuple[int, int, int],
    classes: int,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    bandwidth: float,
) -> None:
    """The loss of half the tokens' logits."""
    tokens = shape[0] * shape[1] // 2
    logits = torch.randn(tokens, classes, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(classes, (tokens,), device=device)
    some = logits[:64].detach()
    exact = some.double().requires_grad_()
    some.requires_grad_()
    (ours,) = torch.autograd.grad(l2wrap_cross_entropy(some, targets[:64]), some)
    (right,) = torch.autograd.grad(l2wrap_by_hand(exact, targets[:64]), exact)
    error = relative_rms(ours, right)
    if not error <= GATE[dtype]:
        print(f"l2wrap_cross_entropy: not timed, the error is {error:.1e}")
        return
    once = logits.nbytes / bandwidth * 1e3
    print(f"{tuple(logits.shape)} logits: once through memory takes {once:.2f} ms")
    for name, loss in (("l2wrap_cross_entropy", l2wrap_cross_entropy), ("plain", l2wrap_by_hand)):
        forward = time_of(functools.partial(loss, logits, targets), device, seconds)
        work = functools.partial(_loss_and_gradients, (logits,), loss, logits, targets)
        both = time_of(work, device, seconds)
        print(
            f"{name}: forward {forward.median_ms:.2f} ms, with backward {both.median_ms:.2f} ms, "
            f"{gibibytes(work, device)}, error {error:.1e}",
            flush=True,
        )


def bench_head(
    shape: tuple[int, int, int], classes: int, dtype: torch.dtype, device: str, seconds: float
) -> None:
    """The loss of all tokens from what the head takes."""
    tokens, width = shape[0] * shape[1], shape[2]
    targets = torch.randint(classes, (tokens,), device=device)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(classes, width, device=device) / width**0.5).to(dtype).requires_grad_()
    for name, loss in (("head_l2wrap_cross_entropy", head_l2wrap_cross_entropy),
                       ("the head, then l2wrap_cross_entropy", head_then_loss)):  # fmt: skip
        work = functools.partial(
            _loss_and_gradients, (hidden, weight), loss, hidden, weight, targets
        )
        both = time_of(work, device, seconds)
        print(f"{name}: {both.median_ms:.1f} ms, {gibibytes(work, device)}", flush=True)


def head_then_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With all logits at once."""
    return l2wrap_cross_entropy(hidden @ weight.T, targets)


def _loss_and_gradients(
    leaves: tuple[Tensor, ...], loss: Callable[..., Tensor], *given: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*given), leaves)


def l2wrap_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss in PyTorch."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = exact.max(-1).values
    term = (largest.detach() * (largest - largest.detach())).mean()
    return F.cross_entropy(exact, targets) + 1e-4 * term


def gradients(
    run: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], layer: TimeMix7
) -> list[Tensor]:
    """The output, and the gradients of inputs and parameters for x as the output's gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *layer.parameters()], inputs[0])]


def gibibytes(work: Callable[[], object], device: str) -> str:
    """The memory that `work` takes beyond what is there."""
    return f"{(extra_memory(work, device) or 0) / 2**30:.2f} GiB"


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """RMS of the difference over RMS of the truth."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm())


def _shape(text: str) -> tuple[int, int, int]:
    try:
        batch, tokens, width = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be B,T,C") from None
    return batch, tokens, width


if __name__ == "__main__":
    main()
