"""A stand-in for the program that builds one kernel: `python -I fake_compiler.py REQUEST.json`.

It appends a line to the file named by FAKE_COUNTER, waits for FAKE_DELAY seconds and writes a
library that is none. FAKE_MODE: "killed" ends itself as the out-of-memory killer would; "orphan"
is deaf to signals and goes on writing for as long as it waits.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

REPEATS = 1000


def library_of(identity: str) -> bytes:
    """The bytes that stand for the library of a source."""
    return f"{identity}\n".encode() * REPEATS


def count(counter: Path) -> None:
    """Append a line, in one piece whoever else does so at the time."""
    descriptor = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.close(descriptor)


def main() -> None:
    """Do what a request asks for, or what the environment says instead."""
    request = json.loads(Path(sys.argv[1]).read_text())
    delay, mode = float(os.environ.get("FAKE_DELAY", "0")), os.environ.get("FAKE_MODE", "")
    library, data = Path(request["library"]), library_of(request["identity"])
    if mode == "orphan":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    count(Path(os.environ["FAKE_COUNTER"]))
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    half = library.with_name("half-written")
    end = time.monotonic() + delay
    while time.monotonic() < end:
        if mode == "orphan":
            library.parent.mkdir(parents=True, exist_ok=True)
            with half.open("ab") as file:
                file.write(data[:100])
        time.sleep(0.02)
    half.unlink(missing_ok=True)
    library.write_bytes(data)


if __name__ == "__main__":
    main()
