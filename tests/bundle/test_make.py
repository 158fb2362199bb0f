"""Making bundles: the same kernels give the same bytes, and a bundle is there whole or not."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from bundles import contents, fake_bundle, fake_entry
from rwkv_jit.bundle import make, verify_bundle
from rwkv_jit.bundle.make import write_bundle
from rwkv_jit.errors import BundleError

NAMES = ("wkv7_n64_bf16_l16_sm90a", "wkv7_n64_fp32_l16_x86_64_v3.backward")


def test_equal_kernels_give_equal_bundles(tmp_path: Path) -> None:
    first = fake_bundle(tmp_path / "first", NAMES)
    second = fake_bundle(tmp_path / "elsewhere" / "second", NAMES[::-1])
    assert contents(first.root) == contents(second.root)
    assert not any(str(tmp_path).encode() in data for data in contents(first.root).values())


def test_it_can_be_read_by_all_and_written_by_its_owner_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        bundle = fake_bundle(tmp_path / "strict", NAMES)
        os.umask(0)
        loose = fake_bundle(tmp_path / "loose", NAMES)
    finally:
        os.umask(before)
    for root in (bundle.root, loose.root):
        for path in (root, *root.rglob("*")):
            mode = 0o755 if path.is_dir() else 0o644
            assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    for replace in (False, True):
        with pytest.raises(BundleError, match="something that is not a bundle"):
            write_bundle([], tmp_path / "out", replace=replace)
    assert contents(tmp_path) == {"out/file": b"precious"}


def test_a_bundle_is_replaced_only_when_asked(tmp_path: Path) -> None:
    fake_bundle(tmp_path / "out", NAMES)
    entry = fake_entry(tmp_path / "entries", NAMES[0])
    with pytest.raises(BundleError, match="is a bundle already; replace it with --force"):
        write_bundle([entry], tmp_path / "out")
    assert len(write_bundle([entry], tmp_path / "out", replace=True).index.entries) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entries", "out", "out.entries"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = fake_entry(tmp_path / "entries", NAMES[0])
    monkeypatch.setattr(make, "verify_bundle", lambda _bundle: ["something is wrong"])
    with pytest.raises(BundleError, match="something is wrong"):
        write_bundle([entry], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["entries"]


def test_a_kernel_that_was_changed_in_the_cache_is_not_bundled(tmp_path: Path) -> None:
    entry = fake_entry(tmp_path / "entries", NAMES[0])
    entry.library.write_bytes(b"another")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        write_bundle([entry], tmp_path / "out")


def test_an_empty_bundle_is_one(tmp_path: Path) -> None:
    assert verify_bundle(write_bundle([], tmp_path / "out")) == []
