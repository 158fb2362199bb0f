"""Starting build workers, and making sure that they end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

_PROGRAM = Path(__file__).with_name("worker_program.py")
_POLL_SECONDS = 0.1
_TERM_SECONDS = 3.0
_KILL_SECONDS = 10.0


class WorkerStoppedError(Exception):
    """A worker was ended before it was done. timed_out: by its limit, and not on request."""

    def __init__(self, *, timed_out: bool) -> None:
        super().__init__("timed out" if timed_out else "stopped")
        self.timed_out = timed_out


def run_worker(
    request: Mapping[str, object],
    folder: Path,
    log: Path,
    *,
    limit: float,
    tick: Callable[[float], None],
    stop: threading.Event,
) -> int:
    """Run one build worker in `folder` with its output in `log`; its exit status.

    limit: seconds that it may take. tick: called often, with the seconds since the start. stop:
    when set, the worker is ended. Raises WorkerStoppedError when it was ended; whatever this
    function raises, the worker and the compilers that it started are gone then.
    """
    path = folder / "request.json"
    text = json.dumps(
        {
            **request,
            "parent": os.getpid(),
            "sys_path": [entry or str(Path.cwd()) for entry in sys.path],
        }
    )
    path.write_text(text, encoding="utf-8")
    with log.open("wb") as output:
        process = _start(path, folder, output)
    started = time.monotonic()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=_POLL_SECONDS)
            seconds = time.monotonic() - started
            if seconds > limit or stop.is_set():
                raise WorkerStoppedError(timed_out=not stop.is_set())
            tick(seconds)
    finally:
        if process.returncode is None:
            _end_session(process)


def _start(request: Path, folder: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", str(_PROGRAM), str(request)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a worker and all that it started. ninja puts each compiler into a process group of its
    own, so they are found by their session, which is the worker's."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_TERM_SECONDS)
    deadline = time.monotonic() + _KILL_SECONDS
    # Again and again: one may start another meanwhile, and the end of each takes a moment.
    while (members := _session_members(process.pid)) and time.monotonic() < deadline:
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    process.kill()
    process.wait()


def _session_members(session: int) -> list[int]:
    """The processes of a session that still run; those that nobody collects do not."""
    members = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # After the command's name, in parentheses: state, parent, group, session.
            state, _, _, owner = status.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state not in ("Z", "X"):
                members.append(int(status.parent.name))
    return members
