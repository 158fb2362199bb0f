"""The program `rwkv-jit`, run in this process or in one of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from rwkv_jit.cli import app

ROOT = Path(__file__).parent.parent


def run(*arguments: str, code: int = 0) -> Any:
    """Run the program in this process, which must end with `code` and without a traceback."""
    result = CliRunner().invoke(app, arguments, prog_name="rwkv-jit")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def run_json(*arguments: str, code: int = 0) -> Any:
    """What a command prints with --json, which must be JSON alone."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def program(*arguments: str) -> list[str]:
    """The command line of the program in a process of its own."""
    return [sys.executable, "-m", "rwkv_jit", *arguments]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RWKV_JIT_CACHE_DIR": str(cache)}
