"""The cache on disk: what is found, what is refused, and what survives others' doings."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from locking import lock_held_elsewhere
from rwkv_jit.cache import (
    MANIFEST_SCHEMA,
    Cache,
    CacheEntry,
    Manifest,
    folders,
    hash_file,
    locks,
    trust,
)
from rwkv_jit.cache.keys import digest_fields
from rwkv_jit.errors import CacheError
from rwkv_jit.settings import Settings

FIELDS = {"operator": "wkv7"}
DIGEST = digest_fields(FIELDS)
OTHER_FIELDS = {"operator": "wkv6"}
OTHER = digest_fields(OTHER_FIELDS)
THIRD_FIELDS = {"operator": "wkv5"}
THIRD = digest_fields(THIRD_FIELDS)
FIELDS_OF = {DIGEST: FIELDS, OTHER: OTHER_FIELDS, THIRD: THIRD_FIELDS}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def fill(
    staging: Path, digest: str = DIGEST, *, meaning: str = "m", text: str = "library", age: int = 0
) -> Path:
    """Make a staging folder complete, with a file that stands for a library."""
    library = staging / "kernel.so"
    library.write_text(text)
    (staging / "source.cpp").write_text("// source")
    (staging / "build.log").write_text("log")
    manifest = Manifest(
        schema=MANIFEST_SCHEMA,
        digest=digest,
        meaning=meaning,
        identity="wkv7.forward",
        fields=FIELDS_OF[digest],
        size=library.stat().st_size,
        sha256=hash_file(library),
        build_seconds=1.5,
        created=f"20{99 - age}-01-01T00:00:00+00:00",
        command="c++",
        resources={"k": {"registers": 1}},
    )
    (staging / "manifest.json").write_text(manifest.to_json())
    return staging


def publish(cache: Cache, digest: str = DIGEST, *, meaning: str = "m", age: int = 0) -> CacheEntry:
    return cache.publish(fill(cache.new_staging(), digest, meaning=meaning, age=age), digest)


def quarantined(cache: Cache) -> list[Path]:
    return list((cache.root / "v1" / "quarantine").iterdir())


def ignore(_seconds: float, _holder: str) -> None:
    pass


def test_looking_up_creates_no_folder(cache: Cache) -> None:
    assert cache.lookup(DIGEST) is None
    assert cache.find_meaning("m") is None
    assert cache.entries() == []
    assert cache.clear(dry_run=False) == []
    assert cache.total_bytes() == 0
    assert not cache.root.exists()


def test_published_entry_is_found_with_its_manifest(cache: Cache) -> None:
    published = publish(cache)
    found = cache.lookup(DIGEST)
    assert found == published
    assert found.path == cache.root / "v1" / "entries" / DIGEST[:2] / DIGEST
    assert found.library.read_text() == "library"
    assert found.log.read_text() == "log"
    assert found.source.name == "source.cpp"
    assert found.manifest.resources == {"k": {"registers": 1}}
    assert cache.lookup(OTHER) is None


def test_folders_and_files_are_private(cache: Cache) -> None:
    entry = publish(cache)
    for path in (cache.root, *cache.root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    assert entry.library.stat().st_mode & 0o777 == 0o600


def test_publishing_leaves_no_staging_folder(cache: Cache) -> None:
    publish(cache)
    assert list((cache.root / "v1" / "staging").iterdir()) == []


def test_losing_the_race_returns_the_winner(cache: Cache) -> None:
    late = fill(cache.new_staging(), text="the later one")
    publish(cache)
    assert cache.publish(late, DIGEST).library.read_text() == "library"
    assert not late.exists()


def test_replacing_puts_the_later_one_in_place(cache: Cache) -> None:
    publish(cache)
    late = fill(cache.new_staging(), text="the later one")
    assert cache.publish(late, DIGEST, replace=True).library.read_text() == "the later one"
    assert list((cache.root / "v1" / "staging").iterdir()) == []


def test_a_bad_entry_gives_way_to_a_published_one(cache: Cache) -> None:
    publish(cache).library.write_text("tampered")
    late = fill(cache.new_staging(), text="the later one")
    with pytest.warns(RuntimeWarning, match="is not usable"):
        assert cache.publish(late, DIGEST).library.read_text() == "the later one"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("kernel.so", "LIBRARY", "SHA-256 differs"),
        ("kernel.so", "cut", "3 bytes instead of 7"),
        ("manifest.json", "{", "is not JSON"),
        ("manifest.json", "[]", "no known schema"),
        ("manifest.json", '{"schema": 999}', "no known schema"),
        ("manifest.json", f'{{"schema": {MANIFEST_SCHEMA}}}', "no valid 'digest'"),
    ],
)
def test_bad_entry_goes_to_quarantine_with_one_warning(
    cache: Cache, file: str, text: str, reason: str
) -> None:
    entry = publish(cache)
    (entry.path / file).write_text(text)
    with pytest.warns(RuntimeWarning, match="is not usable") as caught:
        assert cache.lookup(DIGEST) is None
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert not entry.path.exists()
    assert reason in (quarantined(cache)[0] / "reason.txt").read_text()
    assert cache.lookup(DIGEST) is None


@pytest.mark.parametrize("file", ["kernel.so", "manifest.json"])
def test_missing_file_and_link_go_to_quarantine(cache: Cache, file: str, tmp_path: Path) -> None:
    for link in (False, True):
        path = publish(cache).path / file
        kept = path.rename(tmp_path / file)
        if link:
            path.symlink_to(kept)
        with pytest.warns(RuntimeWarning, match="not a regular file" if link else "is missing"):
            assert cache.lookup(DIGEST) is None


def test_entry_that_is_a_link_goes_to_quarantine(cache: Cache, tmp_path: Path) -> None:
    path = publish(cache).path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(RuntimeWarning, match="not a folder"):
        assert cache.lookup(DIGEST) is None
    assert (tmp_path / "elsewhere" / "kernel.so").exists()


def test_entry_under_another_digest_is_refused(cache: Cache) -> None:
    path = publish(cache).path
    target = cache.root / "v1" / "entries" / OTHER[:2] / OTHER
    target.parent.mkdir(mode=0o700)
    path.rename(target)
    with pytest.warns(RuntimeWarning, match=f"that of {DIGEST[:16]}"):
        assert cache.lookup(OTHER) is None


def test_folder_that_others_can_write_is_refused(cache: Cache) -> None:
    entry = publish(cache)
    for folder in (entry.path, entry.path.parent, cache.root):
        folder.chmod(0o777)
        with pytest.raises(CacheError, match=r"can be written by others.*chmod go-w"):
            cache.lookup(DIGEST)
        folder.chmod(0o700)
    assert cache.lookup(DIGEST) == entry


def test_folder_of_another_user_is_refused(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(cache)
    me = os.geteuid()
    monkeypatch.setattr(trust.os, "geteuid", lambda: me + 1)
    if me == 0:
        for path in (cache.root, *cache.root.rglob("*")):
            os.chown(path, 12345, -1)
    with pytest.raises(CacheError, match="belongs to user"):
        cache.lookup(DIGEST)


def test_digest_that_is_none_is_refused(cache: Cache) -> None:
    with pytest.raises(CacheError, match="not the digest"):
        cache.lookup("../../etc")


def test_meaning_finds_the_newest_entry_that_is_whole(cache: Cache) -> None:
    publish(cache, DIGEST, age=1)
    newest = publish(cache, OTHER)
    publish(cache, THIRD, meaning="another")
    assert cache.find_meaning("m") == newest
    newest.library.write_text("broken")
    with pytest.warns(RuntimeWarning, match="is not usable"):
        found = cache.find_meaning("m")
    assert found is not None
    assert found.manifest.digest == DIGEST


def test_entries_and_clear_tell_what_there_is(cache: Cache) -> None:
    entry = publish(cache)
    log = cache.keep_log(entry.path, OTHER)
    assert log.read_text() == "log"
    assert [found.path for found in cache.entries()] == [entry.path]
    size = sum(file.stat().st_size for file in entry.path.iterdir())
    assert cache.total_bytes() >= size
    assert dict(cache.clear(dry_run=True)) == {log: 3}
    cache.release()
    listed = cache.clear(dry_run=True)
    assert dict(listed) == {entry.path: size, log: 3}
    assert cache.clear(dry_run=False) == listed
    assert cache.lookup(DIGEST) is None
    assert cache.clear(dry_run=True) == []


def test_same_root_gives_the_same_cache(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "cache")
    assert Cache.open(settings) is Cache.open(settings)
    assert Cache.open(settings).root == tmp_path / "cache"
    assert not (tmp_path / "cache").exists()


def test_unwritable_root_falls_back_to_a_private_folder_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match=r"cannot be written.*RWKV_JIT_CACHE_DIR") as caught:
        entry = publish(cache)
    publish(cache, OTHER)
    assert len(caught) == 1
    assert cache.lookup(DIGEST) == entry
    fallback = entry.path.parents[3]
    assert fallback.stat().st_mode & 0o777 == 0o700
    assert tmp_path not in fallback.parents


def test_fallback_folder_is_removed_when_the_process_ends(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from pathlib import Path; from rwkv_jit.cache import Cache\n"
        "print(Cache(Path(sys.argv[1])).new_staging())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file" / "cache")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not Path(run.stdout.strip()).parents[2].exists()


def test_staging_of_dead_processes_is_swept(cache: Cache) -> None:
    mine = cache.new_staging()
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        check=True,
        capture_output=True,
        text=True,
    )
    scope = folders.process_scope()
    dead = mine.with_name(f"{scope}.{done.stdout.strip()}.x")
    elsewhere = mine.with_name(f"0123456789ab.{done.stdout.strip()}.x")
    old = mine.with_name("0123456789ab.1.x")
    for folder in (dead, elsewhere, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    second = cache.new_staging()
    assert set(mine.parent.iterdir()) == {mine, second, elsewhere}


def test_waiting_for_a_lock_names_its_holder_and_ends_at_the_deadline(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_FIRST_ANNOUNCEMENT_SECONDS", 0.2)
    heard: list[str] = []
    with lock_held_elsewhere(cache.root, DIGEST) as holder:
        with cache.lock(DIGEST, 0.7, lambda _, who: heard.append(who)) as held:
            assert not held
        with cache.lock(OTHER, 5, ignore) as held:
            assert held
    assert 1 <= len(heard) <= 4
    assert re.fullmatch(rf"process {holder} on {socket.gethostname()}, at it for \d+ s", heard[0])


def test_waiting_for_a_lock_ends_when_it_is_stopped(cache: Cache) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.3, stop.set)
    with lock_held_elsewhere(cache.root, DIGEST):
        started = time.monotonic()
        timer.start()
        with cache.lock(DIGEST, 60, ignore, stop) as held:
            assert not held
    assert 0.2 < time.monotonic() - started < 5


def test_lock_of_a_killed_process_is_free_at_once(cache: Cache) -> None:
    with lock_held_elsewhere(cache.root, DIGEST):
        pass
    started = time.monotonic()
    with cache.lock(DIGEST, 30, ignore) as held:
        assert held
    assert time.monotonic() - started < 5


def test_lock_without_flock_is_not_held_and_does_not_wait(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "has_flock", lambda _: False)
    with cache.lock(DIGEST, 30, ignore) as held:
        assert not held


def test_lock_excludes_threads(cache: Cache) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with cache.lock(DIGEST, 30, ignore) as held:
            inside.append(1)
            most.append(len(inside) if held else 99)
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


def test_holder_file_is_gone_after_the_lock(cache: Cache) -> None:
    holder = locks.lock_folder(cache.root) / f"{DIGEST}.json"
    with cache.lock(DIGEST, 5, ignore):
        assert json.loads(holder.read_text())["pid"] == os.getpid()
    assert not holder.exists()


def test_entry_that_is_replaced_while_read_is_no_bad_entry(cache: Cache) -> None:
    publish(cache)
    ended = threading.Event()

    def replace() -> None:
        while not ended.is_set():
            cache.publish(fill(cache.new_staging()), DIGEST, replace=True)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(100):
                cache.lookup(DIGEST)
    finally:
        ended.set()
        thread.join()
    assert cache.lookup(DIGEST) is not None
