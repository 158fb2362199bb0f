"""The second half of quickstart.py, run where torch is installed: train, evaluate, write."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pydoc_data import topics

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from quickstart import parse_arguments
from rwkv7_model import RWKV7, State

BYTES = 256
PROMPT = "The "
HELD_OUT = 0.05  # share of the text, at its end
EVALUATED_BYTES = 16_384
TEMPERATURE = 0.7
CLI = "from rwkv_jit.cli import main; main()"


def main() -> None:
    """Train, print the held-out loss, write a sample, list the cache."""
    arguments = parse_arguments()
    console = Console(highlight=False)
    torch.manual_seed(arguments.seed)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_text().to(device)
    split = int(len(data) * (1 - HELD_OUT))
    training, held_out = data[:split], data[split:]
    try:
        model = RWKV7(BYTES, arguments.width, arguments.layers).to(device)
    except ValueError as error:
        sys.exit(f"quickstart: {error}")

    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"RWKV-7 with {arguments.layers} layers, {arguments.width} channels and {parameters:,} "
        f"parameters on {describe(device)}; {len(training):,} bytes of Python's help texts"
    )
    batches = random_batches(training, arguments.batch, arguments.tokens)
    train(model, batches, arguments.steps, arguments.lr, console)
    loss = evaluate(model, held_out, arguments.tokens)
    console.print(
        f"held-out loss {loss:.3f} nats a byte ({loss / math.log(2):.2f} bits); "
        f"guessing would be {math.log(BYTES):.3f}"
    )
    started = time.perf_counter()
    sample = write(model, PROMPT, arguments.sample)
    rate = arguments.sample / (time.perf_counter() - started)
    console.print(f"\nA sample, byte by byte through the state ({rate:,.0f} a second):\n")
    console.print(sample, markup=False, style="green")
    console.print("\nrwkv-jit cache ls")
    subprocess.run([sys.executable, "-c", CLI, "cache", "ls"], check=True)


def load_text() -> Tensor:
    """Python's own help texts as bytes: [length], int64."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def describe(device: str) -> str:
    """The device and the dtype that it computes in."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()} (bfloat16)"
    return f"the CPU, {torch.get_num_threads()} threads (float32)"


def random_batches(data: Tensor, batch: int, tokens: int) -> Iterator[Tensor]:
    """Batches [batch, tokens + 1] of slices that begin anywhere in the data, without end."""
    offsets = torch.arange(tokens + 1, device=data.device)
    while True:
        starts = torch.randint(len(data) - tokens, (batch, 1), device=data.device)
        yield data[starts + offsets]


def train(
    model: RWKV7, batches: Iterator[Tensor], steps: int, highest_rate: float, console: Console
) -> None:
    """Adam with a warm-up and a cosine to a tenth of the learning rate."""
    # RWKV-LM gives the decay's bias twice the learning rate, and decays nothing but matrices.
    fast = [p for name, p in model.named_parameters() if name.endswith("att.w0")]
    slow = [p for name, p in model.named_parameters() if not name.endswith("att.w0")]
    optimizer = torch.optim.Adam(
        [{"params": slow, "scale": 1.0}, {"params": fast, "scale": 2.0}],
        betas=(0.9, 0.99),
        eps=1e-18,
    )
    columns = (
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    # The first step pays for the kernels, so the rate counts from the second.
    started, seen, shown = time.perf_counter(), 0, math.nan
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("building kernels, or finding them in the cache", total=steps)
        for step in range(steps):
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = highest_rate * schedule(step, steps) * group["scale"]
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            value = loss.item()
            shown = value if math.isnan(shown) else 0.9 * shown + 0.1 * value
            seconds = time.perf_counter() - started
            if step == 0:
                progress.console.print(f"step 1: loss {value:.3f} after {seconds:.1f} s")
                started = time.perf_counter()
                description = f"loss {value:.3f}"
            else:
                seen += batch[:, 1:].numel()
                description = f"loss {shown:.3f}  {seen / seconds:,.0f} tokens/s"
                if (step + 1) % max(steps // 6, 1) == 0:
                    progress.console.print(f"step {step + 1}: {description}")
            progress.update(bar, advance=1, description=description)


def schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate at this step."""
    warm_up = min(1.0, (step + 1) / max(1, steps // 20))
    return warm_up * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def loss_of(model: RWKV7, batch: Tensor) -> Tensor:
    """Mean cross entropy of each next byte: a scalar, float32. batch: [B, T + 1]."""
    with computing(batch):
        logits, _ = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def computing(tokens: Tensor) -> AbstractContextManager[object]:
    """Bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda)


@torch.no_grad()
def evaluate(model: RWKV7, data: Tensor, tokens: int) -> float:
    """Mean loss over the beginning of the data, in sequences of `tokens`."""
    count = max(1, min(len(data), EVALUATED_BYTES) // (tokens + 1))
    return loss_of(model, data[: count * (tokens + 1)].view(count, -1)).item()


@torch.no_grad()
def write(model: RWKV7, prompt: str, length: int) -> str:
    """Continue the prompt by `length` bytes, reading one byte at a time after it."""
    device = next(model.parameters()).device
    state: State | None = None
    tokens = torch.tensor([list(prompt.encode())], device=device)
    written = bytearray(prompt.encode())
    for _ in range(length):
        with computing(tokens):
            logits, state = model(tokens, state)
        chances = torch.softmax(logits[:, -1].float() / TEMPERATURE, dim=-1)
        tokens = torch.multinomial(chances, 1)
        written.append(int(tokens))
    return written.decode(errors="replace")


if __name__ == "__main__":
    main()
