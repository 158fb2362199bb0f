"""Keeping a cache small: what may go, in which order, and removing it."""

from __future__ import annotations

from pathlib import Path

from .folders import abandoned, children, folder_bytes
from .usage import is_used, last_use, remove_unused

# A file or folder and its bytes.
Removed = tuple[Path, int]


def contents(base: Path) -> list[Path]:
    """Everything below the folder of a layout that may go, the most worthless first: staging
    folders of dead processes, quarantined entries, logs of failed builds, entries; among each of
    them the one used longest ago."""
    return [
        *_by_age(abandoned(base / "staging")),
        *_by_age(children(base / "quarantine")),
        *_by_age(children(base / "failed")),
        *_by_age(children(base / "entries", "??/*")),
    ]


def excess(base: Path, max_bytes: int) -> list[Path]:
    """The part of `contents` that goes for the rest to have at most `max_bytes`, as far as that is
    in its power: what is in use stays. Abandoned folders go in any case."""
    leftover = set(abandoned(base / "staging"))
    total = folder_bytes(base)
    chosen = []
    for path in contents(base):
        if path in leftover or (total > max_bytes and not is_used(path)):
            chosen.append(path)
            total -= folder_bytes(path)
    return chosen


def remove(base: Path, paths: list[Path], *, dry_run: bool) -> list[Removed]:
    """Remove files and folders that are not in use, or only find out which these are; with their
    bytes."""
    removed = []
    for path in paths:
        size = folder_bytes(path)
        if not is_used(path) if dry_run else remove_unused(path, base / "staging"):
            removed.append((path, size))
    return removed


def _by_age(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=last_use)
