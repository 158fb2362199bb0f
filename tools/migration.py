"""What clients gain: their models by their own kernels, then by ours, with no line of them changed.

    python tools/migration.py --client x070,x060,x052,RWKV7,RWKV6

x070, x060 and x052 are rwkv-trainer's RWKV-7, RWKV-6 and RWKV-5.2 (extra rwkv-trainer), which build
RWKV-LM's kernels; RWKV7 and RWKV6 are FLA's models (extra fla). Prints a table in Markdown. Its
errors are those of both ways in bfloat16 against the same small model in float32: relative RMS, of
the logits and of all gradients together. Where ours are the larger ones there are no times.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rwkv_jit.bench.machine import default_device, describe_machine
from rwkv_jit.settings import current_settings

RUN = Path(__file__).with_name("migration_run.py")
TRAINER = ("x070", "x060", "x052")
FLA = ("RWKV7", "RWKV6")
Tensors = dict[str, torch.Tensor]
# Most of our errors: so often theirs, which are another rounding of the same, and a little.
OF_ITS_OWN_ERROR, FLOOR = 1.2, 1e-3


def main() -> None:
    """Run every client both ways and print what was found."""
    arguments = parse_arguments()
    machine = describe_machine(arguments.device, current_settings())
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    if arguments.short_tuning:
        print("FLA's kernels were tuned without the widest blocks and the most warps.")
    print("\n| client | time | its own, ms | ours, ms | ratio | its own errors | our errors |")
    print("|---|---|---|---|---|---|---|")
    for client in arguments.client.split(","):
        truth, own, ours = (results(client, way, arguments) for way in ("truth", "own", "ours"))
        before, after = (errors_of(found["gate"], truth["gate"]) for found in (own, ours))
        said = " | ".join(f"{logits:.1e}, {grads:.1e}" for logits, grads in (before, after))
        pairs = zip(before, after, strict=True)
        if not all(y <= OF_ITS_OWN_ERROR * x + FLOOR < math.inf for x, y in pairs):
            print(f"| {client} | not timed | | | | {said} |", flush=True)
            continue
        for name, old in own["times"].items():
            new = ours["times"][name]
            row = f"{old:.2f} | {new:.2f} | {old / new:.2f}"
            print(f"| {client} | {name} | {row} | {said} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The flags of this program."""
    parser = argparse.ArgumentParser(
        description="Time clients' models by their own kernels and by ours.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--client", default=",".join((*TRAINER, *FLA)), help="which")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device(), help="where")
    parser.add_argument("--shape", default="8,4096,12", help="B,T,H; N is 64")
    parser.add_argument("--layers", type=int, default=12, help="of the model")
    parser.add_argument("--vocabulary", type=int, default=65536, help="of the model")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each time")
    parser.add_argument(
        "--short-tuning", action="store_true", help="of FLA's kernels, which takes minutes"
    )
    return parser.parse_args()


def results(client: str, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `migration_run.py` saves, run in a process of its own."""
    intercepted = client in TRAINER and way != "own"
    start = ["-m", "rwkv_jit", "run"] if intercepted else []
    options = ("device", "shape", "layers", "vocabulary", "seconds")
    flags = [f"--{name}={getattr(arguments, name)}" for name in options]
    if arguments.short_tuning:
        flags.append("--short-tuning")
    environment = dict(os.environ)
    if client == "x070" and arguments.device == "cpu" and way == "own":
        environment["RWKV_TORCH_FALLBACK"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results"
        done = subprocess.run(
            [sys.executable, *start, str(RUN), client, way, str(path), *flags],
            env=environment, stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"{client}, {way}: the program failed")
        found: dict[str, Any] = torch.load(path)
    return found


def errors_of(found: Tensors, truth: Tensors) -> tuple[float, float]:
    """Relative RMS errors of the logits, and of all the gradients as one vector."""
    names = sorted(truth.keys() - {"logits"})
    if found.keys() != truth.keys():
        raise SystemExit(f"gradients of other parameters: {found.keys() ^ truth.keys()}")
    gradients = (torch.cat([x[name].flatten() for name in names]) for x in (found, truth))
    return relative_rms(found["logits"], truth["logits"]), relative_rms(*gradients)


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the difference over RMS of the truth."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


if __name__ == "__main__":
    main()
