"""The trial of the device at hand."""

from __future__ import annotations

import math

import pytest

from rwkv_jit.arch import host_cpu_arch
from rwkv_jit.cli import trial
from rwkv_jit.errors import KernelBuildError
from rwkv_jit.settings import Settings, current_settings


def test_the_cpu_passes() -> None:
    result = trial.run_trial(host_cpu_arch(), current_settings())
    assert result.passed
    assert 0 < result.error < 1e-5
    assert result.build_seconds > 0


@pytest.mark.parametrize(
    ("errors", "worst", "passed"),
    [
        ({"y": 1e-7, "dw": 2e-7}, "dw", True),
        ({"y": 0.5, "dw": 2e-7}, "y", False),
        ({"y": 0.5, "dw": math.inf}, "dw", False),
    ],
)
def test_the_largest_error_decides(
    monkeypatch: pytest.MonkeyPatch, errors: dict[str, float], worst: str, passed: bool
) -> None:
    monkeypatch.setattr(trial, "build_many", lambda *_, **__: [])
    monkeypatch.setattr(trial, "_errors", lambda _config: errors)
    result = trial.run_trial("x86_64_v2", Settings())
    assert (result.worst, result.passed) == (worst, passed)


def test_a_failed_build_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "build_many", lambda *_, **__: [KernelBuildError("no luck")])
    with pytest.raises(KernelBuildError, match="no luck"):
        trial.run_trial("x86_64_v2", Settings())
