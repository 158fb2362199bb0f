"""Architectures: which binaries run where."""

from __future__ import annotations

import pytest

from rwkv_jit.arch import binary_runs_on


@pytest.mark.parametrize(
    ("built", "arch"),
    [
        ("sm80", "sm80"),
        ("sm80", "sm86"),
        ("sm86", "sm89"),
        ("sm90a", "sm90a"),
        ("sm90", "sm90a"),
        ("sm100", "sm103"),
        ("sm100f", "sm100"),
        ("sm100f", "sm103"),
        ("sm120f", "sm120"),
        ("sm120f", "sm121"),
        ("sm87", "sm87"),
        ("x86_64_v2", "x86_64_v2"),
        ("x86_64_v2", "x86_64_v4"),
        ("x86_64_v3", "x86_64_v4"),
        ("aarch64", "aarch64"),
    ],
)
def test_a_binary_runs_on_the_same_and_on_higher_ones(built: str, arch: str) -> None:
    assert binary_runs_on(built, arch)


@pytest.mark.parametrize(
    ("built", "arch"),
    [
        ("sm86", "sm80"),
        ("sm89", "sm90a"),
        ("sm90a", "sm100"),
        ("sm100a", "sm103"),
        ("sm120a", "sm120"),
        ("sm103f", "sm100"),
        ("sm100f", "sm120"),
        # Embedded GPUs are apart.
        ("sm80", "sm87"),
        ("sm87", "sm89"),
        ("sm100f", "sm101"),
        ("x86_64_v3", "x86_64_v2"),
        ("x86_64_v2", "aarch64"),
        ("aarch64", "x86_64_v3"),
        ("sm80", "x86_64_v3"),
        ("x86_64_v3", "sm80"),
    ],
)
def test_a_binary_does_not_run_elsewhere(built: str, arch: str) -> None:
    assert not binary_runs_on(built, arch)
