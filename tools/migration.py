"""What clients gain: their models by their own kernels, then by ours, with no line of them changed.

    python tools/migration.py --client x070,x060,x052,RWKV7,RWKV6

x070, x060 and x052 are rwkv-trainer's RWKV-7, RWKV-6 and RWKV-5.2 (extra rwkv-trainer), which build
RWKV-LM's kernels; RWKV7 and RWKV6 are FLA's models (extra fla). Prints a table in Markdown. Where
results of both ways differ by more than bfloat16 explains there are no times.
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
# Largest relative RMS error of a gradient between two ways of a small model in bfloat16.
LIMIT = 0.1


def main() -> None:
    """Run every client both ways and print what was found."""
    arguments = parse_arguments()
    machine = describe_machine(arguments.device, current_settings())
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    print("\n| client | time | its own kernels, ms | ours, ms | ratio | largest relative error |")
    print("|---|---|---|---|---|---|")
    for client in arguments.client.split(","):
        own, ours = (results(client, way, arguments) for way in ("own", "ours"))
        errors = {name: relative_rms(ours["gate"][name], x) for name, x in own["gate"].items()}
        worst = max(errors, key=lambda name: errors[name])
        said = f"logits {errors['logits']:.1e}, {worst} {errors[worst]:.1e}"
        if not errors[worst] <= LIMIT:
            print(f"| {client} | not timed | | | | {said} |", flush=True)
            continue
        for name, before in own["times"].items():
            after = ours["times"][name]
            row = f"{before:.2f} | {after:.2f} | {before / after:.2f}"
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
    return parser.parse_args()


def results(client: str, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What `migration_run.py` saves, run in a process of its own."""
    intercepted = client in TRAINER and way == "ours"
    start = ["-m", "rwkv_jit", "run"] if intercepted else []
    options = ("device", "shape", "layers", "vocabulary", "seconds")
    flags = [f"--{name}={getattr(arguments, name)}" for name in options]
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


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the difference over RMS of the truth; infinite where that is no number."""
    difference = float((value.double() - truth.double()).norm())
    size = float(truth.double().norm())
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and math.isfinite(difference) else math.inf


if __name__ == "__main__":
    main()
