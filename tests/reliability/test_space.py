"""Disks that are full: a private copy with one warning, or a clear refusal."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import crew
from another_user import ask, built_in_private, mounting, needs_mount
from crew import Note
from faults import strike_file_steps
from rwkv_jit.errors import CacheError

THIS = Path(__file__).stem


def fill(path: str) -> str:
    return f'(cat /dev/zero > "$0"/{path} || true) 2>/dev/null'


@needs_mount
def test_full_disk_gives_a_private_copy(place: Path, note: Note) -> None:
    (place / "disk").mkdir()
    mount = mounting(
        f'mount -t tmpfs -o size=2m,mode=0755 none "$0" && {fill("big")}', place / "disk"
    )
    result = ask(place, place / "disk" / "cache", user=0, prefix=mount)
    assert built_in_private(result, place)
    note("a full tmpfs of 2 MB", 1, [result["seconds"]])


@needs_mount
@pytest.mark.parametrize("kilobytes", [0, 4, 8, 16, 24, 32, 48, 64, 128])
def test_disk_that_fills_up_in_the_middle_gives_a_private_copy(
    kilobytes: int, place: Path, note: Note
) -> None:
    (place / "disk").mkdir()
    script = (
        'mount -t tmpfs -o size=2m,mode=0755 none "$0"; mkdir -m 700 "$0"/cache; '
        f'head -c {kilobytes}k /dev/zero > "$0"/kept; {fill("big")}; rm "$0"/kept'
    )
    result = ask(place, place / "disk" / "cache", user=0, prefix=mounting(script, place / "disk"))
    assert not result["refused"]
    # With enough room left it is built in the cache itself.
    if result["warnings"]:
        assert len(result["warnings"]) == 1
        assert "No space left" in result["warnings"][0]
    else:
        assert result["path"].startswith(str(place / "disk"))
    note("a tmpfs of 2 MB that fills up during the build", 1, [result["seconds"]])


def refuse_to_write(folder: str, number: int) -> dict[str, Any]:
    """Let the disk be full from each file operation of a build on."""
    crew.hire_function(Path(folder, "counter"))
    steps, step, slowest, copies = 0, 0, 0.0, 0
    changing = ("os.mkdir", "os.rename", "os.fsync")

    def act(cache: Path, first: int) -> dict[str, Any]:
        def strike(step: int, name: str) -> None:
            writes = name.startswith(changing) or (name.startswith("open") and "staging" in name)
            if first and step >= first and writes and str(cache) in name:
                raise OSError(number, os.strerror(number), name)

        count = strike_file_steps([cache], strike)
        return {**crew.want(cache, check=False), "steps": count()}

    while step <= steps:
        cache = Path(folder, f"cache{step}")
        result = crew.collect(crew.fork(lambda cache=cache, step=step: act(cache, step)))
        steps = result["steps"] if step == 0 else steps
        assert len(result["warnings"]) <= 1, (step, result["warnings"])
        copies += len(result["warnings"])
        slowest = max(slowest, result["seconds"])
        crew.collect(crew.fork(lambda cache=cache: crew.want(cache)))
        crew.check_clean(cache)
        step += 1
    return {"steps": steps, "slowest": slowest, "copies": copies}


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT"])
def test_disk_that_is_full_from_some_step_on_gives_a_private_copy(
    name: str, tmp_path: Path, note: Note
) -> None:
    done = crew.play(THIS, "refuse_to_write", tmp_path, getattr(errno, name))
    assert done["copies"] > 20
    note(f"{name} from each file step of a build on", done["steps"], [done["slowest"]])


def full_everywhere(cache: str, counter: str) -> str:
    crew.hire_function(counter)

    def act() -> str:
        def strike(_step: int, name: str) -> None:
            if name.startswith("os.mkdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

        strike_file_steps([Path(cache), Path(os.environ["TMPDIR"])], strike)
        try:
            crew.want(cache)
        except CacheError as error:
            return str(error)
        return ""

    return str(crew.collect(crew.fork(act)))


def test_no_space_in_the_temporary_folder_either_is_a_cache_error(
    tmp_path: Path, note: Note
) -> None:
    said = crew.play(THIS, "full_everywhere", tmp_path / "cache", tmp_path / "counter")
    assert "neither can a temporary folder be made" in said
    assert "No space left on device" in said
    assert "RWKV_JIT_CACHE_DIR" in said
    note("no space in the cache nor in TMPDIR (refused)", 1)
