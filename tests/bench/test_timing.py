"""Timing: runs are repeated, quartiles lie around the median, a copy moves bytes."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from rwkv_jit.bench import timing
from rwkv_jit.bench.timing import copy_bandwidth, extra_memory, time_of


def test_five_runs_are_timed_at_least_after_one_to_warm_up() -> None:
    calls = itertools.count()
    taken = time_of(lambda: next(calls), "cpu", 0.0)
    assert taken.runs == 5
    assert next(calls) == 5 + 1


def test_runs_go_on_until_the_time_is_over() -> None:
    taken = time_of(lambda: time.sleep(1e-3), "cpu", 0.1)
    assert 5 < taken.runs <= 100


def test_quartiles_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    times = itertools.chain([100.0], itertools.cycle([5.0, 1.0, 3.0, 2.0, 4.0]))
    monkeypatch.setattr(timing, "_times_on_cpu", lambda _work, _count: [next(times)])
    taken = time_of(lambda: None, "cpu", 0.0)
    assert (taken.lower_ms, taken.median_ms, taken.upper_ms) == (2.0, 3.0, 4.0)


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_COPIED_FLOATS", {"cpu": 1000})
    monkeypatch.setattr(timing, "_times_on_cpu", lambda _work, _count: [2.0])
    assert copy_bandwidth("cpu", 0.0) == 2 * 4000 / 2e-3


def test_a_cpu_reports_no_extra_memory() -> None:
    assert extra_memory(lambda: None, "cpu") is None


@pytest.mark.gpu
def test_extra_memory_is_the_most_that_was_there_at_once() -> None:
    def work() -> torch.Tensor:
        return torch.empty(1 << 20, device="cuda") + torch.empty(1 << 20, device="cuda")

    assert extra_memory(work, "cuda") == 3 * 4 << 20


@pytest.mark.gpu
def test_a_gpu_is_waited_for() -> None:
    # About a millisecond and more, which the host alone would queue in microseconds.
    taken = time_of(lambda: torch.cuda._sleep(2_000_000), "cuda", 0.0)
    assert taken.median_ms > 0.5


@pytest.mark.gpu
def test_the_host_is_ahead_of_the_gpu() -> None:
    def work() -> None:
        ready = time.perf_counter() + 1e-3
        while time.perf_counter() < ready:
            pass
        torch.cuda._sleep(1000)

    assert time_of(work, "cuda", 0.0).median_ms < 0.02
