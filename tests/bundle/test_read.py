"""Reading bundles: what was damaged or could be changed by others is refused, never loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bundles import fake_bundle, tree
from rwkv_jit.bundle import Bundle, check_entry, open_bundle, verify_bundle
from rwkv_jit.bundle.read import read_limited
from rwkv_jit.errors import BundleError

NAME = "wkv7_n64_fp32_l16_x86_64_v3"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return fake_bundle(tmp_path / "bundle", [NAME, f"{NAME}.backward"])


def library_of(bundle: Bundle) -> Path:
    return bundle.folder(bundle.index.entries[0]) / "kernel.so"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def link(path: Path) -> None:
    elsewhere = path.parents[3] / "elsewhere"
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_folder(path: Path) -> None:
    elsewhere = path.parents[3] / "elsewhere"
    path.parent.rename(elsewhere)
    path.parent.symlink_to(elsewhere)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
    "flipped": (flip, "SHA-256 differs"),
    "missing": (lambda path: path.unlink(), "kernel.so is missing"),
    "link": (link, "not a regular file"),
    "pipe": (pipe, "not a regular file"),
    "folder is a link": (link_folder, "is not a folder"),
    "folder is missing": (lambda path: shutil.rmtree(path.parent), "No such file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_kernel_is_refused_with_the_reason(bundle: Bundle, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    damage(library_of(bundle))
    entry = bundle.index.entries[0]
    # A trusted owner: only the damage is at stake.
    opened = open_bundle(bundle.root, guarded=False)
    with pytest.raises(BundleError, match=reason):
        check_entry(opened, entry)
    assert reason in " ".join(verify_bundle(opened))


def test_a_whole_bundle_has_no_problems_and_is_only_read(bundle: Bundle) -> None:
    before = tree(bundle.root)
    assert verify_bundle(open_bundle(bundle.root)) == []
    assert tree(bundle.root) == before


def test_a_changed_source_is_found(bundle: Bundle) -> None:
    flip(library_of(bundle).with_name("source.cpp"))
    assert "source.cpp is not the file that was bundled" in verify_bundle(bundle)[0]


def test_a_file_that_the_index_does_not_name_is_a_problem(bundle: Bundle) -> None:
    (library_of(bundle).parent / "extra").touch()
    (bundle.root / "extra.so").touch()
    problems = verify_bundle(bundle)
    assert len(problems) == 2
    assert all("not in its index" in problem for problem in problems)


def test_an_entry_is_one_of_a_cache_without_times(bundle: Bundle) -> None:
    checked = check_entry(bundle, bundle.index.entries[0])
    assert checked.library.is_file()
    assert checked.manifest.created == ""
    assert checked.manifest.command == ""
    assert checked.manifest.resources == {"kernel": {"registers": 80}}


def test_a_folder_without_an_index_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle that can be read"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match=r"is not a bundle that can be read: No such file"):
        open_bundle(tmp_path / "missing")


def test_an_archive_is_refused_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    (tmp_path / "bundle.tar").touch()
    with pytest.raises(BundleError, match=r"rwkv-jit bundle install .*bundle\.tar"):
        open_bundle(tmp_path / "bundle.tar")


@pytest.mark.parametrize("where", [".", "bundle.json"])
def test_a_bundle_that_others_can_write_is_refused(bundle: Bundle, where: str) -> None:
    path = bundle.root / where
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(BundleError, match="can be written by others"):
        open_bundle(bundle.root)
    open_bundle(bundle.root, guarded=False)


@pytest.mark.parametrize("name", ["kernel.so", "."])
def test_a_kernel_that_others_can_write_is_refused(bundle: Bundle, name: str) -> None:
    path = library_of(bundle).parent / name
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(BundleError, match="can be written by others"):
        check_entry(open_bundle(bundle.root), bundle.index.entries[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_bundle_of_another_user_is_refused(bundle: Bundle) -> None:
    os.chown(bundle.root, 65534, 65534)
    with pytest.raises(BundleError, match="belongs to user 65534"):
        open_bundle(bundle.root)


def test_an_index_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 11)
    with pytest.raises(BundleError, match="more than 10 bytes"):
        read_limited(tmp_path / "file", 10)


def test_a_bundle_can_be_moved_and_made_read_only(bundle: Bundle, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    bundle.root.rename(moved)
    for path in [moved, *moved.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert verify_bundle(open_bundle(moved)) == []
    for path in [moved, *moved.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
