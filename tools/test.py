"""Run the tests in the checkout's own virtual environment: python3 tools/test.py [pytest args]."""

import os
import sys

from environment import ROOT, prepare_or_exit


def main() -> None:
    """Set up if needed, then become pytest."""
    python = str(prepare_or_exit(["test", "lint", "clients"]))
    os.chdir(ROOT)
    os.execv(python, [python, "-m", "pytest", *sys.argv[1:]])


if __name__ == "__main__":
    main()
