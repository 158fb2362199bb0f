"""What is part of a cache key, and what is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kernel_sources import kernel_source
from rwkv_jit.cache.keys import cache_key, digest_fields, meaning_key
from rwkv_jit.toolchain import Toolchain

TOOLCHAIN = Toolchain(
    arch="sm90a",
    host_compiler=Path("/somewhere/c++"),
    host_identity="gcc 12",
    nvcc=Path("/somewhere/nvcc"),
    nvcc_identity="nvcc 13.0",
    cuda_home=Path("/somewhere"),
    cuda_major=13,
    code_flags=("-O3", "-lineinfo"),
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host_identity", "gcc 13"),
        ("nvcc_identity", "nvcc 13.1"),
        ("code_flags", ("-lineinfo", "-O3")),
    ],
)
def test_compiler_and_flags_change_the_digest_but_not_the_meaning(
    field: str, value: object
) -> None:
    before = cache_key(kernel_source(), TOOLCHAIN)
    after = cache_key(kernel_source(), dataclasses.replace(TOOLCHAIN, **{field: value}))
    assert after.digest != before.digest
    assert after.meaning == before.meaning


def test_paths_are_not_part_of_a_key() -> None:
    moved = dataclasses.replace(
        TOOLCHAIN, host_compiler=Path("/x"), nvcc=Path("/y"), cuda_home=Path("/z")
    )
    assert cache_key(kernel_source(), moved) == cache_key(kernel_source(), TOOLCHAIN)


def test_source_and_cuda_major_change_the_meaning() -> None:
    before = cache_key(kernel_source(), TOOLCHAIN)
    assert cache_key(kernel_source(extra="// more"), TOOLCHAIN).meaning != before.meaning
    other = dataclasses.replace(TOOLCHAIN, cuda_major=12)
    assert cache_key(kernel_source(), other).meaning != before.meaning


def test_meaning_needs_no_toolchain() -> None:
    assert meaning_key(kernel_source(), 13) == cache_key(kernel_source(), TOOLCHAIN).meaning


def test_fields_that_concatenate_equally_have_different_digests() -> None:
    assert digest_fields({"a": "bc"}) != digest_fields({"ab": "c"})
    assert digest_fields({"a": "b", "c": ""}) != digest_fields({"a": "bc"})


def test_fields_hold_the_source_as_its_hash() -> None:
    fields = cache_key(kernel_source(), TOOLCHAIN).fields
    assert len(fields["source"]) == 64
    assert not any("rwkv_jit_launch" in value for value in fields.values())
