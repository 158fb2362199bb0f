"""Workers end: by themselves, at their limit, or on request."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from rwkv_jit.build import worker
from rwkv_jit.build.worker import WorkerStoppedError, run_worker


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that workers run."""
    path = tmp_path / "program.py"
    monkeypatch.setattr(worker, "_PROGRAM", path)
    return path


def run(program: Path, limit: float = 60.0, stop: threading.Event | None = None) -> int:
    folder = program.parent
    return run_worker(
        {"word": "hello"},
        folder,
        folder / "log",
        limit=limit,
        tick=lambda _: None,
        stop=stop or threading.Event(),
    )


def test_worker_gets_its_request_and_writes_the_log(program: Path) -> None:
    program.write_text(
        "import json, sys\n"
        "request = json.load(open(sys.argv[1]))\n"
        "print(request['word'], sys.stdin.read() == '', file=sys.stderr)\n"
        "sys.exit(7)"
    )
    assert run(program) == 7
    assert (program.parent / "log").read_text() == "hello True\n"


@pytest.mark.parametrize("timed_out", [True, False])
def test_ended_worker_takes_along_what_it_started(program: Path, *, timed_out: bool) -> None:
    # A process group of its own, as ninja gives to compilers, and deaf to polite signals.
    program.write_text(
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '300'], preexec_fn=os.setpgrp)\n"
        "print(os.getpid(), child.pid, flush=True)\n"
        "time.sleep(300)"
    )
    stop = threading.Event()
    timer = threading.Timer(1.0, stop.set)
    if not timed_out:
        timer.start()
    began = time.monotonic()
    with pytest.raises(WorkerStoppedError) as caught:
        run(program, 1.0 if timed_out else 60.0, stop)
    timer.cancel()
    assert caught.value.timed_out == timed_out
    assert time.monotonic() - began < 20
    pids = (program.parent / "log").read_text().split()
    assert len(pids) == 2
    for pid in pids:
        state = Path(f"/proc/{pid}/stat")
        # One that is dead but not yet collected by its adopter is a zombie.
        assert not state.exists() or ") Z " in state.read_text()
