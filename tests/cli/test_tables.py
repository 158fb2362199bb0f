"""What people see of kernels and errors."""

from __future__ import annotations

import pytest

from rwkv_jit.cli.output import print_view
from rwkv_jit.cli.tables import failures_text, outcomes_table
from rwkv_jit.cli.warming import Outcome
from rwkv_jit.errors import KernelBuildError, KernelMissingError, ToolchainError


def test_hits_show_no_build_time(capsys: pytest.CaptureFixture[str]) -> None:
    print_view(outcomes_table([Outcome(identity="one.forward", status="missing")]))
    assert capsys.readouterr().out.splitlines()[1].split() == ["one.forward", "missing"] + ["-"] * 3


def test_an_error_of_several_kernels_is_told_once() -> None:
    failures = [
        Outcome(identity=f"{name}.forward", status="failed", error=ToolchainError("no nvcc"))
        for name in ("one", "two")
    ]
    assert failures_text(failures) == "error: one.forward, two.forward: no nvcc"


def test_an_error_that_names_its_kernel_is_not_prefixed_and_loses_the_command() -> None:
    build = KernelBuildError("one.forward: nvcc failed. Full log: x\nA hint\nCommand: nvcc -c")
    missing = KernelMissingError("two.forward is not in any cache")
    failures = [
        Outcome(identity="one.forward", status="failed", error=build),
        Outcome(identity="two.forward", status="failed", error=missing),
    ]
    assert failures_text(failures).splitlines() == [
        "error: one.forward: nvcc failed. Full log: x",
        "A hint",
        "error: two.forward is not in any cache",
    ]
