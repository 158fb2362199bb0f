"""Plain data about operators and cache entries."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache_entries import MANGLED, add_entry
from rwkv_jit.cli.describe import (
    entry_data,
    find_entries,
    kernel_name,
    operator_data,
    parse_kernel,
)
from rwkv_jit.errors import CacheError, ConfigError
from rwkv_jit.ops import get_spec

SLUG = "wkv7_n64_bf16_l16_sm90a"


def test_a_slug_names_all_entries_and_a_suffix_names_one() -> None:
    assert parse_kernel(SLUG)[1] is None
    config, entry = parse_kernel(f"{SLUG}.backward")
    assert (config.slug, entry) == (SLUG, "backward")
    with pytest.raises(ConfigError, match="entry='sideways' does not exist; choose from forward"):
        parse_kernel(f"{SLUG}.sideways")


def test_a_slug_finds_its_entries_in_the_order_of_the_operator(tmp_path: Path) -> None:
    backward, forward = (add_entry(tmp_path, f"{SLUG}.{e}") for e in ("backward", "forward"))
    other = add_entry(tmp_path, f"{SLUG}_kv.forward")
    entries = [backward, other, forward]
    assert find_entries(SLUG, entries) == [forward, backward]
    assert find_entries(f"{SLUG}.backward", entries) == [backward]


def test_of_several_builds_the_newest_is_found(tmp_path: Path) -> None:
    new, old = (
        add_entry(tmp_path, f"{SLUG}.forward", created=f"{year}-01-01T00:00:00+00:00")
        for year in (2026, 2025)
    )
    assert find_entries(SLUG, [new, old]) == [new]


def test_the_beginning_of_a_digest_finds_one_entry(tmp_path: Path) -> None:
    first, second = (
        add_entry(tmp_path, f"{SLUG}.forward", digest=f"abcdef{end * 58}") for end in "01"
    )
    assert find_entries("abcdef0", [first, second]) == [first]
    with pytest.raises(CacheError, match="begins several digests") as caught:
        find_entries("abcdef", [first, second])
    assert first.manifest.digest in str(caught.value)
    with pytest.raises(CacheError, match="no kernel in the cache has a digest"):
        find_entries("123456", [first, second])


def test_a_kernel_that_is_missing_comes_with_the_command_that_builds_it() -> None:
    with pytest.raises(CacheError, match="rwkv-jit warm wkv7 --head-size 64 --dtype bf16 --arch 9"):
        find_entries(SLUG, [])


def test_entry_data_sums_spills_and_takes_the_most_registers(tmp_path: Path) -> None:
    data = entry_data(add_entry(tmp_path, f"{SLUG}.forward"))
    assert (data["registers"], data["spill_bytes"]) == (80, 12)
    assert data["bytes"] == sum(path.stat().st_size for path in Path(data["path"]).iterdir())
    assert Path(data["source"]).read_text().startswith("// source of")


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        (MANGLED, "forward_kernel"),
        ("_Z14forward_kernel9Arguments", "forward_kernel"),
        ("_ZN41_GLOBAL__N__6473f38f_9_source_cu_f7b45fca14forward_kernelENS_9ArgumentsE",
         "forward_kernel"),
        ("plain", "plain"),
    ],
)  # fmt: skip
def test_kernel_name_is_that_of_the_function(mangled: str, name: str) -> None:
    assert kernel_name(mangled) == name


def test_operator_data_has_what_the_spec_serves_on_each_platform() -> None:
    spec = get_spec("wkv7")
    data = operator_data(spec)
    cpu, cuda = data["platforms"]
    assert (cpu["platform"], cuda["platform"], cuda["arch"]) == ("cpu", "cuda", "8.0 or later")
    assert cuda["dtypes"] == ["bf16", "fp16", "fp32"]
    assert cuda["head_sizes"] == sorted(cuda["head_sizes"])
    assert 64 in cuda["head_sizes"]
    assert cpu["state_dtypes"]["fp64"] == ["fp64"]
    assert cpu["state_dtypes"]["bf16"] == ["bf16", "fp16", "fp32"]
    assert data["formula"] == spec.formula
    names = [tensor["name"] for tensor in data["entries"]["forward"]["outputs"]]
    assert names == ["y", "final_state", "checkpoints"]
