"""`rwkv-jit run`: a program as Python itself would run it, and what it builds intercepted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from running import environment, program, run

LOADS = """
from torch.utils.cpp_extension import load
load(name="wkv6", sources=["wkv6.cu"])
"""


def run_program(
    tmp_path: Path, source: str, *arguments: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """A program of that source, run from another folder than its own."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "neighbour.py").write_text("HERE = True")
    script = tmp_path / "folder" / "script.py"
    script.write_text(source)
    done = subprocess.run(
        program("run", str(script), *arguments),
        env={**environment(tmp_path / "cache"), "RWKV_JIT_LOG_LEVEL": "info"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def test_a_program_gets_its_arguments_its_folder_and_its_name(tmp_path: Path) -> None:
    source = """
import sys
import neighbour
print(__name__, sys.argv[1:], __file__ == sys.argv[0])
"""
    done = run_program(tmp_path, source, "--help", "-m", "x", "--json")
    assert done.stdout == "__main__ ['--help', '-m', 'x', '--json'] True\n"
    assert done.stderr == ""


def test_the_exit_code_is_that_of_the_program(tmp_path: Path) -> None:
    assert run_program(tmp_path, "raise SystemExit(7)", code=7).stderr == ""


def test_a_warning_of_the_program_looks_as_it_would(tmp_path: Path) -> None:
    done = run_program(tmp_path, "import warnings\nwarnings.warn('careful')")
    assert "script.py:2: UserWarning: careful" in done.stderr


def test_what_is_replaced_is_said_once(tmp_path: Path) -> None:
    done = run_program(tmp_path, LOADS * 3)
    said = "rwkv_jit: wkv6 is not built: torch.ops.wkv6 is wkv6 of rwkv_jit\n"
    assert done.stderr == said


def test_an_error_of_ours_shows_where_the_program_is(tmp_path: Path) -> None:
    source = """
import torch
library = torch.library.Library("wkv6", "DEF")
library.define("forward(Tensor x) -> ()")
"""
    done = run_program(tmp_path, source + LOADS, code=1)
    assert "script.py" in done.stderr
    assert "torch.ops.wkv6 is registered already, by an extension" in done.stderr


def test_a_module_is_run_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "train.py").write_text("import sys\nprint(__package__, sys.argv[1:])")
    done = subprocess.run(
        program("run", "-m", "package.train", "--steps", "3"),
        env=environment(tmp_path / "cache"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "package ['--steps', '3']\n"


@pytest.mark.parametrize("arguments", [(), ("nowhere.py",)])
def test_without_a_program_the_usage_is_wrong(arguments: tuple[str, ...]) -> None:
    assert "PROGRAM" in run("run", *arguments, code=2).output
