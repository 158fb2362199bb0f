"""Wanting a kernel as another user, and on disks that only the one who wants it can see."""

from __future__ import annotations

import importlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

import crew
from rwkv_jit.errors import CacheError

THIS = Path(__file__).stem
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


def can_mount() -> bool:
    command = ["unshare", "-m", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


needs_mount = pytest.mark.skipif(
    os.geteuid() != 0 or not can_mount(), reason="needs root and a mount namespace of its own"
)


def mounting(script: str, folder: Path) -> list[str]:
    """What runs a command where only it sees what a script mounts at `$0`."""
    run = f'{script} && exec "$@"'
    return ["unshare", "-m", "--propagation", "private", "sh", "-ec", run, str(folder)]


def become(user: int) -> None:
    if user != os.geteuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def want_as(
    user: int, cache: str | None, counter: str, times: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """Want a kernel, as another user, in one process; what came of it, or the refusal."""
    crew.hire_function(counter)
    importlib.import_module("filelock")  # another user may not be able to read this Python
    become(user)
    tempfile.tempdir = None
    try:
        results = [crew.want(cache, **changes) for _ in range(times)]
    except CacheError as error:
        return {"refused": str(error), "warnings": [], "path": ""}
    return {
        "refused": "",
        "warnings": [warning for result in results for warning in result["warnings"]],
        "path": results[-1]["path"],
        "seconds": max(result["seconds"] for result in results),
    }


def ask(
    place: Path,
    cache: Path | None,
    *,
    user: int = NOBODY,
    prefix: tuple[str, ...] | list[str] = (),
    environment: dict[str, str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    counter = place / "tmp" / "counter"
    environment = {"TMPDIR": str(place / "tmp"), **(environment or {})}
    return crew.play(
        THIS, "want_as", user, cache, counter, 2, changes, prefix=prefix, environment=environment
    )


def built_in_private(result: dict[str, Any], place: Path) -> bool:
    """Whether it was built once, in a temporary folder, with one warning."""
    assert not result["refused"], result
    assert len(result["warnings"]) == 1, result
    assert "for this process only" in result["warnings"][0]
    assert result["path"].startswith(str(place / "tmp" / "rwkv_jit."))
    assert crew.compiles(place / "tmp" / "counter") == 1
    # It went with its process.
    return not Path(result["path"]).exists()
