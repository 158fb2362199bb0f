"""What a measurement says of the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rwkv_jit import __version__
from rwkv_jit.arch import host_cpu_arch
from rwkv_jit.bench import machine
from rwkv_jit.bench.machine import describe_machine
from rwkv_jit.errors import ToolchainError
from rwkv_jit.settings import current_settings


def test_device_versions_and_compilers_are_named() -> None:
    found = describe_machine("cpu", current_settings())
    assert json.loads(json.dumps(found)) == found
    assert (found["rwkv_jit"], found["torch"]) == (__version__, torch.__version__)
    assert found["arch"] == host_cpu_arch()
    assert found["device"]
    assert found["host_compiler"]
    assert found["nvcc"] is None


def test_the_driver_is_read_from_its_own_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "version"
    monkeypatch.setattr(machine, "NVIDIA_DRIVER", report)
    assert describe_machine("cpu", current_settings())["driver"] is None
    report.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    assert describe_machine("cpu", current_settings())["driver"] == "550.54.15"


def test_a_machine_without_compilers_can_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise ToolchainError("no compiler")

    monkeypatch.setattr(machine, "find_toolchain", none)
    found = describe_machine("cpu", current_settings())
    assert (found["host_compiler"], found["nvcc"]) == (None, None)
