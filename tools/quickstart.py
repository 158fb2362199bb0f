"""Set up, train a small RWKV-7 on a text that comes with Python, write from it, show the cache.

    python3 tools/quickstart.py

Needs Python 3.10 or later and a C++ compiler; everything else goes into .venv in the checkout.
A GPU is used if there is one (bfloat16), else the CPU (float32). A second run builds nothing.
"""

import argparse
import importlib.util
import os
import sys

from environment import ROOT, prepare_or_exit


def parse_arguments() -> argparse.Namespace:
    """The flags of this program and of quickstart_train.py, which it becomes."""
    parser = argparse.ArgumentParser(
        description="Train a small RWKV-7 on the CPU or a GPU, then write a sample from it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=_positive, default=300, help="training steps")
    parser.add_argument("--batch", type=_positive, default=16, help="sequences a step")
    parser.add_argument("--tokens", type=_positive, default=128, help="bytes in a sequence")
    parser.add_argument("--layers", type=_positive, default=2, help="layers of the model")
    parser.add_argument("--width", type=_positive, default=128, help="channels, a multiple of 64")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--sample", type=_positive, default=400, help="bytes to write at the end")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and sample")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU if there is one",
    )
    parser.add_argument(
        "--no-setup",
        action="store_true",
        help="use this Python as it is, where torch and the other requirements are installed",
    )
    return parser.parse_args()


def main() -> None:
    """Set up if needed, then become quickstart_train.py."""
    arguments = parse_arguments()
    python = sys.executable if arguments.no_setup else str(prepare_or_exit([]))
    if arguments.no_setup and importlib.util.find_spec("rwkv_jit") is None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    # On a machine with other work, OpenMP threads that spin while they wait cost a factor of ten.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    program = ROOT / "tools" / "quickstart_train.py"
    os.execv(python, [python, str(program), *sys.argv[1:]])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


if __name__ == "__main__":
    main()
