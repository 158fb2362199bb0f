"""Signatures: what the owner of a key signed passes, and nothing else."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from bundles import fake_bundle
from rwkv_jit.bundle import Bundle, bundles_in_force, open_bundle, verify_bundle
from rwkv_jit.bundle.make import sign_bundle, write_bundle
from rwkv_jit.bundle.sign import generate_key
from rwkv_jit.errors import BundleError
from rwkv_jit.settings import Settings

NAME = "wkv7_n64_fp32_l16_x86_64_v3"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    generate_key(tmp_path / "key")
    return tmp_path / "key"


@pytest.fixture
def public(key: Path) -> Path:
    return key.with_name("key.pub")


@pytest.fixture
def signed(tmp_path: Path, key: Path) -> Bundle:
    return fake_bundle(tmp_path / "signed", [NAME], sign_with=key)


def test_the_private_key_is_its_owners_alone(key: Path, public: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"PUBLIC KEY" in public.read_bytes()
    with pytest.raises(BundleError, match="File exists"):
        generate_key(key)


def test_a_signed_bundle_passes_and_says_by_whom(signed: Bundle, public: Path) -> None:
    opened = open_bundle(signed.root, keys=[public])
    assert opened.signed_by == public
    assert verify_bundle(opened) == []


def test_a_bundle_may_be_signed_later(tmp_path: Path, key: Path, public: Path) -> None:
    bundle = fake_bundle(tmp_path / "bundle", [NAME])
    with pytest.raises(BundleError, match="it is not signed, and a signature is asked for"):
        open_bundle(bundle.root, keys=[public])
    sign_bundle(bundle, key)
    assert open_bundle(bundle.root, keys=[public]).signed_by == public


def test_any_of_several_keys_will_do(tmp_path: Path, signed: Bundle, public: Path) -> None:
    other = generate_key(tmp_path / "other")
    assert open_bundle(signed.root, keys=[other, public]).signed_by == public
    with pytest.raises(BundleError, match=r"its signature is not by the owner of .*other\.pub"):
        open_bundle(signed.root, keys=[other])


def test_an_index_that_was_changed_after_signing_is_refused(
    tmp_path: Path, signed: Bundle, public: Path
) -> None:
    other = fake_bundle(tmp_path / "other", [NAME, f"{NAME}.backward"])
    (other.root / "bundle.sig").write_bytes((signed.root / "bundle.sig").read_bytes())
    with pytest.raises(BundleError, match="is not by the owner"):
        open_bundle(other.root, keys=[public])


def test_a_kernel_that_was_changed_after_signing_is_found(signed: Bundle, public: Path) -> None:
    (signed.folder(signed.index.entries[0]) / "kernel.so").write_bytes(b"evil")
    assert "instead of" in verify_bundle(open_bundle(signed.root, keys=[public]))[0]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b"{}",
        json.dumps({"schema": 1, "algorithm": "none", "signature": ""}).encode(),
        json.dumps({"schema": 1, "algorithm": "ed25519", "signature": "?"}).encode(),
        json.dumps({"schema": 1, "algorithm": "ed25519", "signature": ""}).encode(),
        b"x" * 5000,
    ],
)
def test_what_is_no_signature_is_refused(signed: Bundle, public: Path, text: bytes) -> None:
    (signed.root / "bundle.sig").write_bytes(text)
    with pytest.raises(BundleError, match="is refused"):
        open_bundle(signed.root, keys=[public])


def test_what_is_no_key_is_told(tmp_path: Path, signed: Bundle, key: Path, public: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for wrong in (tmp_path / "text", key):
        with pytest.raises(BundleError, match="is not a public key"):
            open_bundle(signed.root, keys=[wrong])
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        open_bundle(signed.root, keys=[tmp_path / "missing"])
    with pytest.raises(BundleError, match="is not a private key"):
        sign_bundle(signed, public)


def test_a_bad_key_makes_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        write_bundle([], tmp_path / "out", sign_with=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["auto", "prebuilt"])
def test_with_keys_in_the_settings_signatures_are_mandatory(
    tmp_path: Path, signed: Bundle, public: Path, mode: str
) -> None:
    unsigned = fake_bundle(tmp_path / "unsigned", [NAME])
    settings = Settings(
        cache_dir=tmp_path / "cache",
        mode=mode,
        bundle_path=(signed.root,),
        bundle_keys=(public,),
    )
    assert [bundle.root for bundle in bundles_in_force(settings)] == [signed.root]
    settings = Settings(
        cache_dir=tmp_path / "cache",
        mode=mode,
        bundle_path=(signed.root, unsigned.root),
        bundle_keys=(public,),
    )
    with pytest.raises(BundleError, match="unsigned is refused: it is not signed"):
        bundles_in_force(settings)


def test_without_the_package_the_extra_is_named(
    signed: Bundle, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(BundleError, match=r"pip install 'rwkv_jit\[sign\]'"):
        open_bundle(signed.root, keys=[public])
    assert open_bundle(signed.root).signed_by is None
