"""The index: the same text for the same kernels, and no text but that is accepted."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from bundles import fake_bundle
from rwkv_jit.bundle.index import Index, parse_index
from rwkv_jit.errors import BundleError

NAMES = ("wkv7_n64_bf16_l16_sm90a", "wkv7_n64_fp32_l16_x86_64_v3")


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return fake_bundle(tmp_path / "bundle", NAMES).index


def change(index: Index, **values: Any) -> bytes:
    """The text with other values in its first entry."""
    data = json.loads(index.to_json())
    data["entries"][0].update(values)
    return (json.dumps(data, indent=1) + "\n").encode()


def test_an_index_reads_back_as_it_was(index: Index) -> None:
    again = parse_index(index.to_json().encode())
    assert again.entries == index.entries
    assert again.digest == index.digest


def test_it_names_no_path_and_no_time(index: Index, tmp_path: Path) -> None:
    assert str(tmp_path) not in index.to_json()
    # Hashes have no dashes.
    assert time.strftime("%Y-") not in index.to_json()


def test_entries_are_sorted_whatever_their_order(tmp_path: Path, index: Index) -> None:
    other = fake_bundle(tmp_path / "other", NAMES[::-1]).index
    assert other.to_json() == index.to_json()


def test_a_later_schema_is_refused_with_its_number(index: Index) -> None:
    text = index.to_json().replace('"schema": 1,\n "made_by"', '"schema": 2,\n "made_by"')
    with pytest.raises(BundleError, match="schema 2, and this version of rwkv_jit reads 1"):
        parse_index(text.encode())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_index_is_refused(text: bytes) -> None:
    with pytest.raises(BundleError):
        parse_index(text)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "../../etc"},
        {"name": "/etc"},
        {"files": {}},
        {"files": {"kernel.so": {"size": -1, "sha256": "0" * 64}}},
        {"files": {"kernel.so": {"size": 1 << 40, "sha256": "0" * 64}}},
        {"files": {"kernel.so": {"size": 1, "sha256": "0"}}},
        {
            "files": {
                "kernel.so": {"size": 1, "sha256": "0" * 64},
                "../x": {"size": 1, "sha256": "0" * 64},
            }
        },
        {"fields": {}},
        {"fields": {"identity": 1}},
        {"resources": {"kernel": 1}},
    ],
)
def test_an_entry_that_is_not_as_written_is_refused(index: Index, values: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json is"):
        parse_index(change(index, **values))


def test_an_identity_cannot_become_a_path(index: Index) -> None:
    entry = json.loads(index.to_json())["entries"][0]
    fields = {**entry["fields"], "identity": "../../x"}
    with pytest.raises(BundleError, match="damaged"):
        parse_index(change(index, fields=fields, name="../../x.forward.0123456789abcdef"))


def test_another_form_of_the_same_is_refused(index: Index) -> None:
    with pytest.raises(BundleError, match="not in the form"):
        parse_index(json.dumps(json.loads(index.to_json())).encode())


def test_of_two_builds_of_a_kernel_one_is_kept(tmp_path: Path) -> None:
    from bundles import fake_entry
    from rwkv_jit.bundle import verify_bundle
    from rwkv_jit.bundle.make import write_bundle

    entries = [
        fake_entry(tmp_path / "entries", NAMES[0], fields={"nvcc": nvcc}, library=nvcc.encode())
        for nvcc in ("nvcc 13.0", "nvcc 13.1")
    ]
    first = write_bundle(entries, tmp_path / "first")
    second = write_bundle(entries[::-1], tmp_path / "second")
    assert len(first.index.entries) == 1
    assert first.index.digest == second.index.digest
    assert verify_bundle(first) == []
