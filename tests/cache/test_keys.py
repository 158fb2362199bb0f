"""What is part of a cache key, and what is not."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_sources import kernel_source
from rwkv_jit import toolchain
from rwkv_jit.cache import keys
from rwkv_jit.cache.keys import cache_key, digest_fields, meaning_key
from rwkv_jit.config import OpConfig
from rwkv_jit.ops import SPECS
from rwkv_jit.render import RenderedSource, render
from rwkv_jit.toolchain import Toolchain

ROOT = Path(__file__).parents[2]

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


GOLDEN_SOURCE = RenderedSource(
    config=OpConfig.parse("wkv7_n64_bf16_l16_sm90a"),
    entry="forward",
    identity="wkv7_n64_bf16_l16_sm90a.forward",
    text="int nothing;\n",
    suffix=".cu",
)


def test_digests_do_not_change_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    # A change here makes every cache and bundle out there useless: raise KEY_SCHEMA with it.
    monkeypatch.setattr(keys, "host_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(keys, "LAUNCHER_ABI", 1)
    key = cache_key(GOLDEN_SOURCE, TOOLCHAIN)
    assert keys.KEY_SCHEMA == 1
    assert key.digest == "a26a383292d3f0ef113e36ae8ae66bb357496cbf9f9d1ad4f9b39198ad3b5690"
    assert key.meaning == "ced79ac322d9dc89e484f214d7fce61519306966843938143a4769c706fb1d6e"


def variants_of_the_key() -> dict[str, tuple[RenderedSource, Toolchain]]:
    """What differs from the golden key in one thing that must matter."""
    source, tools = GOLDEN_SOURCE, TOOLCHAIN
    config = source.config
    changed = {
        "op": {"op": "wkv6"},
        "head_size": {"head_size": 128},
        "dtype": {"dtype": "fp16"},
        "chunk_length": {"chunk_length": 32},
        "arch": {"arch": "sm90"},
        "decay": {"decay": "log"},
        "state_dtype": {"state_dtype": "bf16"},
        "state_layout": {"state_layout": "kv"},
        "checkpoint_dtype": {"checkpoint_dtype": "bf16"},
        "precision": {"precision": "tf32"},
        "bounded": {"bounded": True},
    }
    assert set(changed) == {field.name for field in dataclasses.fields(OpConfig)}
    found = {
        name: (dataclasses.replace(source, config=dataclasses.replace(config, **change)), tools)
        for name, change in changed.items()
    }
    for name, value in {
        "entry": "backward",
        "identity": "wkv7_n64_bf16_l16_sm90a.other",
        "text": "int something;\n",
        "suffix": ".cpp",
    }.items():
        found[name] = (dataclasses.replace(source, **{name: value}), tools)
    for name, value in {
        "host_identity": "gcc 13",
        "nvcc_identity": "nvcc 13.1",
        "cuda_major": 12,
        "code_flags": ("-O3",),
        "code_flags in another order": ("-lineinfo", "-O3"),
    }.items():
        found[name] = (source, dataclasses.replace(tools, **{name.split()[0]: value}))
    return found


def test_everything_that_must_matter_gives_its_own_digest() -> None:
    found = {"golden": (GOLDEN_SOURCE, TOOLCHAIN), **variants_of_the_key()}
    digests = {name: cache_key(*pair).digest for name, pair in found.items()}
    for one, other in itertools.combinations(digests, 2):
        assert digests[one] != digests[other], (one, other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("LAUNCHER_ABI", 999), ("KEY_SCHEMA", 999), ("host_platform", lambda: "plan9-mips")],
)
def test_abi_schema_and_platform_matter(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache_key(GOLDEN_SOURCE, TOOLCHAIN)
    monkeypatch.setattr(keys, name, value)
    after = cache_key(GOLDEN_SOURCE, TOOLCHAIN)
    assert after.digest != before.digest
    assert after.meaning != before.meaning


DIGEST_PROGRAM = """
from pathlib import Path
from rwkv_jit.cache import cache_key
from rwkv_jit.config import OpConfig
from rwkv_jit.ops import get_spec
from rwkv_jit.render import render
from rwkv_jit.settings import current_settings
from rwkv_jit.toolchain import find_toolchain
source = render(get_spec("wkv7"), OpConfig.parse("wkv7_n64_fp32_l16_x86_64_v2"), "forward")
print(cache_key(source, find_toolchain("x86_64_v2", current_settings())).digest)
"""


def test_environment_paths_and_dates_do_not_matter(tmp_path: Path) -> None:
    try:
        chosen = toolchain.find_toolchain("x86_64_v2", toolchain.Settings())
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))
    config = OpConfig.parse("wkv7_n64_fp32_l16_x86_64_v2")
    expected = cache_key(render(SPECS["wkv7"], config, "forward"), chosen).digest
    moved = tmp_path / "a compiler elsewhere" / chosen.host_compiler.name
    moved.parent.mkdir()
    moved.write_text(f'#!/bin/sh\nexec {chosen.host_compiler} "$@"\n')
    moved.chmod(0o755)
    # A torch of another version, where toolchains look for it, and templates of another age.
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__ = '9.9'\ncuda = None\n")
    changes: dict[str, dict[str, str]] = {
        "hash seed": {"PYTHONHASHSEED": "7"},
        "locale": {"LC_ALL": "C", "LANG": "tr_TR.UTF-8"},
        "home": {"HOME": str(tmp_path)},
        "cache": {"RWKV_JIT_CACHE_DIR": str(tmp_path / "cache")},
        "jobs": {"MAX_JOBS": "7"},
        "log level": {"RWKV_JIT_LOG_LEVEL": "debug"},
        "time zone": {"TZ": "Asia/Tokyo"},
        "compiler's path": {"CXX": str(moved)},
        "torch's version": {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        "flags": {"CXXFLAGS": "-O0", "NVCC_APPEND_FLAGS": "-G"},
    }
    for name, change in changes.items():
        done = subprocess.run(
            [sys.executable, "-c", DIGEST_PROGRAM],
            cwd=tmp_path if name == "home" else ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **change},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected, name


def test_every_key_field_is_one_line_of_text() -> None:
    fields = cache_key(GOLDEN_SOURCE, TOOLCHAIN).fields
    assert all(isinstance(value, str) for value in fields.values())
    assert not any(str(ROOT) in value or "/" in value for value in fields.values())


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(OpConfig)])
def test_every_knob_of_a_configuration_is_in_its_slug(field: str) -> None:
    source, _ = variants_of_the_key()[field]
    assert source.config.slug != GOLDEN_SOURCE.config.slug
    assert OpConfig.parse(source.config.slug) == source.config
