"""Faults at file operations: Python tells each one to an audit hook before it happens, so a hook
that raises makes it fail, and one that ends the process is a crash right there.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Those that take a path first; what they say next does not matter here.
_EVENTS = (
    "open",
    "os.chmod",
    "os.listdir",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.scandir",
    "os.utime",
)
# Python does not tell of these, so they are wrapped.
_SILENT = ("stat", "lstat", "access", "fsync")

Strike = Callable[[int, str], None]


def strike_file_steps(roots: list[Path], strike: Strike) -> Callable[[], int]:
    """From now on, for the rest of this process, call `strike` with a number and a name before each
    file operation below `roots`. What it returns tells how many there were so far."""
    beginnings = tuple(str(root) for root in roots)
    steps = 0
    busy = False

    def step(event: str, path: object) -> None:
        nonlocal steps, busy
        # The striker's own file operations do not count.
        if busy:
            return
        busy = True
        try:
            steps += 1
            strike(steps, f"{event} {path}")
        finally:
            busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "fcntl.flock":
            step(event, "")
        elif event in _EVENTS and _is_below(arguments[0], beginnings):
            step(event, arguments[0])

    def wrap(name: str) -> None:
        real = getattr(os, name)

        @functools.wraps(real)
        def wrapped(path: Any, *arguments: Any, **options: Any) -> Any:
            if name == "fsync" or _is_below(path, beginnings):
                step(f"os.{name}", path)
            return real(path, *arguments, **options)

        setattr(os, name, wrapped)

    for name in _SILENT:
        wrap(name)
    sys.addaudithook(hook)
    return lambda: steps


def _is_below(path: object, beginnings: tuple[str, ...]) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    text = os.fsdecode(path)
    # A name without a folder is relative to one that is open: that of a tree being removed.
    return text.startswith(beginnings) or os.sep not in text
