"""Folders that another user owns or may write, that cannot be written, or that are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import crew
from another_user import (
    NOBODY,
    ask,
    built_in_private,
    mounting,
    needs_mount,
    needs_root,
    want_as,
)
from crew import Note

THIS = Path(__file__).stem


@needs_root
@pytest.mark.parametrize("mode", [0o500, 0o555, 0o755])
def test_folder_that_cannot_be_written_gives_a_private_copy(
    mode: int, place: Path, note: Note
) -> None:
    (place / "cache").mkdir(mode=mode)
    (place / "cache").chmod(mode)
    result = ask(place, place / "cache")
    assert built_in_private(result, place)
    assert list((place / "cache").iterdir()) == []
    note(f"cache folder of root, mode {mode:04o}, as another user", 1, [result["seconds"]])


@needs_root
def test_folder_that_cannot_be_entered_gives_a_private_copy(place: Path, note: Note) -> None:
    (place / "closed").mkdir(mode=0o700)
    result = ask(place, place / "closed" / "cache")
    assert built_in_private(result, place)
    note("cache below a folder closed to this user", 1, [result["seconds"]])


@needs_root
def test_cache_of_root_that_others_may_read_is_used(place: Path, note: Note) -> None:
    assert not ask(place, place / "cache", user=0)["refused"]
    for path in (place / "cache", *(place / "cache").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    result = ask(place, place / "cache")
    assert result["warnings"] == []
    assert result["path"].startswith(str(place / "cache"))
    assert crew.compiles(place / "tmp" / "counter") == 1
    note("cache of root that others may read (used)", 1, [result["seconds"]])


@needs_root
def test_unreadable_cache_is_named_in_prebuilt_mode(place: Path) -> None:
    assert not ask(place, place / "cache", user=0)["refused"]
    with pytest.raises(AssertionError, match=r"KernelMissingError.*cannot be read"):
        ask(place, place / "cache", mode="prebuilt")


@needs_root
def test_cache_of_another_user_is_refused_unless_sharing_is_allowed(
    place: Path, note: Note
) -> None:
    (place / "cache").mkdir(mode=0o700)
    os.chown(place / "cache", 12345, 12345)
    (place / "cache").chmod(0o777)
    refused = ask(place, place / "cache")["refused"]
    assert "belongs to user 12345" in refused
    assert "RWKV_JIT_ALLOW_SHARED_CACHE" in refused
    result = ask(place, place / "cache", allow_shared_cache=True)
    assert not result["warnings"]
    assert result["path"].startswith(str(place / "cache"))
    note("cache folder of a foreign owner (refused)", 1)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("which", ["parent", "cache", "cache/v1", "cache/v1/entries"])
def test_folder_that_others_can_write_is_refused_unless_sharing_is_allowed(
    which: str, mode: int, tmp_path: Path, note: Note
) -> None:
    place = tmp_path
    (place / "tmp").mkdir()
    cache = place / "parent" / "cache"
    me = os.geteuid()
    assert not ask(place, cache, user=me)["refused"]
    folder = place / "parent" / ("" if which == "parent" else which)
    folder.chmod(mode)
    refused = ask(place, cache, user=me)["refused"]
    assert "can be written by others" in refused
    assert "RWKV_JIT_ALLOW_SHARED_CACHE" in refused
    assert f"chmod go-w {folder}" in refused
    assert not ask(place, cache, user=me, allow_shared_cache=True)["refused"]
    note(f"{which} writable by group or world (refused)", 1)


def test_sticky_parent_is_fine(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent").chmod(0o1777)
    result = ask(tmp_path, tmp_path / "parent" / "cache", user=os.geteuid())
    assert not result["refused"]
    assert not result["warnings"]


def want_at_home(user: int, cwd: str, counter: str) -> object:
    os.chdir(cwd)
    return want_as(user, None, counter, 2, {})


@needs_root
@pytest.mark.parametrize("home", [None, "", "/nonexistent"])
def test_unknown_user_without_a_home_gets_a_private_copy(
    home: str | None, place: Path, note: Note
) -> None:
    counter, cwd = place / "tmp" / "counter", place / "tmp" / "cwd"
    cwd.mkdir()
    cwd.chmod(0o777)
    unset = ["env", "-u", "HOME", "-u", "XDG_CACHE_HOME", *([f"HOME={home}"] if home else [])]
    result = crew.play(
        THIS,
        "want_at_home",
        54321,
        cwd,
        counter,
        prefix=[*unset, *([] if home is None else [f"HOME={home}"])],
        environment={"TMPDIR": str(place / "tmp")},
    )
    assert built_in_private(result, place)
    assert list(cwd.iterdir()) == []
    said = "no home" if home is None else f"HOME={home!r}"
    note(f"user id that no account has, {said}", 1, [result["seconds"]])


@needs_mount
def test_read_only_file_system_gives_a_private_copy(place: Path, note: Note) -> None:
    (place / "disk").mkdir()
    mount = mounting('mount -t tmpfs -o size=2m,ro none "$0"', place / "disk")
    result = ask(place, place / "disk" / "cache", user=0, prefix=mount)
    assert built_in_private(result, place)
    note("read-only file system", 1, [result["seconds"]])


@needs_root
def test_lock_folder_of_somebody_else_is_not_used(place: Path, note: Note) -> None:
    trap = place / "tmp" / f"rwkv_jit-{NOBODY}"
    trap.mkdir()
    trap.chmod(0o777)
    (place / "cache").mkdir()
    os.chown(place / "cache", NOBODY, NOBODY)
    result = ask(place, place / "cache")
    assert not result["refused"]
    assert not result["warnings"]
    assert list(trap.iterdir()) == []
    note("somebody else made this user's lock folder", 1, [result["seconds"]])


def test_lock_folder_is_private_and_not_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    ask(tmp_path, tmp_path / "cache", user=os.geteuid())
    home = tmp_path / "tmp" / f"rwkv_jit-{os.geteuid()}"
    assert home.stat().st_mode & 0o777 == 0o700
    (folder,) = home.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    assert list((tmp_path / "cache").rglob("*.lock")) == []
