"""How fast a TimeMix7 layer is, and the loss, beside the same in PyTorch under torch.compile.

    python3 tools/bench_layer.py --shape 8,4096,4096 --dtype bf16

What does not pass its gate, relative RMS against float32, is not timed. Times are medians, with a
cold cache where there is a GPU.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rwkv_jit import Op, get_op
from rwkv_jit.bench.machine import default_device, describe_machine
from rwkv_jit.bench.timing import copy_bandwidth, extra_memory, time_of
from rwkv_jit.launch import TORCH_DTYPES
from rwkv_jit.nn import TimeMix7, head_l2wrap_cross_entropy, l2wrap_cross_entropy
from rwkv_jit.settings import current_settings

GATE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 2e-4}
GATED_TOKENS = 256
Work = Callable[[], Sequence[Tensor]]


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
    exact = [torch.randn(2, GATED_TOKENS, shape[2], device=device) for _ in range(2)]
    truth = _gradients(lambda x, v: plain_layer(layer, _wkv7(layer, x), x, v), exact, layer)
    layer.to(dtype)
    op = _wkv7(layer, exact[0].to(dtype))
    contenders = {
        "TimeMix7": lambda x, v: layer(x, v)[0],
        "plain, torch.compile": torch.compile(lambda x, v: plain_layer(layer, op, x, v)),
        "plain": lambda x, v: plain_layer(layer, op, x, v),
    }
    inputs = [torch.randn(shape, device=device, dtype=dtype) for _ in range(2)]
    for name, run in contenders.items():
        found = _gradients(run, [t.to(dtype) for t in exact], layer)
        error = max(_relative_rms(x, y) for x, y in zip(found, truth, strict=True))
        if not error <= GATE[dtype]:
            print(f"{name}: not timed, the error is {error:.1e}")
            continue
        with torch.no_grad():
            forward = time_of(functools.partial(run, *inputs), device, seconds)
        work = _training(run, inputs, layer)
        both = time_of(work, device, seconds)
        memory = extra_memory(work, device) or 0
        print(
            f"{name}: forward {forward.median_ms:.2f} ms, with backward {both.median_ms:.2f} ms, "
            f"{memory / 2**30:.2f} GiB, error {error:.1e}",
            flush=True,
        )


def plain_layer(layer: TimeMix7, wkv7: Op, x: Tensor, v_first: Tensor) -> Tensor:
    """What a TimeMix7 computes, written down in PyTorch but for the recurrence."""
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
    """The loss of half a batch's logits, and with the head of all tokens."""
    tokens = shape[0] * shape[1]
    logits = torch.randn(tokens // 2, classes, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(classes, (tokens,), device=device)
    some = targets[: tokens // 2]
    ours = torch.autograd.grad(l2wrap_cross_entropy(logits[:64], some[:64]), logits)[0][:64]
    exact = logits[:64].detach().double().requires_grad_()
    right = torch.autograd.grad(l2wrap_by_hand(exact, some[:64]), exact)[0]
    error = _relative_rms(ours, right)
    if not error <= GATE[dtype]:
        print(f"l2wrap_cross_entropy: not timed, the error is {error:.1e}")
        return
    for name, loss in (("l2wrap_cross_entropy", l2wrap_cross_entropy), ("plain", l2wrap_by_hand)):
        with torch.no_grad():
            forward = time_of(functools.partial(loss, logits, some), device, seconds)
        work = _loss_work(loss, logits, some)
        both = time_of(work, device, seconds)
        memory = extra_memory(work, device) or 0
        floor = 4 * logits.nbytes / bandwidth * 1e3
        print(
            f"{name} {tuple(logits.shape)}: forward {forward.median_ms:.2f} ms, with backward "
            f"{both.median_ms:.2f} ms, {memory / 2**30:.2f} GiB; the floor is {floor / 4:.2f} and "
            f"{floor * 3 / 4:.2f} ms",
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
    forms = {
        "head_l2wrap_cross_entropy": lambda: head_l2wrap_cross_entropy(hidden, weight, targets),
        "the head, then l2wrap_cross_entropy": lambda: l2wrap_cross_entropy(
            hidden @ weight.T, targets
        ),
    }
    for name, run in forms.items():
        work = _head_work(run, hidden, weight)
        both = time_of(work, device, seconds)
        memory = extra_memory(work, device) or 0
        print(
            f"{name} {tuple(hidden.shape)}: with backward {both.median_ms:.1f} ms, "
            f"{memory / 2**30:.2f} GiB",
            flush=True,
        )


def l2wrap_by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss in PyTorch."""
    largest = logits.max(-1).values.float()
    term = (largest.detach() * (largest - largest.detach())).mean()
    return F.cross_entropy(logits.float(), targets) + 1e-4 * term


def _wkv7(layer: TimeMix7, x: Tensor) -> Op:
    return get_op("wkv7", head_size=layer.head_size, dtype=x.dtype, device=x.device, decay="logit")


def _gradients(
    run: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], layer: TimeMix7
) -> list[Tensor]:
    """The output, and the gradients of inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = run(*leaves)
    torch.manual_seed(1)
    dy = torch.randn(y.shape).to(y)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *layer.parameters()], dy)]


def _training(
    run: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor], layer: TimeMix7
) -> Work:
    leaves = [x.detach().requires_grad_() for x in inputs]
    wanted = [*leaves, *layer.parameters()]
    dy = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(run(*leaves), wanted, dy)


def _loss_work(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Work:
    return lambda: torch.autograd.grad(loss(logits, targets), logits)


def _head_work(run: Callable[[], Tensor], hidden: Tensor, weight: Tensor) -> Work:
    return lambda: torch.autograd.grad(run(), (hidden, weight))


def _relative_rms(value: Tensor, truth: Tensor) -> float:
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
