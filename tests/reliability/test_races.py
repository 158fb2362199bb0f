"""Many at once: one compile, and everybody gets a whole kernel."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crew
from crew import Note
from faults import strike_file_steps

THIS = Path(__file__).stem
DELAY = 1.0
ROOT = Path(__file__).parents[2]


def many_on_one_key(cache: str, counter: str, processes: int, threads: int) -> list[Any]:
    crew.hire_program(counter, DELAY)
    acts: list[Callable[[], Any]] = [lambda: crew.want(cache)] * processes
    *one_each, of_threads = crew.together(
        [*acts, lambda: crew.in_threads(lambda: crew.want(cache), threads)]
    )
    return [*one_each, *of_threads]


def test_32_processes_and_16_threads_on_one_key_compile_once(tmp_path: Path, note: Note) -> None:
    counter = tmp_path / "counter"
    results = crew.play(THIS, "many_on_one_key", tmp_path / "cache", counter, 32, 16)
    assert len(results) == 48
    assert len({result["created"] for result in results}) == 1
    assert not any(result["warnings"] for result in results)
    assert crew.compiles(counter) == 1
    crew.check_clean(tmp_path / "cache")
    note("32 processes and 16 threads want one key", 48, [r["seconds"] for r in results])


def opposite_orders(cache: str, counter: str, keys: int) -> list[Any]:
    crew.hire_program(counter, 0.2)
    up, down = list(range(keys)), list(range(keys))[::-1]
    return crew.together(
        [lambda order=order: [crew.want(cache, key) for key in order] for order in [up, down] * 4]
    )


def test_keys_wanted_in_opposite_orders_do_not_deadlock(tmp_path: Path, note: Note) -> None:
    counter = tmp_path / "counter"
    results = crew.play(THIS, "opposite_orders", tmp_path / "cache", counter, 4)
    assert len(results) == 8
    assert crew.compiles(counter) == 4
    crew.check_clean(tmp_path / "cache", 4)
    slowest = max(sum(want["seconds"] for want in result) for result in results)
    note("two sets of keys in opposite order, 8 processes", 8, [slowest])


def without_flock(cache: str, counter: str, answer: int) -> list[Any]:
    def flock(_file: object, _operation: int) -> None:
        if answer:
            raise OSError(answer, os.strerror(answer))

    fcntl.flock = flock
    crew.hire_program(counter, 0.3)
    return crew.together([lambda: crew.want(cache)] * 8)


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, 0])
def test_without_working_flock_all_succeed_and_one_entry_stays(
    answer: int, tmp_path: Path, note: Note
) -> None:
    # 0: a file system that grants every lock to everybody.
    counter = tmp_path / "counter"
    results = crew.play(THIS, "without_flock", tmp_path / "cache", counter, answer)
    assert 1 <= crew.compiles(counter) <= 8
    assert not any(result["warnings"] for result in results)
    crew.check_clean(tmp_path / "cache")
    note("flock fails or is granted to all, 8 processes", 8, [r["seconds"] for r in results])


def fail_at_each_step(folder: str, number: int, found: bool) -> dict[str, Any]:
    """Let each file operation of one look-up or build fail, one after the other."""
    crew.hire_function(Path(folder, "counter"))
    seconds, steps, step = [], 0, 0

    def act(cache: Path, failing: int) -> dict[str, Any]:
        def strike(step: int, name: str) -> None:
            if step == failing:
                raise OSError(number, os.strerror(number), name)

        count = strike_file_steps([cache, Path(os.environ["TMPDIR"])], strike)
        return {**crew.want(cache, check=False), "steps": count()}

    while step <= steps:
        cache = Path(folder, f"cache{step}")
        if found:
            crew.collect(crew.fork(lambda cache=cache: crew.want(cache)))
        result = crew.collect(crew.fork(lambda cache=cache, step=step: act(cache, step)))
        assert not result["warnings"], (step, result["warnings"])
        assert str(cache) in result["path"]
        crew.check_clean(cache)
        steps = result["steps"] if step == 0 else steps
        seconds.append(result["seconds"])
        step += 1
    return {"steps": steps, "slowest": max(seconds)}


@pytest.mark.parametrize("found", [False, True], ids=["build", "look-up"])
@pytest.mark.parametrize("name", ["ESTALE", "ENOENT"])
def test_one_failing_file_operation_is_survived_wherever_it_is(
    name: str, found: bool, tmp_path: Path, note: Note
) -> None:
    done = crew.play(THIS, "fail_at_each_step", tmp_path, getattr(errno, name), found)
    assert done["steps"] > (10 if found else 60)
    what = "look-up" if found else "build"
    note(f"{name} at each file step of a {what}", done["steps"], [done["slowest"]])


RANK = """
import sys, time, torch, torch.distributed as dist
from rwkv_jit import get_op
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=8)
dist.barrier()
began = time.monotonic()
op = get_op("wkv7", head_size=16, dtype=torch.float32, device="cpu")
torch.manual_seed(0)
r, w, k, v, a, b = (torch.rand(1, 3, 1, 16) for _ in range(6))
y, _ = op(r, w, k, v, a, b)
seconds = time.monotonic() - began
every = [torch.empty_like(y) for _ in range(8)]
dist.all_gather(every, y)
assert all(torch.equal(other, y) for other in every)
print(seconds)
dist.destroy_process_group()
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs an x86-64 compiler"
)
def test_eight_ranks_that_start_cold_compile_once(tmp_path: Path, note: Note) -> None:
    counter, compiler = tmp_path / "counter", tmp_path / "counting-g++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo $$ >> {counter};; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "RWKV_JIT_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(rank), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(8)
    ]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), said
    assert crew.compiles(counter) == 1
    note("8 torch.distributed ranks start cold (real build)", 8, [float(out) for out, _ in said])
