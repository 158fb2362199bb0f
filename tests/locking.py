"""A build lock in other hands, for tests of waiting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def lock_held_elsewhere(root: Path, digest: str) -> Iterator[int]:
    """The id of a process that holds the lock of a digest in the cache at `root`, until it is
    killed at the end."""
    code = (
        "import sys, time; from pathlib import Path; from rwkv_jit.cache import Cache\n"
        "with Cache(Path(sys.argv[1])).lock(sys.argv[2], 5, print) as held:\n"
        "    print(held, flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", code, str(root), digest]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "True"
            yield process.pid
        finally:
            process.kill()
