"""Looking at the cache, and emptying it."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest

from cache_entries import add_entry
from running import environment, program, run, run_json

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
