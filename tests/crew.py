"""Processes that want kernels of one cache at once, with a stand-in for the compiler.

Scenes are functions of modules of tests, run in a process of their own (`play`), which has no other
threads and may fork freely.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fake_compiler
from fake_compiler import library_of
from kernel_sources import kernel_source
from rwkv_jit.build import attempt, obtain, worker
from rwkv_jit.build import build as build_module
from rwkv_jit.cache import Cache, CacheEntry
from rwkv_jit.render import RenderedSource
from rwkv_jit.settings import Settings
from rwkv_jit.toolchain import Toolchain

# Of the fixture `note`.
Note = Callable[..., None]
TESTS = Path(__file__).parent
TOOLCHAIN = Toolchain(
    arch="x86_64_v2",
    host_compiler=Path("c++"),
    host_identity="a compiler",
    nvcc=None,
    nvcc_identity="",
    cuda_home=None,
    cuda_major=0,
    code_flags=("-O3",),
)


def play(
    module: str,
    scene: str,
    *arguments: object,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Any:
    """What the function `scene` of a module of the tests returns in a process of its own."""
    code = (
        "import importlib, json, sys\n"
        f"sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'reliability')!r}, {str(TESTS.parent)!r}]\n"
        "module, scene, arguments = sys.argv[1:]\n"
        "result = getattr(importlib.import_module(module), scene)(*json.loads(arguments))\n"
        "print('\\n' + json.dumps(result))"
    )
    texts = json.dumps([str(a) if isinstance(a, Path) else a for a in arguments])
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, module, scene, texts],
        env={**os.environ, "RWKV_JIT_LOG_LEVEL": "quiet", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def settings_of(cache: Path | str | None) -> Settings:
    return Settings(cache_dir=Path(cache) if cache else None, log_level="quiet")


def source_of(number: int = 0) -> RenderedSource:
    """One of several sources."""
    return kernel_source(f"wkv7_n{8 * number + 8}_fp32_l16_x86_64_v2")


def hire_program(counter: Path | str, delay: float = 0.0, mode: str = "") -> None:
    """From now on this process builds with the stand-in, as a program of its own."""
    build_module.find_toolchain = lambda _arch, _settings: TOOLCHAIN
    worker._PROGRAM = Path(fake_compiler.__file__)
    os.environ.update(FAKE_COUNTER=str(counter), FAKE_DELAY=str(delay), FAKE_MODE=mode)


def hire_function(counter: Path | str) -> None:
    """From now on this process builds with the stand-in, as a function."""

    def run_worker(request: Mapping[str, Any], _folder: Path, log: Path, **_: object) -> int:
        fake_compiler.count(Path(counter))
        log.write_text("[1/1] c++ -c source.cpp\n")
        Path(request["library"]).write_bytes(library_of(request["identity"]))
        return 0

    build_module.find_toolchain = lambda _arch, _settings: TOOLCHAIN
    attempt.run_worker = run_worker


def compiles(counter: Path | str) -> int:
    """How many times the stand-in ran."""
    path = Path(counter)
    return len(path.read_text().splitlines()) if path.exists() else 0


def want(
    cache: Path | str | None, number: int = 0, *, check: bool = True, **changes: Any
) -> dict[str, Any]:
    """Obtain a source's entry and check it; when it was made, the seconds it took, and the warnings
    on the way."""
    settings = dataclasses.replace(settings_of(cache), **changes)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entry = obtain(source_of(number), settings)
    seconds = time.monotonic() - began
    if check:
        check_whole(entry)
    return {
        "created": entry.manifest.created,
        "path": str(entry.path),
        "seconds": seconds,
        "warnings": [str(warning.message) for warning in caught],
    }


def check_whole(entry: CacheEntry) -> None:
    assert entry.library.read_bytes() == library_of(entry.manifest.identity)
    assert entry.source.is_file()
    assert entry.log.is_file()


def check_clean(cache: Path | str, entries: int = 1) -> None:
    """The cache holds so many entries, all whole, and nothing else."""
    store = Cache(Path(cache))
    found = [store.lookup(entry.manifest.digest) for entry in store.entries()]
    assert len(found) == entries == len(list(Path(cache).glob("v1/entries/*/*")))
    for entry in found:
        assert entry is not None
        check_whole(entry)
    store.new_staging().rmdir()
    for name in ("staging", "quarantine", "failed"):
        assert list(Path(cache).glob(f"v1/{name}/*")) == [], name


def fork(act: Callable[[], Any]) -> tuple[int, int]:
    """Run a function in a forked process; its id, and where its result can be read."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    code = 1
    try:
        os.close(reading)
        text = json.dumps({"result": act()})
        code = 0
    except BaseException:  # noqa: BLE001
        text = json.dumps({"error": traceback.format_exc()})
    with os.fdopen(writing, "w") as pipe:
        pipe.write(text)
    os._exit(code)


def collect(child: tuple[int, int]) -> Any:
    """The result of a forked process; None if it was killed. Its error is raised here."""
    pid, reading = child
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if not text:
        return None
    data = json.loads(text)
    if "error" in data:
        raise RuntimeError(data["error"])
    return data["result"]


def together(acts: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of functions that forked processes run, beginning at the same moment."""
    start = time.time() + 0.3

    def begin(act: Callable[[], Any]) -> Any:
        time.sleep(max(0.0, start - time.time()))
        return act()

    children = [fork(lambda act=act: begin(act)) for act in acts]
    return [collect(child) for child in children]


def in_threads(act: Callable[[], Any], number: int) -> list[Any]:
    """The results of a function that several threads run at once."""
    barrier = threading.Barrier(number)
    results: list[Any] = []

    def run() -> None:
        barrier.wait()
        results.append(act())

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == number
    return results
