"""How many compilers run at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jit.build import jobs


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """16 cores and 64 GiB, without limits; files of the kernel lie in the folder returned."""
    monkeypatch.setattr(jobs, "_CGROUP", tmp_path)
    monkeypatch.setattr(jobs, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: set(range(16)))
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {64 << 20} kB\n")
    return tmp_path


def test_setting_wins(machine: Path) -> None:
    assert jobs.default_jobs(40) == 40


def test_cores_bound_the_jobs(machine: Path) -> None:
    assert jobs.default_jobs(None) == 16


def test_free_memory_bounds_the_jobs(machine: Path) -> None:
    (machine / "meminfo").write_text(f"MemAvailable: {7 << 20} kB\n")
    assert jobs.default_jobs(None) == 3


def test_control_group_bounds_the_jobs(machine: Path) -> None:
    (machine / "memory.max").write_text(f"{12 << 30}\n")
    (machine / "memory.current").write_text(f"{2 << 30}\n")
    assert jobs.default_jobs(None) == 5
    (machine / "cpu.max").write_text("250000 100000\n")
    assert jobs.default_jobs(None) == 2


def test_unlimited_control_group_does_not_bound(machine: Path) -> None:
    (machine / "memory.max").write_text("max\n")
    (machine / "cpu.max").write_text("max 100000\n")
    assert jobs.default_jobs(None) == 16


def test_there_is_always_one_job(machine: Path) -> None:
    (machine / "meminfo").write_text("MemAvailable: 1000 kB\n")
    assert jobs.default_jobs(None) == 1
