"""Measure wkv7 on the device at hand: `python tools/bench.py [--shape B,T,H,N ...] [--json]`.

Nothing is timed before it has passed its correctness gate. On a CPU the peer is the reference, a
plain PyTorch loop over tokens, in the same run; on a GPU the bandwidth of a copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch

from rwkv_jit import Op, __version__, get_op
from rwkv_jit.reference import REFERENCES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GATES = {"bf16": 1.2e-2, "fp16": 5e-3, "fp32": 2e-5}
GPU_SHAPES = ["8,4096,64,64", "8,4096,32,128", "1,8192,32,64", "4,1024,16,64"]
CPU_SHAPES = ["1,1024,12,64"]


def make_tokens(shape: list[int], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """r, w, k, v, a, b as a model makes them, and dy last."""
    torch.manual_seed(0)
    r, w, k, v, kk, gate, dy = (torch.randn(shape, device=device) for _ in range(7))
    kk = torch.nn.functional.normalize(kk, dim=-1)
    w = -torch.nn.functional.softplus(-w) - 0.5
    tensors = (r, w, k, v, -kk, kk * torch.sigmoid(gate), dy)
    return [x.to(dtype) for x in tensors]


def gate(op: Op, shape: list[int], dtype: str, device: str) -> float:
    """The largest relative RMS error of results and gradients on the first tokens of one head."""
    batch, length, _, size = shape
    small = [min(batch, 2), min(length, 77), 2, size]
    *tokens, dy = make_tokens(small, DTYPES[dtype], device)
    leaves = [x.clone().requires_grad_() for x in tokens]
    y, _ = op(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    truth = [x.double().cpu().requires_grad_() for x in tokens]
    y_true, _ = REFERENCES["wkv7"](*truth)
    grads_true = torch.autograd.grad(y_true, truth, dy.double().cpu())
    pairs = zip((y, *grads), (y_true, *grads_true), strict=True)
    errors = [((x.double().cpu() - t).norm() / t.norm()).item() for x, t in pairs]
    return max(float("inf") if math.isnan(error) else error for error in errors)


def time_of(work: Callable[[], object], device: str, *, seconds: float = 1.0) -> list[float]:
    """Milliseconds of repeated runs, after warming up."""
    times: list[float] = []
    deadline = None
    while deadline is None or len(times) < 5 or time.perf_counter() < deadline:
        if len(times) == 3 and deadline is None:
            times.clear()
            deadline = time.perf_counter() + seconds
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            work()
            times.append((time.perf_counter() - begin) * 1e3)
    return times


def measure(
    call: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    tokens: list[torch.Tensor],
    dy: torch.Tensor,
    device: str,
    *,
    seconds: float,
) -> tuple[list[float], list[float]]:
    """Times of the forward without gradients, and of forward and backward."""
    leaves = [x.clone().requires_grad_() for x in tokens]

    def forward() -> None:
        with torch.no_grad():
            call(*tokens)

    def both() -> None:
        torch.autograd.grad(call(*leaves)[0], leaves, dy)

    return time_of(forward, device, seconds=seconds), time_of(both, device, seconds=seconds)


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the GPU, read and written."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    best = statistics.median(time_of(lambda: target.copy_(source), "cuda", seconds=0.3))
    return 2 * source.numel() * source.element_size() / best * 1e3


def main() -> int:
    """Print the table; 1 if a gate is not passed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", help="B,T,H,N", metavar="SHAPE")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each measurement")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = options.device
    shapes = options.shape or (GPU_SHAPES if device == "cuda" else CPU_SHAPES)
    dtypes = options.dtype or (["bf16", "fp32"] if device == "cuda" else ["fp32"])
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    header = {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rwkv_jit": __version__,
        "copy_bytes_per_second": copy_bandwidth() if device == "cuda" else None,
    }
    rows = []
    for dtype in dtypes:
        for text in shapes:
            shape = [int(part) for part in text.split(",")]
            op = get_op("wkv7", head_size=shape[3], dtype=DTYPES[dtype], device=device)
            error = gate(op, shape, dtype, device)
            if not error <= GATES[dtype]:
                print(f"{op.config.slug}: error {error:.1e} is above {GATES[dtype]:.1e}")
                return 1
            *tokens, dy = make_tokens(shape, DTYPES[dtype], device)
            forward, both = measure(op, tokens, dy, device, seconds=options.seconds)
            row = {"shape": text, "dtype": dtype, "error": error}
            for label, times in (("forward", forward), ("both", both)):
                row[f"{label}_ms"] = statistics.median(times)
                row[f"{label}_spread"] = (max(times) - min(times)) / statistics.median(times)
            if device == "cpu":
                loop = measure(_loop, tokens, dy, device, seconds=options.seconds)
                for label, times in zip(("forward", "both"), loop, strict=True):
                    row[f"{label}_loop_ms"] = statistics.median(times)
                    row[f"{label}_times_loop"] = statistics.median(times) / row[f"{label}_ms"]
            rows.append(row)
    if options.json:
        print(json.dumps({**header, "rows": rows}, indent=1))
        return 0
    print(", ".join(f"{key} {value}" for key, value in header.items() if value is not None))
    columns = list(rows[0])
    print("  ".join(f"{column:>18}" for column in columns))
    for row in rows:
        print("  ".join(f"{_show(row[column]):>18}" for column in columns))
    return 0


def _loop(*tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    return REFERENCES["wkv7"](*tokens, compute_dtype=torch.float32)


def _show(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
