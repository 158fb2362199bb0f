"""The quickstart from its command line, without the set-up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import quickstart

PROGRAM = Path(quickstart.__file__)


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *flags], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def short_run(session_cache: Path) -> subprocess.CompletedProcess[str]:
    """Forty steps of a narrow model on the CPU, enough to learn which bytes are common."""
    flags = ("--no-setup", "--device", "cpu", "--steps", "40", "--batch", "8", "--tokens", "64")
    return run(*flags, "--width", "64", "--sample", "50")


def test_short_run_ends_well(short_run: subprocess.CompletedProcess[str]) -> None:
    assert short_run.returncode == 0, short_run.stderr
    assert "Traceback" not in short_run.stderr


def test_loss_falls(short_run: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in short_run.stdout.splitlines() if line.startswith("step ")]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if ": loss " in line]
    assert losses[0] > 5
    assert losses[-1] < 3.7
    assert "tokens/s" in lines[-1]


def test_sample_continues_the_prompt(short_run: subprocess.CompletedProcess[str]) -> None:
    _, _, after = short_run.stdout.partition("byte by byte through the state")
    sample = after.split("\n\n", 1)[1]
    assert sample.startswith("The ")


def test_cache_listing_shows_the_kernels_that_were_used(
    short_run: subprocess.CompletedProcess[str],
) -> None:
    _, _, listing = short_run.stdout.partition("rwkv-jit cache ls\n")
    assert "wkv7_n64_fp32" in listing


def test_width_without_whole_heads_is_refused_in_one_line() -> None:
    done = run("--no-setup", "--device", "cpu", "--width", "100")
    assert done.returncode == 1
    assert done.stderr == (
        "quickstart: TimeMix7: width=100 must be a positive multiple of head_size=64\n"
    )


@pytest.mark.parametrize("flag", ["--steps", "--batch", "--tokens", "--layers", "--sample"])
def test_counts_below_one_are_refused(flag: str) -> None:
    done = run("--no-setup", flag, "0")
    assert done.returncode == 2
    assert f"argument {flag}: 0 must be at least 1" in done.stderr


def test_help_names_every_flag_and_needs_no_set_up() -> None:
    done = run("--help")
    assert done.returncode == 0
    for flag in ("--steps", "--batch", "--tokens", "--device", "--no-setup", "--sample"):
        assert flag in done.stdout
