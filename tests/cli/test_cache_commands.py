"""Looking at the cache, and emptying it."""

from __future__ import annotations

import dataclasses
import os
import pty
import subprocess
from pathlib import Path

import pytest

from cache_entries import add_entry
from running import environment, program, run, run_json
from rwkv_jit.cache import CacheEntry
from rwkv_jit.cache.keys import digest_fields

SLUG = "wkv7_n64_bf16_l16_sm90a"


def test_cache_path_is_that_of_the_settings(own_cache: Path) -> None:
    assert run("cache", "path").stdout == f"{own_cache}\n"
    assert run_json("cache", "path") == {"path": str(own_cache)}
    assert not own_cache.exists()


def test_cache_ls_lists_kernels_and_their_total(own_cache: Path) -> None:
    assert run("cache", "ls").stdout == f"0 kernels, 0 B in {own_cache}\n"
    for entry in ("forward", "backward"):
        add_entry(own_cache, f"{SLUG}.{entry}")
    lines = run("cache", "ls").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == [f"{SLUG}.backward", f"{SLUG}.forward"]
    assert lines[-1].startswith("2 kernels, ")
    data = run_json("cache", "ls")
    assert data["bytes"] == sum(entry["bytes"] for entry in data["entries"])


def test_cache_clear_removes_without_asking_where_nobody_can_answer(own_cache: Path) -> None:
    entry = add_entry(own_cache, f"{SLUG}.forward")
    planned = run_json("cache", "clear", "--dry-run")
    assert [item["path"] for item in planned["removed"]] == [str(entry.path)]
    assert entry.path.exists()
    assert str(entry.path) in run("cache", "clear", "--dry-run").stdout
    assert run("cache", "clear").stdout.startswith("removed 1 item, ")
    assert not entry.path.exists()
    assert run_json("cache", "clear") == {"dry_run": False, "removed": []}


def add_whole(cache: Path, name: str) -> CacheEntry:
    """An entry whose manifest is true."""
    fields = {"nvcc": "nvcc release 13.0", "flags": name}
    entry = add_entry(cache, f"{SLUG}.{name}", digest=digest_fields(fields))
    manifest = dataclasses.replace(entry.manifest, fields=fields)
    (entry.path / "manifest.json").write_text(manifest.to_json())
    return entry


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_cache_info_tells_numbers_and_changes_nothing(
    own_cache: Path, options: tuple[str, ...]
) -> None:
    data = run_json("cache", "info", *options)
    assert (data["path"], data["entries"], data["problem"]) == (str(own_cache), 0, "")
    assert not own_cache.exists()
    add_whole(own_cache, "forward")
    data = run_json("cache", "info", *options)
    assert (data["entries"], data["in_use"], data["quarantined"]) == (1, 0, 0)
    assert data["max_bytes"] == 2 << 30
    assert "1 kernel, 0 in use" in run("cache", "info", *options).stdout
    own_cache.chmod(0o777)
    assert "can be written by others" in run_json("cache", "info", *options)["problem"]


def test_cache_verify_finds_bad_kernels_and_puts_them_away(own_cache: Path) -> None:
    good, bad = add_whole(own_cache, "forward"), add_whole(own_cache, "backward")
    assert "2 kernels checked, 0 bad" in run("cache", "verify").stdout
    bad.library.write_bytes(b"NOT A LIBRARY")
    found = run_json("cache", "verify", "--dry-run", code=1)["bad"]
    assert [item["path"] for item in found] == [str(bad.path)]
    assert "SHA-256 differs" in found[0]["reason"]
    assert bad.path.exists()
    with pytest.warns(RuntimeWarning, match="is not usable"):
        run("cache", "verify", code=1)
    assert not bad.path.exists()
    assert good.path.exists()
    run("cache", "verify")


def test_cache_trim_removes_the_oldest_until_the_rest_fits(own_cache: Path) -> None:
    old, new = add_whole(own_cache, "backward"), add_whole(own_cache, "forward")
    os.utime(old.path, (1, 1))
    size = sum(file.stat().st_size for file in new.path.iterdir())
    planned = run_json("cache", "trim", "--max-bytes", str(size), "--dry-run")["removed"]
    assert [item["path"] for item in planned] == [str(old.path)]
    assert old.path.exists()
    assert run("cache", "trim").stdout.startswith("removed 0 items")
    assert run("cache", "trim", "--max-bytes", str(size)).stdout.startswith("removed 1 item, ")
    assert not old.path.exists()
    assert new.path.exists()
    run("cache", "trim", "--max-bytes", "much", code=2)


@pytest.mark.parametrize(
    ("options", "answer", "kept"),
    [((), b"n\n", True), ((), b"y\n", False), (("--yes",), b"", False)],
)
def test_cache_clear_asks_on_a_terminal(
    tmp_path: Path, options: tuple[str, ...], answer: bytes, kept: bool
) -> None:
    entry = add_entry(tmp_path, f"{SLUG}.forward")
    ours, theirs = pty.openpty()
    try:
        os.write(ours, answer)
        done = subprocess.run(
            program("cache", "clear", *options),
            stdin=theirs,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert ("Remove 1 item" in done.stderr) == (answer != b"")
    assert done.returncode == (1 if kept else 0)
    assert entry.path.exists() == kept
