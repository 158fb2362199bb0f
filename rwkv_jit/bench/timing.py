"""Times of repeated runs, and the bandwidth of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_WARM_UPS = 3
_FEWEST_RUNS = 5
_COPIED_FLOATS = {"cuda": 1 << 28, "cpu": 1 << 25}
# Runs that wait in a GPU's queue one after another, and the bytes that are written before each.
_QUEUED = 8
# The most seconds for which it is held back, and its cycles in one, of which no GPU has more.
_MOST_HELD = 0.05
_CYCLES_A_SECOND = 3e9
_STEPS = 20
_FLUSHED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median and quartiles of a number of runs, in milliseconds."""

    median_ms: float
    lower_ms: float
    upper_ms: float
    runs: int


def time_of(work: Callable[[], object], device: str, seconds: float) -> Timing:
    """Run `work` for about so many seconds, and a few times at least, after warming up."""
    times_of = _times_on_gpu if device == "cuda" else _times_on_cpu
    # What is slow needs less of it.
    warm = time.perf_counter() + seconds
    for done in range(_WARM_UPS):
        if done == 0 or time.perf_counter() < warm:
            times_of(work, 1)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < _FEWEST_RUNS or time.perf_counter() < deadline:
        times += times_of(work, _QUEUED)
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median_ms=median, lower_ms=lower, upper_ms=upper, runs=len(times))


def time_of_step(work: Callable[[], object], device: str, seconds: float) -> Timing:
    """The same of something so short that on a GPU it is replayed: many in one graph, of which only
    the first meets a cold cache."""
    if device != "cuda":
        return time_of(work, device, seconds)
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_STEPS):
            work()
    timing = time_of(graph.replay, device, seconds)
    return Timing(
        median_ms=timing.median_ms / _STEPS,
        lower_ms=timing.lower_ms / _STEPS,
        upper_ms=timing.upper_ms / _STEPS,
        runs=timing.runs,
    )


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes a second that a large copy moves, read and written."""
    source = torch.randn(_COPIED_FLOATS[device], device=device)
    target = torch.empty_like(source)
    timing = time_of(lambda: target.copy_(source), device, seconds)
    return 2 * source.nbytes / timing.median_ms * 1e3


def extra_memory(work: Callable[[], object], device: str) -> int | None:
    """Most bytes of the GPU that `work` had beyond what was there before; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _times_on_gpu(work: Callable[[], object], count: int) -> list[float]:
    """Milliseconds on the GPU, each run with a cold cache. The GPU is held back until about all
    runs are in its queue, as the host's time is not part of theirs."""
    begin = time.perf_counter()
    work()
    of_host = time.perf_counter() - begin
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    torch.cuda._sleep(int(min(count * of_host, _MOST_HELD) * _CYCLES_A_SECOND))
    for start, end in events:
        flushed.zero_()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) for start, end in events]


def _times_on_cpu(work: Callable[[], object], _count: int) -> list[float]:
    """Milliseconds of one run."""
    begin = time.perf_counter()
    work()
    return [(time.perf_counter() - begin) * 1e3]
