"""A cache that stays small, and never at the cost of what is in use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import crew
from crew import Note
from rwkv_jit.cache import Cache, folder_bytes

THIS = Path(__file__).stem


def build_many(cache: str, counter: str, number: int, limit: int) -> list[str]:
    """Build so many kernels, each in a process of its own and used later than the one before."""
    crew.hire_function(counter)
    paths = []
    for index in range(number):
        want = crew.collect(
            crew.fork(lambda index=index: crew.want(cache, index, cache_max_bytes=limit))
        )
        paths.append(want["path"])
    return paths


def test_least_recently_used_go_first_and_the_limit_holds(tmp_path: Path, note: Note) -> None:
    cache, counter = tmp_path / "cache", tmp_path / "counter"
    paths = [Path(path) for path in crew.play(THIS, "build_many", cache, counter, 6, 0)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    store = Cache(cache)
    # Used again, the oldest is the newest.
    assert store.lookup(paths[0].name) is not None
    store.release()
    limit = sum(folder_bytes(path) for path in (paths[0], paths[4], paths[5])) + 100
    planned = store.trim(limit, dry_run=True)
    assert [path for path, _ in planned] == paths[1:4]
    assert all(path.exists() for path in paths)
    assert store.trim(limit) == planned
    assert [path.exists() for path in paths] == [True, False, False, False, True, True]
    assert store.total_bytes() <= limit
    note("more kernels than the limit allows: trimmed by last use", 3)


def test_every_build_keeps_the_cache_below_its_limit(tmp_path: Path, note: Note) -> None:
    cache, counter = tmp_path / "cache", tmp_path / "counter"
    (first,) = crew.play(THIS, "build_many", cache, counter, 1, 0)
    limit = 3 * folder_bytes(Path(first)) + 1000
    paths = crew.play(THIS, "build_many", cache, counter, 12, limit)
    assert Cache(cache).total_bytes() <= limit
    assert Path(paths[-1]).exists()
    assert 2 <= len(list(cache.glob("v1/entries/*/*"))) <= 3
    note("builds beyond the limit", 12)


HOLDER = """
import sys
from pathlib import Path
from rwkv_jit.cache import Cache
cache = Cache(Path(sys.argv[1]))
assert cache.lookup(sys.argv[2]) is not None
print("in use", flush=True)
sys.stdin.read()
"""


def test_entries_in_use_survive_trimming_and_clearing(tmp_path: Path, note: Note) -> None:
    cache, counter = tmp_path / "cache", tmp_path / "counter"
    used, idle = (Path(path) for path in crew.play(THIS, "build_many", cache, counter, 2, 0))
    os.utime(used, (1000, 1000))
    store = Cache(cache)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(cache), used.name],
        cwd=crew.TESTS.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in use\n"
        assert store.used() == [used]
        assert [path for path, _ in store.trim(0)] == [idle]
        assert store.clear(dry_run=True) == []
        assert store.clear(dry_run=False) == []
        assert used.exists()
        holder.kill()
    assert [path for path, _ in store.clear(dry_run=False)] == [used]
    note("trimmed and cleared while a kernel is in use (kept)", 2)


def trim_while_used(cache: str, counter: str, seconds: float) -> list[Any]:
    """Look kernels up, build them and trim them away, all at once."""
    crew.hire_function(counter)
    end = time.monotonic() + seconds

    def use(number: int) -> int:
        done = 0
        while time.monotonic() < end:
            result = crew.collect(crew.fork(lambda key=(number + done) % 4: crew.want(cache, key)))
            assert result["warnings"] == []
            done += 1
        return done

    def trim() -> int:
        done = 0
        while time.monotonic() < end:
            done += len(Cache(Path(cache)).trim(0))
        return done

    return crew.together([lambda: use(0), lambda: use(1), lambda: use(2), trim])


def test_kernels_are_whole_while_others_trim(tmp_path: Path, note: Note) -> None:
    *uses, trimmed = crew.play(THIS, "trim_while_used", tmp_path / "cache", tmp_path / "counter", 4)
    assert min(uses) > 3
    assert trimmed > 3
    note("entries trimmed while others look them up", trimmed)


def test_quarantine_and_old_logs_go_before_kernels(tmp_path: Path) -> None:
    cache, counter = tmp_path / "cache", tmp_path / "counter"
    (path,) = crew.play(THIS, "build_many", cache, counter, 1, 0)
    quarantined = cache / "v1" / "quarantine" / "x"
    quarantined.mkdir()
    (quarantined / "kernel.so").write_bytes(b"x" * 1000)
    log = cache / "v1" / "failed" / "y.log"
    log.write_text("y" * 1000)
    store = Cache(cache)
    assert store.trim(store.total_bytes()) == []
    assert [gone for gone, _ in store.trim(store.total_bytes() - 1)] == [quarantined]
    assert [gone for gone, _ in store.trim(store.total_bytes() - 1)] == [log]
    assert Path(path).exists()


def test_stale_staging_goes_even_below_the_limit(tmp_path: Path, note: Note) -> None:
    store = Cache(tmp_path / "cache")
    mine = store.new_staging()
    stale = mine.with_name("0123456789ab.1.old")
    stale.mkdir()
    os.utime(stale, (1000, 1000))
    assert store.trim(1 << 40, dry_run=True) == [(stale, 0)]
    assert store.trim(1 << 40) == [(stale, 0)]
    assert mine.exists()
    note("staging folder of a process that died a day ago", 1)
