"""Deaths at every step: the next process succeeds soon and never sees a part of an entry."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crew
from crew import Note
from faults import strike_file_steps
from kernel_sources import kernel_source
from rwkv_jit.build import obtain
from rwkv_jit.cache import Cache, cache_key, locks
from rwkv_jit.cache.locks import lock_folder
from rwkv_jit.errors import KernelBuildError
from rwkv_jit.settings import Settings
from stuck_compiler import StuckCompiler

THIS = Path(__file__).stem
DELAY = 1.0
# What the next process may take beyond the time of the compiler.
EXTRA = 2.0
needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs an x86-64 compiler"
)


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def die_at_each_step(folder: str) -> dict[str, Any]:
    """Kill a process before each of its file operations, and let the next one want the same."""
    crew.hire_function(Path(folder, "counter"))
    names: list[str] = []

    def act(cache: Path, dying: int) -> list[str]:
        seen: list[str] = []

        def strike(step: int, name: str) -> None:
            seen.append(name)
            if step == dying:
                os.kill(os.getpid(), signal.SIGKILL)

        strike_file_steps([cache, Path(os.environ["TMPDIR"])], strike)
        crew.want(cache, check=False)
        return seen

    slowest, step = 0.0, 0
    while step <= len(names):
        cache = Path(folder, f"cache{step}")
        result = crew.collect(crew.fork(lambda cache=cache, step=step: act(cache, step)))
        if step == 0:
            names = result
        else:
            assert result is None, step
            for entry in Cache(cache).entries():
                assert Cache(cache).verify(dry_run=True) == []
                crew.check_whole(entry)
            after = crew.collect(crew.fork(lambda cache=cache: crew.want(cache)))
            assert after["warnings"] == [], (step, names[step - 1], after)
            slowest = max(slowest, after["seconds"])
        crew.check_clean(cache)
        step += 1
    return {"names": names, "slowest": slowest}


def test_death_before_any_file_operation_of_a_build_is_survived(tmp_path: Path, note: Note) -> None:
    done = crew.play(THIS, "die_at_each_step", tmp_path)
    said = "\n".join(done["names"])
    # Lock held, staging made, linked, manifest begun, before and after the rename.
    for name in ("fcntl.flock", "staging", "kernel.so", "manifest.json", "os.rename", "os.fsync"):
        assert name in said
    assert done["slowest"] < EXTRA
    note("SIGKILL before each file operation of a build", len(done["names"]), [done["slowest"]])


def die_in_the_manifest(cache: str, counter: str) -> dict[str, Any]:
    crew.hire_function(counter)

    def act() -> None:
        def strike(_step: int, name: str) -> None:
            if name.startswith("open ") and name.endswith("manifest.json"):
                Path(name.removeprefix("open ")).write_text('{"schema": 1, "dig')
                os.kill(os.getpid(), signal.SIGKILL)

        strike_file_steps([Path(cache)], strike)
        crew.want(cache)

    assert crew.collect(crew.fork(act)) is None
    assert len(list(Path(cache).glob("v1/staging/*/manifest.json"))) == 1
    assert Cache(Path(cache)).entries() == []
    return crew.want(cache)


def test_half_written_manifest_is_never_seen(tmp_path: Path, note: Note) -> None:
    after = crew.play(THIS, "die_in_the_manifest", tmp_path / "cache", tmp_path / "counter")
    assert after["warnings"] == []
    assert after["seconds"] < EXTRA
    crew.check_clean(tmp_path / "cache")
    note("SIGKILL with the manifest half written", 1, [after["seconds"]])


def die_compiling(cache: str, counter: str, number: int, mode: str) -> dict[str, Any]:
    crew.hire_program(counter, DELAY if mode != "orphan" else 4 * DELAY, mode)
    child = crew.fork(lambda: crew.want(cache))
    wait_for(lambda: crew.compiles(counter))
    (compiler,) = map(int, Path(counter).read_text().split())
    os.kill(child[0], number)
    said = ""
    try:
        assert crew.collect(child) is None
    except RuntimeError as error:
        said = str(error)
    crew.hire_program(counter, DELAY)
    after = crew.want(cache)
    orphan = Path(f"/proc/{compiler}").exists()
    # What an orphan goes on writing is swept when it is dead, too.
    wait_for(lambda: not Path(f"/proc/{compiler}").exists())
    return {**after, "orphan": orphan, "said": said}


@pytest.mark.parametrize("mode", ["", "orphan"], ids=["compiler ends", "compiler goes on"])
def test_next_process_does_not_wait_for_a_killed_one_that_compiled(
    mode: str, tmp_path: Path, note: Note
) -> None:
    counter = tmp_path / "counter"
    after = crew.play(THIS, "die_compiling", tmp_path / "cache", counter, int(signal.SIGKILL), mode)
    assert after["orphan"] or not mode
    assert after["seconds"] < DELAY + EXTRA
    assert after["warnings"] == []
    assert crew.compiles(counter) == 2
    crew.check_clean(tmp_path / "cache")
    what = ", its compiler goes on writing" if mode else ""
    note(f"SIGKILL while compiling{what}", 1, [after["seconds"] - DELAY])


def test_interrupt_ends_the_compiler_and_leaves_nothing(tmp_path: Path, note: Note) -> None:
    counter = tmp_path / "counter"
    after = crew.play(THIS, "die_compiling", tmp_path / "cache", counter, int(signal.SIGINT), "")
    assert "KeyboardInterrupt" in after["said"]
    assert not after["orphan"]
    assert after["seconds"] < DELAY + EXTRA
    crew.check_clean(tmp_path / "cache")
    note("SIGINT while compiling", 1, [after["seconds"] - DELAY])


def out_of_memory(cache: str, counter: str) -> dict[str, Any]:
    crew.hire_program(counter, 0.0, "killed")
    try:
        crew.want(cache)
    except KernelBuildError as error:
        said = str(error)
    crew.hire_program(counter)
    return {**crew.want(cache), "said": said}


def test_killed_build_worker_is_an_error_with_a_hint_and_then_builds(
    tmp_path: Path, note: Note
) -> None:
    after = crew.play(THIS, "out_of_memory", tmp_path / "cache", tmp_path / "counter")
    assert "killed by signal 9" in after["said"]
    assert "lower MAX_JOBS" in after["said"]
    assert after["seconds"] < EXTRA
    note("the build worker killed as by the out-of-memory killer", 1, [after["seconds"]])


@needs_compiler
def test_killed_compiler_is_an_error_with_a_hint_and_then_builds(
    tmp_path: Path, note: Note
) -> None:
    compiler = tmp_path / "dying-g++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *" -c "*) kill -9 $$;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    dying = Settings(cache_dir=tmp_path / "cache", log_level="quiet", cxx=str(compiler))
    with pytest.raises(KernelBuildError, match="lower MAX_JOBS"):
        obtain(kernel_source(), dying)
    compiler.write_text('#!/bin/sh\nexec g++ "$@"\n')
    began = time.monotonic()
    entry = obtain(kernel_source(), dying)
    seconds = time.monotonic() - began
    assert seconds < entry.manifest.build_seconds + EXTRA
    note(
        "the C++ compiler killed as by the out-of-memory killer (real build)",
        1,
        [seconds - entry.manifest.build_seconds],
    )


def fork_with_the_lock(cache: str, counter: str) -> dict[str, Any]:
    """Kill a process that holds the lock and has a forked child, which holds it as well."""
    crew.hire_function(counter)
    digest = cache_key(crew.source_of(), crew.TOOLCHAIN).digest
    ready = Path(counter).with_name("child")

    def act() -> None:
        # As Cache.lock does it, but that filelock may close the lock's file in forked children,
        # which only some versions do.
        folder = lock_folder(Path(cache))
        descriptor = os.open(folder / f"{digest}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        locks._write_holder(folder / f"{digest}.json")
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        ready.with_suffix(".new").write_text(str(child))
        ready.with_suffix(".new").rename(ready)
        time.sleep(60)

    holder, _ = crew.fork(act)
    wait_for(ready.exists)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        return crew.want(cache)
    finally:
        os.kill(int(ready.read_text()), signal.SIGKILL)


def test_lock_in_a_forked_child_of_a_dead_process_is_not_waited_for(
    tmp_path: Path, note: Note
) -> None:
    after = crew.play(THIS, "fork_with_the_lock", tmp_path / "cache", tmp_path / "counter")
    assert after["seconds"] < EXTRA
    crew.check_clean(tmp_path / "cache")
    note("a forked child has the lock of a killed process", 1, [after["seconds"]])


def fork_while_threads_build(cache: str, counter: str) -> dict[str, Any]:
    """Fork while another thread of this process builds; the child wants the same."""
    crew.hire_program(counter, DELAY)
    import threading

    thread = threading.Thread(target=lambda: crew.want(cache))
    thread.start()
    wait_for(lambda: crew.compiles(counter))
    child = crew.fork(lambda: crew.want(cache))
    thread.join()
    return crew.collect(child)


def test_forked_child_of_a_building_process_waits_and_finds(tmp_path: Path, note: Note) -> None:
    counter = tmp_path / "counter"
    after = crew.play(THIS, "fork_while_threads_build", tmp_path / "cache", counter)
    assert after["seconds"] < DELAY + EXTRA
    assert crew.compiles(counter) == 1
    note("a process forks while one of its threads builds", 1, [after["seconds"]])


@needs_compiler
def test_compilers_end_with_the_process_that_wanted_them(tmp_path: Path, note: Note) -> None:
    compiler = StuckCompiler(tmp_path)
    code = (
        "import sys; from pathlib import Path; from rwkv_jit.build import obtain\n"
        "from kernel_sources import kernel_source; from rwkv_jit.settings import Settings\n"
        "obtain(kernel_source(), Settings(cache_dir=Path(sys.argv[1]), cxx=sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, crew_paths()))}
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), str(compiler.program)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_for(compiler.is_compiling)
        process.kill()
    began = time.monotonic()
    wait_for(compiler.is_gone, 10)
    note("orphaned compilers end (real build)", 1, [time.monotonic() - began])


def crew_paths() -> list[Path]:
    return [crew.TESTS, crew.TESTS.parent]


def stopped_holder(cache: str, counter: str) -> dict[str, Any]:
    """A holder of the lock that does nothing any more and is not dead."""
    crew.hire_function(counter)
    digest = cache_key(crew.source_of(), crew.TOOLCHAIN).digest

    def act() -> None:
        with Cache(Path(cache)).lock(digest, 5, lambda *_: None):
            os.kill(os.getpid(), signal.SIGSTOP)

    holder, _ = crew.fork(act)
    folder = lock_folder(Path(cache))
    wait_for((folder / f"{digest}.json").exists)
    try:
        return crew.want(cache, lock_timeout=1.5)
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def test_wait_for_a_hung_process_ends_in_an_own_build(tmp_path: Path, note: Note) -> None:
    after = crew.play(THIS, "stopped_holder", tmp_path / "cache", tmp_path / "counter")
    assert 1.4 < after["seconds"] < 1.5 + EXTRA
    crew.check_clean(tmp_path / "cache")
    note("the holder of the lock hangs (waiting is limited)", 1, [after["seconds"] - 1.5])
