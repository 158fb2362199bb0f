"""Archives: the same bytes for the same bundle, and nothing but a bundle comes out of one."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bundles import contents, fake_bundle
from rwkv_jit.bundle import Bundle, archive
from rwkv_jit.bundle.archive import copy_bundle, unpack_archive, write_archive
from rwkv_jit.errors import BundleError

NAMES = ("wkv7_n64_bf16_l16_sm90a", "wkv7_n64_fp32_l16_x86_64_v3")


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return fake_bundle(tmp_path / "bundle", NAMES)


@pytest.fixture
def tar(tmp_path: Path, bundle: Bundle) -> Path:
    path = tmp_path / "bundle.tar"
    write_archive(bundle, path)
    return path


def add(tar: Path, name: str, data: bytes = b"x", **values: object) -> None:
    """Append a member whose header has these values."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in values.items():
        setattr(member, key, value)
    with tarfile.open(tar, "a") as file:
        file.addfile(member, io.BytesIO(data))


def unpack(tar: Path, out: Path) -> Bundle:
    return unpack_archive(tar, out, keys=(), replace=False)


def test_equal_bundles_give_equal_archives(tmp_path: Path, bundle: Bundle, tar: Path) -> None:
    for path in [bundle.root, *bundle.root.rglob("*")]:
        os.utime(path, (1, 1))
    write_archive(bundle, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == tar.read_bytes()
    with tarfile.open(tar) as file:
        members = file.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_what_comes_out_is_what_went_in(tmp_path: Path, bundle: Bundle, tar: Path) -> None:
    out = unpack(tar, tmp_path / "out")
    assert contents(out.root) == contents(bundle.root)
    copied = copy_bundle(bundle, tmp_path / "copied", replace=False)
    assert contents(copied.root) == contents(bundle.root)


ESCAPES: dict[str, Callable[[Path], None]] = {
    "traversal": lambda tar: add(tar, "../escaped"),
    "traversal inside": lambda tar: add(tar, "entries/../../escaped"),
    "absolute": lambda tar: add(tar, "/tmp/escaped"),
    "another name": lambda tar: add(tar, "escaped"),
    "another file": lambda tar: add(tar, "entries/a.forward.0123456789abcdef/escaped"),
    "link": lambda tar: add(tar, "entries", b"", type=tarfile.SYMTYPE, linkname="/tmp"),
    "link to a file": lambda tar: add(
        tar,
        "entries/a.forward.0123456789abcdef/kernel.so",
        b"",
        type=tarfile.SYMTYPE,
        linkname="/etc/passwd",
    ),
    "hard link": lambda tar: add(
        tar, "bundle.sig", b"", type=tarfile.LNKTYPE, linkname="bundle.json"
    ),
    "pipe": lambda tar: add(tar, "bundle.sig", b"", type=tarfile.FIFOTYPE),
    "device": lambda tar: add(tar, "bundle.sig", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "folder elsewhere": lambda tar: add(tar, "../escaped", b"", type=tarfile.DIRTYPE),
    "sparse": lambda tar: add(tar, "bundle.sig", b"", type=tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("kind", ESCAPES)
def test_a_member_that_is_no_part_of_a_bundle_is_refused(
    tmp_path: Path, tar: Path, kind: str
) -> None:
    ESCAPES[kind](tar)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError, match=r"no part of a bundle|is not a tar archive"):
        unpack(tar, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped").exists()


def test_a_member_twice_is_refused(tmp_path: Path, tar: Path) -> None:
    add(tar, "bundle.json")
    with pytest.raises(BundleError, match="File exists"):
        unpack(tar, tmp_path / "out")


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FILE_BYTES", 10, "has more than 10 bytes"),
        ("MAX_TOTAL_BYTES", 100, "unpacks to more than 100 bytes"),
        ("MAX_MEMBERS", 3, "more than 3 members"),
    ],
)
def test_too_much_is_refused(
    tmp_path: Path,
    tar: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: int,
    message: str,
) -> None:
    monkeypatch.setattr(archive, limit, value)
    with pytest.raises(BundleError, match=message):
        unpack(tar, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_archive_is_refused_unread(tmp_path: Path, tar: Path) -> None:
    packed = tmp_path / "bundle.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(BundleError, match="is not a tar archive of a bundle"):
        unpack(packed, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 100, 1000, -20_000])
def test_a_truncated_archive_is_refused(tmp_path: Path, tar: Path, keep: int) -> None:
    tar.write_bytes(tar.read_bytes()[:keep])
    with pytest.raises(BundleError):
        unpack(tar, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_is_found_before_the_bundle_has_its_name(tmp_path: Path, tar: Path) -> None:
    data = tar.read_bytes().replace(b"library of wkv7", b"library of wkv8", 1)
    tar.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        unpack(tar, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_archive_is_told(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not there"):
        unpack(tmp_path / "none.tar", tmp_path / "out")


def test_a_damaged_bundle_is_not_copied(tmp_path: Path, bundle: Bundle) -> None:
    (bundle.folder(bundle.index.entries[0]) / "kernel.so").write_bytes(b"")
    with pytest.raises(BundleError, match="has 0 bytes"):
        copy_bundle(bundle, tmp_path / "out", replace=False)
